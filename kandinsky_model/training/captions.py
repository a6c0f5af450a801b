# SPDX-License-Identifier: Apache-2.0
"""Captions of training data: in a file beside each clip or picture, or in a table."""

from __future__ import annotations

import codecs
import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .clips import BadData

BESIDE = (".txt", ".caption")
TABLES = ("captions.jsonl", "metadata.jsonl", "metadata.csv")
# the names that data sets give to the two columns of a table
FILE_KEYS = ("file", "file_name", "path", "image_path", "video_path")
CAPTION_KEYS = ("caption", "text", "prompt")
EXAMPLE = '{"file": "walk.mp4", "caption": "..."}'
LAYOUTS = (
    "the caption of walk.mp4 is read from walk.txt or walk.caption beside it, or from a line like "
    f"{EXAMPLE} of captions.jsonl or metadata.jsonl, or from a row of metadata.csv with columns "
    "such as file_name and text; folders inside it are read too"
)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark. ValueError, with the line,
    for another encoding."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise ValueError(
            f"captions must be in UTF-8, but line {line} of {path} has the byte 0x{byte:02X}; "
            "save it as UTF-8"
        ) from None


def caption_of(path: Path, table: Mapping[str, str]) -> str:
    """The caption of a file as one line, from beside it or else from `table`. Raises BadData."""
    caption = table.get(os.path.normpath(path), "")
    for suffix in BESIDE:
        beside = path.with_suffix(suffix)
        if beside.is_file():
            try:
                caption = read_text(beside)
            except (OSError, ValueError) as error:
                raise BadData(f"its caption cannot be read ({error})") from None
            break
    if not caption.strip():
        names = " or ".join(path.with_suffix(suffix).name for suffix in BESIDE)
        raise BadData(f"it has no caption, neither in {names} nor in {' or '.join(TABLES)}")
    return " ".join(caption.split())


def read_tables(folder: Path, refuse: Callable[[str], None]) -> dict[str, str]:
    """The captions of all tables in `folder` itself, by the normalised path of the file.

    refuse: called with a sentence about each line that cannot be used. ValueError for a table that
    cannot be read at all. Of two captions for a file, that of the later table counts.
    """
    captions = {}
    for name in TABLES:
        path = folder / name
        if not path.is_file():
            continue
        rows = _csv_rows if path.suffix == ".csv" else _json_rows
        for number, row, shown in rows(path, read_text(path)):
            file = _value(row, FILE_KEYS)
            caption = _value(row, CAPTION_KEYS)
            if file and caption is not None:
                captions[os.path.normpath(folder / file)] = caption
            else:
                refuse(f"line {number} of {path} must be like {EXAMPLE}, got {shown[:80]!r}")
    return captions


def _value(row: object, keys: tuple[str, ...]) -> str | None:
    """The text that a row has under the first of `keys` that it knows."""
    if isinstance(row, dict):
        for key in keys:
            if isinstance(row.get(key), str):
                return row[key]
    return None


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, object, str]]:
    """(number, values, text) of each line; values are None where the line is no JSON."""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield number, row, line


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, object, str]]:
    """(number of its last line, values, text) of each row."""
    reader = csv.DictReader(text.splitlines(keepends=True))
    try:
        columns = reader.fieldnames or []
        if not set(columns) & set(FILE_KEYS) or not set(columns) & set(CAPTION_KEYS):
            raise ValueError(
                f"{path} must have a column {' or '.join(FILE_KEYS)} and a column "
                f"{' or '.join(CAPTION_KEYS)}, got {', '.join(columns)[:80]!r}; rename them"
            )
        for row in reader:
            yield reader.line_num, row, ",".join(map(str, row.values()))
    except csv.Error as error:
        raise ValueError(
            f"{path} must be a table of comma-separated values, but after line "
            f"{reader.line_num} there is {error}; correct it"
        ) from None
