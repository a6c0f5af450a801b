# SPDX-License-Identifier: Apache-2.0
"""Weights from safetensors files, strictly: every tensor of the model must be in the file, in its
shape, and nothing else.

Two layouts are understood: the official single file with bare names, and the diffusers folder with
a `config.json` beside one file or several shards. Names are the same in both. The header of each
file is checked against its size and against the model before a single tensor is read, so that a
wrong or incomplete download says so at once. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import DiTConfig, NablaConfig, VAEConfig
from ..dit.quantized import check_mode, kind_of, mode_of, pack, replace_layers
from ..dit.transformer import DiffusionTransformer3D
from ..media.video import replacing
from ..vae.hunyuan import HunyuanVideoVAE

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# of shards, as diffusers and transformers write them
INDEX_NAMES = (f"{WEIGHTS_NAME}.index.json", "model.safetensors.index.json")
CONFIG_NAME = "config.json"
SHOWN_KEYS = 5
# all released checkpoints; their shapes alone do not tell the split
AXES_BY_HEAD_DIM = {64: (16, 24, 24), 128: (32, 48, 48)}
QUANTIZATION_KEY = "quantization"  # of the metadata in a quantised file's header
FP32_NAMES = ("modulation", "time_embeddings")  # small, and sensitive: see `load_dit`

_log = logging.getLogger(__name__)
_Module = TypeVar("_Module", bound=nn.Module)


class Entry(NamedTuple):
    """Where a tensor is, and its shape."""

    path: Path
    shape: tuple[int, ...]


def load_dit(
    path: str | Path,
    config: DiTConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> DiffusionTransformer3D:
    """The transformer stored at `path`, in eval mode and without gradients (`requires_grad_(True)`
    to train it).

    path: an official .safetensors file; a folder with config.json and weights, or one that holds
    such a folder as `transformer/`; or a folder that holds one official file, also as `model/`.
    config: needed only where no config.json describes the model and its head dim is neither 64 nor
    128.
    dtype: None keeps every tensor as stored, mixed dtypes included. Otherwise weights are cast to
    it, except the modulations and the time embedding, which become fp32, and those that are
    quantised.
    quantize: a mode of `QUANTIZATIONS`, to quantise each tensor as it is read; of weights that are
    stored so, how to compute with them.
    Raises FileNotFoundError, or ValueError: files that are cut short or not safetensors, tensors
    missing, unexpected or of the wrong shape (the first five are named), weights stored in another
    quantisation.
    """
    files, folder = find_weights(path, "transformer")
    entries = read_headers(files)
    if config is None:
        config = read_dit_config(folder)[0] or infer_dit_config(entries)
    stored = read_quantization(files)
    if stored and quantize and check_mode(stored) != check_mode(quantize):
        raise ValueError(
            f"weights that are stored in {check_mode(stored)} can compute in "
            f"{check_mode(stored)} and "
            f"{check_mode(stored)}-dynamic, got {quantize}; load the original"
        )
    dit = empty_dit(config, stored and (quantize or stored))
    return _load(dit, entries, dtype, device, None if stored else quantize)


def empty_dit(config: DiTConfig, quantization: str | None = None) -> DiffusionTransformer3D:
    """A transformer on the meta device: the names and shapes of its weights, as they are or as they
    are once quantised."""
    with torch.device("meta"):
        dit = DiffusionTransformer3D(config)
    if quantization:
        replace_layers(dit, quantization)
    return dit


def load_vae(
    path: str | Path,
    config: VAEConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> HunyuanVideoVAE:
    """The VAE stored at `path`, a folder with config.json and weights or one that holds it as
    `vae/`; as `load_dit` otherwise."""
    files, folder = find_weights(path, "vae")
    entries = read_headers(files)
    if config is None:
        config = read_vae_config(folder)
    # convolutions of channels-last activations would bring other weights into this order on every
    # call
    with torch.device("meta"):
        vae = HunyuanVideoVAE(config)
    return _load(vae, entries, dtype, device).to(memory_format=torch.channels_last_3d)


def save_dit(
    dit: DiffusionTransformer3D, folder: str | Path, nabla: NablaConfig | None = None
) -> None:
    """Write config.json and weights as diffusers does; `nabla` records the attention the model was
    trained with.

    What is quantised is stored so, and the header says in which mode.
    """
    mode = mode_of(dit)
    save_module(
        dit,
        folder,
        dit_config_json(dit.config, nabla, mode),
        {QUANTIZATION_KEY: mode} if mode else None,
    )


def dit_config_json(config: DiTConfig, nabla: NablaConfig | None, quantization: str | None) -> dict:
    """The config.json of a transformer, as diffusers writes it; of a quantised one, so that
    diffusers refuses it."""
    values = {"_class_name": "Kandinsky5Transformer3DModel", **asdict(config)}
    if config.instruct_type is None:
        del values["instruct_type"]
    if nabla is not None:
        w_t, w_y, w_x = nabla.window
        values.update(
            attention_type="nabla",
            attention_P=nabla.keep_mass,
            attention_wT=w_t,
            attention_wH=w_y,
            attention_wW=w_x,
            attention_add_sta=True,
            attention_method="topcdf",
        )
    else:
        values.update(attention_type="regular")
    if quantization is not None:
        values["quantization_config"] = {"quant_method": "kandinsky", "mode": quantization}
    return values


def save_vae(vae: HunyuanVideoVAE, folder: str | Path) -> None:
    """Write config.json and weights as diffusers does."""
    config = asdict(vae.config)
    config["spatial_compression_ratio"] = config.pop("spatial_compression")
    config["temporal_compression_ratio"] = config.pop("temporal_compression")
    save_module(vae, folder, {"_class_name": "AutoencoderKLHunyuanVideo", **config})


def save_module(
    module: nn.Module, folder: str | Path, config: Mapping, metadata: dict[str, str] | None = None
) -> None:
    """Write `config` as config.json and the module's tensors, in their dtypes, into `folder` (made
    when missing)."""
    save_tensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()},
        folder,
        config,
        metadata,
    )


def save_tensors(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    config: Mapping,
    metadata: dict[str, str] | None = None,
) -> None:
    """`save_module` of contiguous tensors on the CPU. Each of the two files is written whole or not
    at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / CONFIG_NAME) as target:
        target.write_text(json.dumps(config, indent=2) + "\n")
    with replacing(folder / WEIGHTS_NAME) as target:
        save_file(dict(tensors), target, metadata)


