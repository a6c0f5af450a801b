# SPDX-License-Identifier: Apache-2.0
"""Ask the tiny checkpoint for combinations it never saw, and measure what it drew."""

import logging
import math

from .. import pipeline
from ..checkpoints.locate import TINY
from . import scenes as shapes
from .judge import judge, marks

logger = logging.getLogger(__name__)
WORDS = ("color", "background", "shape", "motion")


def draw(combinations, folder=TINY, seed=0, batch=8, quantize=None, lora=None, **settings):
    """Yield (combination, prompt, video) for each; the i-th uses seed + i. `settings` as
    `Kandinsky5.generate` takes them."""
    model = pipeline.load(folder, quantize=quantize)
    if lora:
        model.lora.load(lora)
    for start in range(0, len(combinations), batch):
        wanted = combinations[start : start + batch]
        prompts = [shapes.prompt(c) for c in wanted]
        yield from zip(
            wanted, prompts, model.generate(prompts, seed=seed + start, **settings), strict=True
        )


def check_tiny(
    folder=TINY, seed=0, steps=None, guidance=None, combinations=None, quantize=None, lora=None
):
    """Sample held-out prompts and judge them: {"prompts", "color", "background", "shape", "motion",
    "samples"}; shares of 1.

    combinations: all 48 held-out ones unless given; one that comes again is drawn from other noise.
    A share counts clips whose word is right; "color_and_background" and "all" count clips where
    those words are right together. Logs one line per clip. quantize: a mode of `QUANTIZATIONS`; the
    model is then also run without, from the same noise: "unquantized" holds its shares, and "psnr"
    of each sample how near its frames come, in dB. lora: an adapter to draw with.
    """
    combinations = shapes.held_out() if combinations is None else combinations
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    modes = [quantize, None] if quantize else [None]
    runs = [
        draw(combinations, folder, seed, quantize=mode, lora=lora, **settings) for mode in modes
    ]
    samples, plain = [], []
    for (combination, prompt, clip), *others in zip(*runs, strict=True):
        samples.append(judged(combination, prompt, clip))
        for *_, other in others:
            plain.append(judged(combination, f"unquantised: {prompt}", other))
            samples[-1]["psnr"] = round(psnr(clip.frames, other.frames), 2)
    used = {
        "seed": seed,
        "steps": clip.settings.num_inference_steps,
        "guidance": clip.settings.guidance_scale,
    }
    compared = {"quantize": quantize, "unquantized": shares(plain)} if quantize else {}
    return {"prompts": len(samples), **shares(samples), **used, **compared, "samples": samples}


def judged(combination, prompt, clip):
    """What a clip of a prompt shows and which of its words are right; logs a line."""
    verdict = judge(clip.frames)
    right = marks(verdict, combination)
    seen = {word: getattr(verdict, word) for word in WORDS}
    logger.info(
        "%s: %s",
        prompt,
        ", ".join(f"{word} {seen[word]}{'' if right[word] else ' (wrong)'}" for word in WORDS),
    )
    return {
        "prompt": prompt,
        "seen": seen,
        "right": right,
        "travel": [round(x, 1) for x in verdict.travel],
    }


def shares(samples):
    """How many of the samples are right, in 0..1, by word."""
    share = {word: sum(s["right"][word] for s in samples) / len(samples) for word in WORDS}
    share["color_and_background"] = sum(
        s["right"]["color"] and s["right"]["background"] for s in samples
    ) / len(samples)
    share["all"] = sum(all(s["right"].values()) for s in samples) / len(samples)
    return share


def psnr(frames, others):
    """Of two uint8 videos, in dB; at most that of one pixel one level apart."""
    error = (frames.double() - others.double()).square().sum().clamp_min(1.0) / frames.numel()
    return 10 * math.log10(255**2 / error.item())
