# SPDX-License-Identifier: Apache-2.0
"""The command line: `kandinsky generate "prompt" -o out.mp4`, and the other commands.

A failure is one sentence on stderr and exit status 2; with --debug it is a traceback. Ctrl-C,
SIGTERM and SIGHUP end a command with 128 plus the number of the signal, which is 130 for Ctrl-C.
One that comes while a video is sampled leaves a file to go on with.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import suppress

from .cli.grammar import parse
from .cli.interrupts import INTERRUPTS


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    # Before torch loads OpenMP: threads that wait without spinning leave a busy machine's cores to
    # others. Before the hub library and transformers, which read theirs when they are imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with INTERRUPTS.handled(is_program=argv is None):
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt as stop:
            INTERRUPTS.end()
            _complain(argparse.Namespace(), "interrupted" + _detail(stop))
            return 128 + INTERRUPTS.number


def _run(argv: list[str]) -> int:
    """See `main`."""
    try:
        args = parse(argv)
    except (ValueError, OSError) as error:
        _complain(argparse.Namespace(), _one_sentence(error))
        return 2
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(message)s" if args.chatty else "note: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger(__package__).setLevel(logging.INFO if args.chatty else logging.WARNING)
    try:
        args.run(args)
    except KeyboardInterrupt as stop:
        INTERRUPTS.end()
        _complain(args, _subject() + "interrupted" + _detail(stop), is_told=False)
        return 128 + INTERRUPTS.number
    except Exception as error:
        if args.debug:
            raise
        if INTERRUPTS.came:  # a library has made an error of the interruption
            _complain(args, f"interrupted; {_one_sentence(error)}")
            return 128 + INTERRUPTS.number
        _complain(args, _one_sentence(error), getattr(error, "is_told", None))
        return 2
    return 0


def _subject() -> str:
    """Who was interrupted, where torchrun has started several processes: each says so, because
    nobody knows which of the others can."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} was "


def _detail(stop: KeyboardInterrupt) -> str:
    """What an interruption says of itself, to stand behind the word "interrupted"."""
    text = " ".join(map(str, stop.args))
    return text if not text or text.startswith(";") else f" {text}"


def _complain(args: argparse.Namespace, text: str, is_told: bool | None = None) -> None:
    """Print what went wrong: once, where several processes share a run.

    is_told: whether another process has said the same; None where that is not known, because the
    processes did not share anything yet, and what goes wrong then goes wrong in all of them.
    """
    if is_told is None:
        own_videos = getattr(args, "prompts", None) or getattr(args, "seeds", None)
        is_told = os.environ.get("RANK", "0") != "0" and not own_videos
    if not is_told:
        with suppress(OSError):  # the terminal has hung up, which may be why the command ends
            print(f"kandinsky: {_printable(text)}", file=sys.stderr)


class _OneLine(logging.Formatter):
    """Messages that are printable, each on one line."""

    def format(self, record: logging.LogRecord) -> str:
        return _printable(super().format(record))


def _printable(text: str) -> str:
    """`text`, in which a name from a file may hold what steers a terminal or breaks the line."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _one_sentence(error: Exception) -> str:
    """Errors of this package are one sentence already. Of any other error, its type and its first
    line, which says most."""
    lines = str(error).strip().splitlines() or ["no message"]
    ours = isinstance(error, (ValueError, TypeError, RuntimeError, OSError)) and len(lines) == 1
    return lines[0] if ours else f"{type(error).__name__}: {lines[0]} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
