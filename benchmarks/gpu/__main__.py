# SPDX-License-Identifier: Apache-2.0
"""The operators and one transformer pass at full size on a GPU, beside what one would run instead,
all in one process.

``python -m benchmarks.gpu --out gate.json [--only norms,selection,...]``; `benchmarks/gpu/gate.sh`
builds and tests first. ``--small`` runs everything at toy sizes on any device: a test that the
benchmark itself works, not a measurement.
"""

import argparse
import itertools
import json
import math
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import kandinsky_kernels as ops
from kandinsky_kernels import _library, reference, tuning
from kandinsky_kernels.launch import vae as launch_vae
from kandinsky_model.config import LITE_DIT, PRO_DIT, NablaConfig
from kandinsky_model.dit.geometry import block_offsets, local_window
from kandinsky_model.dit.layout import make_layout
from tests.cases import gated_add_norm_peer, head_first, modulated_norm_peer, norm_rope_per_token
from tests.support.backward import derived

from ..door import door
from .card import (
    FULL,
    SMALL,
    Clock,
    Size,
    block_mask,
    card,
    ceilings,
    compile_once,
    masks,
    peak_memory,
    ratios,
    show,
)
from .memory import memory
from .networks import transformer, vae

WINDOW = (11, 3, 3)
# channels in and out, Y, X, taps, and how many frames of it a decode of 10 s at 512 x 768 computes
CONVOLUTIONS = (
    (16, 512, 64, 96, (3, 3, 3), 61),
    (512, 512, 64, 96, (3, 3, 3), 610),
    (512, 512, 64, 96, (3, 2, 2), 244),
    (512, 512, 128, 192, (3, 3, 3), 366),
    (512, 512, 128, 192, (2, 2, 2), 484),
    (512, 256, 256, 384, (3, 3, 3), 121),
    (256, 256, 256, 384, (3, 3, 3), 605),
    (256, 256, 256, 384, (2, 2, 2), 964),
    (256, 128, 512, 768, (3, 3, 3), 241),
    (128, 128, 512, 768, (3, 3, 3), 1205),
    (128, 3, 512, 768, (3, 3, 3), 241),
)
TOY_CONVOLUTIONS = ((16, 16, 3, 5, (3, 3, 3), 2), (16, 3, 3, 5, (2, 2, 2), 1))


