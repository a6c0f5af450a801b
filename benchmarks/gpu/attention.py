# SPDX-License-Identifier: Apache-2.0
"""Block selection and block-sparse attention, and their gradients, against FlexAttention and dense
attention, on a GPU."""

from __future__ import annotations

import itertools
import math
import subprocess
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import kandinsky_kernels as ops
from kandinsky_kernels import _library, tuning
from kandinsky_model.dit.geometry import block_offsets, local_window
from tests.peers import head_first
from tests.support.backward import derived

from . import expected, machine
from .card import (
    Clock,
    Size,
    block_mask,
    compile_once,
    masks,
    modelled_card,
    peak_memory,
    ratios,
)

WINDOW = (11, 3, 3)


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


def selection(clock: Clock, size: Size, _: dict) -> Iterator[dict]:
    """select_blocks against the published recipe on the same means, and the scratch memory it
    takes."""
    N, make = size.grid.blocks, dict(device=clock.device)
    means = [2 * torch.randn(1, size.H, N, size.D, **make) / size.D**0.25 for _ in range(2)]
    near = local_window(size.grid.tiles, WINDOW).to(clock.device)
    call = lambda: ops.select_blocks(*means, 0.9, size.grid.tiles, WINDOW)  # noqa: E731
    chosen, peak = peak_memory(call, clock.device)
    narrow = [x.bfloat16() for x in means]
    calls = {"ours": call, "published": lambda: published_selection(*narrow, 0.9, near)}
    compiled = _library.compiled("select_blocks")
    if compiled and clock.device.type == "cuda":  # whether or not `ours` is it already
        calls["cuda c++"] = lambda: compiled(
            *means, 0.9, list(size.grid.tiles), list(WINDOW), "all"
        )
    times = clock.measure(calls)
    yield {
        "op": "select_blocks",
        "size": size.name,
        "ms": times,
        "density": ops.selection_density(chosen, N),
        "peak_mib": peak,
        **ratios(times),
    }


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


def modelled(clock: Clock, size: Size, roof: dict, kind: str) -> dict[str, float]:
    """TFLOP/s that `expected` allows this card at most, with tiles that are there at once and with
    tiles out of L2 at the rate that was measured; nothing of a card that it does not know, or where
    the model cannot run, which must not cost what is measured."""
    card = modelled_card(clock.device)
    if card is None:
        return {}
    try:
        speed = expected.speeds(card, size.D, roof.get("l2_bytes", machine.L2_BYTES))[kind]
    except subprocess.CalledProcessError as error:
        print(f"  the model cannot run: {error.stderr[-500:]}", flush=True)
        return {}
    return {"modelled_tflop_s": speed["alone"], "modelled_l2_tflop_s": speed["l2"]}


def attention(clock: Clock, size: Size, roof: dict) -> Iterator[dict]:
    """block_sparse_attention against compiled FlexAttention on the same masks, and dense attention;
    useful FLOPs only."""
    N, offsets = size.grid.blocks, block_offsets(size.grid).to(clock.device)
    q, k, v, bound = normed_heads(size, clock.device)
    heads, compiled = head_first(q, k, v), compile_once(clock.device)
    dense = clock.measure({"dense": lambda: F.scaled_dot_product_attention(*heads)})
    model = modelled(clock, size, roof, "forward")
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
            yield {
                "op": "block_sparse_attention",
                "size": size.name,
                "mask": family,
                "density": real,
                "ms": times,
                "useful_tflop_s": 1e3 * tflop / times["ours"],
                "largest_error": off,
                "floor_ms": 1e3 * tflop / roof["matmul_tflop_s"],
                **ratios(times),
                **model,
            }


def gradients(clock: Clock, size: Size, roof: dict) -> Iterator[dict]:
    """The backward pass of block_sparse_attention against compiled FlexAttention's and dense
    attention's; useful FLOPs only."""
    names = ("query", "key", "value")
    N, offsets = size.grid.blocks, block_offsets(size.grid).to(clock.device)
    *qkv, bound = normed_heads(size, clock.device)
    grad, compiled = torch.randn_like(qkv[2]), compile_once(clock.device)
    ours, heads = (
        dict(zip((*names, "grad_0"), tensors, strict=True))
        for tensors in ((*qkv, grad), head_first(*qkv, grad))
    )
    dense = clock.measure({"dense": derived(F.scaled_dot_product_attention, names, heads)})
    model = modelled(clock, size, roof, "gradients")
    for family, chosen in masks(size, 0.1, clock.device).items():

        def attend(query, key, value, chosen=chosen):
            return ops.block_sparse_attention(query, key, value, chosen, offsets, logit_bound=bound)

        real, backward = ops.selection_density(chosen, N), derived(attend, names, ours)
        off = gradient_check(backward(), *qkv, grad, chosen, offsets)
        calls = {"ours": backward}
        if clock.device.type == "cuda":  # FlexAttention has no backward pass on a CPU

            def flex(query, key, value, chosen=chosen):
                return flex_call(compiled, (query, key, value), chosen, N)()

            calls["flex"] = lazily(lambda flex=flex: derived(flex, names, heads))
        times = clock.measure(calls) | dense
        tflop = 10 * 64 * 64 * size.D * real * N * N * size.H / 1e12
        yield {
            "op": "block_sparse_attention_backward",
            "size": size.name,
            "mask": family,
            "density": real,
            "ms": times,
            "useful_tflop_s": 1e3 * tflop / times["ours"],
            "largest_error": off,
            "floor_ms": 1e3 * tflop / roof["matmul_tflop_s"],
            **ratios(times),
            **model,
        }


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


def together(clock: Clock, size: Size, _: dict) -> Iterator[dict]:
    """From normed and rotated q, k, v to the attention's output: ours against the published recipe,
    with its copies."""
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
    yield {"op": "selection and attention", "size": size.name, "ms": times, **ratios(times)}


def launches(clock: Clock, size: Size, roof: dict) -> Iterator[dict]:
    """block_sparse_attention under every launch that could be the better one: what
    `tuning.attention` is to be decided by."""
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
        yield {
            "op": "block_sparse_attention",
            "size": size.name,
            "warps": warps,
            "stages": stages,
            "descriptors": descriptors,
            "usual": usual_one,
            "ms": times,
        }
