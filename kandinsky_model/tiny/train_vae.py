# SPDX-License-Identifier: Apache-2.0
"""Training of the tiny model's VAE on drawn clips."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from ..config import VAEConfig
from ..vae.hunyuan import HunyuanVideoVAE, sample_posterior
from ..vae.layers import CausalConv3d, Downsample, FrameCausalAttention, ResnetBlock, Upsample
from . import scenes
from .optimizer import Average, Clock, Optimizer, training_dtype


@dataclass(frozen=True)
class VAERecipe:
    """How the VAE is trained.

    rate: the highest learning rate. kl_weight: of the distance to N(0, 1). average: the decay of
    the moving average of the weights. phases: (steps, clips, frames, side in pixels) of the crops
    that a step is taken on: first stills, then clips, whole ones last.
    """

    rate: float = 4e-3
    kl_weight: float = 1e-3
    average: float = 0.99
    phases: tuple[tuple[int, int, int, int], ...] = (
        (1400, 16, 1, 32),
        (400, 8, 1, 64),
        (900, 2, 17, 64),
        (300, 1, 17, 128),
        (30, 1, 17, 160),
    )


def to_video(frames: Tensor) -> Tensor:
    """uint8 [..., F, H, W, 3] -> fp32 [..., 3, F, H, W] in -1..1."""
    return (frames.float() / 127.5 - 1).movedim(-1, -4)


def crop_batch(
    clips: int,
    frames: int,
    side: int,
    generator: random.Random,
) -> Tensor:
    """Random windows of training clips near the object: fp32 [clips, 3, frames, side, side] in
    -1..1."""
    batch = []
    for _ in range(clips):
        scene = scenes.training_scene(generator.randrange(10**6), generator)
        first = generator.randrange(scenes.FRAMES - frames + 1)
        # where the object is in the middle of these frames
        along = scene.travel * (first + frames / 2) / scenes.FRAMES
        dx, dy = scenes.MOTIONS[scene.combination.motion]
        left = scene.start[0] + dx * along - side / 2 + generator.uniform(-60, 60)
        top = scene.start[1] + dy * along - side / 2 + generator.uniform(-60, 60)
        window = (
            int(min(max(top, 0), scenes.HEIGHT - side)),
            int(min(max(left, 0), scenes.WIDTH - side)),
            side,
            side,
        )
        batch.append(scenes.draw(scene, range(first, first + frames), window))
    return to_video(torch.stack(batch))


def vae_loss(
    vae: HunyuanVideoVAE,
    video: Tensor,
    kl_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, L1, KL) of video [B, 3, F, H, W].

    The loss is the L1 and the L2 of the reconstruction, and kl_weight times the mean
    Kullback-Leibler distance of the posterior to N(0, 1).
    """
    mean, logvar = vae.encode(video)
    mean = mean.float()
    logvar = logvar.float().clamp(-30, 20)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    error = vae.decode(sample_posterior(mean, logvar)).float() - video
    l1 = error.abs().mean()
    return l1 + error.square().mean() + kl_weight * kl, l1, kl


def _bias(layer: nn.Conv3d) -> Tensor:
    """The bias, which every convolution of the VAE has."""
    return cast(Tensor, layer.bias)


@torch.no_grad()
def start_linear(vae: HunyuanVideoVAE) -> None:
    """Initialise a VAE as a linear resampler: every residual branch is zero, and every change of
    size keeps its channels.

    Group norms hide flat colours from the branches; the path around the branches carries colours
    from the first step on. The posterior starts narrow, because its noise would otherwise drown the
    latents until the encoder has learned to make them large.
    """
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] *= 0.1
    _bias(vae.quant_conv)[channels:] = -5.0
    binomial = torch.tensor([0.25, 0.5, 0.25])
    blur = torch.zeros(3, 3, 3)
    blur[2] = binomial.outer(binomial)  # of the newest frame
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.conv.weight)
            nn.init.zeros_(_bias(module.conv2.conv))
        elif isinstance(module, FrameCausalAttention):
            nn.init.zeros_(module.to_out[0].weight)
        elif isinstance(module, (Downsample, Upsample)):
            weight = module.conv.conv.weight  # [C, C, 3, 3, 3]
            same = torch.eye(len(weight))[:, :, None, None, None]
            weight.mul_(0.2).add_(same * blur)


@torch.no_grad()
def fold_time(vae: HunyuanVideoVAE) -> None:
    """Move the whole temporal weight of each convolution to its newest tap. The encoding of a still
    picture does not change.

    Stills teach only the sum of the taps. Spread evenly over three of them, it delays a clip by a
    frame in every layer, by more than the clip's length in all.
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.conv.kernel_size[0] == 3:
            weight = module.conv.weight  # [out, in, 3, 3, 3]
            weight[:, :, 2] = weight.sum(2)
            weight[:, :, :2] = 0


def train_vae(
    config: VAEConfig,
    recipe: VAERecipe,
    seed: int,
    device: str = "cpu",
    start: HunyuanVideoVAE | None = None,
) -> tuple[HunyuanVideoVAE, list[dict]]:
    """Train a VAE of `config`, or go on with the VAE `start`.

    Returns the averaged VAE, whose latents are centred and have unit variance, and the losses.
    """
    torch.manual_seed(seed)
    generator = random.Random(seed)
    dtype = training_dtype(device)
    vae = start
    if vae is None:
        vae = HunyuanVideoVAE(replace(config, scaling_factor=1.0))
        start_linear(vae)
    vae.train().requires_grad_(True).to(device)
    schedule = [crop for steps, *crop in recipe.phases for _ in range(steps)]
    optimizer = Optimizer(vae)
    average = Average(vae, recipe.average)
    clock = Clock(len(schedule))
    frames_before = None
    for step, (clips, frames, side) in enumerate(schedule):
        if frames_before == 1 and frames > 1:
            fold_time(vae)
        frames_before = frames
        video = crop_batch(clips, frames, side, generator).to(device)
        with torch.autocast(video.device.type, dtype, enabled=dtype != torch.float32):
            loss, l1, kl = vae_loss(vae, video, recipe.kl_weight)
        optimizer.step(loss, clock.rate(step, recipe.rate))
        average.update(vae, step)
        if step % 20 == 0:
            clock.record(step, l1=l1.item(), kl=kl.item(), side=side)
    center_latents(average.module, generator)
    return average.module, clock.losses


@torch.no_grad()
def center_latents(
    vae: HunyuanVideoVAE,
    generator: random.Random,
    clips: int = 24,
) -> None:
    """Fold the mean of each channel of the latents, and their common deviation, into the two 1x1x1
    convolutions around them, so that the scaling factor is exactly 1."""
    device = vae.quant_conv.weight.device
    means = []
    for _ in range(clips):
        video = crop_batch(
            1,
            scenes.FRAMES,
            scenes.HEIGHT,
            generator,
        ).to(device)
        means.append(vae.encode(video)[0])
    latents = torch.cat(means)  # [clips, C, T, h, w]
    shift = latents.mean((0, 2, 3, 4))  # [C]
    scale = 1 / (latents - shift[:, None, None, None]).std()
    channels = len(shift)
    before = vae.quant_conv
    after = vae.post_quant_conv
    bias_before = _bias(before)
    bias_after = _bias(after)
    bias_after += after.weight[:, :, 0, 0, 0] @ shift
    after.weight /= scale
    bias_before[:channels] -= shift
    before.weight[:channels] *= scale
    bias_before[:channels] *= scale
    bias_before[channels:] += 2 * scale.log()  # the logarithm of the variance