def norms(clock: Clock, size: Size, roof: dict) -> list[dict]:
    """Norms against the plain expression, eager and compiled; achieved GB/s over the copy's."""
    rows = []
    S, C, make = size.grid.tokens, size.H * size.D, dict(device=clock.device, dtype=torch.bfloat16)
    x, branch = torch.randn(1, S, C, **make), torch.randn(1, S, C, **make)
    gate, scale, shift = (torch.randn(1, C, device=clock.device) for _ in range(3))
    heads, weight = x.view(1, S, size.H, size.D), torch.rand(size.D, device=clock.device)
    layout = make_layout(
        PRO_DIT if size.D == 128 else LITE_DIT,
        size.grid,
        (1.0, 2.0, 2.0),
        NablaConfig(0.9),
        clock.device,
    )
    angles = torch.rand(S, size.D // 2, device=clock.device)
    whole = ops.Rotary.per_token(angles.cos(), angles.sin())  # what the peers read
    tensor, table = 2 * S * C, 12 * S
    for name, moved, ours, peer in (
        (
            "modulated_norm",
            2 * tensor,
            lambda: ops.modulated_norm(x, scale, shift),
            lambda f: f(modulated_norm_peer)(x, scale, shift),
        ),
        (
            "gated_add_norm",
            4 * tensor,
            lambda: ops.gated_add_norm(x, branch, gate, scale, shift),
            lambda f: f(gated_add_norm_peer)(x, branch, gate, scale, shift),
        ),
        (
            "norm_rope",
            2 * tensor + table,
            lambda: ops.norm_rope(heads, weight, layout.rotary),
            lambda f: f(norm_rope_per_token)(heads, weight, whole.cos, whole.sin),
        ),
        (
            "norm_rope_means",
            2 * tensor + table,
            lambda: ops.norm_rope_means(heads, weight, layout.rotary, layout.block_offsets),
            None,
        ),
    ):
        calls = {"ours": ours}
        if peer:
            compiled = compile_once(clock.device)
            calls |= {
                "eager": lambda peer=peer: peer(lambda f: f),
                "compiled": lambda peer=peer, c=compiled: peer(c),
            }
        times = clock.measure(calls)
        rows.append(
            {
                "op": name,
                "size": size.name,
                "ms": times,
                "floor_ms": moved / 1e6 / roof["copy_gb_s"],
                "of_copy": moved / 1e6 / times["ours"] / roof["copy_gb_s"],
                **ratios(times),
            }
        )
        show(rows[-1])
    return rows


def published_selection(
    query_means: Tensor, key_means: Tensor, keep_mass: float, near: Tensor
) -> tuple[Tensor, Tensor]:
    """The published recipe: sort the map, sum, compare, sort back, unite with the window, sort into
    lists. (counts, lists) int32."""
    share = (query_means @ key_means.transpose(-1, -2) / math.sqrt(query_means.shape[-1])).softmax(
        -1
    )
    values, order = share.sort(-1)
    kept = (values.cumsum(-1) >= 1 - keep_mass).gather(-1, order.argsort(-1)) | near
    return kept.sum(-1, dtype=torch.int32), kept.int().argsort(-1, descending=True).int()


def selection(clock: Clock, size: Size, _: dict) -> list[dict]:
    """select_blocks against the published recipe on the same means, and the scratch memory it
    takes."""
    rows = []
    N, make = size.grid.blocks, dict(device=clock.device)
    means = [2 * torch.randn(1, size.H, N, size.D, **make) / size.D**0.25 for _ in range(2)]
    near = local_window(size.grid.tiles, WINDOW).to(clock.device)
    call = lambda: ops.select_blocks(*means, 0.9, size.grid.tiles, WINDOW)  # noqa: E731
    chosen, peak = peak_memory(call, clock.device)
    narrow = [x.bfloat16() for x in means]
    calls = {"ours": call, "published": lambda: published_selection(*narrow, 0.9, near)}
    if compiled := _library.compiled("select_blocks"):  # whether or not `ours` is it already
        calls["cuda c++"] = lambda: compiled(
            *means, 0.9, list(size.grid.tiles), list(WINDOW), "all"
        )
    times = clock.measure(calls)
    rows.append(
        {
            "op": "select_blocks",
            "size": size.name,
            "ms": times,
            "density": ops.selection_density(chosen, N),
            "peak_mib": peak,
            **ratios(times),
        }
    )
    show(rows[-1])
    return rows


def flex_call(compiled: Callable, heads: tuple[Tensor, ...], selection: Tensor, N: int) -> Callable:
    """FlexAttention over the same blocks, all declared full, as published; `compiled` once for all
    masks; head-first tensors."""
    from torch.nn.attention.flex_attention import flex_attention

    mask, flex = block_mask(selection, N), compiled(flex_attention)
    return lambda: flex(*heads, block_mask=mask)


def normed_heads(size: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor, float]:
    """query, key, value in bf16 as the network has them, queries and keys of RMS 1, and the bound
    of their logits."""
    q, k, v = (torch.randn(1, size.grid.tokens, size.H, size.D, device=device) for _ in range(3))
    q, k = (F.rms_norm(x, x.shape[-1:]) for x in (q, k))
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), 1.01 * math.sqrt(size.D)


