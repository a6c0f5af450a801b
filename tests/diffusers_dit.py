# SPDX-License-Identifier: Apache-2.0
"""diffusers' transformer as an oracle: its two faults that hide what is compared are taken out."""
import inspect
import textwrap

import pytest
import torch


def diffusers_of(dit, stripped, monkeypatch):
    """diffusers' transformer with the weights of ours and NABLA's block lists honoured: uncompiled flex attention ignores them, a dense
    mask does not. stripped: without the hard-coded bf16 cast of rotated queries and keys.
    """
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    block_lists = getattr(module.nablaT_v2, "stock", module.nablaT_v2)

    def dense_mask(query, key, sta, thr):
        lists = block_lists(query, key, sta, thr=thr)
        counts, indices = lists.full_kv_num_blocks, lists.full_kv_indices.long()
        kept = torch.arange(indices.shape[-1]) < counts[..., None]
        mask = torch.zeros_like(kept).scatter(-1, indices, kept)
        return mask.repeat_interleave(64, -1).repeat_interleave(64, -2)

    dense_mask.stock = block_lists
    monkeypatch.setattr(module, "nablaT_v2", dense_mask)
    if stripped:
        source = inspect.getsource(module.Kandinsky5AttnProcessor.__call__)
        assert source.count(".to(torch.bfloat16)") == 1
        scope = {}
        exec(textwrap.dedent(source.replace(".to(torch.bfloat16)", "")), module.__dict__, scope)
        monkeypatch.setattr(module.Kandinsky5AttnProcessor, "__call__", scope["__call__"])
    config = {key: getattr(dit.config, key) for key in dit.config.__dataclass_fields__ if key != "instruct_type"}
    model = module.Kandinsky5Transformer3DModel(**config).eval()
    model.load_state_dict(dit.state_dict())
    return model
