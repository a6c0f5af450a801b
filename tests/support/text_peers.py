# SPDX-License-Identifier: Apache-2.0
"""The way of transformers and diffusers with the same tiny encoders, and a picture to show them."""

from inspect import signature

import torch
from torch import nn

from kandinsky_model.text.vision import Preprocessor

PICTURE_SIZE = (130, 206)  # halved and rounded: 2 x 4 tokens


def picture(height=PICTURE_SIZE[0], width=PICTURE_SIZE[1], seed=0):
    """uint8 [3, H, W] in which every part is another."""
    noise = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(noise, (height, width), mode="bilinear")[0] * 255).byte()


def pil(image):
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).numpy())


def image_processor(**settings):
    """transformers' own, in the form that does without torchvision."""
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil as kind,
        )
    except ImportError:
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
            Qwen2VLImageProcessor as kind,
        )
    return kind(
        **{"min_pixels": Preprocessor.min_pixels, "max_pixels": Preprocessor.max_pixels, **settings}
    )


class Processor:
    """What the pipelines of diffusers take for a Qwen2.5-VL processor, whose own needs
    torchvision."""

    def __init__(self, qwen, tokenizer):
        self.tokenizer, self.image_token_id = tokenizer, qwen.config.image_token_id
        # transformers >= 5
        self.tells_types = "mm_token_type_ids" in signature(qwen.forward).parameters

    def __call__(self, text, images=None, videos=None, **options):
        from transformers import BatchFeature

        seen = {}
        if images is not None:
            seen = dict(image_processor()(images=images, return_tensors="pt"))
            text = [
                line.replace("<|image_pad|>", "<|image_pad|>" * int(grid.prod() // 4))
                for line, grid in zip(text, seen["image_grid_thw"], strict=True)
            ]
        tokens = self.tokenizer(text, **options)
        if images is not None and self.tells_types:
            seen["mm_token_type_ids"] = (tokens["input_ids"] == self.image_token_id).int()
        return BatchFeature({**tokens, **seen})

    def decode(self, *args, **options):
        return self.tokenizer.decode(*args, **options)


def reference_pipeline(parts, name, template, crop):
    """diffusers' pipeline around the same networks, with our template and crop."""
    import diffusers

    pipe = getattr(diffusers, name)(
        None, None, parts[0], Processor(*parts[:2]), parts[2], parts[3], None
    )
    pipe.prompt_template, pipe.prompt_template_encode_start_idx = template, crop
    return pipe
