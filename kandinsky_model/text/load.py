# SPDX-License-Identifier: Apache-2.0
"""Loads the text encoders that a checkpoint names."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoints.locate import Sources


def load_text(sources: Sources, dtype: torch.dtype, cache: bool) -> nn.Module:
    """The text encoder of a model: a module with `encode(prompts, kind, images) -> Conditioning`.

    sources: with the folder of the bundled model's encoder, or with those of Qwen2.5-VL and CLIP.
    dtype: of Qwen's weights. cache: whether embeddings are kept on disk.
    """
    if sources.text_encoder_2 is None and sources.text_encoder is not None:
        from .tiny import TinyTextEncoder

        return TinyTextEncoder.load(sources.text_encoder)
    from .qwen_clip import QwenClipEncoder

    return QwenClipEncoder.load(sources, dtype, cache=cache)
