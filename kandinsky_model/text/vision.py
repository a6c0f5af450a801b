# SPDX-License-Identifier: Apache-2.0
"""How Qwen2.5-VL is shown a picture: pixels to patches, and where the picture's tokens stand in the
sequence."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"  # in a text: here is the picture
PLACEHOLDER = "<|image_pad|>"
CONFIG_NAMES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Preprocessor:
    """How pictures become patches. Field names are those of the published
    `preprocessor_config.json`, whose values are the defaults.

    min_pixels, max_pixels: between these areas a picture keeps its size but for rounding.
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
        """What the first of these folders with such a configuration says; ValueError where that is
        no JSON."""
        for path in (folder / name for folder in folders for name in CONFIG_NAMES):
            if path.is_file():
                try:
                    values = json.loads(path.read_text(encoding="utf-8"))
                except ValueError as error:
                    raise ValueError(
                        f"{path} must be valid JSON, got {error}; download it again"
                    ) from error
                values = values.get("image_processor", values)
                size = values.get("size") or {}  # transformers >= 5 writes the two areas there
                values = {
                    "min_pixels": size.get("shortest_edge"),
                    "max_pixels": size.get("longest_edge"),
                    **values,
                }
                known = {
                    field.name: values[field.name]
                    for field in fields(cls)
                    if values.get(field.name) is not None
                }
                return cls(
                    **{
                        name: tuple(value) if isinstance(value, list) else value
                        for name, value in known.items()
                    }
                )
        return cls()

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The size that a picture is resized to: sides that are whole tokens, nearly the same
        shape, an area within the bounds."""
        step = self.patch_size * self.merge_size
        rounded = round(height / step) * step, round(width / step) * step
        if rounded[0] * rounded[1] > self.max_pixels:
            factor = math.sqrt(height * width / self.max_pixels)
            return max(step, math.floor(height / factor / step) * step), max(
                step, math.floor(width / factor / step) * step
            )
        if rounded[0] * rounded[1] < self.min_pixels:
            factor = math.sqrt(self.min_pixels / (height * width))
            return math.ceil(height * factor / step) * step, math.ceil(width * factor / step) * step
        return rounded

    def patches(self, image: Tensor, shrink: int = 1) -> tuple[Tensor, int, int]:
        """uint8 [3, H, W], first made `shrink` times smaller -> patches [rows * columns, 3 *
        temporal * patch^2] fp32, rows, columns.

        The patches of one token follow each other; a still picture is the same at all times of a
        patch.
        """
        import numpy
        from PIL import Image

        picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        if shrink > 1:
            picture = picture.resize(
                (max(1, picture.width // shrink), max(1, picture.height // shrink)),
                Image.Resampling.BICUBIC,
            )
        height, width = self.size(picture.height, picture.width)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 255  # [3, H, W]
        pixels = (pixels - torch.tensor(self.image_mean)[:, None, None]) / torch.tensor(
            self.image_std
        )[:, None, None]
        patch, merge, times = self.patch_size, self.merge_size, self.temporal_patch_size
        rows, columns = height // patch, width // patch
        split = pixels.reshape(3, rows // merge, merge, patch, columns // merge, merge, patch)
        # [rows / m, columns / m, m, m, 3, 1, patch, patch]
        split = split.permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        return (
            split.expand(-1, -1, -1, -1, -1, times, -1, -1).reshape(rows * columns, -1),
            rows,
            columns,
        )


def positions(before: int, rows: int = 0, columns: int = 0, after: int = 0) -> Tensor:
    """Where the tokens of text, picture and text stand, int64 [4, 1, L]: in the sequence, and as
    time, row and column.

    rows, columns: of the picture's tokens. A token of text stands at the same time, row and column;
    those of a picture share the time and spread over rows and columns; text goes on behind the
    largest of them.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    # [3, rows * columns]
    seen = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + before
    behind = torch.arange(after) + before + max(rows, columns)
    # [3, L]
    rotary = torch.cat([torch.arange(before).expand(3, -1), seen, behind.expand(3, -1)], dim=1)
    return torch.cat([torch.arange(rotary.shape[1])[None], rotary])[:, None]


def look_up(language: nn.Module, tokens: list[int]) -> Tensor:
    """Embeddings [1, L, Dt] of tokens, where the rest of the language model is; their table may
    have stayed on the CPU."""
    table = language.embed_tokens
    return table(torch.tensor([tokens], dtype=torch.int64, device=table.weight.device)).to(
        language.norm.weight.device
    )
