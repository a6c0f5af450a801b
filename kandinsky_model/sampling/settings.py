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

from torch import Tensor

from ..config import ATTENTIONS, CACHES, PRESETS, QUANTIZATIONS, Preset
from ..dit.geometry import Grid
from ..vae.hunyuan import POLICIES
from .sampler import NO_GUIDANCE, PRECISIONS, Sampling
from .step_cache import make_cache
from .values import CONVERTERS, integer, text

PIXELS_PER_LATENT = 8  # in height and width
PIXELS_PER_TOKEN = 2 * PIXELS_PER_LATENT  # the transformer's patches are 2 x 2 latent pixels
FRAMES_PER_LATENT = 4  # of all latent frames but the first, which holds one

# Beyond these a value is a mistake or a damaged file.
LARGEST_SIDE = 16384
MOST_FRAMES = 16385
MOST_STEPS = 1000
MOST_FPS = 240
SEEDS = 2**64

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
NOT_BY_NAME = (
    "prompt",
    "expanded_prompt",
    "seed",
    "fps",
    "model",
    "preset",
    "lora",
    "quantization",
)

# What others call our settings.
OTHER_NAMES = {
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "frames": "num_frames",
    "length": "num_frames",
    "guidance": "guidance_scale",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "scale": "scheduler_scale",
    "shift": "scheduler_scale",
    "flow_shift": "scheduler_scale",
    "negative": "negative_prompt",
    "policy": "vae_policy",
    "prompts": "prompt",
    "seeds": "seed",
    "expand": "expand_prompt",
}
# Arguments of diffusers' pipelines that `generate` has no equal of, and what to do instead.
REFUSED = {
    "generator": "pass seed=, for example seed=generator.initial_seed()",
    "output_type": "leave it out: the result has .latents, .frames (uint8 [F, H, W, 3]) and .pil()",
    "return_dict": "leave it out: the result is a Video",
    "callback_on_step_end": "pass callback=, which is called with (stage, step, steps, latents)",
    "callback_on_step_end_tensor_inputs": "pass callback=, which is always given the latents",
    "num_videos_per_prompt": "pass a list with the prompt as often as videos are wanted",
    "num_images_per_prompt": "pass a list with the prompt as often as pictures are wanted",
    "max_sequence_length": "leave it out: it belongs to the checkpoint",
    "latents": "pass seed=, or go on with a run by resume()",
    "prompt_embeds": "pass prompt=; embedded prompts are kept on disk",
    "negative_prompt_embeds": "pass negative_prompt=",
    "prompt_template": "leave it out: it belongs to the checkpoint",
    "sigmas": "pass scheduler_scale=",
    "timesteps": "pass scheduler_scale=",
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """All that one video is made from, besides the weights. It is stored with its latents and in
    the finished file.

    expanded_prompt: what the language model made of the prompt, empty where it was not asked to.
    image, last_image: the paths of the given pictures, "given" for pictures that were no files.
    lora: "path:scale" of the active adapters. quantization: of the transformer's weights, or "".
    model: the preset, path or repository that the weights came from. preset: whose attention and
    positions were used; two models of one file may differ in it.
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
    preset: str = ""

    def __post_init__(self):
        for name in FIELD_TYPES:
            object.__setattr__(self, name, converted(name, getattr(self, name)))
        check_prompt(self.prompt)
        check_size(self.height, self.width)
        _check_frames(self.num_frames)
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}, got {value!r}; choose one of them"
                )
        if not 1 <= self.num_inference_steps <= MOST_STEPS:
            raise ValueError(
                f"num_inference_steps must be at least 1 and at most {MOST_STEPS}, got "
                f"{self.num_inference_steps}; 50 is usual"
            )
        if self.scheduler_scale <= 0:
            raise ValueError(
                f"scheduler_scale must be positive, got {self.scheduler_scale}; 5 is usual"
            )
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"the seed must lie in 0 .. 2^64 - 1, got {self.seed}; choose another")
        if not 1 <= self.fps <= MOST_FPS:
            raise ValueError(f"fps must lie in 1 .. {MOST_FPS}, got {self.fps}; 24 is usual")

    def _check_stored(self) -> None:
        """Raise ValueError for what no program of ours can have stored. A preset may be of the
        user's own making."""
        if self.quantization and self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization must be empty or one of {', '.join(QUANTIZATIONS)}, got "
                f"{self.quantization!r:.80}; it was written by another program or version"
            )
        for adapter in self.lora:
            if not _has_scale(adapter):
                raise ValueError(
                    f"lora must be a list of path:scale with finite scales, got {adapter!r:.80}; "
                    "it was written by another program"
                )
        if self.preset in PRESETS:
            make_cache(self.cache, self.preset)  # raises where the preset has none

    @classmethod
    def parse(cls, stored: object) -> Settings:
        """Settings from the JSON that `to_json` wrote, or from what it stands for. Raises
        ValueError for anything else."""
        if isinstance(stored, (str, bytes)):
            try:
                stored = json.loads(stored)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"settings must be valid JSON, got {error}") from None
        if not isinstance(stored, dict):
            raise ValueError(f"settings must be a JSON object, got {type(stored).__name__}")
        unknown = sorted(stored.keys() - FIELD_TYPES.keys())
        if unknown:
            raise ValueError(
                f"settings must be those that this version knows, got {str(unknown[0])!r:.80} too"
            )
        try:
            settings = cls(**stored)
        except TypeError as error:  # of a value, or for one that is missing
            raise ValueError(str(error)) from None
        settings._check_stored()
        return settings

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(T, h, w): latent frames and latent pixels."""
        height, width = self.height // PIXELS_PER_LATENT, self.width // PIXELS_PER_LATENT
        return (self.grid.T, height, width)

    @property
    def grid(self) -> Grid:
        """The transformer's tokens: latent frames, rows and columns."""
        return Grid(
            (self.num_frames - 1) // FRAMES_PER_LATENT + 1,
            self.height // PIXELS_PER_TOKEN,
            self.width // PIXELS_PER_TOKEN,
        )

    @property
    def guided(self) -> bool:
        return abs(self.guidance_scale - 1.0) > NO_GUIDANCE

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


