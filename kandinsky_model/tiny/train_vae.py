# SPDX-License-Identifier: Apache-2.0
"""Trains the bundled model's VAE."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..vae.hunyuan import HunyuanVideoVAE, sample_posterior
from ..vae.layers import CausalConv3d, Downsample, FrameCausalAttention, ResnetBlock, Upsample
from . import scenes as shapes
from .optimizer import Average, Clock, Optimizer, training_dtype


@dataclass(frozen=True)
class VAEPlan:
    """How the VAE is trained. `phases` = (steps, clips, frames, side in pixels): still crops first,
    then clips, whole ones last."""

    rate: float = 4e-3
    kl_weight: float = 1e-3
    average: float = 0.99
    phases: tuple = (
        (1400, 16, 1, 32),
        (400, 8, 1, 64),
        (900, 2, 17, 64),
        (300, 1, 17, 128),
        (30, 1, 17, 160),
    )


def to_video(frames):
    """uint8 [..., F, H, W, 3] -> fp32 [..., 3, F, H, W] in -1..1."""
    return (frames.float() / 127.5 - 1).movedim(-1, -4)


def to_frames(video):
    """[3, F, H, W] in about -1..1 -> uint8 [F, H, W, 3]."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(0, -1)


def crop_batch(clips, frames, side, generator):
    """Random windows of training clips near the object: fp32 [clips, 3, frames, side, side] in
    -1..1."""
    batch = []
    for _ in range(clips):
        scene = shapes.training_scene(generator.randrange(10**6), generator)
        first = generator.randrange(shapes.FRAMES - frames + 1)
        along = scene.travel * (first + frames / 2) / shapes.FRAMES
        dx, dy = shapes.MOTIONS[scene.combination.motion]
        left = scene.start[0] + dx * along - side / 2 + generator.uniform(-60, 60)
        top = scene.start[1] + dy * along - side / 2 + generator.uniform(-60, 60)
        window = (
            int(min(max(top, 0), shapes.HEIGHT - side)),
            int(min(max(left, 0), shapes.WIDTH - side)),
            side,
            side,
        )
        batch.append(shapes.draw(scene, range(first, first + frames), window))
    return to_video(torch.stack(batch))


def vae_loss(vae, video, kl_weight):
    """L1 + L2 of the reconstruction + kl_weight * mean Kullback-Leibler distance to N(0, 1).
    Returns (loss, l1, kl)."""
    mean, logvar = vae.encode(video)
    mean, logvar = mean.float(), logvar.float().clamp(-30, 20)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    error = vae.decode(sample_posterior(mean, logvar)).float() - video
    l1 = error.abs().mean()
    return l1 + error.square().mean() + kl_weight * kl, l1, kl


@torch.no_grad()
def start_linear(vae):
    """Initialise so that the untrained VAE is a linear resampler: every residual branch is zero,
    every sampler keeps its channels.

    Group norms hide flat colours from the branches; the path around them carries colours from the
    first step on. The posterior starts narrow, or its noise would drown the latents until the
    encoder has learned to shout.
    """
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] *= 0.1
    vae.quant_conv.bias[channels:] = -5.0
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.conv.weight)
            nn.init.zeros_(module.conv2.conv.bias)
        elif isinstance(module, FrameCausalAttention):
            nn.init.zeros_(module.to_out[0].weight)
        elif isinstance(module, (Downsample, Upsample)):
            weight = module.conv.conv.weight  # [C, C, 3, 3, 3]
            last = torch.zeros(3, 3, 3)
            last[2] = torch.tensor([0.25, 0.5, 0.25]).outer(torch.tensor([0.25, 0.5, 0.25]))
            weight.mul_(0.2).add_(torch.eye(len(weight))[:, :, None, None, None] * last)


@torch.no_grad()
def fold_time(vae):
    """Give each convolution's whole temporal weight to its newest tap; what a still picture yields
    does not change.

    Stills teach only the sum of the taps, and spread evenly it delays a clip by a frame per layer,
    by more than its length in all.
    """
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.conv.kernel_size[0] == 3:
            weight = module.conv.weight  # [out, in, 3, 3, 3]
            weight[:, :, 2] = weight.sum(2)
            weight[:, :, :2] = 0


def train_vae(config, plan, seed, device="cpu", start=None):
    """Train a VAE of `config`, or train on from the VAE `start`; returns (vae with centred latents
    of unit variance, losses)."""
    torch.manual_seed(seed)
    generator, dtype = random.Random(seed), training_dtype(device)
    vae = start
    if start is None:
        vae = HunyuanVideoVAE(replace(config, scaling_factor=1.0))
        start_linear(vae)
    vae.train().requires_grad_(True).to(device)
    schedule = [phase[1:] for phase in plan.phases for _ in range(phase[0])]
    optimizer, average, clock = Optimizer(vae), Average(vae, plan.average), Clock(len(schedule))
    for step, shape in enumerate(schedule):
        if step and shape[1] > 1 and schedule[step - 1][1] == 1:
            fold_time(vae)
        video = crop_batch(*shape, generator).to(device)
        with torch.autocast(video.device.type, dtype, enabled=dtype != torch.float32):
            loss, l1, kl = vae_loss(vae, video, plan.kl_weight)
        optimizer.step(loss, clock.rate(step, plan.rate))
        average.update(vae, step)
        if step % 20 == 0:
            clock.record(step, l1=l1.item(), kl=kl.item(), side=shape[2])
    center_latents(average.module, generator)
    return average.module, clock.losses


@torch.no_grad()
def center_latents(vae, generator, clips=24):
    """Fold mean and overall deviation of the latents into the two 1x1x1 convolutions, so that
    scaling_factor is exactly 1."""
    device = vae.quant_conv.weight.device
    latents = torch.cat(
        [
            vae.encode(crop_batch(1, shapes.FRAMES, shapes.HEIGHT, generator).to(device))[0]
            for _ in range(clips)
        ]
    )
    shift = latents.mean((0, 2, 3, 4))  # [C]
    scale = 1 / (latents - shift[:, None, None, None]).std()
    channels, after = len(shift), vae.post_quant_conv
    after.bias += after.weight[:, :, 0, 0, 0] @ shift
    after.weight /= scale
    vae.quant_conv.bias[:channels] -= shift
    vae.quant_conv.weight[:channels] *= scale
    vae.quant_conv.bias[:channels] *= scale
    vae.quant_conv.bias[channels:] += 2 * scale.log()
