# SPDX-License-Identifier: Apache-2.0
"""Every file is written whole or not at all, nobody can turn the write elsewhere, its mode follows
the umask, and what a killed process left goes with the next write of the same file."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kandinsky_model.files import check_regular, read_json, remove_leftovers, replacing
from kandinsky_model.media import video

ROOT = Path(__file__).parents[1]


def text(path, content="new"):
    with replacing(path) as target:
        target.write_text(content)


def tensors(path):
    with replacing(path) as target:
        save_file({"x": torch.zeros(3)}, target)


def png(path):
    video.save(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), path.with_suffix(".png"))


def mp4(path):
    video.save(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), path.with_suffix(".mp4"))


WRITERS = [text, tensors, png, mp4]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(("mask", "wanted"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_modes_follow_the_umask_whatever_wrote_the_file(tmp_path, writer, mask, wanted):
    before = os.umask(mask)
    try:
        writer(tmp_path / "out.safetensors")
    finally:
        os.umask(before)
    (path,) = tmp_path.iterdir()
    assert mode(path) == wanted


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    path.write_text("private")
    path.chmod(0o600)
    text(path)
    assert path.read_text() == "new"
    assert mode(path) == 0o600


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as target:
        target.write_text("half")
        (target.parent / ".tmpXYZ").write_text("what a library keeps beside its file")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_names_cannot_be_foreseen_and_nobody_else_can_enter(tmp_path):
    seen = set()
    for _ in range(4):
        with replacing(tmp_path / "a") as target:
            assert mode(target.parent) == 0o700
            assert not target.exists()
            assert target.suffix == (tmp_path / "a").suffix
            seen.add(target.parent.name)
            target.write_text("")
    assert len(seen) == 4


def test_a_link_in_the_place_of_the_temporary_folder_is_refused(tmp_path, monkeypatch):
    """Even to one who guesses the name: a folder is made, or nothing is written."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "a").write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * 2 * count)
    with replacing(tmp_path / "a") as target:
        guessed = target.parent
        target.write_text("")
    guessed.symlink_to(victim)
    with pytest.raises(FileExistsError):
        text(tmp_path / "a")
    assert (victim / "a").read_text() == "precious"


KILLED = """
import os, signal, sys
from pathlib import Path
from kandinsky_model.files import replacing
with replacing(Path(sys.argv[1])) as target:
    target.write_text("half")
    (target.parent / ".tmpXYZ").write_text("half of that")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill_while_writing(path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL


def test_what_a_killed_process_left_goes_with_the_next_write_of_the_same_file(
    tmp_path, monkeypatch
):
    kill_while_writing(tmp_path / "a.mp4")
    kill_while_writing(tmp_path / "b.mp4")
    assert len(list(tmp_path.iterdir())) == 2
    with replacing(tmp_path / "a.mp4") as target:
        target.write_text("whole")
        with monkeypatch.context() as patch:  # another thread, by another path
            patch.chdir(tmp_path)
            text(Path("a.mp4"), "by another thread")
        assert target.exists()
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(left) == 1
    assert left[0].startswith(".b.mp4.")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_what_another_machine_or_a_running_process_writes_stays(tmp_path):
    with replacing(tmp_path / "a") as target:
        target.write_text("")
        own = target.parent.name
        start, host, pid, token = own.rsplit("-", 3)
        elsewhere = f"{start}-{int(host, 16) ^ 1:08x}-{pid}-{token}"
        parent = f"{start}-{host}-{os.getppid()}-{token}"
        for name in (elsewhere, parent):
            (tmp_path / name).mkdir()
        text(tmp_path / "a")
        assert {path.name for path in tmp_path.iterdir()} == {"a", own, elsewhere, parent}


def test_long_names_and_any_bytes(tmp_path):
    for name in ("ё" * 120, "b" * 250, os.fsdecode(b"\xff\xfe.png")):
        text(tmp_path / name)
        assert (tmp_path / name).read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "must be valid JSON, got Expecting property name"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b"\xff\xfe", "must be valid JSON, got 'utf-8' codec"),
        (b"[" * 100_000, "must be valid JSON, got"),
    ],
)
def test_json_that_cannot_be_used_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path} must")
    assert "\n" not in str(caught.value)


def test_json_of_other_editors_and_of_no_end(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "ё"}).encode())
    assert read_json(path) == {"a": "ё"}
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(ValueError, match="at most 67,108,864 bytes, got 1,099,511,627,776"):
        read_json(path)


def test_what_is_no_regular_file_is_refused_before_it_blocks(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (
        (tmp_path / "pipe", "a FIFO"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "a device"),
    ):
        with pytest.raises(OSError, match=f"must be a regular file, but is {kind}"):
            check_regular(path)
        with pytest.raises(OSError, match=kind):
            read_json(path)
    with pytest.raises(FileNotFoundError, match="does not exist; check the path"):
        read_json(tmp_path / "absent")