def find_weights(path: str | Path, subfolder: str) -> tuple[list[Path], Path]:
    """The safetensors files at `path`, and the folder whose config.json describes them."""
    path = Path(path)
    if path.is_file():
        return [path], path.parent
    if not path.is_dir():
        raise FileNotFoundError(
            f"weights must be a .safetensors file or a folder, got {path}, "
            "which does not exist; check the path"
        )
    for folder in (path / subfolder, path, path / "model"):
        for index in (folder / name for name in INDEX_NAMES):
            if index.is_file():
                names = set(_read_json(index).get("weight_map", {}).values())
                return [folder / name for name in sorted(names)], folder
        files = sorted(folder.glob("*.safetensors"))
        if folder / WEIGHTS_NAME in files:
            return [folder / WEIGHTS_NAME], folder
        if len(files) > 1:
            found = _some("found", [file.name for file in files])
            raise ValueError(
                f"{folder} must hold one model, but {found}; give the path of one of the files"
            )
        if files:
            return files, folder
    raise FileNotFoundError(
        f"{path} must hold .safetensors weights, here or in {subfolder}/ or "
        "model/, got none; check the download"
    )


def read_headers(files: Iterable[Path]) -> dict[str, Entry]:
    """Names, places and shapes of all tensors, from the headers alone. ValueError where a file is
    not complete, valid safetensors."""
    entries = {}
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(
                f"the index lists {path.name}, but {path} does not exist; download all shards"
            )
        header = _read_header(path)
        entries.update((name, Entry(path, tuple(item["shape"]))) for name, item in header.items())
    return entries


