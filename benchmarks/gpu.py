# SPDX-License-Identifier: Apache-2.0
"""The operators and one transformer pass at full size on a GPU, beside what one would run instead, all in one process.

``python -m benchmarks.gpu --out gate.json [--only norms,selection,...]``; `benchmarks/gpu_gate.sh` builds and tests first.
``--small`` runs everything at toy sizes on any device: a test that the benchmark itself works, not a measurement.
"""
import argparse
import json
import math
import platform
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import kandinsky_kernels as ops
from kandinsky_kernels import _library
from kandinsky_model import dit as dit_module
from kandinsky_model.config import LITE_DIT, PRO_DIT, NablaConfig
from kandinsky_model.dit import DiffusionTransformer3D, make_plan
from kandinsky_model.geometry import Grid, block_offsets, local_window
from tests.cases import gated_add_norm_peer, head_first, modulated_norm_peer, norm_rope_peer

WINDOW = (11, 3, 3)


@dataclass(frozen=True)
class Size:
    """One workload: the grid of tokens, heads and head dim."""

    name: str
    grid: Grid
    H: int
    D: int


FULL = (Size("lite 10 s", Grid(61, 32, 48), LITE_DIT.num_heads, LITE_DIT.head_dim),
        Size("pro 10 s", Grid(61, 32, 48), PRO_DIT.num_heads, PRO_DIT.head_dim))
SMALL = (Size("toy", Grid(3, 16, 16), 2, 64),)


class Clock:
    """Medians of device time by events; on a CPU of wall time."""

    def __init__(self, device: torch.device, budget_s: float):
        self.device, self.budget_s = device, budget_s

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
        """Median milliseconds of each, in turns after two warm-up calls; a provider that fails is left out and named on stdout."""
        able = {}
        for name, call in calls.items():
            try:
                call()
                able[name] = self.once(call)
            except Exception as error:
                print(f"  {name} cannot run: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}", flush=True)
        rounds = {name: max(3, min(50, int(1e3 * self.budget_s / max(ms, 1e-3)))) for name, ms in able.items()}
        times: dict[str, list[float]] = {name: [] for name in able}
        for turn in range(max(rounds.values(), default=0)):
            for name in able:
                if turn < rounds[name]:
                    times[name].append(self.once(calls[name]))
        return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def card(device: torch.device) -> dict:
    """What one must know to compare a figure with another one."""
    record = {"torch": torch.__version__, "python": platform.python_version(), "device": str(device)}
    if device.type == "cuda":
        import triton

        query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total,mig.mode.current"
        answer = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True)
        record |= {"card": torch.cuda.get_device_name(device), "capability": torch.cuda.get_device_capability(device),
                   "cuda": torch.version.cuda, "triton": triton.__version__, "nvidia_smi": {query: answer.stdout.strip()}}
    return record


def ceilings(clock: Clock, small: bool) -> dict:
    """The rates this card reaches at best: a copy in GB/s, read and written, and a bf16 matrix product in TFLOP/s."""
    elements, side = (1 << 20, 256) if small else (1 << 29, 8192)
    source = torch.randn(elements, device=clock.device, dtype=torch.bfloat16)
    target, a = torch.empty_like(source), torch.randn(side, side, device=clock.device, dtype=torch.bfloat16)
    times = clock.measure({"copy": lambda: target.copy_(source), "matmul": lambda: a @ a})
    return {"copy_gb_s": 4 * elements / 1e6 / times["copy"], "matmul_tflop_s": 2 * side**3 / 1e9 / times["matmul"]}


