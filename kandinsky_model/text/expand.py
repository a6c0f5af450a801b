# SPDX-License-Identifier: Apache-2.0
"""Expansion of short prompts to the detailed English ones that the checkpoints were trained on,
written by the text encoder's own language model."""

from __future__ import annotations

from collections.abc import Collection
from inspect import signature

from torch import Tensor, nn

from .vision import PICTURE, look_up

MOST_TOKENS = 256  # that are written
# As in the official code, a picture to edit is shown with a quarter of its sides, a first frame
# whole.
EDIT_SHRINK = 4
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
STOPS = ("<|im_end|>", "<|endoftext|>")

VIDEO = """\
You turn short ideas for videos into the detailed English prompts that a video generator \
understands best. Such a prompt is one paragraph of 70 to 110 words in the present tense. It says \
where and when the scene takes place, who or what is there and how they look, what they do and in \
which order, where the camera is and how it moves, how the light falls and, last, what style the \
video has. Keep all that the idea says and add only what goes with it. Translate an idea that is \
in another language.

Three prompts of this kind:

1. A baker in a flour-dusted apron kneads dough on a wooden table in a small village kitchen at \
dawn. He folds it towards himself, gives it a quarter turn and presses it down again, while steam \
rises from a kettle behind him. The camera begins close to his hands and slowly pulls back until \
shelves of fresh loaves along the wall come into view. Warm light falls through a low window and \
shows the flour in the air. The video looks like a documentary, with natural colours and a shallow \
depth of field.

2. A red fox trots along the edge of a snowy birch forest in the late afternoon. It stops, pricks \
its ears at a sound below the snow, then leaps up high and dives into the drift nose first. The \
camera follows it from the side at the height of its eyes, steadily and at the same pace, and \
stands still for the jump. The low golden sun throws long blue shadows between the trunks. The \
footage is that of a professional nature film, sharp, calm and true to life.

3. A paper boat with a small yellow sail drifts down a flooded street of a toy-like city at night. \
It bumps into a lantern, spins around twice and slides under a stone bridge, where an astonished \
frog watches it pass. The camera glides behind the boat just above the water and at the end tilts \
up to the lit windows. Neon signs shimmer in the ripples, and fine rain falls through their light. \
The style is three-dimensional animation with round shapes, rich colours and a playful mood.

The idea: {}

Answer with the finished prompt and nothing else."""

FIRST_FRAME = """\
The picture is the first frame of a video that is still to be made. Say in English how the video \
goes on, as a prompt of 30 to 70 words for a video generator. Concentrate on motion: how people, \
animals and things move and change, in which order, and what the camera does. Make it lively. \
Mention what the picture shows only as far as it takes to say what moves. Follow the wish below, \
and translate it if it is in another language.

Three prompts of this kind:

1. The woman raises her head, begins to smile and walks briskly towards the viewer, her scarf \
fluttering behind her. Leaves whirl up around her shoes. The camera moves backwards in front of \
her and keeps her face in the middle.

2. Wave after wave rolls in and breaks over the rocks, throwing spray high into the air. The small \
boat rises, tips to the left and swings back. The camera climbs slowly and turns until the \
lighthouse appears.

3. The cat crouches, twitches its tail and leaps from the shelf onto the table, where it knocks \
over a glass. Milk spreads over the wood and drips from the edge. The camera follows the leap with \
a quick pan and then stands still.

The wish: {}

Answer with the finished prompt and nothing else."""

IMAGE = """\
You turn short ideas for pictures into the detailed English prompts that an image generator \
understands best. Such a prompt is one paragraph of 50 to 100 words. It says what is in the \
picture, how many of it, with which shapes, colours and materials, where each thing is in relation \
to the others, what is behind them, how the light falls, from where one looks, and what style the \
picture has. Words that are to be read in the picture stand in UPPER CASE between "double quotes". \
Keep all that the idea says and add only what goes with it. Translate an idea that is in another \
language, but not the words to be read.

An idea: a sign at a bakery that says fresh bread
Its prompt: An oval wooden sign with the words "FRESH BREAD" in curved cream-white letters hangs \
from a black iron bracket beside the door of a small bakery. Below it, three round loaves and a \
bundle of wheat lie in a wicker basket on a stone step. The wall behind is of pale yellow plaster \
with a green shutter at its left edge. Soft morning light comes from the right and gives every \
object a gentle shadow. The picture is a photograph taken from slightly below, sharp in front and \
blurred behind.

The idea: {}

Answer with the finished prompt and nothing else."""

EDIT = """\
The picture is to be edited as the wish below says. Write the instruction for it in English, as \
one paragraph of 20 to 80 words: what changes, where in the picture, and how it looks afterwards; \
what stays exactly as it is; and where the camera stands, which is where it stood before unless \
the wish says otherwise. Ask for nothing that the wish does not ask for. Translate a wish that is \
in another language.

The wish: {}

Answer with the finished instruction and nothing else."""

# By the kind of prompt, and whether there is an image.
INSTRUCTIONS = {
    ("video", False): VIDEO,
    ("video", True): FIRST_FRAME,
    ("image", False): IMAGE,
    ("image_edit", True): EDIT,
}


def request(prompt: str, kind: str, image: Tensor | None) -> tuple[str, int]:
    """The chat that asks the language model to expand a prompt, and how many times smaller it is
    shown the image.

    kind: "video", "image" or "image_edit". Raises ValueError for another kind, an edit without an
    image, or a still picture with one.
    """
    instruction = INSTRUCTIONS.get((kind, image is not None))
    if instruction is None:
        raise ValueError(
            "a prompt is expanded for a video, for a video or an image_edit with an image, or for "
            f"an image without one, got {kind!r} {'without' if image is None else 'with'} an "
            "image; change one of the two"
        )
    picture = "" if image is None else PICTURE
    text = CHAT.replace("{}", picture + instruction).replace("{}", prompt)
    return text, EDIT_SHRINK if kind == "image_edit" else 1


def continue_greedily(
    language: nn.Module, head: nn.Module, embeds: Tensor, places: Tensor, stops: Collection[int]
) -> list[int]:
    """The tokens that greedy decoding writes: the likeliest one, again and again.

    embeds: the text so far, [1, L, Dt]. places: its positions, [4, 1, L]. Writing ends before a
    token of `stops`, or after `MOST_TOKENS`.
    """
    from transformers import DynamicCache

    # transformers 5.24 has renamed the argument
    name = "cache" if "cache" in signature(language.forward).parameters else "past_key_values"
    past = {name: DynamicCache()}
    tokens: list[int] = []
    while len(tokens) < MOST_TOKENS:
        output = language(inputs_embeds=embeds, position_ids=places, **past)
        hidden = output.last_hidden_state[:, -1]  # [1, Dt]
        token = int(head(hidden.to(head.weight.device)).argmax())
        if token in stops:
            break
        tokens.append(token)
        embeds = look_up(language, [token])  # [1, 1, Dt]
        places = places[..., -1:] + 1  # [4, 1, 1]
    return tokens