def attention(clock: Clock, size: Size, roof: dict) -> list[dict]:
    """block_sparse_attention against compiled FlexAttention on the same masks, and dense attention;
    useful FLOPs only."""
    rows = []
    N, offsets = size.grid.blocks, block_offsets(size.grid).to(clock.device)
    q, k, v, bound = normed_heads(size, clock.device)
    heads, compiled = head_first(q, k, v), compile_once(clock.device)
    dense = clock.measure({"dense": lambda: F.scaled_dot_product_attention(*heads)})
    for density in (0.1, 0.2):
        for family, chosen in masks(size, density, clock.device).items():
            real = ops.selection_density(chosen, N)
            off = max(spot_check(q, k, v, chosen, offsets, limit) for limit in (bound, math.inf))
            times = (
                clock.measure(
                    {
                        "ours": lambda chosen=chosen: ops.block_sparse_attention(
                            q, k, v, chosen, offsets, logit_bound=bound
                        ),
                        "ours, running maximum": lambda chosen=chosen: ops.block_sparse_attention(
                            q, k, v, chosen, offsets
                        ),
                        "flex": flex_call(compiled, heads, chosen, N),
                    }
                )
                | dense
            )
            tflop = 4 * 64 * 64 * size.D * real * N * N * size.H / 1e12
            rows.append(
                {
                    "op": "block_sparse_attention",
                    "size": size.name,
                    "mask": family,
                    "density": real,
                    "ms": times,
                    "useful_tflop_s": 1e3 * tflop / times["ours"],
                    "largest_error": off,
                    "floor_ms": 1e3 * tflop / roof["matmul_tflop_s"],
                    **ratios(times),
                }
            )
            show(rows[-1])
    return rows


def gradients(clock: Clock, size: Size, roof: dict) -> list[dict]:
    """The backward pass of block_sparse_attention against compiled FlexAttention's and dense
    attention's; useful FLOPs only."""
    rows, names = [], ("query", "key", "value")
    N, offsets = size.grid.blocks, block_offsets(size.grid).to(clock.device)
    *qkv, bound = normed_heads(size, clock.device)
    grad, compiled = torch.randn_like(qkv[2]), compile_once(clock.device)
    ours, heads = (
        dict(zip((*names, "grad_0"), tensors, strict=True))
        for tensors in ((*qkv, grad), head_first(*qkv, grad))
    )
    dense = clock.measure({"dense": derived(F.scaled_dot_product_attention, names, heads)})
    for family, chosen in masks(size, 0.1, clock.device).items():

        def attend(query, key, value, chosen=chosen):
            return ops.block_sparse_attention(query, key, value, chosen, offsets, logit_bound=bound)

        real, backward = ops.selection_density(chosen, N), derived(attend, names, ours)
        off = gradient_check(backward(), *qkv, grad, chosen, offsets)
        calls = {"ours": backward}
        if clock.device.type == "cuda":  # FlexAttention has no backward pass on a CPU
            flex = lambda query, key, value, chosen=chosen: flex_call(
                compiled, (query, key, value), chosen, N
            )()  # noqa: E731
            calls["flex"] = lazily(lambda flex=flex: derived(flex, names, heads))
        times = clock.measure(calls) | dense
        tflop = 10 * 64 * 64 * size.D * real * N * N * size.H / 1e12
        rows.append(
            {
                "op": "block_sparse_attention_backward",
                "size": size.name,
                "mask": family,
                "density": real,
                "ms": times,
                "useful_tflop_s": 1e3 * tflop / times["ours"],
                "largest_error": off,
                "floor_ms": 1e3 * tflop / roof["matmul_tflop_s"],
                **ratios(times),
            }
        )
        show(rows[-1])
    return rows


def lazily(prepare: Callable) -> Callable:
    """What `prepare` returns, prepared by its first call: a peer that cannot run is found out
    there, and left out."""
    made = []
    return lambda: (made or made.append(prepare()) or made)[0]()


