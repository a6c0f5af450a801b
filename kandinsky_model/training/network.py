# SPDX-License-Identifier: Apache-2.0
"""The transformer as training runs it: visual blocks are computed again for their gradients, and
their weights may be streamed from host memory.

Between the forward and the backward pass a block keeps only its input, on the device or in host
memory. Its backward pass computes self-attention again for all tokens at once, and everything else
for some tokens at a time, so that the wide activations never exist for all tokens together.
PyTorch's own checkpointing does not serve here: it computes a whole block again at once, and it has
no moment at which streamed weights could leave the device, since a block needs them from its second
forward pass to the end of its backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..config import DiTConfig
from ..devices.host import Store
from ..devices.offload import LayerStream, streamed_layers
from ..dit.layout import Layout
from ..dit.modulation import VISUAL_SUBLAYERS, Modulations, ModulationTable, triples
from ..dit.transformer import DiffusionTransformer3D


@dataclass(frozen=True)
class Computation:
    """How a forward and backward pass is computed.

    checkpoint: keep only the inputs of blocks and compute the rest again; else keep everything.
    host: keep the inputs in host memory.
    resident: how many visual blocks stay on the device, the others being streamed; None: all.
    tokens: how many are computed at a time, over all samples of the batch.
    """

    checkpoint: bool = True
    host: bool = False
    resident: int | None = None
    tokens: int = 16384


@dataclass(frozen=True, eq=False)
class _Pass:
    """What all blocks of one forward and backward pass share. recorded: a backward will follow."""

    network: TrainNetwork
    layout: Layout
    key_mask: Tensor | None
    recorded: bool


class TrainNetwork:
    """Called as `DiffusionTransformer3D` is, with the same result. `dit` moves to `device`.

    Only frozen weights can be streamed. The parameters of an adapter must be on the device before,
    and stay there.
    """

    def __init__(
        self,
        dit: DiffusionTransformer3D,
        device: torch.device,
        computation: Computation = Computation(),
    ):
        self.dit = dit
        self.device = device
        self.computation = computation
        self.blocks = list(dit.visual_transformer_blocks)
        # Autograd records a function only where some input needs a gradient. Neither the first
        # block's input nor its text does while an adapter trains, so this tensor stands in.
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.inputs: dict[int, Tensor] = {}  # of blocks, in host memory, used again in every pass
        self.streamed: dict[int, int] = {}  # a streamed block's index -> its place in the stream
        self.stream: LayerStream | None = None
        if computation.resident is None or computation.resident >= len(self.blocks):
            dit.to(device)
        else:
            self._stream(computation.resident)

    @property
    def config(self) -> DiTConfig:
        return self.dit.config

    def modulate(self, time: Tensor, pooled: Tensor) -> ModulationTable:
        return self.dit.modulate(time, pooled)

    def _stream(self, resident: int) -> None:
        """Keep `resident` blocks and everything outside the blocks on the device, and let the other
        blocks take turns. Modulations, which run once a pass, stay in host memory."""
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
        """Block i with its weights on the device. Meanwhile the next streamed block is fetched;
        step: 1 where blocks run forwards, -1 where they run backwards."""
        if self.stream is None or i not in self.streamed:
            yield self.blocks[i]
            return
        place = self.streamed[i]
        following = place + step
        self.stream.enter(place, following if 0 <= following < len(self.streamed) else None)
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
        if modulations is None:
            modulations = self.dit.modulate(time[None], pooled).step(0)
        x, context = self.dit.begin(x, text, layout, text_lengths, modulations)
        shared = _Pass(self, layout, context.key_mask, torch.is_grad_enabled())
        for i, modulation in enumerate(modulations.visual):
            vectors = [v for one in modulation for v in (one.shift, one.scale, one.gate)]
            x = _Block.apply(self.anchor, shared, i, x, context.text, *vectors)
        return self.dit.finish(modulations.out.norm(x), layout)

    def parts(self, x: Tensor) -> list[slice]:
        """The tokens of x [B, S, C], in parts that are computed one after another."""
        size = max(1, self.computation.tokens // x.shape[0])
        return [slice(start, start + size) for start in range(0, x.shape[1], size)]

    def keep(self, i: int, x: Tensor) -> Tensor:
        """x, the input of block i, or with `host` its copy in host memory."""
        if not self.computation.host:
            return x
        if i not in self.inputs or self.inputs[i].shape != x.shape:
            pinned = self.device.type == "cuda"
            self.inputs[i] = torch.empty(x.shape, dtype=x.dtype, pin_memory=pinned)
        return self.inputs[i].copy_(x, non_blocking=True)


class _Block(torch.autograd.Function):
    """A visual block, from x [B, S, C] to the next x, with the backward pass described above.

    vectors: of its modulation, shift, scale and gate of each sub-layer.
    """

    @staticmethod
    def forward(ctx, anchor, shared, i, x, text, *vectors):
        network = shared.network
        ctx.shared = shared
        ctx.i = i
        if shared.recorded:
            ctx.save_for_backward(network.keep(i, x), text, *vectors)
        modulation = triples(iter(vectors), VISUAL_SUBLAYERS)
        out = torch.empty_like(x)
        with network.placed(i, 1) as block:
            attended = block.self_attention.attend(modulation[0].norm(x), shared.layout)
            keys = block.cross_attention.read(text, shared.key_mask)
            for part in network.parts(x):
                out[:, part] = block.after_attention_without_norm(
                    x[:, part], attended[:, part], keys, modulation
                )
        return out

    @staticmethod
    def backward(ctx, grad):
        shared = ctx.shared
        network = shared.network
        saved = [tensor.to(network.device, non_blocking=True) for tensor in ctx.saved_tensors]
        leaves = [
            tensor.detach().requires_grad_(needed)
            for tensor, needed in zip(saved, ctx.needs_input_grad[3:], strict=True)
        ]
        x, text, *vectors = leaves
        modulation = triples(iter(vectors), VISUAL_SUBLAYERS)
        with network.placed(ctx.i, -1) as block, torch.enable_grad():
            attended = block.self_attention.attend(modulation[0].norm(x), shared.layout)
            keys = block.cross_attention.read(text, shared.key_mask)

            # Everything behind self-attention, part by part. Each part is a graph of its own that
            # ends at these leaves; `through` collects the gradient of `attended`, `direct` that of
            # x along the residual path.
            read = replace(keys, key=_leaf(keys.key), value=_leaf(keys.value))
            through = torch.empty_like(attended)
            direct = torch.empty_like(x)
            for part in network.parts(x):
                own = _leaf(x[:, part])
                seen = _leaf(attended[:, part])
                out = block.after_attention_without_norm(own, seen, read, modulation)
                if out.requires_grad:
                    out.backward(grad[:, part])
                through[:, part] = _gradient(seen)
                direct[:, part] = _gradient(own)

            # Then self-attention, and the keys and values that were read from the text.
            pairs = (
                (attended, through),
                (keys.key, _gradient(read.key)),
                (keys.value, _gradient(read.value)),
            )
            roots = [(root, gradient) for root, gradient in pairs if root.requires_grad]
            if roots:
                torch.autograd.backward(*map(list, zip(*roots, strict=True)))
        if x.requires_grad:
            x.grad = direct if x.grad is None else x.grad.add_(direct)
        return None, None, None, *(leaf.grad for leaf in leaves)


def _leaf(x: Tensor) -> Tensor:
    """The same numbers as a leaf of the graph, which gets a gradient where x needs one."""
    return x.detach().requires_grad_(x.requires_grad)


def _gradient(x: Tensor) -> Tensor | float:
    return 0.0 if x.grad is None else x.grad
