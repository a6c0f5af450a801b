# SPDX-License-Identifier: Apache-2.0
"""The kernels and networks at full size on a GPU, beside what one would run instead.

``python -m benchmarks.gpu --out FOLDER [--only norms,selection,...] [--minutes 12]`` runs sections
in order of worth. Each writes FOLDER/<section>.json, anew after every row. `benchmarks/gpu/gate.sh`
installs a wheel first. ``--small`` runs everything at toy sizes on any device: a test that the
benchmark itself works, not a measurement.
"""

import argparse
import gc
import importlib
import json
import math
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config as functorch

import kandinsky_kernels as ops

from .card import FULL, SMALL, Clock, card, ceilings, show


@dataclass(frozen=True)
class Section:
    """``function`` of ``module`` in this package yields rows. It is imported when its turn comes:
    a package that is not installed costs the sections that need it. ``seconds`` are an estimate of
    what it takes on one H200, compilation included; none was measured."""

    name: str
    module: str
    seconds: int
    function: str = ""

    def rows(self, clock: Clock, size, roof: dict):
        module = importlib.import_module(self.module, __package__)
        return getattr(module, self.function or self.name)(clock, size, roof)


# in order of worth
SECTIONS = (
    Section("selftests", ".selftests", 90),
    Section("l2", ".l2", 5),
    Section("attention", ".attention", 100),
    Section("selection", ".attention", 10),
    Section("norms", ".norms", 30),
    Section("transformer", ".networks", 50),
    Section("decode", ".networks", 60),
    Section("memory", ".memory", 150),
    Section("gradients", ".attention", 60),
    Section("norm_gradients", ".norms", 30),
    Section("tests", ".suite", 120),
    Section("together", ".attention", 20),
    Section("convolutions", ".convolutions", 40),
    Section("diffusers", "..diffusers", 60, "on_gpu"),
    Section("memcheck", ".suite", 90),
)
MORE = (Section("launches", ".attention", 120),)  # run only when named
BY_NAME = {section.name: section for section in (*SECTIONS, *MORE)}


def write(path: Path, result: dict) -> None:
    """Whole or not at all: the process may be ended at any time."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def run(section: Section, clock: Clock, common: dict, path: Path, small: bool) -> bool:
    """One section into its file; whether it failed, which is written there too."""
    print(f"== {section.name}", flush=True)
    start, rows = time.monotonic(), []
    result = {**common, "rows": {section.name: rows}, "failed": {}}
    try:
        for size in SMALL if small else FULL:
            for row in section.rows(clock, size, common["ceilings"]):
                show(row)
                rows.append(row)
                write(path, result)
    except Exception as error:
        traceback.print_exc()
        result["failed"][section.name] = f"{type(error).__name__}: {error}"
    result |= {"kernels": ops.kernels(), "first_call_s": clock.first_call_s}
    result["seconds"] = round(time.monotonic() - start, 1)
    write(path, result)
    gc.collect()
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()
    return bool(result["failed"])


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the JSON files")
    parser.add_argument(
        "--only", type=lambda text: text.split(","), help=f"some of {','.join(BY_NAME)}"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="the first section that would not end within them does not start, nor do later ones",
    )
    parser.add_argument("--spent", type=float, default=0.0, help="seconds of them already gone")
    parser.add_argument("--small", action="store_true", help="toy sizes on any device")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per provider and row")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.only or () if name not in BY_NAME]
    if unknown:
        parser.error(f"--only takes some of {', '.join(BY_NAME)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available() and not options.small:
        parser.error(
            "a CUDA device is required, torch sees none; use --small for toy sizes on the CPU"
        )
    return options


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    sections = [BY_NAME[name] for name in options.only] if options.only else list(SECTIONS)
    end = time.monotonic() + 60 * options.minutes - options.spent
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, 0.01 if options.small else options.budget)
    machine, roof = card(device), ceilings(clock, options.small)
    print(json.dumps(machine), json.dumps(roof), flush=True)
    functorch.donated_buffer = False  # a peer's backward pass is run again and again
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    common = {"machine": machine, "ceilings": roof}
    for i, section in enumerate(sections):
        if time.monotonic() + section.seconds > end:
            left = ", ".join(one.name for one in sections[i:])
            print(f"no time is left for {left}", flush=True)
            break
        if run(section, clock, common, options.out / f"{section.name}.json", options.small):
            failed.append(section.name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