def read_quantization(files: Iterable[Path]) -> str | None:
    """The mode in which all of these files are quantised, or None. ValueError where it is unknown,
    or not the same in all."""
    modes = set()
    for path in files:
        with opened(path) as file:
            modes.add((file.metadata() or {}).get(QUANTIZATION_KEY))
    if len(modes) > 1:
        raise ValueError(
            f"the files of a model must be quantised alike, but {path.parent.name} "
            f"has {', '.join(sorted(map(str, modes)))}; "
            "do not mix them"
        )
    (mode,) = modes
    if mode is not None:
        check_mode(mode)
    return mode


def _read_header(path: Path) -> dict:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} must be a complete safetensors file: its header claims "
                f"{length:,} bytes, the file has {size:,}; "
                "it is cut short or of another kind, so download it again"
            )
        header_bytes = file.read(length)
    try:
        header = json.loads(header_bytes)
        header.pop("__metadata__", None)
        end = 8 + length + max((item["data_offsets"][1] for item in header.values()), default=0)
        complete = all(isinstance(item["shape"], list) for item in header.values())
    except (ValueError, LookupError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise ValueError(
            f"{path} must be a safetensors file, but the {length:,} bytes of its "
            "header are not one; download it again"
        )
    if end != size:
        raise ValueError(
            f"{path} must be a complete safetensors file: its header declares "
            f"{end:,} bytes, the file has {size:,}; "
            "download it again"
        )
    return header


def read_dit_config(folder: Path) -> tuple[DiTConfig | None, NablaConfig | None]:
    """What `folder`'s config.json says of a transformer and its attention; (None, None) when there
    is no such file or it is silent."""
    values = _read_config(folder)
    if "model_dim" not in values:
        return None, None
    nabla = None
    if values.get("attention_type") == "nabla":
        nabla = NablaConfig(
            values["attention_P"],
            (values["attention_wT"], values["attention_wH"], values["attention_wW"]),
        )
    return _pick(DiTConfig, values), nabla


def read_vae_config(folder: Path) -> VAEConfig:
    """What `folder`'s config.json says of a VAE; the released sizes where it is silent."""
    values = _read_config(folder)
    for key in ("spatial_compression", "temporal_compression"):
        if f"{key}_ratio" in values:
            values[key] = values[f"{key}_ratio"]
    return _pick(VAEConfig, values)


def _read_config(folder: Path) -> dict:
    path = folder / CONFIG_NAME
    return _read_json(path) if path.is_file() else {}


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} must be valid JSON, got {error}; download it again") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold a JSON object, got {type(values).__name__}; download it again"
        )
    return values


def _pick(kind: type, values: Mapping):
    known = {
        field.name: values[field.name]
        for field in fields(kind)
        if values.get(field.name) is not None
    }
    return kind(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in known.items()
        }
    )


def infer_dit_config(entries: Mapping[str, Entry]) -> DiTConfig:
    """The configuration a bare checkpoint must have had, read off its shapes. ValueError when they
    are not those of a transformer."""
    wanted = (
        "visual_embeddings.in_layer.weight",
        "text_embeddings.in_layer.weight",
        "pooled_text_embeddings.in_layer.weight",
        "out_layer.out_layer.weight",
        "visual_transformer_blocks.0.feed_forward.in_layer.weight",
        "visual_transformer_blocks.0.self_attention.query_norm.weight",
    )
    missing = [name for name in wanted if name not in entries]
    if missing:
        raise ValueError(
            "the file must hold a Kandinsky 5 transformer, but "
            f"{_some('missing', missing)}, "
            f"{_some('found', sorted(entries))}; check that this is the right file"
        )
    visual, text, pooled, out, feed_forward, query_norm = (entries[name].shape for name in wanted)
    if query_norm[0] not in AXES_BY_HEAD_DIM:
        raise ValueError(
            f"the rotary axes of head dim {query_norm[0]} are not known from shapes "
            "(64 and 128 are); "
            f"put a {CONFIG_NAME} with axes_dims beside the file or pass config"
        )
    patch = math.prod(DiTConfig.patch_size)
    channels = out[0] // patch
    return DiTConfig(
        in_visual_dim=channels,
        in_text_dim=text[1],
        in_text_dim2=pooled[1],
        time_dim=pooled[0],
        out_visual_dim=channels,
        model_dim=visual[0],
        ff_dim=feed_forward[0],
        num_text_blocks=_count(entries, "text_transformer_blocks"),
        num_visual_blocks=_count(entries, "visual_transformer_blocks"),
        axes_dims=AXES_BY_HEAD_DIM[query_norm[0]],
        visual_cond=visual[1] // patch == 2 * channels + 1,
    )


