# SPDX-License-Identifier: Apache-2.0
"""What a file of weights holds, told by the names of its tensors: which parts of a Kandinsky model,
or else whose network it is. Headers are read and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from ..vae import names
from .encoders import (
    CLIP,
    CLIP_WIDTH,
    LANGUAGE,
    LLAMA_CPP_MARK,
    QWEN_WIDTH,
    find_clip,
    find_qwen,
)
from .headers import Entry, printable, read_headers
from .variants import TRANSFORMER_MARK, prefix_of

PARTS = ("dit", "text_encoder", "text_encoder_2", "vae", "lora")
LATENT_CHANNELS = 16  # of both VAEs

_LORA = re.compile(r"[._]lora[._]?(A|B|down|up)\b|\.hada_w|\.lokr_w|\.dora_scale", re.IGNORECASE)
_OUR_BLOCKS = re.compile(r"(visual|text)_transformer_blocks")
# Networks that stand in the same folders: a name that each has, and what it is.
_OTHERS = (
    (r"SelfAttention\.q\.weight$", "a T5 text encoder"),
    (r"resblocks\.0\.attn\.in_proj_weight$", "a CLIP under OpenCLIP's names"),
    (r"vision_model\.encoder\.layers\.0\.", "a CLIP vision model"),
    (r"(^|\.)double_blocks\.0\.", "a transformer of FLUX or HunyuanVideo"),
    (r"(^|\.)joint_blocks\.0\.", "a transformer of Stable Diffusion 3"),
    (r"(^|\.)input_blocks\.0\.0\.", "a U-Net of Stable Diffusion"),
    (r"(^|\.)blocks\.0\.self_attn\.q\.weight$", "a transformer of Wan"),
    (r"(^|\.)transformer_blocks\.0\.", "a transformer of another family"),
    (r"(^|\.)(encoder|decoder)\.", "another VAE or encoder"),
    (r"(^|\.)layers\.0\.self_attn\.", "a language model"),
)


def what_it_is(entries: Mapping[str, Entry]) -> str:
    """A file with these tensors, in words: "a CLIP text model", "a T5 text encoder"."""
    if any(_LORA.search(name) for name in entries):
        return "a LoRA"
    found = parts_of(entries)
    if found:
        return " with ".join(found.values())
    for pattern, words in _OTHERS:
        if any(re.search(pattern, name) for name in entries):
            return words
    shown = ", ".join(map(printable, sorted(entries)[:3]))
    return f"a file of {len(entries)} tensors such as {shown}" if entries else "a file of no tensor"


def parts_of(entries: Mapping[str, Entry]) -> dict[str, str]:
    """The parts of a model, of any size, that these tensors are, and what each is in words."""
    return dict(_parts(entries))


def _parts(entries: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """The part of a model that each network would be, and what the network is."""
    if _has(entries, TRANSFORMER_MARK):
        yield "dit", "a Kandinsky 5 transformer"
    prefix = names.prefix_of(entries)
    if prefix is not None:
        bare = [name.removeprefix(prefix) for name in entries if name.startswith(prefix)]
        yield "vae", f"a VAE of {'videos' if names.is_video(bare) else 'pictures'}"
    if LLAMA_CPP_MARK in entries:
        yield "text_encoder", "a language model under llama.cpp's names"
    elif _has(entries, LANGUAGE.mark):
        yield "text_encoder", f"a language model{_width(entries, 'embed_tokens.weight')}"
    if _has(entries, CLIP.mark):
        yield "text_encoder_2", f"a CLIP text model{_width(entries, CLIP.mark)}"


def _has(entries: Mapping[str, Entry], mark: str) -> bool:
    return any(name == mark or name.endswith(f".{mark}") for name in entries)


def _width(entries: Mapping[str, Entry], table: str) -> str:
    widths = [entry.shape[-1] for name, entry in entries.items() if name.endswith(table)]
    return f" of width {widths[0]}" if widths and widths[0] else ""


def parts_inside(path: Path) -> frozenset[str]:
    """The parts of a model of any size that the file at `path` holds; none where it cannot be read:
    whoever loads it says why."""
    try:
        return frozenset(parts_of(read_headers([path])))
    except (OSError, ValueError, RuntimeError):
        return frozenset()


def holds(path: Path, part: str) -> bool:
    """Whether the file at `path` has the tensors of a part of a Kandinsky model: one of `PARTS`.
    False also for what cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return False
    return part in _held(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _held(path: Path, modified: int, size: int) -> frozenset[str]:
    """The parts that a file holds, by the sizes that theirs have. modified, size: the file's, so
    that what changed is read anew."""
    try:
        entries = read_headers([path])
        return frozenset(_ours(entries))
    # Any file may lie there, and the libraries that read them raise what they like.
    except Exception:
        return frozenset()


def _ours(entries: Mapping[str, Entry]) -> Iterator[str]:
    if any(_LORA.search(name) for name in entries):
        if any(_OUR_BLOCKS.search(name) for name in entries):
            yield "lora"
        return
    for part, _ in _parts(entries):
        if part == "vae":
            prefix = names.prefix_of(entries) or ""
            shapes = [
                entry.shape
                for name, entry in entries.items()
                if re.fullmatch(rf"{re.escape(prefix)}decoder\.conv_in(\.conv)?\.weight", name)
            ]
            if shapes and shapes[0][1:2] == (LATENT_CHANNELS,):
                yield part
        elif part == "text_encoder":
            qwen = find_qwen(entries)
            if qwen and _is_wide(qwen.language, "embed_tokens.weight", QWEN_WIDTH):
                yield part
        elif part == "text_encoder_2":
            if _is_wide(find_clip(entries), CLIP.mark, CLIP_WIDTH):
                yield part
        else:
            prefix_of(entries, TRANSFORMER_MARK)  # refuses two
            yield part


def _is_wide(entries: Mapping[str, Entry], table: str, width: int) -> bool:
    return table in entries and entries[table].shape[-1:] == (width,)
