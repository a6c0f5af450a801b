# SPDX-License-Identifier: Apache-2.0
"""Loads the text encoders that a checkpoint names."""

from __future__ import annotations

import torch
from torch import nn

from ..checkpoints.locate import Sources


def load_text(
    sources: Sources, dtype: torch.dtype, cache: bool, quantize: str | None = None
) -> nn.Module:
    """The text encoder of a model: a module with `encode(prompts, kind, images) -> Conditioning`.

    sources: with the folder of the bundled model's encoder, or with the places of Qwen2.5-VL and
    CLIP. dtype: of Qwen's weights. cache: whether embeddings are kept on disk. quantize: one of
    `TEXT_QUANTIZATIONS`, for Qwen. Raises ValueError where that is asked of another encoder.
    """
    if sources.text_encoder_2 is None and sources.text_encoder is not None:
        from .tiny import TinyTextEncoder

        if quantize is not None:
            raise ValueError(
                f"text_quantize is for Qwen2.5-VL, but {sources.name} reads prompts with a small "
                f"encoder of its own, got {quantize!r}; leave it out"
            )
        return TinyTextEncoder.load(sources.text_encoder)
    from .qwen_clip import QwenClipEncoder

    return QwenClipEncoder.load(sources, dtype, cache=cache, quantize=quantize)
