# SPDX-License-Identifier: Apache-2.0
"""The clock behind every published timing of a CPU.

The implementations that are compared are called providers. They take turns, the median of each is
reported with its spread, and the machine is recorded beside the figures.
"""

import ctypes
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kandinsky_kernels import _library
from kandinsky_model.devices.available import cpu_name

WARM_UP_S = 0.3  # seconds that each provider runs before it is timed
NOISY = 0.05  # every table marks a timing whose spread exceeds this share of its median


@dataclass(frozen=True)
class Timing:
    """Milliseconds that one provider took, over all its runs."""

    median_ms: float
    low_ms: float  # 20th percentile
    high_ms: float  # 80th percentile
    runs: int

    @property
    def spread(self) -> float:
        """The distance between the two percentiles, as a share of the median."""
        return (self.high_ms - self.low_ms) / self.median_ms

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY

    def record(self) -> dict:
        """The timing as a result file holds it."""
        return {
            "median_ms": round(self.median_ms, 4),
            "low_ms": round(self.low_ms, 4),
            "high_ms": round(self.high_ms, 4),
            "runs": self.runs,
            "noisy": self.noisy,
        }


def keep_memory() -> None:
    """Make glibc keep memory that is freed, instead of giving it back to the system.

    Otherwise the next allocation would pay for page faults, and the clock would count them as
    arithmetic. Does nothing where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


def _timed(call: Callable) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _warm_up(call: Callable) -> float:
    """Calls until WARM_UP_S have passed, at least once; returns the seconds of the last call."""
    deadline = time.perf_counter() + WARM_UP_S
    last = _timed(call)
    while time.perf_counter() + last < deadline:
        last = _timed(call)
    return last


def measure(
    providers: dict[str, Callable], budget_s: float = 2.0, most: int = 60
) -> dict[str, Timing]:
    """Time the providers in turns, so that a drift of the machine affects all of them alike.

    Each provider runs for about ``budget_s`` seconds: at least 3 and at most ``most`` times.
    """
    rounds = {
        name: min(most, max(3, int(budget_s / _warm_up(call)))) for name, call in providers.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(max(rounds.values())):
        for name, call in providers.items():
            if turn < rounds[name]:
                seconds[name].append(_timed(call))
    result = {}
    for name, values in seconds.items():
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        result[name] = Timing(
            1e3 * statistics.median(values), 1e3 * fifths[0], 1e3 * fifths[-1], len(values)
        )
    return result


def commit() -> str:
    """The commit of this checkout, marked if files beside the results differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} with changes" if changed else head


def machine() -> dict:
    """What must be known of the machine before its figures can be compared with others."""
    extension = _library.extension
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": extension.simd() if extension else "none",
        "compiler": _library.build_info()["compiler"] if extension else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
    }


def roofs() -> dict[str, float]:
    """The best this machine can do now: copying 28 MiB, and an fp32 product of 2048 x 2048.

    A copy counts the bytes read and the bytes written.
    """
    source = torch.randn(7 << 20)
    target = torch.empty_like(source)
    square = torch.randn(2048, 2048)
    timings = measure(
        {"copy": lambda: target.copy_(source), "matmul": lambda: square @ square}, budget_s=1.0
    )
    megabytes = 2 * source.numel() * source.element_size() / 1e6
    megaflops = 2 * 2048**3 / 1e6
    return {
        "copy_gb_s": round(megabytes / timings["copy"].median_ms, 2),
        "matmul_gflop_s": round(megaflops / timings["matmul"].median_ms, 1),
    }
