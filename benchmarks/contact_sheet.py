# SPDX-License-Identifier: Apache-2.0
"""Sample twelve held-out prompts with the bundled tiny checkpoint and lay five frames of each side
by side, caption above.

    python -m benchmarks.contact_sheet [-o sheet.png] [--seed 0] [--bundle folder]
"""

import argparse
from pathlib import Path

from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.tiny import scenes as shapes
from kandinsky_model.tiny.check import draw

SHEET = Path(__file__).with_name("results") / "tiny_contact_sheet.png"
FRAMES, SIDE, CAPTION = (0, 4, 8, 12, 16), 96, 18


def strip(clip, text):
    """Five frames of a clip [F, H, W, 3] in a row under a caption: uint8 [SIDE + CAPTION, 5 * SIDE
    + 8, 3]."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (len(FRAMES) * SIDE + 8, SIDE + CAPTION), (255, 255, 255))
    for i, frame in enumerate(FRAMES):
        picture.paste(
            Image.fromarray(clip[frame].numpy()).resize((SIDE - 2, SIDE - 2), Image.LANCZOS),
            (i * SIDE, CAPTION),
        )
    ImageDraw.Draw(picture).text((2, 3), text, fill=(0, 0, 0))
    return picture


def sheet(texts, clips, path):
    """Two columns of strips, written to `path` as PNG."""
    from PIL import Image

    strips = [strip(clip, text) for clip, text in zip(clips, texts, strict=True)]
    width, height = strips[0].size
    whole = Image.new("RGB", (2 * width, -(-len(strips) // 2) * height), (255, 255, 255))
    for i, picture in enumerate(strips):
        whole.paste(picture, (i % 2 * width, i // 2 * height))
    whole.save(path, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=SHEET)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, default=TINY)
    options = parser.parse_args()
    drawn = [
        (text, video.frames)
        for _, text, video in draw(shapes.held_out()[::4], options.bundle, options.seed)
    ]
    sheet(*zip(*drawn, strict=True), options.output)


if __name__ == "__main__":
    main()
