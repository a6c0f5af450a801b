# SPDX-License-Identifier: Apache-2.0
"""Every write of generate, resume, decode and quantize fails once, with a full disk, a forbidden
file or Ctrl-C. Afterwards nothing finished is lost and no file with its final name is half-written.
The same command without a fault then makes what it always makes, and leaves nothing else.

    python -m tests.fuzz.faults_cli

Writes are seen by an audit hook: files opened for writing, folders made, files renamed, modes
changed. Files that are written by one call also fail halfway, with half of their bytes on disk.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from kandinsky_model import pipeline
from kandinsky_model.__main__ import main as command_line
from kandinsky_model.media import video
from kandinsky_model.sampling import result
from kandinsky_model.sampling.result import load_latents
from kandinsky_model.text import cache

from ..support import tiny_models

KINDS: dict[str, Callable[[], BaseException]] = {
    "full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "forbidden": lambda: PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    "interrupted": KeyboardInterrupt,
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
OWN = f"{shlex.join(tiny_models.SMALL_ARGS)} --device cpu"
PROMPT = f"generate 'a red circle' --model {{model}} {OWN} --seed 5"


@dataclass(frozen=True)
class Scenario:
    """One command. before: commands that make its inputs. status: with which it ends without a
    fault. stops: whether Ctrl-C comes after the first step."""

    line: str
    before: tuple[str, ...] = ()
    status: int = 0
    stops: bool = False


SCENARIOS = {
    "generate mp4": Scenario(f"{PROMPT} -o a.mp4"),
    "generate png": Scenario(f"{PROMPT} -o a.png --strip s.png"),
    "generate, stopped": Scenario(f"{PROMPT} -o a.mp4", status=130, stops=True),
    "resume": Scenario("resume a.run.safetensors --device cpu", (f"stop {PROMPT} -o a.mp4",)),
    "decode": Scenario(
        "decode a.latents.safetensors -o b.gif --device cpu", (f"{PROMPT} -o a.gif",)
    ),
    "quantize": Scenario("quantize {model} q --mode int8"),
}


@dataclass
class Writes:
    """Counts the writes below `root`, and lets the one with the number `fails` fail."""

    root: Path
    fails: int | None = None
    error: Callable[[], BaseException] = KeyboardInterrupt
    seen: list[str] = field(default_factory=list)
    is_counting: bool = True

    def point(self, what: str) -> bool:
        """Count a write; whether it is the one that fails."""
        self.seen.append(what)
        return len(self.seen) - 1 == self.fails

    def audit(self, event: str, args: tuple) -> None:
        if not self.is_counting or event not in ("open", "os.rename", "os.mkdir", "os.chmod"):
            return
        path = args[0]
        if event == "open" and not (isinstance(args[2], int) and args[2] & WRITING):
            return
        if not isinstance(path, (str, bytes)) or not self._is_below(os.fsdecode(path)):
            return
        if self.point(f"{event} {Path(os.fsdecode(path)).name}"):
            raise self.error()

    def _is_below(self, path: str) -> bool:
        return Path(os.path.abspath(path)).is_relative_to(self.root)

    def halfway(self, real: Callable, path_of: Callable) -> Callable:
        """`real`, which writes one file, or writes half of it and fails."""

        def write(*args, **options):
            done = real(*args, **options)
            if self.is_counting and self.point(f"half of {path_of(args).name}"):
                path = path_of(args)
                with _quiet(self):
                    os.truncate(path, path.stat().st_size // 2)
                raise self.error()
            return done

        return write


_active: list[Writes] = []


def _hook(event: str, args: tuple) -> None:
    for writes in _active:
        writes.audit(event, args)


sys.addaudithook(_hook)  # stays for the life of the process, and does nothing while none is active


@contextlib.contextmanager
def _quiet(writes: Writes) -> Iterator[None]:
    writes.is_counting = False
    try:
        yield
    finally:
        writes.is_counting = True


@dataclass
class Outcome:
    status: int
    told: str  # stderr
    writes: list[str]
    sampled: bool  # whether sampling was finished


def run(line: str, root: Path, stops: bool, writes: Writes | None = None) -> Outcome:
    """Run one command in `root`/work, with temporary files and caches below `root` too."""
    writes = writes or Writes(root)
    sampled = []

    def finishing(real):
        def wrapped(*args, **options):
            value = real(*args, **options)
            sampled.append(True)
            return value

        return wrapped

    def stopped(real):
        def sample(*args, **options):
            steps = real(*args, **options)
            yield next(steps)
            raise KeyboardInterrupt

        return sample

    model = pipeline.Kandinsky5
    patches = [
        mock.patch.object(tempfile, "tempdir", str(root / "tmp")),
        mock.patch.object(cache, "default_folder", lambda: root / "cache"),
        mock.patch.object(model, "generate", finishing(model.generate)),
        mock.patch.object(model, "resume", finishing(model.resume)),
        mock.patch.object(result, "save_file", writes.halfway(result.save_file, lambda a: a[1])),
        mock.patch.object(video, "_write_clip", writes.halfway(video._write_clip, lambda a: a[1])),
        mock.patch.object(Path, "write_bytes", writes.halfway(Path.write_bytes, lambda a: a[0])),
        mock.patch.object(Path, "write_text", writes.halfway(Path.write_text, lambda a: a[0])),
    ]
    if stops:
        patches.append(mock.patch.object(pipeline, "sample", stopped(pipeline.sample)))
    told = io.StringIO()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(contextlib.redirect_stderr(told))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(_below(root / "work"))
        _active.append(writes)
        try:
            status = command_line(shlex.split(line))
        finally:
            _active.remove(writes)
    return Outcome(status, told.getvalue(), writes.seen, bool(sampled))


@contextlib.contextmanager
def _below(folder: Path) -> Iterator[None]:
    """Work in `folder`, as `contextlib.chdir` of Python 3.11."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


