# SPDX-License-Identifier: Apache-2.0
"""Whatever its arguments are, an operator answers or refuses.

It does not crash, hang or fail with an error that it does not document, and its kernel and its
reference refuse the same calls.

    python -m tests.fuzz.operators --minutes 10

A case follows from its number alone. Cases run in a process of their own, so that a crash is seen,
and a failure says how to run its case again.
"""

import argparse
import contextlib
import faulthandler
import importlib
import inspect
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import torch
from torch import Tensor

import kandinsky_kernels as ops
from kandinsky_kernels import _library, reference

from .arguments import SPOILERS, Arguments, huge, spoiled

ROOT = Path(__file__).resolve().parents[2]
REFUSALS = (ValueError, TypeError)
MEMORY = 6 << 30  # bytes of address space beyond what is there at the start
SUMS = ("group_moments", "group_affine")  # as long as their inputs are, without any memory
PATIENCE = 60  # seconds for one case
RAW = sorted(_library._references)
PUBLIC = [name for name in ops.__all__ if name not in ("Rotary", "build_info", "kernels")]


def _call(name: str, args: list):
    """Call the public function ``name`` with the arguments of its operator's schema."""
    function = getattr(ops, name)
    if name in ("norm_rope", "norm_rope_means"):
        x, weight, cos, sin, positions, pairs, offsets, eps = args
        tables = (cos, sin, positions)
        rotary = None if any(t is None for t in tables) else ops.Rotary(*tables, pairs)
        blocks = () if name == "norm_rope" else (offsets,)
        return function(x, weight, rotary, *blocks, eps)
    if name == "select_blocks":
        queries, keys, keep_mass, tiles, window, ties = args
        return function(queries, keys, keep_mass, tiles or None, window or None, ties)
    if name == "block_sparse_attention":
        *tensors, scale, bound = args
        return function(*tensors, scale, True, bound)
    return function(*args)


class Case:
    """One call of one function, made from a number."""

    def __init__(self, number: int):
        rng = Random(number)
        torch.manual_seed(number)
        self.public = rng.random() < 0.4
        self.name = rng.choice(PUBLIC if self.public else RAW)
        maker = Arguments(rng)
        made = getattr(maker, self.name.replace("norm_rope_means", "norm_rope"))()
        if self.name == "norm_rope_means" and made[6] is None:
            made[6] = maker.offsets(made[0].shape[1])
        optional = [not self.public and (value is None or rng.random() < 0.1) for value in made]
        spoilers = [s for s in SPOILERS if s is not huge or self.name not in SUMS]
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            i = rng.randrange(len(made))
            made[i] = spoiled(rng, made[i], optional[i], spoilers)
        self.args = made
        self.derives = rng.random() < 0.3
        self.autocast = rng.random() < 0.1

    def __str__(self) -> str:
        def described(value) -> str:
            if not isinstance(value, Tensor):
                return repr(value)
            strides = list(value.stride()) if value.layout == torch.strided else value.layout
            return f"{value.dtype} {list(value.shape)} strides {strides} on {value.device}"

        kind = "public" if self.public else "raw"
        return f"{kind} {self.name}(" + ", ".join(described(value) for value in self.args) + ")"

    def outcome(self, function):
        """("answer", result) where the call returned, otherwise (type of the error, its text)."""
        try:
            return "answer", function(*self.args)
        except (*REFUSALS, RuntimeError, NotImplementedError) as error:
            return type(error).__name__, str(error)

    def run(self) -> str:
        if self.derives:
            self.args = [
                value.detach().requires_grad_()
                if isinstance(value, Tensor) and value.is_floating_point()
                else value
                for value in self.args
            ]
        operator = getattr(torch.ops.kandinsky_kernels, self.name, None)
        with torch.autocast("cpu") if self.autocast else contextlib.nullcontext():
            kind, result = self.outcome(
                (lambda *args: _call(self.name, list(args))) if self.public else operator
            )
            if kind == "answer" and self.derives:
                kind = self.backward(result)
            if not self.public and hasattr(reference, self.name):
                self.compare(kind, result)
        return kind

    def backward(self, result) -> str:
        outputs = [
            x
            for x in (result if isinstance(result, tuple) else (result,))
            if isinstance(x, Tensor) and x.requires_grad
        ]
        inputs = [x for x in self.args if isinstance(x, Tensor) and x.requires_grad]
        if not outputs:
            return "answer"
        try:
            torch.autograd.grad(
                outputs, inputs, [torch.ones_like(x) for x in outputs], allow_unused=True
            )
        except (*REFUSALS, RuntimeError, NotImplementedError) as error:
            return f"backward {type(error).__name__}"
        return "derived"

    def compare(self, kind: str, result) -> None:
        """Require that the reference refuses what the operator refuses.

        Where both answer, results have the same shapes, dtypes and devices.
        """
        refused = kind in ("ValueError", "TypeError")
        words = result if isinstance(result, str) else ""
        if "expected" in words.lower():
            return  # what the schema expects; the reference has none
        twin, other = self.outcome(getattr(reference, self.name))
        doubles = any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in self.args)
        if doubles and "float64" in words:
            return  # which only the reference computes with
        if refused != (twin in ("ValueError", "TypeError")):
            other = other if isinstance(other, str) else ""
            raise AssertionError(f"operator: {kind} {words}; reference: {twin} {other}")
        if kind in ("answer", "derived") and twin == "answer":
            form, wanted = (
                [(x.shape, x.dtype, x.device) for x in (y if isinstance(y, tuple) else (y,))]
                for y in (result, other)
            )
            assert form == wanted, f"operator: {form}; reference: {wanted}"


