# SPDX-License-Identifier: Apache-2.0
"""The pictures that ComfyUI's template browser shows, one beside each example workflow:

    python -m kandinsky_model.comfyui.thumbnails

draws clips with the bundled model and writes NAME.jpg into `templates/` for each NAME.json there.
Each shows what goes into the workflow above, and what comes out of it below.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from .workflows import FOLDER, TRY, workflows

SIZE = (400, 400)  # pixels; cards of the template browser are square
SIDE = 140  # of a frame
GAP = 22  # how far each frame of a clip stands out behind the one before it
TOP = 24  # above what goes in
ARROW = 36
BACKGROUND = (32, 33, 38)
INK = (225, 225, 230)
FONT_SIZE = 26
LINE_LENGTH = 24  # characters
QUALITY = 90

RED = "a red circle moving right on a blue background"
STAR = "a yellow star moving up on a gray background"
GREEN = "a green circle moving right on a blue background"

Clip = list[Image.Image]


def thumbnails(draw: Callable[[str], Clip]) -> dict[str, Image.Image]:
    """Name of the file -> its picture. draw: gives the frames of a clip by its prompt."""
    red, star, green = (draw(prompt) for prompt in (RED, STAR, GREEN))
    shown = {
        TRY: (_words(RED), red),
        "text to video": (_words(STAR), star),
        "image to video": (_frame(star[0]), star),
        "text to image": (_words("a green circle on a blue background"), green[:1]),
        "image editing": (_frame(red[0]), green[:1]),
        "accelerated ComfyUI nodes": (_words("ComfyUI's own nodes, accelerated"), red),
    }
    pictures = {f"Kandinsky 5 - {name}.jpg": _joined(*sides) for name, sides in shown.items()}
    assert pictures.keys() == {Path(name).with_suffix(".jpg").name for name in workflows()}
    return pictures


def _words(text: str) -> Image.Image:
    """A text on a strip of its own."""
    strip = Image.new("RGB", (SIZE[0], SIDE), BACKGROUND)
    lines = textwrap.fill(text, LINE_LENGTH)
    font = ImageFont.load_default(FONT_SIZE)
    middle = (SIZE[0] / 2, SIDE / 2)
    ImageDraw.Draw(strip).text(middle, lines, INK, font, "mm", align="center")
    return strip


def _frame(picture: Image.Image) -> Image.Image:
    """A square picture with a thin border."""
    square = picture.convert("RGB").resize((SIDE, SIDE))
    ImageDraw.Draw(square).rectangle((0, 0, SIDE - 1, SIDE - 1), outline=INK)
    return square


def _joined(given: Image.Image, made: Clip) -> Image.Image:
    """What goes in, an arrow, and what comes out: the first frame of a clip in front, its middle
    and its end behind."""
    canvas = Image.new("RGB", SIZE, BACKGROUND)
    middle = SIZE[0] // 2
    canvas.paste(given, (middle - given.width // 2, TOP))
    start = TOP + SIDE + 4
    tip = start + ARROW
    arrow = ImageDraw.Draw(canvas)
    arrow.line((middle, start, middle, tip - 8), INK, 3)
    arrow.polygon([(middle, tip), (middle - 8, tip - 12), (middle + 8, tip - 12)], INK)
    last = len(made) - 1
    frames = [made[last * i // 2] for i in range(3)] if last else made
    left = middle - (SIDE + GAP * (len(frames) - 1)) // 2
    top = tip + 6 + GAP * (len(frames) - 1)
    for i, picture in reversed(list(enumerate(frames))):
        canvas.paste(_frame(picture), (left + GAP * i, top - GAP * i))
    return canvas


def main(folder: Path = FOLDER) -> None:
    from ..pipeline import Kandinsky5
    from ..sampling.result import Video

    model = Kandinsky5.from_pretrained("tiny", device="cpu")

    def draw(prompt: str) -> Clip:
        video = model.generate(prompt, seed=7)
        assert isinstance(video, Video)
        return video.pil()

    for name, picture in thumbnails(draw).items():
        picture.save(folder / name, quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