class Sweep:
    """One scenario: what it makes without a fault, and the number of its writes."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.scenario = SCENARIOS[name]
        self.folder = folder
        self.model = folder / "model"
        if not self.model.exists():
            tiny_models.tiny_folder(self.model)
        self.inputs = self._fresh("inputs")
        for line in self.scenario.before:
            self._run(self.inputs, line.removeprefix("stop "), line.startswith("stop "))
        whole = self._copy("whole")
        outcome = self._run(whole)
        assert outcome.status == self.scenario.status, outcome.told
        self.wanted = contents(whole / "work")
        self.points = outcome.writes

    def _fresh(self, name: str) -> Path:
        root = self.folder / self.name.replace(" ", "-") / name
        shutil.rmtree(root, ignore_errors=True)
        for part in ("work", "tmp", "cache"):
            (root / part).mkdir(parents=True)
        return root

    def _copy(self, name: str) -> Path:
        root = self._fresh(name)
        shutil.copytree(self.inputs / "work", root / "work", dirs_exist_ok=True)
        return root

    def _run(
        self,
        root: Path,
        line: str | None = None,
        stops: bool | None = None,
        writes: Writes | None = None,
    ) -> Outcome:
        line = (line or self.scenario.line).format(model=self.model)
        return run(line, root, self.scenario.stops if stops is None else stops, writes)

    def fail(self, point: int, kind: str) -> None:
        """Let one write fail, and check all that must hold afterwards."""
        where = f"{self.name}, write {point} ({self.points[point]}), {kind}"
        root = self._copy("faulty")
        before = contents(root / "work")
        outcome = self._run(root, writes=Writes(root, point, KINDS[kind]))
        assert len(outcome.writes) > point, f"{where}: this write did not happen"
        assert outcome.status in (0, 2, 130), f"{where}: status {outcome.status}"
        said = [line for line in outcome.told.splitlines() if line.startswith("kandinsky: ")]
        assert len(said) == (outcome.status != 0), f"{where}: {outcome.told}"
        after = contents(root / "work")
        for name, data in after.items():
            is_hidden = Path(name).parts[0].startswith(".")
            allowed = (self.wanted.get(name), before.get(name))
            assert is_hidden or data in allowed, f"{where}: {name} is not what it should be"
        assert before.keys() <= after.keys(), f"{where}: an input is gone"
        if outcome.sampled:
            assert self._latents(root), f"{where}: the latents are lost"
        if self.scenario.stops and outcome.status == 130:
            runs = list(root.glob("*/**/a.run.safetensors"))
            assert runs or "resume" not in outcome.told, f"{where}: the run is lost"
        again = self._run(root)
        assert again.status == self.scenario.status, f"{where}: again: {again.told}"
        made = contents(root / "work")
        wrong = {name for name in {*made, *self.wanted} if made.get(name) != self.wanted.get(name)}
        assert not wrong, f"{where}: again: {sorted(wrong)} are not what they were"

    def _latents(self, root: Path) -> bool:
        """Whether latents of a finished sampling are on disk, whole."""
        found = list(root.glob("*/**/*.latents.safetensors"))
        return any(bool(torch.isfinite(load_latents(path)[0]).all()) for path in found)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and the bytes in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}


def sweep(folder: Path, most: int | None = None, seed: int = 0) -> Counter:
    """Let writes fail one by one: all of them, or `most` of each scenario, chosen by `seed`. How
    many did, by scenario. Raises AssertionError for the first after which something is wrong."""
    counts: Counter = Counter()
    for name in SCENARIOS:
        scenario = Sweep(name, folder)
        cases = [(point, kind) for point in range(len(scenario.points)) for kind in KINDS]
        if most is not None:
            cases = random.Random(seed).sample(cases, min(most, len(cases)))
        for point, kind in cases:
            scenario.fail(point, kind)
            counts[name] += 1
    return counts


def main() -> None:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = sweep(Path(folder).resolve())
    for name, count in counts.items():
        print(f"{name:18} {count:4} faults")
    print(f"{'all':18} {counts.total():4} faults in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
