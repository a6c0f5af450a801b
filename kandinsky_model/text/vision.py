# SPDX-License-Identifier: Apache-2.0
"""How Qwen2.5-VL reads a picture: from pixels to patches, and where the picture's tokens stand in
the sequence."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"  # the place of a picture in a text
PLACEHOLDER = "<|image_pad|>"
CONFIG_NAMES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Preprocessor:
    """How pictures become patches.

    Field names and default values are those of the published `preprocessor_config.json`.
    min_pixels, max_pixels: a picture whose area lies between them keeps its size but for rounding.
    merge_size: that many patches in each direction become one token.
    """

    min_pixels: int = 3136
    max_pixels: int = 12845056
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def read(cls, *folders: Path) -> Preprocessor:
        """The configuration in the first of these folders that has one, or the published values.
        Raises ValueError where it is no JSON."""
        for path in (folder / name for folder in folders for name in CONFIG_NAMES):
            if not path.is_file():
                continue
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(
                    f"{path} must be valid JSON, got {error}; download it again"
                ) from error
            return cls._of(values.get("image_processor", values))
        return cls()

    @classmethod
    def _of(cls, values: dict) -> Preprocessor:
        size = values.get("size") or {}  # transformers >= 5 writes the two areas there
        areas = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
        values = areas | values
        known: dict[str, Any] = {}
        for field in fields(cls):
            value = values.get(field.name)
            if value is not None:
                known[field.name] = tuple(value) if isinstance(value, list) else value
        return cls(**known)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The size that a picture is resized to: both sides are whole tokens, the shape is nearly
        the same, and the area lies within the bounds."""
        step = self.patch_size * self.merge_size
        near_height = round(height / step) * step
        near_width = round(width / step) * step
        area = near_height * near_width
        if area > self.max_pixels:
            factor = math.sqrt(height * width / self.max_pixels)
            small_height = math.floor(height / factor / step) * step
            small_width = math.floor(width / factor / step) * step
            return max(step, small_height), max(step, small_width)
        if area < self.min_pixels:
            factor = math.sqrt(self.min_pixels / (height * width))
            large_height = math.ceil(height * factor / step) * step
            large_width = math.ceil(width * factor / step) * step
            return large_height, large_width
        return near_height, near_width

    def patches(self, image: Tensor, shrink: int = 1) -> tuple[Tensor, int, int]:
        """The patches of a picture, fp32 [rows * columns, 3 * temporal * patch^2], and how many
        rows and columns of patches there are.

        image: uint8 [3, H, W], which is first made `shrink` times smaller. The patches of one token
        follow each other. A still picture is the same at all times of a patch.
        """
        import numpy
        from PIL import Image

        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        if shrink > 1:
            smaller = (max(1, picture.width // shrink), max(1, picture.height // shrink))
            picture = picture.resize(smaller, Image.Resampling.BICUBIC)
        height, width = self.size(picture.height, picture.width)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 255  # [3, H, W]
        mean = torch.tensor(self.image_mean)[:, None, None]
        std = torch.tensor(self.image_std)[:, None, None]
        pixels = (pixels - mean) / std
        patch = self.patch_size
        merge = self.merge_size
        rows = height // patch
        columns = width // patch
        split = pixels.reshape(
            3,
            rows // merge,
            merge,
            patch,
            columns // merge,
            merge,
            patch,
        )
        # [rows / m, columns / m, m, m, 3, patch, patch]
        split = split.permute(1, 4, 2, 5, 0, 3, 6)
        # [rows / m, columns / m, m, m, 3, times, patch, patch]
        split = split.unsqueeze(5).repeat_interleave(self.temporal_patch_size, 5)
        return split.reshape(rows * columns, -1), rows, columns


def positions(before: int, rows: int = 0, columns: int = 0, after: int = 0) -> Tensor:
    """Positions of `before` tokens of text, those of a picture, and `after` tokens of text.

    int64 [4, 1, L]: the place in the sequence, then time, row and column for the rotary embedding.
    A token of text has the same time, row and column. The tokens of a picture, `rows` times
    `columns`, share their time and spread over rows and columns. Text goes on behind the largest of
    these.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    # [3, rows * columns]
    picture = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + before
    text_before = torch.arange(before).expand(3, -1)
    text_after = torch.arange(after).expand(3, -1) + before + max(rows, columns)
    rotary = torch.cat([text_before, picture, text_after], dim=1)  # [3, L]
    sequence = torch.arange(rotary.shape[1])[None]  # [1, L]
    return torch.cat([sequence, rotary])[:, None]


def look_up(language: nn.Module, tokens: list[int]) -> Tensor:
    """Embeddings [1, L, Dt] of tokens, on the device of the language model's other weights. The
    table of embeddings may have stayed on the CPU."""
    table = cast(nn.Embedding, language.embed_tokens)
    norm: Any = language.norm  # of a class of transformers
    indices = torch.tensor([tokens], dtype=torch.int64, device=table.weight.device)
    return table(indices).to(norm.weight.device)
