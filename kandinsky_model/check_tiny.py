# SPDX-License-Identifier: Apache-2.0
"""Ask the tiny checkpoint for combinations it never saw, and measure what it drew."""

import logging

from . import pipeline, shapes
from .locate import TINY

logger = logging.getLogger(__name__)
WORDS = ("color", "background", "shape", "motion")


def draw(combinations, folder=TINY, seed=0, batch=8, **settings):
    """Yield (combination, prompt, video) for each; the i-th uses seed + i. `settings` as `Kandinsky5.generate` takes them."""
    model = pipeline.load(folder)
    for start in range(0, len(combinations), batch):
        wanted = combinations[start : start + batch]
        prompts = [shapes.prompt(c) for c in wanted]
        yield from zip(wanted, prompts, model.generate(prompts, seed=seed + start, **settings), strict=True)


def check_tiny(folder=TINY, seed=0, steps=None, guidance=None, combinations=None):
    """Sample held-out prompts and judge them: {"prompts", "color", "background", "shape", "motion", "samples"}; shares of 1.

    combinations: all 48 held-out ones unless given. A share counts clips whose word is right; "color_and_background" and "all" count
    clips where those words are right together. Logs one line per clip.
    """
    combinations, samples = shapes.held_out() if combinations is None else combinations, []
    for combination, prompt, clip in draw(combinations, folder, seed, num_inference_steps=steps, guidance_scale=guidance):
        verdict = shapes.judge(clip.frames)
        right = shapes.marks(verdict, combination)
        seen = {word: getattr(verdict, word) for word in WORDS}
        samples.append({"prompt": prompt, "seen": seen, "right": right, "travel": [round(x, 1) for x in verdict.travel]})
        logger.info("%s: %s", prompt, ", ".join(f"{word} {seen[word]}{'' if right[word] else ' (wrong)'}" for word in WORDS))
    share = {word: sum(s["right"][word] for s in samples) / len(samples) for word in WORDS}
    share["color_and_background"] = sum(s["right"]["color"] and s["right"]["background"] for s in samples) / len(samples)
    share["all"] = sum(all(s["right"].values()) for s in samples) / len(samples)
    settings = {"seed": seed, "steps": clip.settings.num_inference_steps, "guidance": clip.settings.guidance_scale}
    return {"prompts": len(samples), **share, **settings, "samples": samples}
