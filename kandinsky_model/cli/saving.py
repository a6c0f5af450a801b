# SPDX-License-Identifier: Apache-2.0
"""What was sampled reaches a disk, whatever fails; and no command writes over what it reads."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_log = logging.getLogger(__name__)


def save_somewhere(write: Callable[[Path], object], path: Path, what: str) -> Path:
    """Call `write(path)`. Where that fails, write a file of the same name in the temporary folder;
    where that fails too, ask at a terminal where to write. The path that was written.

    what: names the content in messages. An interruption is raised once the content is saved. Raises
    OSError where no place is left.
    """
    interrupted = False
    reasons: list[str] = []
    for place in _places(path, what, reasons):
        for _ in range(2):  # once more after an interruption
            try:
                write(place)
            except KeyboardInterrupt:
                interrupted = True
                reasons.append("interrupted")
                continue
            except Exception as error:  # safetensors has exceptions of its own for a full disk
                reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
                break
            if place != path:
                _log.warning("%s cannot be written (%s); %s in %s", path, reasons[0], what, place)
            if interrupted:
                raise KeyboardInterrupt(f"; {what} in {place}")
            return place
    raise OSError(
        f"saving {what} requires a folder that can be written, got {path} ({reasons[0]}) and the "
        "temporary folder; free some space, or set TMPDIR"
    )


def _places(path: Path, what: str, reasons: list[str]) -> Iterator[Path]:
    """Where to try, in turn; `reasons` says why the place before failed."""
    yield path
    try:
        folder = Path(tempfile.mkdtemp(prefix="kandinsky-"))
    except OSError as error:
        reasons.append(str(error))
    else:
        yield folder / path.name
        folder.rmdir()  # nothing could be written into it
    while sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        try:
            chosen = _ask(f"{what} cannot be saved ({reasons[-1]}); another folder, or nothing: ")
            if not chosen:
                return
            place = Path(chosen).expanduser()
            place = place / path.name if place.is_dir() else place
            if place.exists():
                raise FileExistsError(f"{place} exists")
        except (OSError, RuntimeError, ValueError) as error:  # what is typed may be no path at all
            reasons.append(str(error))
        else:
            yield place


def _ask(question: str) -> str:
    """A line that the user types; "" at the end of the input, or where the terminal is gone."""
    from tqdm import tqdm

    try:
        with tqdm.external_write_mode(file=sys.stderr):
            print(question, end="", file=sys.stderr, flush=True)
            return sys.stdin.readline().strip()
    except OSError:
        return ""


def check_not_inputs(outputs: Iterable[Path], inputs: Iterable[str | os.PathLike | None]) -> None:
    """Raise ValueError if one of the outputs is the same file as one of the inputs, under whatever
    name, or a folder that holds one. An output "a.png" also stands for "a_000.png" and so on:
    frames have numbers."""
    present = [Path(path) for path in inputs if path is not None and os.path.exists(path)]
    for output in outputs:
        for path in present:
            if _is_same(output, path) or _is_numbered(output, path) or _holds(output, path):
                raise ValueError(
                    f"the output must not be one of the inputs, but {output} would overwrite "
                    f"{path}; choose another name"
                )


def check_apart(output: Path, strip: Path) -> None:
    """Raise ValueError if a strip would take the place of the output or of one of its frames."""
    named_alike = output.name == strip.name and _is_same(output.parent, strip.parent)
    if named_alike or _is_same(output, strip) or _is_numbered(output, strip):
        raise ValueError(
            f"the strip must not be the output, but {strip} would overwrite a frame of {output}; "
            "choose another name"
        )


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False  # the output is not there yet


def _holds(folder: Path, path: Path) -> bool:
    return folder.is_dir() and folder.resolve() in path.resolve().parents


def _is_numbered(output: Path, path: Path) -> bool:
    name = re.escape(output.stem) + r"_\d{3,}" + re.escape(output.suffix)
    return bool(re.fullmatch(name, path.name)) and _is_same(output.parent, path.parent)