def gradient_check(
    gradients: tuple, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, chosen: Tensor, offsets: Tensor
) -> float:
    """Largest error of the gradients of some random blocks against fp64, over the largest value.
    Raises AssertionError beyond bf16's."""
    out, lse = ops.block_sparse_attention(q, k, v, chosen, offsets, return_lse=True)
    kept, block = (
        ops.unpack_selection(chosen, len(offsets) - 1),
        torch.repeat_interleave(offsets.diff(), output_size=q.shape[1]),
    )
    worst = 0.0
    for _ in range(6):
        head, i = int(torch.randint(q.shape[2], ())), int(torch.randint(len(offsets) - 1, ()))
        tensors = [x[0, :, head].double() for x in (q, k, v, out, grad)]
        own = (block == i).nonzero()[:, 0]
        keys, rows = (kept[0, head].select(dim, i)[block].nonzero()[:, 0] for dim in (0, 1))
        (_, change), (share, change_of_keys) = (
            weights_and_changes(tensors, lse[0, head], *pair) for pair in ((own, keys), (rows, own))
        )
        exact = (
            change @ tensors[1][keys],
            change_of_keys.T @ tensors[0][rows],
            share.T @ tensors[4][rows],
        )
        for gradient, wanted in zip(gradients, exact, strict=True):
            worst = max(
                worst,
                (
                    (gradient[0, own, head] - wanted).abs().max() / (1e-3 + wanted.abs().max())
                ).item(),
            )
    assert worst < 2**-4, f"the gradients of block_sparse_attention are off by {worst}"
    return worst