def work(first: int, cases: int, seconds: float, progress: str) -> None:
    """Run cases from number ``first`` on.

    The number of each is written to the file ``progress`` before it begins, so that it is known
    which one crashed.
    """
    warnings.simplefilter("ignore")
    importlib.import_module("torch._dynamo")  # long, and otherwise within some case
    torch.set_num_threads(2)
    if not os.environ.get("LD_PRELOAD"):  # an address sanitizer reserves far more than it uses
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    note = os.open(progress, os.O_WRONLY)
    end = time.monotonic() + seconds
    kinds = Counter()
    number = first
    while number < first + cases and time.monotonic() < end:
        os.pwrite(note, f"{number:<20}".encode(), 0)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        try:
            case = Case(number)
        except RuntimeError:  # torch itself cannot make such tensors
            kinds["not made"] += 1
        else:
            try:
                kinds[case.run()] += 1
            except Exception as error:
                raise SystemExit(f"case {number}: {case}\n{type(error).__name__}: {error}") from (
                    error
                )
        number += 1
    faulthandler.cancel_dump_traceback_later()
    summary = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    print(f"{number - first} cases from {first} on: {summary}")


def fuzz(first: int, cases: int, seconds: float, references: bool = False) -> str:
    """Run cases in a process of their own; return a summary.

    Raises AssertionError, which says how to run the case that failed.
    """
    environment = {**os.environ, "KANDINSKY_KERNELS": "reference" if references else ""}
    with tempfile.NamedTemporaryFile() as progress:
        command = [sys.executable, "-X", "faulthandler", "-m", "tests.fuzz.operators", "--work"]
        command += [progress.name, "--first", str(first), "--cases", str(cases)]
        command += ["--minutes", str(seconds / 60)]
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
        number = Path(progress.name).read_text().strip()
    if done.returncode:
        switch = "KANDINSKY_KERNELS=reference " if references else ""
        again = f"{switch}python -m tests.fuzz.operators --first {number} --cases 1"
        raise AssertionError(
            f"case {number} ended with {done.returncode}; run it again: {again}\n"
            f"{done.stdout[-2000:]}{done.stderr[-6000:]}"
        )
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--minutes", type=float, default=1.0, help="how long, at most")
    parser.add_argument("--cases", type=int, default=1 << 62, help="how many, at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--work", metavar="FILE", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        return work(asked.first, asked.cases, 60 * asked.minutes, asked.work)
    for references in (False, True):
        print("references" if references else "kernels", flush=True)
        try:
            print(fuzz(asked.first, asked.cases, 30 * asked.minutes, references), flush=True)
        except AssertionError as error:
            sys.exit(str(error))
    return None


if __name__ == "__main__":
    main()
