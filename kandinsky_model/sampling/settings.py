# SPDX-License-Identifier: Apache-2.0
"""What a run was asked for, completed from a preset and checked."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ..config import ATTENTIONS, CACHES, Preset
from ..dit.geometry import Grid
from ..vae.hunyuan import POLICIES
from .sampler import PRECISIONS
from .step_cache import make_cache

PIXELS_PER_TOKEN = 16


# Above this many elements of the widest activation (256 channels at full size), clips are decoded
# in the official tiles. A function of the clip's size alone, never of free memory, so that a seed
# means the same pixels on every machine.
WIDEST_CHANNELS, GLOBAL_DECODE_LIMIT = 256, 2**31


@dataclass(frozen=True)
class Settings:
    """All that one video is made from, besides the weights. Stored with its latents and in the
    finished file."""

    prompt: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    scheduler_scale: float
    attention: str
    precision: str = "fp32"
    vae_policy: str = "global"
    cache: str = "none"
    expanded_prompt: str = ""  # what the language model made of the prompt, where it was asked to
    image: str = ""  # where the first frame, or the picture to edit, came from
    last_image: str = ""
    lora: tuple[str, ...] = ()  # "path:scale" of those that were active
    quantization: str = ""  # of the transformer
    fps: int = 24
    model: str = ""

    def __post_init__(self):
        object.__setattr__(self, "lora", tuple(self.lora))  # a list where it comes from JSON
        check_prompt(self.prompt)
        check_size(self.height, self.width)
        _check_frames(self.num_frames)
        for name, allowed in (
            ("attention", ATTENTIONS),
            ("precision", tuple(PRECISIONS)),
            ("cache", CACHES),
            ("vae_policy", POLICIES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}, got "
                    f"{getattr(self, name)!r}; choose one of them"
                )
        if self.num_inference_steps < 1:
            raise ValueError(
                "the number of steps must be at least 1, got "
                f"{self.num_inference_steps}; 50 is usual"
            )
        if not (math.isfinite(self.guidance_scale) and 0 < self.scheduler_scale < math.inf):
            raise ValueError(
                "guidance must be finite and the scheduler scale positive, got "
                f"{self.guidance_scale} and "
                f"{self.scheduler_scale}; 5 is usual for both"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed must lie in 0 .. 2^63 - 1, got {self.seed}; choose another")

    @property
    def grid(self) -> Grid:
        return Grid(
            (self.num_frames - 1) // 4 + 1,
            self.height // PIXELS_PER_TOKEN,
            self.width // PIXELS_PER_TOKEN,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def complete(
    preset: Preset, name: str, prompts: list[str], seed: int, given: Mapping
) -> list[Settings]:
    """One checked Settings for each prompt, the i-th with seed + i: what is given (None: not), else
    what the preset was released with.

    Raises TypeError for names that are no settings, ValueError for values that do not fit each
    other or the checkpoint.
    """
    # elsewhere
    settled = ("prompt", "expanded_prompt", "seed", "fps", "model", "lora", "quantization")
    known = [field.name for field in fields(Settings) if field.name not in settled]
    for word in given:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1) or known
            raise TypeError(
                f"settings must be among {', '.join(known)}, got {word!r}; did you "
                f"mean {near[0]!r}?"
            )
    for prompt in prompts or [""]:
        check_prompt(prompt)
    values = dict(
        height=preset.sizes[0][0],
        width=preset.sizes[0][1],
        num_frames=preset.frames,
        num_inference_steps=preset.steps,
        guidance_scale=preset.guidance,
        scheduler_scale=preset.scheduler_scale,
        attention="nabla" if preset.nabla else "dense",
        fps=preset.fps,
        model=name,
    ) | {word: value for word, value in given.items() if value is not None}
    check_size(values["height"], values["width"])
    values.setdefault(
        "vae_policy", default_policy(values["num_frames"], values["height"], values["width"])
    )
    if preset.vae is None and (values["num_frames"], values["vae_policy"]) != (1, "global"):
        raise ValueError(
            f"{preset.name} makes pictures, decoded whole, got "
            f"{values['num_frames']} frames and {values['vae_policy']} "
            "decoding; leave both out, or use a video preset"
        )
    # says now what it would say after the text
    make_cache(values.get("cache", "none"), preset.name)
    return [Settings(prompt, seed=seed + i, **values) for i, prompt in enumerate(prompts)]


def check_settings(prompt: str, **given) -> None:
    """Raise what `generate` would for these settings (None: not given), without a model and so
    before one is loaded."""
    valid = dict(
        negative_prompt="",
        seed=0,
        height=16,
        width=16,
        num_frames=1,
        num_inference_steps=1,
        guidance_scale=1.0,
        scheduler_scale=1.0,
        attention="dense",
    )
    Settings(
        prompt, **(valid | {name: value for name, value in given.items() if value is not None})
    )


def default_policy(num_frames: int, height: int, width: int) -> str:
    """How a clip is decoded unless told otherwise: "global" while that fits in ordinary memory,
    else "official"."""
    return (
        "global"
        if WIDEST_CHANNELS * num_frames * height * width < GLOBAL_DECODE_LIMIT
        else "official"
    )


def check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise TypeError(
            f"a prompt must be a str, got {type(prompt).__name__}; pass a str or a list of them"
        )
    if not prompt.strip():
        raise ValueError("the prompt must say something, got an empty one; describe the video")


def check_size(height: int, width: int) -> None:
    step = PIXELS_PER_TOKEN
    if min(height, width) < step or height % step or width % step:
        near = [max(step, round(side / step) * step) for side in (width, height)]
        raise ValueError(
            f"width and height must be positive multiples of {step}, got "
            f"{width}x{height}; "
            f"the nearest is {near[0]}x{near[1]}"
        )


def _check_frames(count: int) -> None:
    if count < 1 or count % 4 != 1:
        below = max(1, (count - 1) // 4 * 4 + 1)
        near = "1" if count < 1 else f"{below} or {below + 4}"
        raise ValueError(
            "the number of frames must be 4k + 1, because a latent frame holds "
            f"four, got {count}; the nearest is {near}"
        )
