# SPDX-License-Identifier: Apache-2.0
"""The command line: `kandinsky generate "prompt" -o out.mp4`, and what belongs to it.

Every failure is one sentence on stderr and exit status 2 (with --debug the traceback); an interrupt
exits with 130, and one during sampling leaves a file to go on with.
"""

from __future__ import annotations

import logging
import os
import sys

from .cli.grammar import parser


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s" if args.chatty else "note: %(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO if args.chatty else logging.WARNING)
    # before the hub library and transformers are imported: they read it then
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        args.run(args)
    except KeyboardInterrupt as stop:
        _complain(args, " ".join(["interrupted", *map(str, stop.args)]))
        return 130
    except Exception as error:
        if args.debug:
            raise
        _complain(args, _one_sentence(error), getattr(error, "is_told", None))
        return 2
    return 0


def _complain(args, text: str, is_told: bool | None = None) -> None:
    """Print what went wrong: once, where several processes share a run.

    is_told: whether another process has said the same; None where that is not known, because the
    processes did not share anything yet, and what goes wrong then goes wrong in all of them.
    """
    if is_told is None:
        is_told = os.environ.get("RANK", "0") != "0" and not getattr(args, "prompts", None)
    if not is_told:
        print(f"kandinsky: {text}", file=sys.stderr)


def _one_sentence(error: Exception) -> str:
    """Our own errors are one sentence already; of a foreign one, the type and the first line, which
    is where the matter is."""
    lines = str(error).strip().splitlines() or ["no message"]
    ours = isinstance(error, (ValueError, TypeError, RuntimeError, OSError)) and len(lines) == 1
    return lines[0] if ours else f"{type(error).__name__}: {lines[0]} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
