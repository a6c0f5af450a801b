# SPDX-License-Identifier: Apache-2.0
"""Networks of transformers, built without weights and filled from files, strictly.

transformers' own loading wants a folder in its layout. Here the weights may lie in any file, under
any of their published names, in fp8 or GGUF, and are quantised one by one as they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..checkpoints.encoders import Network, check_sizes
from ..checkpoints.headers import CONFIG_NAME, Entry, check_names, opened
from ..checkpoints.variants import read
from ..files import read_json
from .quantized import is_packed, pack, replace_layers

# What the released checkpoints were trained with, for files that no configuration lies beside:
# Qwen2.5-VL-7B-Instruct and CLIP ViT-L/14.
QWEN: dict[str, Any] = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "default", "type": "default", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    },
    "tie_word_embeddings": False,
}
CLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}


def qwen_config(*folders: Path):
    """The configuration of Qwen2.5-VL in the first of these folders that has one, or the published
    one. Raises ValueError where it is damaged."""
    from transformers import Qwen2_5_VLConfig

    for folder in folders:
        if _model_type(folder).startswith("qwen2_5_vl"):
            return _read(Qwen2_5_VLConfig, folder)
    return Qwen2_5_VLConfig(**QWEN)


def clip_config(*folders: Path):
    """`qwen_config` for CLIP's text model."""
    from transformers import CLIPTextConfig

    for folder in folders:
        if _model_type(folder) in ("clip", "clip_text_model"):
            return _read(CLIPTextConfig, folder)
    return CLIPTextConfig(**CLIP)


def _model_type(folder: Path) -> str:
    path = folder / CONFIG_NAME
    return str(read_json(path).get("model_type", "")) if path.is_file() else ""


def _read(kind: Any, folder: Path):
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    # transformers checks values in many ways, and its errors have many types.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder / CONFIG_NAME} cannot be used: {reason}") from error


def build(
    kind: Any,
    config: Any,
    entries: Mapping[str, Entry],
    network: Network,
    dtype: torch.dtype,
    quantize: str | None = None,
) -> nn.Module:
    """A network of the class `kind` with the tensors of `entries`, in eval mode and without
    gradients.

    entries: by the names of `checkpoints.encoders`. dtype: of the weights, except those that
    `quantize` keeps in fewer bits. Raises ValueError, with the first names, unless the tensors are
    exactly those of the network.
    """
    check_sizes(config, entries, network)
    with _without_weights():
        model = kind(config)
    # transformers < 5 puts this before the names of CLIP's text model
    inside = "text_model." if hasattr(model, "text_model") else ""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_names({name.removeprefix(inside): shape for name, shape in shapes.items()}, entries)
    state: dict[str, Tensor] = {}
    for path in sorted({entry.path for entry in entries.values()}):
        with opened(path) as file:
            for name, entry in entries.items():
                if entry.path != path:
                    continue
                tensor = read(file, entry)
                if quantize and is_packed(name):
                    state |= pack(name, tensor, quantize)
                else:
                    state[inside + name] = tensor.to(dtype)
    if quantize:
        replace_layers(model, quantize)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


@contextmanager
def _without_weights() -> Iterator[None]:
    """While the body runs, parameters of new modules have no data. Buffers do: what transformers
    computes for a network, such as its frequencies, is in no file."""

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None):
        if parameter is None:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        yield
    finally:
        handle.remove()