# The type of each setting, by its annotation.
FIELD_TYPES = {field.name: str(field.type) for field in fields(Settings)}


def _has_scale(adapter: str) -> bool:
    path, _, scale = adapter.rpartition(":")
    try:
        return bool(path) and math.isfinite(float(scale))
    except ValueError:
        return False


def converted(name: str, value: object) -> Any:
    """The value of a setting in the setting's own type; see `sampling.values`."""
    return CONVERTERS[FIELD_TYPES[name]](name, value)


def named(given: Mapping[str, object]) -> dict[str, Any]:
    """Those of the given settings that are not None, in their own types.

    Raises TypeError for names that are no settings and for values of another type, and ValueError
    for numbers that are not finite. negative_prompt may be a list, and stays as it is.
    """
    _check_names(given)
    return {
        name: value if name == "negative_prompt" else converted(name, value)
        for name, value in given.items()
        if value is not None
    }


def complete(
    preset: Preset, name: str, prompts: Sequence[str], seed: int | Sequence[int], given: Mapping
) -> list[Settings]:
    """Checked settings for each prompt.

    name: of the model. seed: the i-th prompt takes seed + i; or a seed for each prompt. given:
    settings by name, where None counts as not given; the others are what the preset was released
    with. negative_prompt may be a list, of one for each prompt. Raises TypeError for names that are
    no settings and values of another type, ValueError for values that do not fit each other or the
    checkpoint.
    """
    chosen = named(given)
    for prompt in prompts or [""]:
        check_prompt(prompt)
    seeds = seed
    if not isinstance(seeds, (list, tuple)):
        first = integer("seed", seed)
        seeds = [first + i for i in range(len(prompts))]
    negatives = chosen.pop("negative_prompt", "")
    if not isinstance(negatives, (list, tuple)):
        negatives = [negatives] * len(prompts)
    for what, values in (("seed", seeds), ("negative_prompt", negatives)):
        if len(values) != len(prompts):
            raise ValueError(
                f"a list for {what} must have one for each prompt, got {len(values)} for "
                f"{len(prompts)} prompts; pass as many, or a single one"
            )
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
        "preset": preset.name,
    }
    values = released | chosen
    check_size(values["height"], values["width"])
    policy = default_policy(values["num_frames"], values["height"], values["width"])
    values.setdefault("vae_policy", policy)
    if preset.vae is None and (values["num_frames"], values["vae_policy"]) != (1, "global"):
        raise ValueError(
            f"{preset.name} makes pictures, decoded whole, got {values['num_frames']} frames and "
            f"{values['vae_policy']} decoding; leave both out, or use a video preset"
        )
    make_cache(values.get("cache", "none"), preset.name)  # raises where the preset has none
    return [
        Settings(prompt, negative, one, **values)
        for prompt, negative, one in zip(prompts, negatives, seeds, strict=True)
    ]


def _check_names(given: Mapping) -> None:
    known = [field.name for field in fields(Settings) if field.name not in NOT_BY_NAME]
    for name in given:
        if name in REFUSED:
            raise TypeError(f"generate takes no {name}; {REFUSED[name]}")
        if name not in known:
            near = [OTHER_NAMES[name]] if name in OTHER_NAMES else []
            near += difflib.get_close_matches(name, known, n=1) or known
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


def check_latents(latents: Tensor, settings: Settings, channels: int | None = None) -> None:
    """Raise ValueError unless latents [1, T, h, w, C] have the size that the settings say.

    channels: C; None for any.
    """
    T, h, w = settings.latent_shape
    C = latents.shape[-1] if channels is None and latents.dim() == 5 else channels
    if tuple(latents.shape) != (1, T, h, w, C) or not latents.is_floating_point():
        raise ValueError(
            f"{settings.num_frames} frames of {settings.width}x{settings.height} require floating "
            f"latents [1, {T}, {h}, {w}, {channels or 'C'}], got {latents.dtype} "
            f"{list(latents.shape)}; they belong to another model or other settings"
        )


def check_prompt(prompt: str) -> None:
    if not text("prompt", prompt).strip():
        raise ValueError("the prompt must say something, got an empty one; describe the video")


def check_size(height: int, width: int) -> None:
    step = PIXELS_PER_TOKEN
    if max(height, width) > LARGEST_SIDE:
        raise ValueError(
            f"width and height must be at most {LARGEST_SIDE}, got {width}x{height}; make it "
            "smaller"
        )
    if min(height, width) < step or height % step or width % step:
        near_width, near_height = (max(step, round(side / step) * step) for side in (width, height))
        raise ValueError(
            f"width and height must be positive multiples of {step}, got {width}x{height}; "
            f"the nearest is {near_width}x{near_height}"
        )


def _check_frames(count: int) -> None:
    if count > MOST_FRAMES:
        raise ValueError(
            f"the number of frames must be at most {MOST_FRAMES}, got {count}; make it shorter"
        )
    if count < 1 or count % FRAMES_PER_LATENT != 1:
        below = max(1, (count - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1)
        near = "1" if count < 1 else f"{below} or {below + FRAMES_PER_LATENT}"
        raise ValueError(
            "the number of frames must be 4k + 1, because a latent frame holds "
            f"four, got {count}; the nearest is {near}"
        )
