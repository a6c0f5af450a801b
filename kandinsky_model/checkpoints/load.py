# SPDX-License-Identifier: Apache-2.0
"""Weights from files, strictly: every tensor of the model must be there, in its shape, and nothing
else.

Two published layouts are understood: the official single file with bare names, and the diffusers
folder with a `config.json` beside one file or several shards. Names are the same in both. What
other programs make of them is understood as well (variants.py), and so are GGUF files. The header
of each file is checked against its size, the configuration and the model before a single tensor is
read, so that a wrong or incomplete download says so at once. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import DiTConfig, NablaConfig, Preset, VAEConfig
from ..dit.quantized import check_mode, kind_of, mode_of, pack, replace_layers
from ..dit.transformer import DiffusionTransformer3D
from ..files import read_json, replacing
from ..vae import flux, hunyuan, names
from ..vae.flux import ImageVAE
from ..vae.hunyuan import HunyuanVideoVAE
from .configs import (
    check_dit_config,
    check_vae_config,
    dit_config_json,
    infer_dit_config,
    read_dit_config,
    read_vae_config,
)
from .contents import what_it_is
from .headers import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Entry,
    check_names,
    find_weights,
    opened,
    read_headers,
    read_metadata,
)
from .variants import TRANSFORMER_MARK, VAE_MARK, check_formats, of_network, read, with_scales

QUANTIZATION_KEY = "quantization"  # of the metadata in a quantised file's header
WIDE_DTYPES = {"F64", "F32", "F16", "BF16"}  # as safetensors calls them
FP32_NAMES = ("modulation", "time_embeddings")  # small, and sensitive: see `load_dit`

_log = logging.getLogger(__name__)
_Module = TypeVar("_Module", bound=nn.Module)


def load_dit(
    path: str | Path,
    config: DiTConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantize: str | None = None,
) -> DiffusionTransformer3D:
    """The transformer stored at `path`, in eval mode and without gradients (`requires_grad_(True)`
    to train it).

    path: an official .safetensors file, or what other programs made of it, a .gguf file included; a
    folder with config.json and weights, or one that holds such a folder as `transformer/`; or a
    folder that holds one official file, also as `model/`.
    config: needed only where no config.json describes the model and its head dim is neither 64 nor
    128.
    dtype: None keeps every tensor as stored, mixed dtypes included; fp8, int8 and GGUF become bf16.
    Otherwise weights are cast to it, except the modulations and the time embedding, which become
    fp32, and those that are quantised.
    quantize: a mode of `QUANTIZATIONS`, to quantise each tensor as it is read; for weights that
    this package stored quantised, how to compute with them.
    Raises FileNotFoundError or OSError for paths, RuntimeError without the package that reads GGUF,
    or ValueError: files that are cut short or of another kind, tensors missing, unexpected or of
    the wrong shape (the first five are named), weights stored in another quantisation.
    """
    files, folder = find_weights(path, "transformer")
    entries, stored = dit_entries(files)
    if config is None:
        config = read_dit_config(folder)[0] or infer_dit_config(entries)
    if stored and quantize and check_mode(stored) != check_mode(quantize):
        raise ValueError(
            f"weights that are stored in {check_mode(stored)} can compute in "
            f"{check_mode(stored)} and "
            f"{check_mode(stored)}-dynamic, got {quantize}; load the original"
        )
    check_dit_config(config, entries)
    dit = empty_dit(config, stored and (quantize or stored))
    return _load(dit, entries, dtype, device, None if stored else quantize)


def dit_entries(files: list[Path]) -> tuple[dict[str, Entry], str | None]:
    """The tensors of the transformer in the files, by our names for them, and the mode in which
    this package quantised them, if it did."""
    entries = read_headers(files)
    stored = read_quantization(files)
    if stored is None:
        check_formats(files, entries)
        entries = of_network(entries, TRANSFORMER_MARK)
    return entries, stored


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
    entries = of_network(read_headers(files), VAE_MARK)
    if config is None:
        config = read_vae_config(folder)
    check_vae_config(config, entries)
    vae = _load(empty_vae(config), entries, dtype, device)
    # Activations are channels-last, and a convolution reorders weights that are not on every call.
    return vae.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def empty_vae(config: VAEConfig) -> HunyuanVideoVAE:
    """A VAE on the meta device: the names and shapes of its weights."""
    with torch.device("meta"):
        return HunyuanVideoVAE(config)


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
        target.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    with replacing(folder / WEIGHTS_NAME) as target:
        save_file(dict(tensors), target, metadata)


def read_quantization(files: Iterable[Path]) -> str | None:
    """The mode in which this package quantised all of these files, or None. ValueError where it is
    unknown, or not the same in all."""
    modes = {path: read_metadata(path).get(QUANTIZATION_KEY) for path in files}
    different = set(modes.values())
    if len(different) > 1:
        folder = next(iter(modes)).parent
        raise ValueError(
            f"the files of a model must be quantised alike, but {folder.name} "
            f"has {', '.join(sorted(map(str, different)))}; do not mix them"
        )
    (mode,) = different
    if mode is not None:
        check_mode(mode)
    return mode


def _load(
    module: _Module,
    entries: Mapping[str, Entry],
    dtype: torch.dtype | None,
    device: torch.device | str,
    quantize: str | None = None,
) -> _Module:
    """`module`, which is on the meta device, with the tensors of `entries` in it. quantize: the
    mode to quantise its large weights in."""
    check_names(shapes_of(module), entries)
    stored = {name: tensor.dtype for name, tensor in module.named_buffers()}
    state: dict[str, Tensor] = {}
    for path in sorted({entry.path for entry in entries.values()}):
        with opened(path, device) as file:
            for name, entry in entries.items():
                if entry.path != path:
                    continue
                layer = name.removesuffix(".weight")
                if name in stored:
                    state[name] = _quantised(file, entry, stored[name])
                elif quantize and layer != name and kind_of(layer):
                    state |= pack(layer, read(file, entry), quantize)
                else:
                    state[name] = cast(name, read(file, entry), dtype or _as_stored(entry))
    if quantize:
        replace_layers(module, quantize)
    module.load_state_dict(state, strict=True, assign=True)
    _log.info(
        "loaded %d tensors, %d parameters",
        len(state),
        sum(tensor.numel() for tensor in state.values()),
    )
    return module.eval().requires_grad_(False)


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a module's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def _quantised(file: Any, entry: Entry, dtype: torch.dtype) -> Tensor:
    """A tensor of a layer that this package quantised."""
    tensor = file.get_tensor(entry.key)
    if tensor.dtype != dtype:
        raise ValueError(
            f"{entry.path} says that its weights are quantised, so {entry.key} must "
            f"be {dtype}, got {tensor.dtype}; quantise the original again"
        )
    return tensor


def _as_stored(entry: Entry) -> torch.dtype | None:
    """The dtype of weights whose dtype in memory is that in the file; None where that can be kept.
    Values of 8 bits or less become bf16, because the products of a layer are in its weight's dtype.
    """
    return None if entry.scale is None and entry.dtype in WIDE_DTYPES else torch.bfloat16


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in the dtype that `load_dit` gives it."""
    if dtype is None:
        return tensor
    sensitive = any(part in name for part in FP32_NAMES)
    return tensor.to(torch.promote_types(dtype, torch.float32) if sensitive else dtype)


