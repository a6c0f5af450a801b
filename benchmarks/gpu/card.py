# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmarks share: workloads, a clock of device time, the card's record and ceilings,
selections of three families."""

import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import kandinsky_kernels as ops
from kandinsky_model.config import LITE_DIT, PRO_DIT
from kandinsky_model.dit.geometry import Grid, local_window

from ..clock import commit
from . import machine


@dataclass(frozen=True)
class Size:
    """One workload: the grid of tokens, heads and head dim."""

    name: str
    grid: Grid
    H: int
    D: int


FULL = (
    Size("lite 10 s", Grid(61, 32, 48), LITE_DIT.num_heads, LITE_DIT.head_dim),
    Size("pro 10 s", Grid(61, 32, 48), PRO_DIT.num_heads, PRO_DIT.head_dim),
)
SMALL = (Size("toy", Grid(3, 16, 16), 2, 64),)


class Clock:
    """Medians of device time by events; on a CPU of wall time."""

    def __init__(self, device: torch.device, budget_s: float):
        self.device, self.budget_s = device, budget_s
        # the longest of ours: compilation, and the trial against the reference
        self.first_call_s = 0.0

    def once(self, call: Callable) -> float:
        """Milliseconds of one call."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def measure(self, calls: dict[str, Callable]) -> dict[str, float]:
        """Median milliseconds of each, in turns after two warm-up calls; a provider that fails is
        left out and named on stdout."""
        able = {}
        for name, call in calls.items():
            try:
                start = time.perf_counter()
                call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                if name == "ours":
                    self.first_call_s = max(self.first_call_s, time.perf_counter() - start)
                able[name] = self.once(call)
            except Exception as error:
                print(
                    f"  {name} cannot run: {type(error).__name__}: "
                    f"{str(error).splitlines()[0][:200] if str(error) else ''}",
                    flush=True,
                )
        # minutes of a lent card are few
        least = {name: 3 if ms < 2000 else 1 for name, ms in able.items()}
        rounds = {
            name: max(least[name], min(50, int(1e3 * self.budget_s / max(ms, 1e-3))))
            for name, ms in able.items()
        }
        times: dict[str, list[float]] = {name: [] for name in able}
        for turn in range(max(rounds.values(), default=0)):
            for name in able:
                if turn < rounds[name]:
                    times[name].append(self.once(calls[name]))
        return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def card(device: torch.device) -> dict:
    """What one must know to compare a figure with another one."""
    record = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "commit": commit(),
    }
    if device.type == "cuda":
        import triton

        query = (
            "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total,"
            "mig.mode.current"
        )
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
        )
        record |= {
            "card": torch.cuda.get_device_name(device),
            "capability": torch.cuda.get_device_capability(device),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "nvidia_smi": {query: answer.stdout.strip()},
        }
    return record


def ceilings(clock: Clock, small: bool) -> dict:
    """The rates this card reaches at best: a copy in GB/s, read and written, and a bf16 matrix
    product in TFLOP/s."""
    elements, side = (1 << 20, 256) if small else (1 << 29, 8192)
    source = torch.randn(elements, device=clock.device, dtype=torch.bfloat16)
    target, a = (
        torch.empty_like(source),
        torch.randn(side, side, device=clock.device, dtype=torch.bfloat16),
    )
    times = clock.measure({"copy": lambda: target.copy_(source), "matmul": lambda: a @ a})
    return {
        "copy_gb_s": 4 * elements / 1e6 / times["copy"],
        "matmul_tflop_s": 2 * side**3 / 1e9 / times["matmul"],
    }


def modelled_card(device: torch.device) -> machine.Card | None:
    """The card of `machine` with the device's architecture; an H100 where there is no GPU."""
    on_gpu = device.type == "cuda"
    major, minor = torch.cuda.get_device_capability(device) if on_gpu else (9, 0)
    return next((card for card in machine.CARDS if card.sm == 10 * major + minor), None)


def compile_once(device: torch.device) -> Callable:
    """torch.compile that compiles each function once; on a CPU, where only the benchmark itself is
    tried, nothing at all."""
    torch._dynamo.reset()
    made = {}
    return lambda f: (
        made.setdefault(f, torch.compile(f, dynamic=False)) if device.type == "cuda" else f
    )


def peak_memory(call: Callable, device: torch.device):
    """(result, MiB allocated at most beyond what was there)."""
    if device.type != "cuda":
        return call(), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return result, round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def masks(size: Size, density: float, device: torch.device) -> dict[str, Tensor]:
    """Packed selections of three families: random; one local window of about this density; rows in
    clusters with skewed counts."""
    N, tiles = size.grid.blocks, size.grid.tiles
    wanted = max(1, round(density * N))
    windows = [
        (t, y, x) for t in range(1, 2 * tiles[0], 2) for y in (1, 3, 5, 7) for x in (1, 3, 5, 7)
    ]
    near = min(
        (local_window(tiles, w) for w in windows[:: max(1, len(windows) // 64)]),
        key=lambda m: abs(m.float().mean() - density),
    )
    families = {"random": [], "local": [], "clustered": []}
    for _ in range(size.H):
        rank = torch.rand(N, N, device=device).argsort(-1).argsort(-1)
        families["random"].append(ops.pack_selection(rank < wanted))
        families["local"].append(ops.pack_selection(near.to(device)))
        score = torch.randn(16, N, device=device)[
            torch.randint(16, (N,), device=device)
        ] + 0.3 * torch.randn(N, N, device=device)
        count = torch.randn(N, device=device).mul(0.6).exp()
        count = (count / count.mean() * wanted).round().clamp(1, N)
        families["clustered"].append(
            ops.pack_selection(score.argsort(-1).argsort(-1) < count[:, None])
        )
    return {name: torch.stack(heads)[None] for name, heads in families.items()}


def ratios(times: dict[str, float]) -> dict[str, float]:
    """How many times faster ours is than each of the others."""
    return (
        {f"over_{name}": ms / times["ours"] for name, ms in times.items() if name != "ours"}
        if "ours" in times
        else {}
    )


def show(row: dict) -> None:
    cells = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name != "ms"
    ]
    times = [f"{name} {ms:.4g} ms" for name, ms in row.get("ms", {}).items()]
    print("  ".join([*cells, *times]), flush=True)


def block_mask(selection: Tensor, N: int):
    """FlexAttention's form of a packed selection: all blocks declared full, as published. The empty
    partial list is a tensor of its own."""
    from torch.nn.attention.flex_attention import BlockMask

    kept = ops.unpack_selection(selection, N)
    counts, lists = kept.sum(-1, dtype=torch.int32), kept.int().argsort(-1, descending=True).int()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(lists),
        counts,
        lists,
        BLOCK_SIZE=64,
        mask_mod=None,
    )
