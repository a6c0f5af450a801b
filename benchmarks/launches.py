# SPDX-License-Identifier: Apache-2.0
"""The kernels that one visual block with NABLA launches on a GPU, counted without one:
``python -m benchmarks.launches [preset]``.

The block runs on the meta device, where tensors have shapes but no values. Every operator of
PyTorch that computes counts as one launch. For ours their launchers run, whose Triton kernels are
counters meanwhile. Bytes are those of all inputs and outputs, each read or written once; they say
little about products and attention.
"""

import argparse
from collections import Counter
from contextlib import ExitStack
from unittest import mock

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kandinsky_kernels import _library, _ops, cards
from kandinsky_kernels.triton import nabla, norm, selection
from kandinsky_model.config import PRESETS, Preset
from kandinsky_model.dit.attention import Attention
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import Chunks, make_layout
from kandinsky_model.dit.modulation import Modulations, ShiftScale, triples
from kandinsky_model.dit.transformer import BlockContext, VisualBlock

TEXT_TOKENS = 256
VECTORS = 9  # of a visual block
# what launches nothing, beside views
FREE = {"empty", "new_empty", "empty_like", "_unsafe_view", "_reshape_alias"}
WAYS = {"16,384 tokens at a time": Chunks(), "all tokens at once": Chunks(tokens=1 << 31)}


def bytes_of(*values) -> int:
    tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    return sum(x.numel() * x.itemsize for x in tensors)


class Launches(TorchDispatchMode):
    """Counts launches, and their bytes, by the name of what is launched."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()

    def note(self, name: str, moved: int) -> None:
        self.counts[name] += 1
        self.moved[name] += moved

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        space, name = func._schema.name.split("::")
        if space == _ops.ops.name:
            with self:
                return _library.launchers[name].launch(*args)
        out = func(*args, **(kwargs or {}))
        returns = [one.alias_info for one in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in returns)
        on_gpu = any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves((args, out)))
        if on_gpu and not view and name not in FREE:
            written_only = bytes_of(args[0]) if name in ("copy_", "fill_") else 0
            self.note(name, bytes_of(args, kwargs, out) - written_only)
        return out

    def attention(self, query, key, value, **_):
        """Stands for PyTorch's dense attention, which is one kernel on a GPU."""
        out = query.transpose(1, 2).new_empty(query.transpose(1, 2).shape).transpose(1, 2)
        self.note("scaled_dot_product_attention", bytes_of(query, key, value, out))
        return out


class Counting:
    """Stands for a Triton kernel."""

    def __init__(self, name: str, launches: Launches):
        self.name = name
        self.launches = launches

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **constants):
        self.launches.note(f"{self.name} (Triton)", bytes_of(args))


def count(preset: Preset, chunks: Chunks) -> Launches:
    """The launches of one visual block of the preset's transformer at its first size, in bf16."""
    config = preset.dit
    height, width = preset.sizes[0]
    grid = Grid((preset.frames - 1) // 4 + 1, height // 16, width // 16)
    layout = make_layout(
        config, grid, preset.scale_factor, preset.nabla, device="meta", chunks=chunks
    )
    launches = Launches()
    with torch.device("meta"):
        block = VisualBlock(config).bfloat16().eval()
        projection = block.self_attention.to_query
        block.self_attention._joint = (projection.empty(3 * config.model_dim).bfloat16(),)
        x = torch.empty(1, grid.tokens, config.model_dim, dtype=torch.bfloat16)
        text = torch.empty(1, TEXT_TOKENS, config.model_dim, dtype=torch.bfloat16)
        vectors = torch.empty(VECTORS + 2, 1, config.model_dim)
    shift, scale, *rest = vectors
    modulation = triples(iter(rest), VECTORS // 3)
    following = ShiftScale(shift, scale)
    context = BlockContext(text, None, layout, Modulations([], [modulation], following))
    with torch.no_grad(), ExitStack() as stack:
        # Projections without values have no addresses by which they could be parts of a joint one.
        joint = mock.patch.object(Attention, "_is_joint", lambda attention: bool(attention._joint))
        stack.enter_context(joint)
        for module in (nabla, norm, selection):
            for name in vars(module):
                if name in _library.launchers or name == "list_blocks":
                    counting = Counting(name, launches)
                    stack.enter_context(mock.patch.object(module, name, counting))
        stack.enter_context(mock.patch.object(cards, "INTERPRETED", (9, 0)))
        stack.enter_context(
            mock.patch.object(F, "scaled_dot_product_attention", launches.attention)
        )
        stack.enter_context(launches)
        block(x, torch.empty_like(x), modulation, following, context)
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("preset", nargs="?", default="t2v-lite-sft-10s")
    preset = PRESETS[parser.parse_args().preset]
    for name, chunks in WAYS.items():
        launches = count(preset, chunks)
        print(f"\n{name}: {launches.counts.total()} launches\n\n| kernel | launches | GB |")
        print("|---|---:|---:|")
        for kernel, many in launches.counts.most_common():
            print(f"| {kernel} | {many} | {launches.moved[kernel] / 1e9:.2f} |")


if __name__ == "__main__":
    main()