def norms(clock: Clock, size: Size, roof: dict) -> list[dict]:
    """Norms against the plain expression, eager and compiled; achieved GB/s over the copy's."""
    rows = []
    S, C, make = size.grid.tokens, size.H * size.D, dict(device=clock.device, dtype=torch.bfloat16)
    x, branch = torch.randn(1, S, C, **make), torch.randn(1, S, C, **make)
    gate, scale, shift = (torch.randn(1, C, device=clock.device) for _ in range(3))
    heads, weight = x.view(1, S, size.H, size.D), torch.rand(size.D, device=clock.device)
    angles, offsets = torch.rand(S, size.D // 2, device=clock.device), block_offsets(size.grid).to(clock.device)
    cos, sin = angles.cos(), angles.sin()
    tensor, table = 2 * S * C, 4 * S * size.D
    for name, moved, ours, peer in (
        ("modulated_norm", 2 * tensor, lambda: ops.modulated_norm(x, scale, shift), lambda f: f(modulated_norm_peer)(x, scale, shift)),
        ("gated_add_norm", 4 * tensor, lambda: ops.gated_add_norm(x, branch, gate, scale, shift),
         lambda f: f(gated_add_norm_peer)(x, branch, gate, scale, shift)),
        ("norm_rope", 2 * tensor + table, lambda: ops.norm_rope(heads, weight, cos, sin),
         lambda f: f(norm_rope_peer)(heads, weight, cos, sin)),
        ("norm_rope_means", 2 * tensor + table, lambda: ops.norm_rope_means(heads, weight, cos, sin, offsets), None),
    ):
        calls = {"ours": ours}
        if peer:
            torch._dynamo.reset()
            compiled = cached_compile()
            calls |= {"eager": lambda peer=peer: peer(lambda f: f), "compiled": lambda peer=peer, c=compiled: peer(c)}
        times = clock.measure(calls)
        rows.append({"op": name, "size": size.name, "ms": times, "floor_ms": moved / 1e6 / roof["copy_gb_s"],
                     "of_copy": moved / 1e6 / times["ours"] / roof["copy_gb_s"]})
        show(rows[-1])
    return rows


def cached_compile() -> Callable:
    """torch.compile that compiles each function once."""
    made = {}
    return lambda f: made.setdefault(f, torch.compile(f, dynamic=False))


def published_selection(query_means: Tensor, key_means: Tensor, keep_mass: float, near: Tensor) -> tuple[Tensor, Tensor]:
    """The published recipe: sort the map, sum, compare, sort back, unite with the window, sort into lists. (counts, lists) int32."""
    share = (query_means @ key_means.transpose(-1, -2) / math.sqrt(query_means.shape[-1])).softmax(-1)
    values, order = share.sort(-1)
    kept = (values.cumsum(-1) >= 1 - keep_mass).gather(-1, order.argsort(-1)) | near
    return kept.sum(-1, dtype=torch.int32), kept.int().argsort(-1, descending=True).int()


def selection(clock: Clock, size: Size, _: dict) -> list[dict]:
    """select_blocks against the published recipe on the same means, and the scratch memory it takes."""
    rows = []
    N, make = size.grid.blocks, dict(device=clock.device)
    means = [2 * torch.randn(1, size.H, N, size.D, **make) / size.D**0.25 for _ in range(2)]
    near = local_window(size.grid.tiles, WINDOW).to(clock.device)
    call = lambda: ops.select_blocks(*means, 0.9, size.grid.tiles, WINDOW)  # noqa: E731
    chosen, peak = peak_memory(call, clock.device)
    narrow = [x.bfloat16() for x in means]
    calls = {"ours": call, "published": lambda: published_selection(*narrow, 0.9, near)}
    if compiled := _library.compiled("select_blocks"):  # whether or not `ours` is it already
        calls["cuda c++"] = lambda: compiled(*means, 0.9, list(size.grid.tiles), list(WINDOW), "all")
    times = clock.measure(calls)
    rows.append({"op": "select_blocks", "size": size.name, "ms": times, "density": ops.selection_density(chosen, N), "peak_mib": peak,
                 **ratios(times)})
    show(rows[-1])
    return rows


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
    """Packed selections of three families: random; one local window of about this density; rows in clusters with skewed counts."""
    N, tiles = size.grid.blocks, size.grid.tiles
    wanted = max(1, round(density * N))
    windows = [(t, y, x) for t in range(1, 2 * tiles[0], 2) for y in (1, 3, 5, 7) for x in (1, 3, 5, 7)]
    near = min((local_window(tiles, w) for w in windows[:: max(1, len(windows) // 64)]), key=lambda m: abs(m.float().mean() - density))
    families = {"random": [], "local": [], "clustered": []}
    for _ in range(size.H):
        rank = torch.rand(N, N, device=device).argsort(-1).argsort(-1)
        families["random"].append(ops.pack_selection(rank < wanted))
        families["local"].append(ops.pack_selection(near.to(device)))
        score = torch.randn(16, N, device=device)[torch.randint(16, (N,), device=device)] + 0.3 * torch.randn(N, N, device=device)
        count = torch.randn(N, device=device).mul(0.6).exp()
        count = (count / count.mean() * wanted).round().clamp(1, N)
        families["clustered"].append(ops.pack_selection(score.argsort(-1).argsort(-1) < count[:, None]))
    return {name: torch.stack(heads)[None] for name, heads in families.items()}


def flex_call(q: Tensor, k: Tensor, v: Tensor, selection: Tensor, N: int) -> Callable:
    """Compiled FlexAttention over the same blocks, all declared full, as published; head-first tensors."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    kept = ops.unpack_selection(selection, N)
    counts, lists = kept.sum(-1, dtype=torch.int32), kept.int().argsort(-1, descending=True).int()
    mask = BlockMask.from_kv_blocks(torch.zeros_like(counts), lists, counts, lists, BLOCK_SIZE=64, mask_mod=None)
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask)


def attention(clock: Clock, size: Size, roof: dict) -> list[dict]:
    """block_sparse_attention against compiled FlexAttention on the same masks, and dense attention; useful FLOPs only."""
    rows = []
    S, N, offsets = size.grid.tokens, size.grid.blocks, block_offsets(size.grid).to(clock.device)
    q, k, v = (torch.randn(1, S, size.H, size.D, device=clock.device, dtype=torch.bfloat16) for _ in range(3))
    heads = head_first(q, k, v)
    dense = clock.measure({"dense": lambda: F.scaled_dot_product_attention(*heads)})
    for density in (0.1, 0.2):
        for family, chosen in masks(size, density, clock.device).items():
            real = ops.selection_density(chosen, N)
            off = spot_check(q, k, v, chosen, offsets)
            times = clock.measure({
                "ours": lambda chosen=chosen: ops.block_sparse_attention(q, k, v, chosen, offsets),
                "flex": flex_call(*heads, chosen, N)}) | dense
            tflop = 4 * 64 * 64 * size.D * real * N * N * size.H / 1e12
            rows.append({"op": "block_sparse_attention", "size": size.name, "mask": family, "density": real, "ms": times,
                         "useful_tflop_s": 1e3 * tflop / times["ours"], "largest_error": off,
                         "floor_ms": 1e3 * tflop / roof["matmul_tflop_s"], **ratios(times)})
            show(rows[-1])
    return rows


def spot_check(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, offsets: Tensor, rows: int = 24) -> float:
    """Largest error of some random blocks of queries against fp64. Raises AssertionError beyond bf16's."""
    out, worst = ops.block_sparse_attention(q, k, v, chosen, offsets), 0.0
    kept, block = ops.unpack_selection(chosen, len(offsets) - 1), torch.repeat_interleave(offsets.diff(), output_size=q.shape[1])
    for _ in range(rows):
        head, i = int(torch.randint(q.shape[2], ())), int(torch.randint(len(offsets) - 1, ()))
        start, stop = offsets[i : i + 2].tolist()
        keys = kept[0, head, i][block].nonzero()[:, 0]
        logits = q[0, start:stop, head].double() @ k[0, keys, head].double().T / math.sqrt(q.shape[-1])
        worst = max(worst, (logits.softmax(-1) @ v[0, keys, head].double() - out[0, start:stop, head]).abs().max().item())
    assert worst < 2**-5, f"block_sparse_attention is off by {worst}"
    return worst


def together(clock: Clock, size: Size, _: dict) -> list[dict]:
    """From normed and rotated q, k, v to the attention's output: ours against the published recipe, with its copies."""
    rows = []
    S, N, offsets = size.grid.tokens, size.grid.blocks, block_offsets(size.grid).to(clock.device)
    q, k, v = (torch.randn(1, S, size.H, size.D, device=clock.device, dtype=torch.bfloat16) for _ in range(3))
    near = local_window(size.grid.tiles, WINDOW).to(clock.device)

    def ours():
        means = (ops.block_means(x, offsets) for x in (q, k))
        return ops.block_sparse_attention(q, k, v, ops.select_blocks(*means, 0.3, size.grid.tiles, WINDOW), offsets)

    def published(q, k, v):
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        heads = head_first(q, k, v)
        means = (x.unflatten(2, (N, 64)).mean(-2) for x in heads[:2])
        counts, lists = published_selection(*means, 0.3, near)
        mask = BlockMask.from_kv_blocks(torch.zeros_like(counts), lists, counts, lists, BLOCK_SIZE=64, mask_mod=None)
        return flex_attention(*heads, block_mask=mask).transpose(1, 2).contiguous()

    torch._dynamo.reset()
    compiled = torch.compile(published, dynamic=False)
    times = clock.measure({"ours": ours, "published": lambda: compiled(q, k, v)})
    rows.append({"op": "selection and attention", "size": size.name, "ms": times, **ratios(times)})
    show(rows[-1])
    return rows


@torch.no_grad()
def transformer(clock: Clock, size: Size, _: dict) -> list[dict]:
    """One pass of the whole network at Lite's 10 s size (random weights), with 15 % of the blocks kept."""
    if size is FULL[1]:
        return []
    toy = size is not FULL[0]
    config = LITE_DIT if not toy else type(LITE_DIT)(model_dim=128, ff_dim=256, num_visual_blocks=2, visual_cond=True)
    with torch.device("meta"):
        dit = DiffusionTransformer3D(config)
    dit = dit.to_empty(device=clock.device).to(torch.bfloat16 if not toy else torch.float32)
    for parameter in dit.parameters():
        parameter.normal_(0, 0.02)
    plan = make_plan(config, size.grid, (1.0, 2.0, 2.0), NablaConfig(0.9), clock.device)
    grid, make = size.grid, dict(device=clock.device)
    x = torch.randn(1, grid.T, 2 * grid.Y, 2 * grid.X, config.in_channels, **make)
    inputs = (x, torch.randn(1, 256, config.in_text_dim, **make), torch.randn(1, config.in_text_dim2, **make),
              torch.tensor([700.0], **make), plan)
    real = Size(size.name, grid, config.num_heads, config.head_dim)
    chosen = masks(real, 0.15, clock.device)["clustered"]
    with mock.patch.object(dit_module, "select_blocks", lambda *_: chosen):
        _, peak = peak_memory(lambda: dit(*inputs), clock.device)
        times = clock.measure({"ours, 15 % kept": lambda: dit(*inputs)})
    row = {"op": "transformer", "size": size.name, "ms": times, "peak_mib": peak, "density": ops.selection_density(chosen, grid.blocks)}
    show(row)
    return [row]


def ratios(times: dict[str, float]) -> dict[str, float]:
    """How many times faster ours is than each of the others."""
    return {f"over_{name}": ms / times["ours"] for name, ms in times.items() if name != "ours"} if "ours" in times else {}


def show(row: dict) -> None:
    cells = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items() if name != "ms"]
    print("  ".join([*cells, *(f"{name} {ms:.4g} ms" for name, ms in row["ms"].items())]), flush=True)


SECTIONS = {"norms": norms, "selection": selection, "attention": attention, "together": together, "transformer": transformer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes; rewritten after every section")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, comma-separated, in order: {','.join(SECTIONS)}")
    parser.add_argument("--small", action="store_true", help="toy sizes on any device")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per provider and row")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        parser.error("a CUDA device is required, torch sees none; use --small for toy sizes on the CPU")
    clock = Clock(device, 0.01 if options.small else options.budget)
    roof = ceilings(clock, options.small)
    result = {"machine": card(device), "ceilings": roof, "kernels": ops.kernels(), "rows": {}, "failed": {}}
    print(json.dumps(result["machine"]), json.dumps(roof), flush=True)
    for name in options.only.split(","):
        print(f"== {name}", flush=True)
        try:
            for size in SMALL if options.small else FULL:
                result["rows"][name] = result["rows"].get(name, []) + SECTIONS[name](clock, size, roof)
        except Exception as error:  # the other sections' figures must not be lost
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"
        result["kernels_after"] = ops.kernels()
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if result["failed"]:
        raise SystemExit(f"failed: {result['failed']}")


if __name__ == "__main__":
    main()
