# SPDX-License-Identifier: Apache-2.0
"""The tensors of the text encoders, Qwen2.5-VL and CLIP's text model, under one set of names.

The same networks are published under several: transformers calls Qwen's layers `model.layers` or,
in newer files, `model.language_model.layers`, and CLIP's tensors with or without `text_model.`.
ComfyUI's single files have the older names, all-in-one files a prefix before them, and GGUF files
those of llama.cpp. Here prefixes are dropped: `layers.0...`, `blocks.0...`, `embeddings...`. No
tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .configs import compare_sizes, count_blocks
from .headers import Entry, first_few, read_headers
from .variants import check_formats, prefix_of, with_scales

HEAD = "lm_head.weight"
CLIP_WIDTH = 768  # of the CLIP that the released checkpoints were trained with
QWEN_WIDTH = 3584


@dataclass(frozen=True)
class Network:
    """How a network is known in a file.

    mark: a tensor that it always has. begins: how the names of all its tensors begin. blocks: the
    prefix of its blocks. in_block, others: the tensors of a block, and those outside of blocks.
    depth, sizes: the fields of its configuration that are the number of blocks, and a size of a
    tensor: (its name, the dimension).
    """

    name: str
    mark: str
    begins: tuple[str, ...]
    blocks: str
    in_block: tuple[str, ...]
    others: tuple[str, ...]
    depth: str
    sizes: Mapping[str, tuple[str, int]]


def _both(*layers: str) -> tuple[str, ...]:
    return tuple(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))


LANGUAGE = Network(
    "language model",
    "layers.0.mlp.gate_proj.weight",
    ("layers.", "embed_tokens.", "norm."),
    "layers",
    (
        *_both("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj.weight",
        *(f"mlp.{layer}_proj.weight" for layer in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    ),
    ("embed_tokens.weight", "norm.weight"),
    "num_hidden_layers",
    {
        "vocab_size": ("embed_tokens.weight", 0),
        "hidden_size": ("embed_tokens.weight", 1),
        "intermediate_size": ("layers.0.mlp.gate_proj.weight", 0),
    },
)
VISION = Network(
    "vision tower",
    "patch_embed.proj.weight",
    ("patch_embed.", "blocks.", "merger."),
    "blocks",
    (
        "norm1.weight",
        "norm2.weight",
        *_both("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ),
    ("patch_embed.proj.weight", "merger.ln_q.weight", *_both("merger.mlp.0", "merger.mlp.2")),
    "depth",
    {
        "hidden_size": ("patch_embed.proj.weight", 0),
        "intermediate_size": ("blocks.0.mlp.gate_proj.weight", 0),
        "out_hidden_size": ("merger.mlp.2.weight", 0),
    },
)
CLIP = Network(
    "CLIP text model",
    "embeddings.token_embedding.weight",
    ("embeddings.", "encoder.", "final_layer_norm."),
    "encoder.layers",
    _both(
        "layer_norm1",
        "layer_norm2",
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        "mlp.fc1",
        "mlp.fc2",
    ),
    (
        "embeddings.token_embedding.weight",
        "embeddings.position_embedding.weight",
        *_both("final_layer_norm"),
    ),
    "num_hidden_layers",
    {
        "vocab_size": ("embeddings.token_embedding.weight", 0),
        "hidden_size": ("embeddings.token_embedding.weight", 1),
        "max_position_embeddings": ("embeddings.position_embedding.weight", 0),
        "intermediate_size": ("encoder.layers.0.mlp.fc1.weight", 0),
    },
)
# What old files hold beside weights: it is computed, not learnt.
_COMPUTED = re.compile(r"(^|\.)(position_ids|inv_freq)$")

# llama.cpp's names for a language model, and the ones here.
LLAMA_CPP_MARK = "blk.0.ffn_gate.weight"
_LLAMA_CPP = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Qwen:
    """The tensors of Qwen2.5-VL's networks, by their names in each. vision: empty where a file has
    none. head: of its own, or None."""

    language: Mapping[str, Entry]
    vision: Mapping[str, Entry]
    head: Entry | None

    @property
    def all(self) -> list[Entry]:
        head = [] if self.head is None else [self.head]
        return [*self.language.values(), *self.vision.values(), *head]


def encoder_entries(files: Iterable[Path]) -> dict[str, Entry]:
    """All tensors of files that hold a text encoder, with scales put to their weights. Raises what
    `read_headers` raises, and ValueError for a format of weights that cannot be read."""
    files = list(files)
    entries = read_headers(files)
    check_formats(files, entries)
    return with_scales(entries)


def find_qwen(entries: Mapping[str, Entry]) -> Qwen | None:
    """The networks of Qwen2.5-VL among the entries; None where there is no language model. Raises
    ValueError for more than one of a kind."""
    if LLAMA_CPP_MARK in entries:
        entries = {_from_llama_cpp(name): entry for name, entry in entries.items()}
    language = _find(entries, LANGUAGE)
    if not language:
        return None
    heads = [entry for name, entry in entries.items() if name == HEAD or name.endswith(f".{HEAD}")]
    return Qwen(language, _find(entries, VISION), heads[0] if heads else None)


def find_clip(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The tensors of CLIP's text model among the entries; {} where there is none."""
    return _find(entries, CLIP)


