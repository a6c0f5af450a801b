# SPDX-License-Identifier: Apache-2.0
"""diffusers' transformer as an oracle: its two faults that hide what is compared are taken out."""

import inspect
import sys
import textwrap

import pytest
import torch


def dense_mask(block_lists):
    """In place of `nablaT_v2`, which is block_lists: its lists as a mask [B, H, S, S], which
    uncompiled attention does not ignore."""
    block_lists = getattr(block_lists, "stock", block_lists)

    def mask_of(query, key, sta, thr):
        lists = block_lists(query, key, sta, thr=thr)
        counts = lists.full_kv_num_blocks
        indices = lists.full_kv_indices.long()
        kept = torch.arange(indices.shape[-1]) < counts[..., None]
        mask = torch.zeros_like(kept).scatter(-1, indices, kept)
        return mask.repeat_interleave(64, -1).repeat_interleave(64, -2)

    mask_of.stock = block_lists
    return mask_of


def without_cast(processor):
    """The `__call__` of their attention processor without its cast of rotated queries and keys to
    bf16."""
    if not processor.__call__.__code__.co_filename.endswith(".py"):  # it is without it already
        return processor.__call__
    source = inspect.getsource(processor.__call__)
    assert source.count(".to(torch.bfloat16)") == 1
    scope = {}
    exec(
        textwrap.dedent(source.replace(".to(torch.bfloat16)", "")),
        sys.modules[processor.__module__].__dict__,
        scope,
    )
    return scope["__call__"]


def diffusers_of(dit, stripped, monkeypatch):
    """diffusers' transformer with the weights of ours and NABLA's block lists honoured; stripped:
    `without_cast`."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    monkeypatch.setattr(module, "nablaT_v2", dense_mask(module.nablaT_v2))
    if stripped:
        monkeypatch.setattr(
            module.Kandinsky5AttnProcessor, "__call__", without_cast(module.Kandinsky5AttnProcessor)
        )
    config = {
        key: getattr(dit.config, key)
        for key in dit.config.__dataclass_fields__
        if key != "instruct_type"
    }
    model = module.Kandinsky5Transformer3DModel(**config).eval()
    model.load_state_dict(dit.state_dict())
    return model