def _count(entries: Mapping[str, Entry], prefix: str) -> int:
    matches = (re.match(rf"{prefix}\.(\d+)\.", name) for name in entries)
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def _load(
    module: _Module,
    entries: Mapping[str, Entry],
    dtype: torch.dtype | None,
    device: torch.device | str,
    quantize: str | None = None,
) -> _Module:
    """`module`, from the meta device, with the tensors of `entries` in it."""
    check_names(
        {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}, entries
    )
    quantized = {name: tensor.dtype for name, tensor in module.named_buffers()}
    state = {}
    for path in sorted({entry.path for entry in entries.values()}):
        with opened(path, device) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor, layer = file.get_tensor(name), name.removesuffix(".weight")
                if quantize and layer != name and kind_of(layer):
                    state |= pack(layer, tensor, quantize)
                elif name not in quantized:
                    state[name] = cast(name, tensor, dtype)
                elif tensor.dtype == quantized[name]:
                    state[name] = tensor
                else:
                    raise ValueError(
                        f"{path} says that its weights are quantised, so {name} must "
                        f"be {quantized[name]}, "
                        f"got {tensor.dtype}; quantise the original again"
                    )
    if quantize:
        replace_layers(module, quantize)
    module.load_state_dict(state, strict=True, assign=True)
    _log.info(
        "loaded %d tensors, %d parameters",
        len(state),
        sum(tensor.numel() for tensor in state.values()),
    )
    return module.eval().requires_grad_(False)


@contextmanager
def opened(path: Path, device: torch.device | str = "cpu") -> Iterator[safe_open]:
    """The file, to read tensors from; ValueError where the library finds it to be no safetensors
    file."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a valid safetensors file, got {error}; download it again"
        ) from error


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in the dtype that `load_dit` gives it."""
    if dtype is None:
        return tensor
    return tensor.to(
        torch.promote_types(dtype, torch.float32)
        if any(part in name for part in FP32_NAMES)
        else dtype
    )


def check_names(expected: Mapping[str, tuple[int, ...]], entries: Mapping[str, Entry]) -> None:
    """ValueError, with the first five of each kind, unless `entries` are exactly the tensors and
    shapes that are expected."""
    missing = [name for name in expected if name not in entries]
    unexpected = sorted(name for name in entries if name not in expected)
    wrong = [
        f"{name} {list(entries[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in entries and entries[name].shape != shape
    ]
    problems = [
        _some(*problem)
        for problem in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if problem[1]
    ]
    if problems:
        where = (
            ", ".join(
                sorted(
                    {f"{entry.path.parent.name}/{entry.path.name}" for entry in entries.values()}
                )
            )
            or "the file"
        )
        raise ValueError(
            f"the weights must match the model tensor by tensor, but in {where} "
            f"{'; '.join(problems)}; "
            "check that file and configuration belong together"
        )


def _some(label: str, names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_KEYS} more" if len(names) > SHOWN_KEYS else ""
    return f"{label} ({len(names)}): {', '.join(names[:SHOWN_KEYS])}{more}"