def load_any_vae(path: Path, dtype: torch.dtype, preset: Preset | None = None) -> nn.Module:
    """The VAE at `path`, of pictures or of videos: a folder of which the config.json says which, or
    one file, of which the names do. ValueError where it is not of the kind that a preset needs."""
    if path.is_file():
        vae = load_vae_file(path, dtype)
    else:
        vae = load_image_vae(path, dtype) if is_image_vae(path) else load_vae(path, dtype=dtype)
    makes_pictures = preset is not None and preset.vae is None
    if preset is not None and isinstance(vae, ImageVAE) != makes_pictures:
        wanted, given = ("pictures", "videos") if makes_pictures else ("videos", "pictures")
        raise ValueError(
            f"{preset.name} needs a VAE of {wanted}, but {path} is one of {given}; give another, "
            "or name the preset that the transformer is with --preset (preset=)"
        )
    return vae


def load_vae_file(path: str | Path, dtype: torch.dtype) -> nn.Module:
    """The VAE in one file, under the names of diffusers or those of its authors, alone or beside
    other networks. Raises what `load_vae` raises, and RuntimeError without diffusers for a VAE of
    pictures."""
    build, own = _vae_in(Path(path))
    state: dict[str, Tensor] = {}
    for file_path in sorted({entry.path for entry in own.values()}):
        with opened(file_path) as file:
            found = {name: entry for name, entry in own.items() if entry.path == file_path}
            state |= {name: read(file, entry) for name, entry in found.items()}
    return build(state, dtype=dtype)


