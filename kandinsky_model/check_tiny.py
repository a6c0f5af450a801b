# SPDX-License-Identifier: Apache-2.0
"""Ask the tiny checkpoint for combinations it never saw, and measure what it drew."""

import logging
from collections import deque
from pathlib import Path

import torch

from . import shapes
from .config import PRESETS
from .dit import make_plan
from .geometry import Grid
from .sampler import Conditioning, Sampling, noise, sample
from .text import TinyTextEncoder
from .train import training_dtype
from .train_tiny import to_frames
from .weights import load_dit, load_vae

logger = logging.getLogger(__name__)
BUNDLE = Path(__file__).with_name("tiny")
WORDS = ("color", "background", "shape", "motion")


class Sampler:
    """The three networks of a bundle folder, ready to turn prompts into frames of the preset's size.

    dtype: of transformer and VAE activations; None asks `training_dtype`. Prompts sampled together share the passes.
    """

    def __init__(self, folder=BUNDLE, dtype=None, device="cpu", dense=False):
        self.preset, folder = PRESETS["tiny"], Path(folder)
        self.dtype, self.device = dtype or training_dtype(device), device
        self.dit = load_dit(folder / "transformer", dtype=self.dtype, device=device)
        self.vae = load_vae(folder / "vae", dtype=self.dtype, device=device)
        self.text = TinyTextEncoder.load(folder / "text_encoder").to(device)
        self.grid = Grid((shapes.FRAMES - 1) // 4 + 1, shapes.HEIGHT // 16, shapes.WIDTH // 16)
        self.plan = make_plan(self.dit.config, self.grid, self.preset.scale_factor, None if dense else self.preset.nabla, device)

    @torch.no_grad()
    def __call__(self, prompts, seed=0, steps=None, guidance=None):
        """Sample each prompt with noise of seed, seed + 1, ... Returns uint8 [B, F, H, W, 3] on the CPU."""
        preset, channels = self.preset, self.dit.config.in_visual_dim
        shape = (1, self.grid.T, 2 * self.grid.Y, 2 * self.grid.X, channels)
        initial = torch.cat([noise(seed + i, shape, self.device) for i in range(len(prompts))])
        sampling = Sampling(steps or preset.steps, preset.scheduler_scale, preset.guidance if guidance is None else guidance)
        encoded = (self.text.encode(prompts), self.text.encode([""] * len(prompts)))
        cond, uncond = (Conditioning(e.embeds, e.lengths, e.pooled) for e in encoded)
        ((_, latents),) = deque(sample(self.dit, initial, cond, self.plan, sampling, uncond), maxlen=1)
        latents = latents.movedim(-1, 1).to(self.dtype) / self.vae.config.scaling_factor  # [B, C, T, h, w]
        return torch.stack([to_frames(self.vae.decode(one[None])[0]).cpu() for one in latents])


def check_tiny(folder=BUNDLE, seed=0, steps=None, guidance=None, combinations=None, batch=4):
    """Sample held-out prompts and judge them: {"prompts", "color", "background", "shape", "motion", "samples"}; shares of 1.

    combinations: all 48 held-out ones unless given. A share counts clips whose word is right; "color_and_background" and "all" count
    clips where those words are right together. Logs one line per clip.
    """
    combinations = shapes.held_out() if combinations is None else combinations
    sampler, samples = Sampler(folder), []
    for start in range(0, len(combinations), batch):
        wanted = combinations[start : start + batch]
        prompts = [shapes.prompt(c) for c in wanted]
        for combination, prompt, clip in zip(wanted, prompts, sampler(prompts, seed + start, steps, guidance), strict=True):
            verdict = shapes.judge(clip)
            right = shapes.marks(verdict, combination)
            seen = {word: getattr(verdict, word) for word in WORDS}
            samples.append({"prompt": prompt, "seen": seen, "right": right, "travel": [round(x, 1) for x in verdict.travel]})
            logger.info("%s: %s", prompt, ", ".join(f"{word} {seen[word]}{'' if right[word] else ' (wrong)'}" for word in WORDS))
    share = {word: sum(s["right"][word] for s in samples) / len(samples) for word in WORDS}
    share["color_and_background"] = sum(s["right"]["color"] and s["right"]["background"] for s in samples) / len(samples)
    share["all"] = sum(all(s["right"].values()) for s in samples) / len(samples)
    settings = {"seed": seed, "steps": steps or sampler.preset.steps, "guidance": sampler.preset.guidance if guidance is None else guidance}
    return {"prompts": len(samples), **share, **settings, "samples": samples}
