# SPDX-License-Identifier: Apache-2.0
"""One clock for every figure we publish: providers take turns, medians with their spread, and the
machine's record."""

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

WARM_UP_S = 0.3
NOISY = 0.05  # a spread above this share of the median is marked in every table


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one provider over its runs."""

    median_ms: float
    low_ms: float  # 20th percentile
    high_ms: float  # 80th percentile
    runs: int

    @property
    def spread(self) -> float:
        return (self.high_ms - self.low_ms) / self.median_ms

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY

    def record(self) -> dict:
        return {
            "median_ms": round(self.median_ms, 4),
            "low_ms": round(self.low_ms, 4),
            "high_ms": round(self.high_ms, 4),
            "runs": self.runs,
            "noisy": self.noisy,
        }


def keep_memory() -> None:
    """Make glibc keep what is freed: else whoever allocates next pays for its page faults, and the
    clock blames the arithmetic."""
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
    """Runs until WARM_UP_S have passed, once at least; returns the last duration."""
    deadline = time.perf_counter() + WARM_UP_S
    last = _timed(call)
    while time.perf_counter() + last < deadline:
        last = _timed(call)
    return last


def measure(
    providers: dict[str, Callable], budget_s: float = 2.0, most: int = 60
) -> dict[str, Timing]:
    """Runs the providers in turn, so that a drift of the machine meets all of them alike.

    Each runs for about ``budget_s`` seconds: at least 3 and at most ``most`` times.
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


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", "..", ":!results"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed.strip() else "")


def machine() -> dict:
    """What one must know to compare a figure with another one."""
    extension = _library.extension
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "simd": extension.simd() if extension else "none",
        "compiler": extension.build_info()["compiler"] if extension else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
    }


def roofs() -> dict[str, float]:
    """What this machine can do at best: copying 28 MiB, read and written, and fp32 matrix
    products."""
    source, target, square = torch.randn(7 << 20), torch.randn(7 << 20), torch.randn(2048, 2048)
    timings = measure(
        {"copy": lambda: target.copy_(source), "matmul": lambda: square @ square}, budget_s=1.0
    )
    moved = 2 * source.numel() * source.element_size() / 1e6
    return {
        "copy_gb_s": round(moved / timings["copy"].median_ms, 2),
        "matmul_gflop_s": round(2 * 2048**3 / 1e6 / timings["matmul"].median_ms, 1),
    }
