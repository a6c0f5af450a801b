# SPDX-License-Identifier: Apache-2.0
"""The norms and their gradients against PyTorch, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kandinsky_kernels as ops
from kandinsky_model.config import LITE_DIT, PRO_DIT, NablaConfig
from kandinsky_model.dit.layout import make_layout
from tests.peers import gated_add_norm_peer, modulated_norm_peer, norm_rope_per_token
from tests.support.backward import derived

from .attention import lazily
from .card import Clock, Size, compile_once, ratios


def norms(clock: Clock, size: Size, roof: dict) -> Iterator[dict]:
    """Norms against the plain expression, eager and compiled; achieved GB/s over the copy's."""
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
        yield {
            "op": name,
            "size": size.name,
            "ms": times,
            "floor_ms": moved / 1e6 / roof["copy_gb_s"],
            "of_copy": moved / 1e6 / times["ours"] / roof["copy_gb_s"],
            **ratios(times),
        }


def norm_gradients(clock: Clock, size: Size, roof: dict) -> Iterator[dict]:
    """The backward passes of the norms against those of the plain expressions, eager and compiled;
    achieved GB/s over the copy's."""
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
        yield {
            "op": f"{name}_backward",
            "size": size.name,
            "ms": times,
            "floor_ms": moved / 1e6 / roof["copy_gb_s"],
            "of_copy": moved / 1e6 / times["ours"] / roof["copy_gb_s"],
            **ratios(times),
        }
