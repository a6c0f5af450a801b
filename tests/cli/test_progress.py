# SPDX-License-Identifier: Apache-2.0
"""The progress bar in a pseudo-terminal: it shares the screen with lines and leaves nothing."""

import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky_model import pipeline

from ..support import tiny_models

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = 100


def in_a_terminal(folder, *arguments):
    """What a command writes to a terminal of `COLUMNS` columns that is its stdin, stdout and
    stderr."""
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "kandinsky_model", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": str(COLUMNS),
        },
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    data = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other side is closed
            piece = b""
        if not piece:
            break
        data += piece
    os.close(ours)
    assert process.wait() == 0, data.decode()
    return data.decode()


def screen(written):
    """The lines that stand on the screen after all was written, without trailing spaces."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[A|\x1b\[[0-9;?]*[A-Za-z]|[^\x1b]", written):
        if part == "\x1b[A":
            row -= 1
        elif part == "\r":
            column = 0
        elif part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif not part.startswith("\x1b"):
            line = lines[row].ljust(column)
            lines[row] = line[:column] + part + line[column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_the_screen_shows_what_a_terminal_would():
    assert screen("half 50%\r        \rnote\r\n100%\r    \rdone\r\n") == ["note", "done"]
    assert screen("one\r\ntwo\x1b[A\rO") == ["One", "two"]


def test_lines_stand_above_the_bar_and_nothing_is_left_of_it(folder, tmp_path):
    own = ["--model", str(folder), *tiny_models.SMALL_ARGS, "--device", "cpu", "--seed", "5"]
    written = in_a_terminal(tmp_path, "generate", "a red zebra", *own, "-o", "a.mp4")
    note, words, scheme, *rest = screen(written)
    assert note.startswith("note: tiny was trained for 160x160")
    assert words.startswith("note: tiny does not know zebra; its words are a, red,")
    assert scheme.startswith("decoding in scheme")
    assert rest == [
        "a.mp4",
        "seed 5, 5 frames of 80x64, global decoding, latents in a.latents.safetensors",
    ]
    stages = re.findall(r"(text|sampling|decoding) +(\d+)/(\d+) \|", written)
    assert ("text", "0", "1") in stages and ("decoding", "2", "2") in stages
    assert "s/step" in written and "left" in written


def test_resume_counts_on(folder, tmp_path, run, monkeypatch):
    real = pipeline.sample

    def interrupted(steps):
        yield next(steps)
        yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(
        pipeline, "sample", lambda *args, **options: interrupted(real(*args, **options))
    )
    assert run("generate 'a red circle' -o a.mp4 --steps 4")[0] == 130
    written = in_a_terminal(tmp_path, "resume", "a.run.safetensors", "--device", "cpu")
    counts = re.findall(r"sampling +(\d+)/(\d+) \|", written)
    assert set(counts) <= {("2", "4"), ("3", "4"), ("4", "4")} and ("2", "4") in counts
    assert screen(written)[-2] == "a.mp4"