def check_vae_file(path: Path) -> dict[str, Entry]:
    """The tensors of the VAE in one file, by our names for them. Raises what `load_vae_file`
    raises, of the file's header alone."""
    _, own = _vae_in(path)
    ours = names.our_names(own)
    return {ours[name]: entry for name, entry in own.items()}


def _vae_in(path: Path) -> tuple[Any, dict[str, Entry]]:
    """What builds the VAE in one file of its tensors, and those by their names there. ValueError
    where the header shows that they are not those of a VAE."""
    files, folder = find_weights(path, "vae")
    entries = with_scales(read_headers(files))
    check_formats(files, entries)
    prefix = names.prefix_of(entries)
    if prefix is None:
        raise ValueError(
            f"a VAE must be HunyuanVideo's, or FLUX.1's for pictures, but {path} is "
            f"{what_it_is(entries)}; give another file"
        )
    own = {name: entries[name] for name in names.our_names(entries)}
    build: Any = flux.from_weights
    if names.is_video(name.removeprefix(prefix) for name in own):
        config = read_vae_config(folder) if describes_vae(folder) else None
        build = partial(hunyuan.from_weights, config=config)
    build({name: torch.empty(entry.shape, device="meta") for name, entry in own.items()})
    return build, own


def describes_vae(folder: Path) -> bool:
    """Whether the config.json in `folder` gives the sizes of a VAE."""
    path = folder / CONFIG_NAME
    return path.is_file() and "block_out_channels" in read_json(path)


def is_image_vae(folder: Path) -> bool:
    """Whether the config.json in `folder` is that of an image VAE."""
    path = folder / CONFIG_NAME
    return path.is_file() and read_json(path).get("_class_name") == "AutoencoderKL"


def load_image_vae(folder: str | Path, dtype: torch.dtype) -> ImageVAE:
    """The VAE in `folder`, strictly. Raises RuntimeError without diffusers, OSError or ValueError
    for files that are no such VAE."""
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise RuntimeError(
            "image checkpoints decode through diffusers, which cannot be imported "
            f"({error}); "
            "pip install 'kandinsky-kernels[text]'"
        ) from error
    folder = Path(folder)
    files, home = find_weights(folder, "vae")
    # diffusers would believe any size, and build the network before it reads a weight.
    check_vae_config(read_vae_config(home), read_headers(files))
    vae, report = AutoencoderKL.from_pretrained(
        folder,
        torch_dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        low_cpu_mem_usage=False,
        output_loading_info=True,
    )
    wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if wrong:
        raise ValueError(
            f"the VAE in {folder} must match its configuration tensor by tensor, but "
            f"{len(wrong)} do not, {wrong[0]} first; "
            "download it again"
        )
    return ImageVAE(vae.eval().requires_grad_(False))
