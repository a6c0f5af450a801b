# SPDX-License-Identifier: Apache-2.0
"""What a file is that was given where safetensors is wanted, told by how it begins."""

from __future__ import annotations

from pathlib import Path

_BEGINNINGS = (
    (b"GGUF", "a GGUF file"),
    (b"GGML", "a file of an early version of GGUF"),
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"\x7fELF", "a program"),
    (b"%PDF", "a PDF"),
)
_READ = 4096  # bytes: enough for a zip's first names


def describe(path: Path) -> str:
    """What the file at `path` is, with an article: "a GGUF file", "a pickle"."""
    with path.open("rb") as file:
        start = file.read(_READ)
    if not start:
        return "an empty file"
    for beginning, kind in _BEGINNINGS:
        if start.startswith(beginning):
            return kind
    if start.startswith(b"PK\x03\x04"):
        pickled = b"/data.pkl" in start or b"\x80\x02" in start
        return "a pickle (a zip archive of torch.save)" if pickled else "a zip archive"
    # Protocol 2 and later; Python 2's protocols have no mark of their own.
    if start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "a pickle"
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, perhaps what the server said instead of the file"
    if text.startswith((b"{", b"[")):
        return "a JSON file"
    if not start.strip(b"\0"):
        return "a file that begins with zeros, as an unfinished download does"
    if start.isascii():
        return "a text file"
    return "of no kind that is known here"
