# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: written beside their place and moved there as the last step.
JSON files, read with an error that says what is wrong with them."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MOST_JSON_BYTES = 2**26  # the index of a checkpoint with a million tensors is smaller

_LONGEST_NAME = 100  # bytes of a file's name that are repeated in that of its temporary folder
_LEFTOVER = re.compile(r"\..*\.partial-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{16}", re.DOTALL)
_own_folders: set[str] = set()  # the names of temporary folders that this process writes into


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the body succeeds and disappears when it does not.

    The temporary file lies in a new folder beside `path` that no other user can enter. Its name
    cannot be predicted, and making a folder fails where the name is taken, so nobody can put a link
    in its place. What a library leaves beside the file that it writes (safetensors: `.tmp*`) lies
    in the folder too and goes with it. First, such folders of processes that were killed while they
    wrote the same path are removed.

    The file's mode is that of the file it replaces, or else what the umask leaves of 0666, whatever
    the library that wrote it has chosen.
    """
    remove_leftovers(path.parent, path.name)
    folder = path.with_name(f"{_prefix(path.name)}{_host()}-{os.getpid()}-{secrets.token_hex(8)}")
    folder.mkdir(mode=0o700)
    _own_folders.add(folder.name)
    try:
        partial = folder / path.name
        mode = _mode(path, partial)
        yield partial
        partial.chmod(mode)
        os.replace(partial, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _own_folders.discard(folder.name)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary folders in `folder` of processes of this user and machine that no longer
    run: of those that wrote `name`, or of all."""
    prefix = "." if name is None else _prefix(name)
    try:
        entries = [entry for entry in os.scandir(folder) if entry.name.startswith(prefix)]
    except OSError:
        return  # the write itself will say what is wrong with the folder
    for entry in entries:
        match = _LEFTOVER.fullmatch(entry.name)
        if match and _is_own(entry) and not _is_in_use(match):
            shutil.rmtree(entry.path, ignore_errors=True)


def _prefix(name: str) -> str:
    short = name.encode(errors="surrogateescape")[:_LONGEST_NAME]
    return f".{short.decode(errors='ignore')}.partial-"


def _host() -> str:
    """Eight digits for this machine: process ids mean nothing on another that shares the disk."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _is_own(entry: os.DirEntry) -> bool:
    if not entry.is_dir(follow_symlinks=False):
        return False
    return os.name == "nt" or entry.stat(follow_symlinks=False).st_uid == os.getuid()


def _is_in_use(match: re.Match) -> bool:
    """Whether the process that made a temporary folder may still be writing into it."""
    pid = int(match["pid"])
    if match["host"] != _host() or os.name == "nt":
        return True  # nothing is known of that process
    if pid == os.getpid():
        return match[0] in _own_folders
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # it runs, for another user
    return True


def _mode(path: Path, probe: Path) -> int:
    """The permissions for `path`: its own if it is a file, else those that a new file gets. To
    learn them, the file `probe` is made and removed, because reading the umask means setting it."""
    try:
        present = path.stat()
        if stat.S_ISREG(present.st_mode):
            return stat.S_IMODE(present.st_mode)
    except OSError:
        pass
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def check_regular(path: Path) -> int:
    """The size in bytes of the regular file at `path`; FileNotFoundError where there is nothing,
    OSError for what is no regular file: reading a FIFO or a device may never end."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{path} must be a file, but does not exist; check the path"
        ) from None
    except OSError as error:  # a link to itself, a forbidden folder
        raise unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(
            f"{path} must be a regular file, but is {_kind(status.st_mode)}; "
            "give the path of a file"
        )
    return status.st_size


def unreadable(path: Path, error: OSError) -> OSError:
    """What to raise where reading the file at `path` fails."""
    reason = error.strerror or error
    return OSError(f"{path} must be a file that can be read, got {reason!r}; check it and its disk")


def read_limited(path: Path) -> bytes:
    """The bytes of a file of text, which may be a FIFO, as a shell gives for <(...). ValueError
    where they are too many: those of a device may have no end."""
    with path.open("rb") as file:
        data = file.read(MOST_JSON_BYTES + 1)
    if len(data) > MOST_JSON_BYTES:
        raise ValueError(
            f"{path} must be a file of at most {MOST_JSON_BYTES:,} bytes, but goes on; choose "
            "another file"
        )
    return data


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def read_json(path: Path) -> dict:
    """The JSON object in `path`. OSError where it is no regular file, ValueError where it holds
    anything else."""
    size = check_regular(path)
    if size > MOST_JSON_BYTES:
        raise ValueError(
            f"{path} must be a JSON file of at most {MOST_JSON_BYTES:,} bytes, got {size:,}; "
            "download it again"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} must be valid JSON, got {reason}; download it again") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold a JSON object, got {type(values).__name__}; download it again"
        )
    return values
