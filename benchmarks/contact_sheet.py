# SPDX-License-Identifier: Apache-2.0
"""A picture of twelve clips that the bundled model draws for prompts it was not trained on: five
frames of each side by side, under its prompt.

    python -m benchmarks.contact_sheet [-o sheet.png] [--seed 0] [--bundle folder]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.tiny import scenes
from kandinsky_model.tiny.check import draw

SHEET = Path(__file__).with_name("results") / "tiny_contact_sheet.png"
FRAMES = (0, 4, 8, 12, 16)  # which frames of a clip are shown
SIDE = 96  # pixels from one frame to the next
CAPTION = 18  # pixels of height for the prompt
GAP = 8  # pixels between the two columns
WHITE = (255, 255, 255)


def strip(clip: Tensor, text: str) -> Image.Image:
    """FRAMES of a clip, uint8 [F, H, W, 3], in a row under a caption."""
    picture = Image.new("RGB", (len(FRAMES) * SIDE + GAP, SIDE + CAPTION), WHITE)
    for i, frame in enumerate(FRAMES):
        small = Image.fromarray(clip[frame].numpy()).resize((SIDE - 2, SIDE - 2), Image.LANCZOS)
        picture.paste(small, (i * SIDE, CAPTION))
    ImageDraw.Draw(picture).text((2, 3), text, fill=(0, 0, 0))
    return picture


def sheet(texts: Sequence[str], clips: Sequence[Tensor], path: Path) -> None:
    """Write the strips of all clips to ``path`` as a PNG, in two columns."""
    strips = [strip(clip, text) for clip, text in zip(clips, texts, strict=True)]
    width, height = strips[0].size
    rows = -(-len(strips) // 2)
    whole = Image.new("RGB", (2 * width, rows * height), WHITE)
    for i, picture in enumerate(strips):
        whole.paste(picture, (i % 2 * width, i // 2 * height))
    whole.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=SHEET, help="the PNG to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first clip")
    parser.add_argument("--bundle", type=Path, default=TINY, help="folder of the model")
    options = parser.parse_args()
    texts, clips = [], []
    for _, text, video in draw(scenes.held_out()[::4], options.bundle, options.seed):
        texts.append(text)
        clips.append(video.frames)
    sheet(texts, clips, options.output)


if __name__ == "__main__":
    main()
