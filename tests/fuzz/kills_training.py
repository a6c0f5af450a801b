# SPDX-License-Identifier: Apache-2.0
"""A small training, killed at each of its writes and resumed: what it leaves must be whole, and
equal to what it leaves undisturbed.

`Faults` replaces the functions of `os` and `io` through which Python code writes. At a chosen call
it either kills, so that this call and every later one fails and nothing is cleaned up, or it lets
this one call fail as on a full disk. What compiled libraries write lies in temporary files, whose
moves to their places are such calls.

    python -m tests.fuzz.kills_training          # every write of every scenario, and real SIGKILLs
    python -m tests.fuzz.kills_training lora 5   # every fifth write of one scenario
"""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kandinsky_model import files
from kandinsky_model.training import LoRAConfig, TrainConfig, train

from ..support.train_folders import SMALL, pictures

ROOT = Path(__file__).resolve().parents[2]
WRITERS = (
    (os, "replace"),
    (os, "mkdir"),
    (os, "chmod"),
    (os, "symlink"),
    (os, "unlink"),
    (io, "open"),
    (shutil, "rmtree"),
)


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclass
class Faults:
    """Calls that write below `folder`, counted, the one number `at` being the first to fail.

    kind: "kill" or "full".
    """

    folder: Path
    at: int | None = None
    kind: str = "kill"
    calls: list[str] = field(default_factory=list)

    def __enter__(self) -> "Faults":
        self.patch = pytest.MonkeyPatch()
        for module, name in WRITERS:
            self.patch.setattr(module, name, self.watched(name, getattr(module, name)))
        return self

    def __exit__(self, *_) -> None:
        self.patch.undo()

    def watched(self, name, function):
        def call(*args, **options):
            path = os.fspath(args[0]) if isinstance(args[0], (str, os.PathLike)) else ""
            mode = args[1] if name == "open" and len(args) > 1 else options.get("mode", "r")
            reads = name == "open" and not set(str(mode)) & set("wax+")
            if not reads and str(path).startswith(str(self.folder)):
                self.calls.append(f"{name} {Path(path).name}")
                self.strike()
            return function(*args, **options)

        return call

    def strike(self) -> None:
        number = len(self.calls) - 1
        if self.at is None or number < self.at:
            return
        if self.kind == "kill":
            raise Killed
        if number == self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass(frozen=True)
class Scenario:
    """A training in a folder of its own: settings, and whether its cache is filled before."""

    config: TrainConfig
    cached: bool = True


LORA = TrainConfig(
    lora=LoRAConfig(4, trigger="zap"),
    sizes=((64, 64),),
    lengths=(1,),
    batch=2,
    passes=1,
    rate=1e-2,
    warmup=0,
    steps=2,
    save_every=1,
    sample_every=2,
    samples=1,
    sample_steps=1,
    device="cpu",
)
SCENARIOS = {
    "lora": Scenario(LORA),
    "full": Scenario(replace(LORA, lora=None, rate=1e-4, sample_every=0)),
    "cache": Scenario(replace(LORA, steps=1, sample_every=0), cached=False),
}


@dataclass
class Sweep:
    """A scenario in `root`: `whole` is what it leaves undisturbed, `writes` are its calls."""

    name: str
    root: Path

    def __post_init__(self) -> None:
        scenario = SCENARIOS[self.name]
        self.cached = scenario.cached
        self.data = pictures(self.root / "data")
        cache = str(self.root / "cache") if self.cached else None
        self.config = replace(scenario.config, cache=cache)
        with Faults(self.root / "whole") as faults:
            if self.cached:
                train(self.data, self.root / "filling", self.config)
                faults.calls.clear()
            train(self.data, self.root / "whole", self.config)
        self.writes = faults.calls
        self.whole = contents(self.root / "whole")

    def strike(self, at: int, kind: str) -> None:
        """Let write number `at` fail, begin or resume as a user would, and compare."""
        out = self.root / f"{kind} {at}"
        try:
            with Faults(out, at, kind):
                train(self.data, out, self.config)
        except Killed:
            files._own_folders.clear()  # as the end of the process would
        except OSError as error:
            assert len(str(error).splitlines()) == 1, error
        self.recover(out)
        left = contents(out)
        told = f"{self.name}: {kind} at write {at}, {self.writes[at]}"
        assert set(left) == set(self.whole), f"{told}: {set(left) ^ set(self.whole)}"
        unequal = [name for name in left if left[name] != self.whole[name]]
        assert not unequal, f"{told}: {unequal}"
        shutil.rmtree(out)

    def recover(self, out: Path) -> None:
        state = out / "training" / "state.safetensors"
        train(self.data, out, self.config, resume=state.is_file())

    def kill_for_real(self, seconds: float) -> bool:
        """SIGKILL a process after so long, then as `strike`; whether it was killed at all."""
        out = self.root / f"real {seconds:.2f}"
        small = ["1" if before == "--frames" else word for before, word in pairwise(["", *SMALL])]
        command = [sys.executable, "-m", "kandinsky_model", "train", self.data, "-o", out, *small]
        options = ["--steps", 40, "--save-every", 1, "--cache", self.root / "real cache"]
        process = subprocess.Popen(
            [str(word) for word in (*command, *options)],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        state = out / "training" / "state.safetensors"
        resume = ["--resume"] if state.is_file() else []
        subprocess.run([str(word) for word in (*command, *options, *resume)], check=True)
        hidden = [path for path in out.rglob(".*") if path.name != ".gitignore"]
        assert not hidden, f"killed after {seconds:.2f} s: {hidden}"
        return killed


def contents(out: Path) -> dict[str, bytes | str]:
    """Every file of a training's output by its path, and where links lead. Of the cache only the
    names, and of temporary folders nothing."""
    found: dict[str, bytes | str] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink():
            found[str(name)] = os.readlink(path)
        elif path.is_file():
            found[str(name)] = b"" if "cache" in name.parts else path.read_bytes()
    return found


def sweep(name: str, every: int = 1, first: int = 0) -> Iterator[str]:
    """Strike every so many writes of a scenario, in both kinds; yields a line about each."""
    with tempfile.TemporaryDirectory() as root:
        one = Sweep(name, Path(root))
        for at in range(first, len(one.writes), every):
            for kind in ("kill", "full"):
                one.strike(at, kind)
            yield f"{name}: write {at + 1} of {len(one.writes)}, {one.writes[at]}"


def main(names: list[str], every: int) -> None:
    torch.set_num_threads(1)
    count = 0
    for name in names:
        for line in sweep(name, every):
            count += 2
            print(line, flush=True)
    killed = 0
    with tempfile.TemporaryDirectory() as root:
        one = Sweep("lora", Path(root))
        begin = time.time()
        for i in range(8):
            killed += one.kill_for_real(5 + 0.7 * i)
        print(f"{killed} processes killed in {time.time() - begin:.0f} s", flush=True)
    print(f"{count} faults and {killed} kills, all recovered")


if __name__ == "__main__":
    chosen = sys.argv[1:2] or list(SCENARIOS)
    main(chosen, int(sys.argv[2]) if len(sys.argv) > 2 else 1)