def weights_and_changes(
    tensors: list[Tensor], lse: Tensor, rows: Tensor, keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Softmax weights and scaled gradients of the logits of rows x keys of one head's q, k, v, out
    and its gradient."""
    q, k, v, out, grad = tensors
    scale = 1 / math.sqrt(q.shape[-1])
    share = (q[rows] @ k[keys].T * scale - lse[rows, None]).exp()
    return share, share * (
        grad[rows] @ v[keys].T - (grad[rows] * out[rows]).sum(-1, keepdim=True)
    ) * scale


def norm_gradients(clock: Clock, size: Size, roof: dict) -> list[dict]:
    """The backward passes of the norms against those of the plain expressions, eager and compiled;
    achieved GB/s over the copy's."""
    rows = []
    S, C, make = size.grid.tokens, size.H * size.D, dict(device=clock.device, dtype=torch.bfloat16)
    x, branch, grad, more = (torch.randn(1, S, C, **make) for _ in range(4))
    vectors = {name: torch.randn(1, C, device=clock.device) for name in ("gate", "scale", "shift")}
    layout = make_layout(
        PRO_DIT if size.D == 128 else LITE_DIT,
        size.grid,
        (1.0, 2.0, 2.0),
        NablaConfig(0.9),
        clock.device,
    )
    angles = torch.rand(S, size.D // 2, device=clock.device)
    heads = {"x": x.view(1, S, size.H, size.D), "weight": torch.rand(size.D, device=clock.device)}
    for name, tensors, ours, peer, inputs in (
        (
            "modulated_norm",
            3,
            ops.modulated_norm,
            modulated_norm_peer,
            {"x": x, "scale": vectors["scale"], "shift": vectors["shift"]},
        ),
        (
            "gated_add_norm",
            6,
            ops.gated_add_norm,
            gated_add_norm_peer,
            {"x": x, "branch": branch, **vectors},
        ),
        (
            "norm_rope",
            3,
            lambda x, weight: ops.norm_rope(x, weight, layout.rotary),
            lambda x, weight: norm_rope_per_token(x, weight, angles.cos(), angles.sin()),
            heads,
        ),
    ):
        names, moved = tuple(inputs), tensors * 2 * S * C
        inputs = (
            inputs
            | {"grad_0": grad.view_as(inputs["x"])}
            | ({"grad_1": more} if "branch" in inputs else {})
        )
        compiled = compile_once(clock.device)(peer)
        times = clock.measure(
            {
                "ours": derived(ours, names, inputs),
                "eager": derived(peer, names, inputs),
                "compiled": lazily(
                    lambda f=compiled, names=names, inputs=inputs: derived(f, names, inputs)
                ),
            }
        )
        rows.append(
            {
                "op": f"{name}_backward",
                "size": size.name,
                "ms": times,
                "floor_ms": moved / 1e6 / roof["copy_gb_s"],
                "of_copy": moved / 1e6 / times["ours"] / roof["copy_gb_s"],
                **ratios(times),
            }
        )
        show(rows[-1])
    return rows


def spot_check(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, offsets: Tensor, bound: float, rows: int = 24
) -> float:
    """Largest error of some random blocks of queries against fp64. Raises AssertionError beyond
    bf16's."""
    out, worst = ops.block_sparse_attention(q, k, v, chosen, offsets, logit_bound=bound), 0.0
    kept, block = (
        ops.unpack_selection(chosen, len(offsets) - 1),
        torch.repeat_interleave(offsets.diff(), output_size=q.shape[1]),
    )
    for _ in range(rows):
        head, i = int(torch.randint(q.shape[2], ())), int(torch.randint(len(offsets) - 1, ()))
        start, stop = offsets[i : i + 2].tolist()
        keys = kept[0, head, i][block].nonzero()[:, 0]
        logits = (
            q[0, start:stop, head].double() @ k[0, keys, head].double().T / math.sqrt(q.shape[-1])
        )
        worst = max(
            worst,
            (logits.softmax(-1) @ v[0, keys, head].double() - out[0, start:stop, head])
            .abs()
            .max()
            .item(),
        )
    assert worst < 2**-5, f"block_sparse_attention is off by {worst}"
    return worst


def together(clock: Clock, size: Size, _: dict) -> list[dict]:
    """From normed and rotated q, k, v to the attention's output: ours against the published recipe,
    with its copies."""
    rows = []
    N, offsets = size.grid.blocks, block_offsets(size.grid).to(clock.device)
    q, k, v, bound = normed_heads(size, clock.device)
    near = local_window(size.grid.tiles, WINDOW).to(clock.device)

    def ours():
        chosen = ops.select_blocks(
            *(ops.block_means(x, offsets) for x in (q, k)), 0.3, size.grid.tiles, WINDOW
        )
        return ops.block_sparse_attention(q, k, v, chosen, offsets, logit_bound=bound)

    def published(q, k, v):
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        heads = head_first(q, k, v)
        means = (x.unflatten(2, (N, 64)).mean(-2) for x in heads[:2])
        counts, lists = published_selection(*means, 0.3, near)
        mask = BlockMask.from_kv_blocks(
            torch.zeros_like(counts), lists, counts, lists, BLOCK_SIZE=64, mask_mod=None
        )
        return flex_attention(*heads, block_mask=mask).transpose(1, 2).contiguous()

    compiled = compile_once(clock.device)(published)
    times = clock.measure({"ours": ours, "published": lambda: compiled(q, k, v)})
    rows.append({"op": "selection and attention", "size": size.name, "ms": times, **ratios(times)})
    show(rows[-1])
    return rows


def launches(clock: Clock, size: Size, roof: dict) -> list[dict]:
    """block_sparse_attention under every launch that could be the better one: what
    `tuning.attention` is to be decided by."""
    rows = []
    offsets = block_offsets(size.grid).to(clock.device)
    q, k, v, bound = normed_heads(size, clock.device)
    chosen, usual = masks(size, 0.15, clock.device)["clustered"], tuning.attention
    for warps, stages, descriptors in itertools.product((4, 8), (1, 2, 3, 4), (False, True)):
        launch = tuning.Launch(warps, stages, descriptors)
        with mock.patch.object(tuning, "attention", lambda *_, launch=launch: launch):
            times = clock.measure(
                {
                    "ours": lambda: ops.block_sparse_attention(
                        q, k, v, chosen, offsets, logit_bound=bound
                    ),
                    "ours, running maximum": lambda: ops.block_sparse_attention(
                        q, k, v, chosen, offsets
                    ),
                }
            )
        usual_one = clock.device.type == "cuda" and launch == usual(
            size.D, q.dtype, torch.cuda.get_device_capability(), True
        )
        rows.append(
            {
                "op": "block_sparse_attention",
                "size": size.name,
                "warps": warps,
                "stages": stages,
                "descriptors": descriptors,
                "usual": usual_one,
                "ms": times,
            }
        )
        show(rows[-1])
    return rows


@torch.no_grad()
def convolutions(clock: Clock, size: Size, roof: dict) -> list[dict]:
    """The decoder's convolutions, a frame at a time as it calls them: our kernel against cuDNN's
    best, and both for all of a decode."""
    if size is FULL[1]:
        return []
    toy, rows = size is not FULL[0], []
    # on a CPU this function is tested only
    ours = launch_vae.launch_conv if clock.device.type == "cuda" else reference.causal_conv3d
    whole = {"ours": 0.0, "cudnn": 0.0}
    for C, N, Y, X, taps, frames in TOY_CONVOLUTIONS if toy else CONVOLUTIONS:
        make, sizes = (
            dict(device=clock.device, dtype=torch.bfloat16),
            [n - 1 + k for n, k in zip((1, Y, X), taps, strict=True)],
        )
        weight = (
            torch.randn(N, C, *taps, **make)
            .div_(math.sqrt(C * math.prod(taps)))
            .to(memory_format=torch.channels_last_3d)
        )
        args = torch.randn(1, *sizes, C, **make), weight, torch.randn(N, **make), (1, 1, 1)
        exact = reference.causal_conv3d(*(x.float() for x in args[:3]), args[3])
        off = (ours(*args).float() - exact).abs().max().item()
        assert off < 2**-7 * exact.abs().max(), f"causal_conv3d is off by {off}"
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            times = clock.measure(
                {
                    "ours": lambda args=args: ours(*args),
                    "cudnn": lambda args=args: reference.causal_conv3d(*args),
                }
            )
        tflop = 2 * Y * X * C * N * math.prod(taps) / 1e12
        rows.append(
            {
                "op": "causal_conv3d",
                "size": f"{C} to {N}, {Y}x{X}, taps {taps}",
                "ms": times,
                "largest_error": off,
                "useful_tflop_s": 1e3 * tflop / times["ours"],
                "floor_ms": 1e3 * tflop / roof["matmul_tflop_s"],
                **ratios(times),
            }
        )
        show(rows[-1])
        whole = {name: ms + frames * times[name] for name, ms in whole.items()}
    rows.append(
        {
            "op": "causal_conv3d",
            "size": "toy" if toy else "10 s, all frames",
            "ms": whole,
            **ratios(whole),
        }
    )
    show(rows[-1])
    return rows


SECTIONS = {
    "norms": norms,
    "selection": selection,
    "attention": attention,
    "together": together,
    "convolutions": convolutions,
    "transformer": transformer,
    "vae": vae,
    "door": door,
    "gradients": gradients,
    "norm_gradients": norm_gradients,
}
MORE = {"launches": launches, "memory": memory}  # run only when named: they take minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="where the JSON goes; rewritten after every section"
    )
    parser.add_argument(
        "--only",
        default=",".join(SECTIONS),
        help=f"sections, comma-separated, in order: {','.join(SECTIONS | MORE)}",
    )
    parser.add_argument("--small", action="store_true", help="toy sizes on any device")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per provider and row")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        parser.error(
            "a CUDA device is required, torch sees none; use --small for toy sizes on the CPU"
        )
    clock = Clock(device, 0.01 if options.small else options.budget)
    roof = ceilings(clock, options.small)
    result = {
        "machine": card(device),
        "ceilings": roof,
        "kernels": ops.kernels(),
        "rows": {},
        "failed": {},
    }
    torch._functorch.config.donated_buffer = False  # a peer's backward pass is run again and again
    print(json.dumps(result["machine"]), json.dumps(roof), flush=True)
    for name in options.only.split(","):
        print(f"== {name}", flush=True)
        try:
            for size in SMALL if options.small else FULL:
                result["rows"][name] = result["rows"].get(name, []) + (SECTIONS | MORE)[name](
                    clock, size, roof
                )
        except Exception as error:  # the other sections' figures must not be lost
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"
        result |= {"kernels_after": ops.kernels(), "first_call_s": clock.first_call_s}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if result["failed"]:
        raise SystemExit(f"failed: {result['failed']}")


if __name__ == "__main__":
    main()