def check_sizes(config: object, entries: Mapping[str, Entry], network: Network) -> None:
    """ValueError unless a configuration has the sizes that the tensors show. To be called before
    the network is built: what a configuration claims would be believed otherwise."""
    found: dict[str, object] = {network.depth: count_blocks(entries, network.blocks)}
    for field, (name, dim) in network.sizes.items():
        if name in entries and dim < len(entries[name].shape):
            found[field] = entries[name].shape[dim]
    compare_sizes({field: getattr(config, field, None) for field in found}, found)


def check_whole(entries: Mapping[str, Entry], network: Network) -> None:
    """ValueError, with the first names, unless all tensors of the network are there and nothing
    else, and all its blocks have the same shapes."""
    count = count_blocks(entries, network.blocks)
    blocks = [f"{network.blocks}.{i}.{name}" for i in range(count) for name in network.in_block]
    wanted = {*blocks, *network.others}
    first = {name: entries.get(f"{network.blocks}.0.{name}") for name in network.in_block}
    uneven = []
    for name in blocks:
        one = entries.get(name)
        other = first[name.split(".", network.blocks.count(".") + 2)[-1]]
        if one is not None and other is not None and one.shape != other.shape:
            uneven.append(f"{name} {list(one.shape)}")
    problems = {
        "missing": sorted(wanted - entries.keys()),
        "unexpected": sorted(entries.keys() - wanted),
        "of another shape than in block 0": uneven,
    }
    told = [first_few(label, names) for label, names in problems.items() if names]
    if told:
        paths = {entry.path for entry in entries.values()}
        places = sorted(f"{path.parent.name}/{path.name}" for path in paths)
        raise ValueError(
            f"a {network.name} must have the {len(wanted)} tensors of its {count} blocks, but in "
            f"{', '.join(places)} {'; '.join(told)}; download it again"
        )


def _find(entries: Mapping[str, Entry], network: Network) -> dict[str, Entry]:
    prefix = prefix_of(entries, network.mark)
    if f"{prefix}{network.mark}" not in entries:
        return {}
    own = {
        name.removeprefix(prefix): entry
        for name, entry in entries.items()
        if name.startswith(prefix)
    }
    return {
        name: entry
        for name, entry in own.items()
        if name.startswith(network.begins) and not _COMPUTED.search(name)
    }


def _from_llama_cpp(name: str) -> str:
    """`layers.3.mlp.up_proj.weight` for `blk.3.ffn_up.weight`."""
    layer, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", layer)
    if block:
        return f"layers.{block[1]}.{_LLAMA_CPP.get(block[2], block[2])}.{kind}"
    return f"{_LLAMA_CPP.get(layer, layer)}.{kind}"
