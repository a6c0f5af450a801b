# SPDX-License-Identifier: Apache-2.0
"""The tests of kernels on this GPU, and some of them under compute-sanitizer."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .card import FULL, Clock, Size

ROOT = Path(__file__).absolute().parents[2]  # through the link that gate.sh sets, if any
FILES = [f"tests/kernels/test_{name}.py" for name in ("gpu", "guard", "cuda", "triton")]
# what needs no GPU is tested without one
ELSEWHERE = "not cubins and not spills and not matrix_units and not shared_memory"
FEW = "test_every_case and (odd or ragged-bfloat16 or select_blocks-one)"
TOY_FEW = "test_every_case and modulated_norm-one-float32"


def tests(clock: Clock, size: Size, _: dict) -> Iterator[dict]:
    """pytest, eight at a time with pytest-xdist, because most of their time is compilation."""
    if size is FULL[1]:
        return
    files = FILES if size is FULL[0] else FILES[:1]
    parallel = ["-n", "8"] if size is FULL[0] and importlib.util.find_spec("xdist") else []
    yield run("tests", [*parallel, *files, "-k", ELSEWHERE])


def memcheck(clock: Clock, size: Size, _: dict) -> Iterator[dict]:
    """compute-sanitizer over small cases, where it is installed."""
    if size is FULL[1]:
        return
    if not shutil.which("compute-sanitizer"):
        raise FileNotFoundError("compute-sanitizer is not on PATH")
    sanitizer = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    few = FEW if size is FULL[0] else TOY_FEW
    yield run("memcheck", ["-x", FILES[-1], "-k", few], sanitizer)


def run(op: str, arguments: list[str], under: list[str] | None = None) -> dict:
    """A row with pytest's last line; raises RuntimeError with its last lines where it fails."""
    command = [*(under or []), sys.executable, "-m", "pytest", "-q", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout + done.stderr).strip().splitlines()[-15:]
    if done.returncode:
        raise RuntimeError("\n".join([f"{op} exited with {done.returncode}:", *last]))
    return {"op": op, "said": last[-1]}
