# SPDX-License-Identifier: Apache-2.0
"""The settings of a video: what was asked for, completed from a preset, and checked."""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..config import ATTENTIONS, CACHES, Preset
from ..dit.geometry import Grid
from ..vae.hunyuan import POLICIES
from .sampler import PRECISIONS, Sampling
from .step_cache import make_cache

PIXELS_PER_TOKEN = 16  # in height and width: 8 of the VAE, 2 of the transformer's patches
FRAMES_PER_LATENT = 4  # of all latent frames but the first, which holds one

# From this many elements of the decoder's widest activation (256 channels at full size) on, clips
# are decoded in the official tiles. This depends on the clip's size alone, never on free memory, so
# that a seed gives the same pixels on every machine.
WIDEST_CHANNELS = 256
GLOBAL_DECODE_LIMIT = 2**31

CHOICES = {
    "attention": ATTENTIONS,
    "precision": tuple(PRECISIONS),
    "cache": CACHES,
    "vae_policy": POLICIES,
}
# Settings that `generate` does not take by name: it has them from elsewhere.
NOT_BY_NAME = ("prompt", "expanded_prompt", "seed", "fps", "model", "lora", "quantization")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """All that one video is made from, besides the weights. It is stored with its latents and in
    the finished file.

    expanded_prompt: what the language model made of the prompt, empty where it was not asked to.
    image, last_image: the paths of the given pictures, "given" for pictures that were no files.
    lora: "path:scale" of the active adapters. quantization: of the transformer's weights, or "".
    model: the preset, path or repository that the weights came from.
    """

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
    expanded_prompt: str = ""
    image: str = ""
    last_image: str = ""
    lora: tuple[str, ...] = ()
    quantization: str = ""
    fps: int = 24
    model: str = ""

    def __post_init__(self):
        object.__setattr__(self, "lora", tuple(self.lora))  # a list where it comes from JSON
        check_prompt(self.prompt)
        check_size(self.height, self.width)
        _check_frames(self.num_frames)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}, got {value!r}; choose one of them"
                )
        if self.num_inference_steps < 1:
            raise ValueError(
                f"the number of steps must be at least 1, got {self.num_inference_steps}; "
                "50 is usual"
            )
        if not (math.isfinite(self.guidance_scale) and 0 < self.scheduler_scale < math.inf):
            raise ValueError(
                "guidance must be finite and the scheduler scale positive, got "
                f"{self.guidance_scale} and {self.scheduler_scale}; 5 is usual for both"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"the seed must lie in 0 .. 2^64 - 1, got {self.seed}; choose another")

    @property
    def grid(self) -> Grid:
        """The transformer's tokens: latent frames, rows and columns."""
        return Grid(
            (self.num_frames - 1) // FRAMES_PER_LATENT + 1,
            self.height // PIXELS_PER_TOKEN,
            self.width // PIXELS_PER_TOKEN,
        )

    def sampling(self, preset: str, start: int = 0) -> Sampling:
        """How to sample with these settings, for the checkpoint of a preset. start: steps that are
        already done."""
        return Sampling(
            self.num_inference_steps,
            self.scheduler_scale,
            self.guidance_scale,
            self.precision,
            make_cache(self.cache, preset),
            start,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)


def complete(
    preset: Preset, name: str, prompts: Sequence[str], seed: int, given: Mapping
) -> list[Settings]:
    """Checked settings for each prompt, the i-th with seed + i.

    name: of the model. given: settings by name, where None counts as not given; the others are what
    the preset was released with. Raises TypeError for names that are no settings, ValueError for
    values that do not fit each other or the checkpoint.
    """
    _check_names(given)
    for prompt in prompts or [""]:
        check_prompt(prompt)
    released: dict[str, Any] = {
        "height": preset.sizes[0][0],
        "width": preset.sizes[0][1],
        "num_frames": preset.frames,
        "num_inference_steps": preset.steps,
        "guidance_scale": preset.guidance,
        "scheduler_scale": preset.scheduler_scale,
        "attention": "nabla" if preset.nabla else "dense",
        "fps": preset.fps,
        "model": name,
    }
    values = released | {key: value for key, value in given.items() if value is not None}
    check_size(values["height"], values["width"])
    policy = default_policy(values["num_frames"], values["height"], values["width"])
    values.setdefault("vae_policy", policy)
    if preset.vae is None and (values["num_frames"], values["vae_policy"]) != (1, "global"):
        raise ValueError(
            f"{preset.name} makes pictures, decoded whole, got {values['num_frames']} frames and "
            f"{values['vae_policy']} decoding; leave both out, or use a video preset"
        )
    make_cache(values.get("cache", "none"), preset.name)  # raises where the preset has none
    return [Settings(prompt, seed=seed + i, **values) for i, prompt in enumerate(prompts)]


def _check_names(given: Mapping) -> None:
    known = [field.name for field in fields(Settings) if field.name not in NOT_BY_NAME]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or known
            raise TypeError(
                f"settings must be among {', '.join(known)}, got {name!r}; "
                f"did you mean {near[0]!r}?"
            )


def warn_untrained(settings: Settings, preset: Preset) -> None:
    """Log a warning about a size that the checkpoint was not trained for."""
    size = (settings.height, settings.width)
    if preset.task != "i2v" and size not in preset.sizes:
        _log.warning(
            "%s was trained for %s (width x height); %dx%d may look worse",
            preset.name,
            ", ".join(f"{width}x{height}" for height, width in preset.sizes),
            settings.width,
            settings.height,
        )


def check_settings(prompt: str, **given) -> None:
    """Raise what `generate` would raise for these settings, where None counts as not given, without
    a model and so before one is loaded."""
    valid: dict[str, Any] = {
        "negative_prompt": "",
        "seed": 0,
        "height": 16,
        "width": 16,
        "num_frames": 1,
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "scheduler_scale": 1.0,
        "attention": "dense",
    }
    Settings(prompt, **valid | {key: value for key, value in given.items() if value is not None})


def default_policy(num_frames: int, height: int, width: int) -> str:
    """How a clip is decoded where nothing else is asked for: "global" while its widest activation
    fits in ordinary memory, else "official"."""
    fits = WIDEST_CHANNELS * num_frames * height * width < GLOBAL_DECODE_LIMIT
    return "global" if fits else "official"


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
        near_width, near_height = (max(step, round(side / step) * step) for side in (width, height))
        raise ValueError(
            f"width and height must be positive multiples of {step}, got {width}x{height}; "
            f"the nearest is {near_width}x{near_height}"
        )


def _check_frames(count: int) -> None:
    if count < 1 or count % FRAMES_PER_LATENT != 1:
        below = max(1, (count - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1)
        near = "1" if count < 1 else f"{below} or {below + FRAMES_PER_LATENT}"
        raise ValueError(
            "the number of frames must be 4k + 1, because a latent frame holds "
            f"four, got {count}; the nearest is {near}"
        )
