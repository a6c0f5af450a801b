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
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import DiTConfig, NablaConfig, VAEConfig
from ..dit.quantized import check_mode, kind_of, mode_of, pack, replace_layers
from ..dit.transformer import DiffusionTransformer3D
from ..files import replacing
from ..vae.flux import ImageVAE
from ..vae.hunyuan import HunyuanVideoVAE
from .configs import dit_config_json, infer_dit_config, read_dit_config, read_vae_config
from .headers import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Entry,
    check_names,
    find_weights,
    opened,
    read_headers,
)

QUANTIZATION_KEY = "quantization"  # of the metadata in a quantised file's header
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
                tensor = file.get_tensor(name)
                layer = name.removesuffix(".weight")
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


def cast(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A weight in the dtype that `load_dit` gives it."""
    if dtype is None:
        return tensor
    return tensor.to(
        torch.promote_types(dtype, torch.float32)
        if any(part in name for part in FP32_NAMES)
        else dtype
    )


def load_any_vae(folder: Path, dtype: torch.dtype) -> nn.Module:
    return load_image_vae(folder, dtype) if is_image_vae(folder) else load_vae(folder, dtype=dtype)


def is_image_vae(folder: Path) -> bool:
    """Whether the config.json in `folder` is that of an image VAE."""
    path = folder / "config.json"
    return (
        path.is_file()
        and json.loads(path.read_text(encoding="utf-8")).get("_class_name") == "AutoencoderKL"
    )


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
    read_headers(find_weights(folder, "vae")[0])
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
