# SPDX-License-Identifier: Apache-2.0
"""The transformer as training runs it: visual blocks are computed again for their gradients, and
their weights may be streamed.

Between the forward and the backward pass a block keeps nothing but its input, on the device or in
host memory. Its backward computes self-attention again for all tokens, and all else for some tokens
at a time, so that the wide activations never exist together. While it lasts the block's weights
stay where they are: that is why this is no job for PyTorch's checkpointing, which would have let
them go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..devices.host import Store
from ..devices.offload import LayerStream, streamed_layers
from ..dit.layout import Layout
from ..dit.modulation import VISUAL_SUBLAYERS, Modulations, ModulationTable, triples
from ..dit.transformer import DiffusionTransformer3D


@dataclass(frozen=True)
class Computation:
    """How a pass is computed. checkpoint: blocks are computed again, else everything is kept. host:
    what they begin with waits in host memory. resident: how many visual blocks stay on the device,
    the others being streamed; None: all. tokens: at a time, of all samples together."""

    checkpoint: bool = True
    host: bool = False
    resident: int | None = None
    tokens: int = 16384


class TrainNetwork:
    """Called as the transformer is, with the same result: see `DiffusionTransformer3D.forward`. The
    transformer moves to `device`.

    Streamed weights are frozen ones. Adapters that are trained are on the device before and stay
    there.
    """

    def __init__(
        self,
        dit: DiffusionTransformer3D,
        device: torch.device,
        computation: Computation = Computation(),
    ):
        self.dit, self.device, self.computation = dit, device, computation
        self.blocks = list(dit.visual_transformer_blocks)
        # lets autograd record blocks whose inputs need no gradient
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.inputs: dict[int, Tensor] = {}  # of blocks, in host memory
        self.streamed, self.stream = {}, None
        if computation.resident is None or computation.resident >= len(self.blocks):
            dit.to(device)
        else:
            self._stream(computation.resident)

    @property
    def config(self):
        return self.dit.config

    def modulate(self, time: Tensor, pooled: Tensor) -> ModulationTable:
        return self.dit.modulate(time, pooled)

    def _stream(self, resident: int) -> None:
        """Bring to the device what stays there, and let the other blocks take turns. Modulations
        are computed in host memory."""
        pinned = self.device.type == "cuda"
        chosen = streamed_layers(len(self.blocks), resident)
        self.streamed = {i: place for place, i in enumerate(chosen)}
        layers = [self.blocks[i] for i in chosen]
        stay = Store([self.dit], [*layers, *self.dit.once], pinned=False)
        stay.refresh()
        self.there = torch.empty(stay.size, dtype=torch.uint8, device=self.device)
        stay.copy_to(self.there)
        stay.enter(self.there)
        stores = [Store([layer], self.dit.once, pinned) for layer in layers]
        for store in stores:
            store.refresh()
        self.stream = LayerStream((), stores, self.device)

    @contextmanager
    def placed(self, i: int, step: int) -> Iterator[nn.Module]:
        """Block i with its weights on the device; meanwhile the next streamed one in the direction
        of `step` is fetched."""
        if i not in self.streamed:
            yield self.blocks[i]
            return
        place = self.streamed[i]
        self.stream.enter(place, place + step if 0 <= place + step < len(self.streamed) else None)
        try:
            yield self.blocks[i]
        finally:
            self.stream.leave()

    def __call__(
        self,
        x: Tensor,
        text: Tensor,
        pooled: Tensor,
        time: Tensor,
        layout: Layout,
        text_lengths: Tensor | None = None,
        modulations: Modulations | None = None,
    ) -> Tensor:
        if not self.computation.checkpoint:
            return self.dit(x, text, pooled, time, layout, text_lengths, modulations)
        modulations = (
            self.dit.modulate(time[None], pooled).step(0) if modulations is None else modulations
        )
        x, context = self.dit.begin(x, text, layout, text_lengths, modulations)
        shared = (layout, context.key_mask, torch.is_grad_enabled())
        for i, modulation in enumerate(modulations.visual):
            vectors = [v for one in modulation for v in (one.shift, one.scale, one.gate)]
            x = _Block.apply(self.anchor, self, i, shared, x, context.text, *vectors)
        return self.dit.finish(modulations.out.norm(x), layout)

    def parts(self, x: Tensor) -> list[slice]:
        """The tokens of x [B, S, C] that are done together."""
        size = max(1, self.computation.tokens // x.shape[0])
        return [slice(start, start + size) for start in range(0, x.shape[1], size)]

    def keep(self, i: int, x: Tensor) -> Tensor:
        """x, or with `host` a copy of it in memory that is used for this block again and again."""
        if not self.computation.host:
            return x
        if i not in self.inputs or self.inputs[i].shape != x.shape:
            self.inputs[i] = torch.empty(
                x.shape, dtype=x.dtype, pin_memory=self.device.type == "cuda"
            )
        return self.inputs[i].copy_(x, non_blocking=True)


class _Block(torch.autograd.Function):
    """A visual block from x [B, S, C] to the next x."""

    @staticmethod
    def forward(ctx, anchor, network, i, context, x, text, *vectors):
        ctx.network, ctx.i, ctx.context = network, i, context
        layout, key_mask, recorded = context
        if recorded:
            ctx.save_for_backward(network.keep(i, x), text, *vectors)
        modulation = triples(iter(vectors), VISUAL_SUBLAYERS)
        out = torch.empty_like(x)
        with network.placed(i, 1) as block:
            attended = block.self_attention.attend(modulation[0].norm(x), layout)
            keys = block.cross_attention.read(text, key_mask)
            for part in network.parts(x):
                out[:, part] = block.after_attention_without_norm(
                    x[:, part], attended[:, part], keys, modulation
                )
        return out

    @staticmethod
    def backward(ctx, grad):
        network, (layout, key_mask, _) = ctx.network, ctx.context
        saved = [tensor.to(network.device, non_blocking=True) for tensor in ctx.saved_tensors]
        x, text, *vectors = leaves = [
            x.detach().requires_grad_(need)
            for x, need in zip(saved, ctx.needs_input_grad[4:], strict=True)
        ]
        modulation = triples(iter(vectors), VISUAL_SUBLAYERS)
        with network.placed(ctx.i, -1) as block, torch.enable_grad():
            attended = block.self_attention.attend(modulation[0].norm(x), layout)
            keys = block.cross_attention.read(text, key_mask)
            read = replace(keys, key=_leaf(keys.key), value=_leaf(keys.value))
            through, direct = torch.empty_like(attended), torch.empty_like(x)
            for part in network.parts(x):
                own, seen = _leaf(x[:, part]), _leaf(attended[:, part])
                out = block.after_attention_without_norm(own, seen, read, modulation)
                if out.requires_grad:
                    out.backward(grad[:, part])
                through[:, part], direct[:, part] = _gradient(seen), _gradient(own)
            pairs = (
                (attended, through),
                (keys.key, _gradient(read.key)),
                (keys.value, _gradient(read.value)),
            )
            roots = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
            if roots:
                torch.autograd.backward(*map(list, zip(*roots, strict=True)))
        if x.requires_grad:
            x.grad = direct if x.grad is None else x.grad.add_(direct)
        return None, None, None, None, *(leaf.grad for leaf in leaves)


def _leaf(x: Tensor) -> Tensor:
    """The same numbers as the beginning of a graph of its own, for a gradient where x has one."""
    return x.detach().requires_grad_(x.requires_grad)


def _gradient(x: Tensor) -> Tensor | float:
    return 0.0 if x.grad is None else x.grad
