# SPDX-License-Identifier: Apache-2.0
"""What weights are: which network and presets they belong to, whether they are whole, and their
checksums. Headers are read; tensors only where their values are to be checked."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..files import read_json
from .configs import (
    check_dit_config,
    check_vae_config,
    infer_dit_config,
    read_dit_config,
    read_vae_config,
)
from .contents import parts_of, what_it_is
from .encoders import (
    CLIP,
    LANGUAGE,
    VISION,
    check_whole,
    encoder_entries,
    find_clip,
    find_qwen,
)
from .headers import CONFIG_NAME, Entry, check_names, find_weights, opened, printable, read_headers
from .load import check_vae_file, dit_entries, empty_dit, empty_vae, is_image_vae, shapes_of
from .presets import presets_of
from .variants import VAE_MARK, of_network

CHUNK = 1 << 24
# The folders of a model's parts, in diffusers' layout and the official one.
PART_FOLDERS = ("transformer", "model", "vae", "flux/vae")
TEXT_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder2")

_SHA256 = re.compile(r"[0-9a-f]{64}")


def verify(path: str | Path, values: bool = False) -> list[str]:
    """Lines about all weights at `path`: a file, the folder of one network, or that of a model with
    all its parts.

    values: also read every tensor, and refuse NaN and infinity. Raises FileNotFoundError, OSError
    for what is no file, or ValueError: of another kind than safetensors or GGUF, cut short, of no
    known network, tensors missing, surplus or of the wrong shape (the first five are named), other
    bytes than the hub published.
    """
    path = Path(path)
    lines = []
    for part, is_text in _parts(path):
        files, about = _text_encoder(part) if is_text else _network(part, path)
        if values:
            about.append(_finite(files))
        sums = [_checksum(file) for file in files]
        name = f"{part.relative_to(path)}{'/' if part.is_dir() else ''}: " if part != path else ""
        lines += [f"{name}{about[0]}", *about[1:], *sums]
    return lines


def _parts(path: Path) -> Iterator[tuple[Path, bool]]:
    """What is to be verified at `path`, and whether it is a text encoder: the parts of a model, or
    `path` itself where it has none."""
    folders = [(name, False) for name in PART_FOLDERS] + [(name, True) for name in TEXT_FOLDERS]
    parts = [(path / name, is_text) for name, is_text in folders if (path / name).exists()]
    if parts and path.is_dir():
        _read_configs(path)
        yield from parts
    else:
        yield path, path.is_dir() and path.name in TEXT_FOLDERS


def _read_configs(root: Path) -> None:
    """ValueError where a configuration file of a model, or of one of its folders, is damaged."""
    for config in sorted((*root.glob("*.json"), *root.glob("*/*.json"))):
        if config.name.endswith(("config.json", "model_index.json")):
            read_json(config)


def _network(part: Path, path: Path) -> tuple[list[Path], list[str]]:
    """The files of a transformer, a VAE or text encoders, or of several of them in one file, and
    lines about them."""
    files, folder = find_weights(part, "transformer")
    entries = read_headers(files)
    held = parts_of(entries)
    lines = _transformer(files, folder, path) if "dit" in held else []
    if "vae" in held:
        lines.append(_vae_file(part) if part.is_file() else _vae_folder(folder, entries))
    if held.keys() & {"text_encoder", "text_encoder_2"}:
        lines += _encoders(encoder_entries(files))
    if not lines:
        raise ValueError(
            f"{part} must hold a part of a Kandinsky 5 model, a transformer, a VAE or a text "
            f"encoder, but is {what_it_is(entries)}; give another file"
        )
    return files, lines


def _vae_folder(folder: Path, entries: Mapping[str, Entry]) -> str:
    own = of_network(entries, VAE_MARK)
    config = read_vae_config(folder)
    check_vae_config(config, own)
    if is_image_vae(folder):
        return f"image VAE: {_size(own)}, names not compared"
    check_names(shapes_of(empty_vae(config)), own)
    return f"VAE, complete: {_size(own)}"


def _transformer(files: list[Path], folder: Path, path: Path) -> list[str]:
    entries, quantization = dit_entries(files)
    config = read_dit_config(folder)[0] or infer_dit_config(entries)
    check_dit_config(config, entries)
    check_names(shapes_of(empty_dit(config, quantization)), entries)
    lines = [f"transformer, complete: {_size(entries)}"]
    if quantization:
        lines.append(f"quantised: {quantization}")
    presets, reason = presets_of(path if path.is_file() else folder, str(path), config)
    known = ", ".join(preset.name for preset in presets) if reason is not None else ""
    lines.append(f"presets: {known or 'none; its sizes are those of no released checkpoint'}")
    return lines


def _vae_file(path: Path) -> str:
    """A line about a VAE in one file, under any of its names."""
    own = check_vae_file(path)
    kind = "VAE" if VAE_MARK in own and len(own[VAE_MARK].shape) > 4 else "image VAE"
    return f"{kind}, complete: {_size(own)}"


def _encoders(entries: Mapping[str, Entry]) -> Iterator[str]:
    """A line about each text encoder among the entries. ValueError where one is not whole."""
    qwen = find_qwen(entries)
    if qwen is not None:
        check_whole(qwen.language, LANGUAGE)
        if qwen.vision:
            check_whole(qwen.vision, VISION)
        lacks = [] if qwen.vision else ["no vision tower, so it sees no pictures"]
        lacks += [] if qwen.head else ["no head, so it cannot expand prompts"]
        size = _size({str(i): entry for i, entry in enumerate(qwen.all)})
        yield "; ".join([f"Qwen2.5-VL text encoder, complete: {size}", *lacks])
    clip = find_clip(entries)
    if clip:
        check_whole(clip, CLIP)
        yield f"CLIP text encoder, complete: {_size(clip)}"


def _text_encoder(part: Path) -> tuple[list[Path], list[str]]:
    """The files of a text encoder, and lines about them; the names of one that is neither Qwen nor
    CLIP are not compared."""
    files, folder = find_weights(part, part.name)
    entries = encoder_entries(files)
    about = list(_encoders(entries))
    if about:
        return files, about
    kind = read_json(folder / CONFIG_NAME).get("architectures", ["text encoder"])
    name = kind[0] if isinstance(kind, list) and kind else "text encoder"
    return files, [f"{printable(str(name))}: {_size(entries)}, names not compared"]


def _size(entries: Mapping[str, Entry]) -> str:
    """ "9 tensors, 1,024 parameters, BF16 in 8, F32 in 1"."""
    counts = Counter(entry.dtype for entry in entries.values())
    parameters = sum(
        math.prod(entry.shape)
        for name, entry in entries.items()
        if not name.endswith(".weight_scale")
    )
    dtypes = [
        f"{dtype} in {count}" if len(counts) > 1 else dtype for dtype, count in counts.most_common()
    ]
    return f"{len(entries)} tensors, {parameters:,} parameters, {', '.join(dtypes)}"


def _finite(files: list[Path]) -> str:
    """A line that says that all values are finite; ValueError, with the first name, where not."""
    for path in files:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not _all_finite(tensor):
                    raise ValueError(
                        f"weights must be finite, but {printable(name)} in {path} has NaN or "
                        "infinity; take another file of the model"
                    )
    return "values: all finite"


def _all_finite(tensor: torch.Tensor) -> bool:
    # isfinite is not implemented for all dtypes of 8 bits.
    wide = tensor if tensor.itemsize > 1 else tensor.to(torch.bfloat16)
    return bool(torch.isfinite(wide).all())


def _checksum(file: Path) -> str:
    """A line with the file's SHA-256; ValueError where the hub published the file with another."""
    digest = _sha256(file)
    published = _published_sha256(file)
    if published is None:
        return f"{file.name}: sha256 {digest}"
    if published != digest:
        raise ValueError(
            f"{file} must have the bytes that the hub published (sha256 {published}), got sha256 "
            f"{digest}; download it again"
        )
    return f"{file.name}: sha256 {digest}, as published on the hub"


def _published_sha256(file: Path) -> str | None:
    """The checksum that the hub library keeps of a large file, or None.

    In its cache, a file is a link to one that is called by the checksum; in a folder that it
    downloaded to, the checksum is the second line of its notes about the file.
    """
    if file.is_symlink() and file.resolve().parent.name == "blobs":
        name = file.resolve().name
        return name if _SHA256.fullmatch(name) else None
    for root in list(file.absolute().parents)[:3]:
        inside = file.absolute().relative_to(root)
        notes = root / ".cache" / "huggingface" / "download" / f"{inside}.metadata"
        if notes.is_file():
            lines = notes.read_text(encoding="utf-8", errors="replace").splitlines()
            etag = lines[1].strip() if len(lines) > 1 else ""
            return etag if _SHA256.fullmatch(etag) else None
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
