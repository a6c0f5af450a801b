# SPDX-License-Identifier: Apache-2.0
"""How often a tiny model draws what its prompt says, for combinations of words that its training
never showed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from .. import pipeline
from ..checkpoints.locate import TINY
from . import scenes
from .judge import WORDS, judge, marks
from .scenes import Combination

logger = logging.getLogger(__name__)


def draw(
    combinations: Sequence[Combination],
    folder: str | Path = TINY,
    seed: int = 0,
    batch: int = 8,
    quantize: str | None = None,
    lora: str | Path | None = None,
    **settings,
) -> Iterator[tuple]:
    """Yield (combination, prompt, `Video`) for each combination, the i-th sampled with seed + i.

    settings: further arguments of `Kandinsky5.generate`.
    """
    model = pipeline.load(folder, quantize=quantize)
    if lora:
        model.lora.load(lora)
    for start in range(0, len(combinations), batch):
        wanted = combinations[start : start + batch]
        prompts = [scenes.prompt(combination) for combination in wanted]
        videos = model.generate(prompts, seed=seed + start, **settings)
        assert isinstance(videos, list)  # as prompts are
        yield from zip(wanted, prompts, videos, strict=True)


def check_tiny(
    folder: str | Path = TINY,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    combinations: Sequence[Combination] | None = None,
    quantize: str | None = None,
    lora: str | Path | None = None,
) -> dict:
    """Sample prompts and judge the clips; one line of the log for each.

    combinations: what to draw; None: the 48 that are held out of training. One that comes again is
        drawn from other noise.
    quantize: a mode of `QUANTIZATIONS`. The model then also runs without it, from the same noise.
    lora: an adapter to draw with.

    The result has the number of "prompts", the seed, steps and guidance, the shares of clips in
    0..1 that are right (see `shares`), and the verdicts, "samples". With `quantize`, "unquantized"
    has the shares without it, and each sample the "psnr" between both clips, in dB.
    """
    combinations = scenes.held_out() if combinations is None else combinations
    settings: dict = {"num_inference_steps": steps, "guidance_scale": guidance}
    modes = [quantize, None] if quantize else [None]
    runs = [
        draw(
            combinations,
            folder,
            seed,
            quantize=mode,
            lora=lora,
            **settings,
        )
        for mode in modes
    ]
    samples: list[dict] = []
    plain: list[dict] = []
    for (combination, prompt, clip), *others in zip(*runs, strict=True):
        samples.append(judged(combination, prompt, clip))
        for _, _, other in others:
            plain.append(judged(combination, f"unquantised: {prompt}", other))
            samples[-1]["psnr"] = round(psnr(clip.frames, other.frames), 2)
    result = {
        "prompts": len(samples),
        **shares(samples),
        "seed": seed,
        "steps": clip.settings.num_inference_steps,
        "guidance": clip.settings.guidance_scale,
    }
    if quantize:
        result["quantize"] = quantize
        result["unquantized"] = shares(plain)
    return {**result, "samples": samples}


def judged(
    combination: Combination,
    prompt: str,
    clip,
) -> dict:
    """The verdict about a clip, a `Video`, and which words of its prompt are right."""
    verdict = judge(clip.frames)
    right = marks(verdict, combination)
    seen = {word: getattr(verdict, word) for word in WORDS}
    words = [f"{word} {seen[word]}{'' if right[word] else ' (wrong)'}" for word in WORDS]
    logger.info("%s: %s", prompt, ", ".join(words))
    travel = [round(x, 1) for x in verdict.travel]
    return {"prompt": prompt, "seen": seen, "right": right, "travel": travel}


def shares(samples: Sequence[dict]) -> dict[str, float]:
    """The shares of samples in 0..1 of which a word is right, or those words together."""

    def share(*words: str) -> float:
        return sum(all(one["right"][word] for word in words) for one in samples) / len(samples)

    return {
        **{word: share(word) for word in WORDS},
        "color_and_background": share("color", "background"),
        "all": share(*WORDS),
    }


def psnr(frames: Tensor, others: Tensor) -> float:
    """The peak signal-to-noise ratio of two uint8 videos, in dB. For equal videos it is that of one
    number that is one level off."""
    squares = (frames.double() - others.double()).square().sum()
    error = squares.clamp_min(1.0) / frames.numel()
    return 10 * math.log10(255**2 / error.item())
