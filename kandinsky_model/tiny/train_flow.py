# SPDX-License-Identifier: Apache-2.0
"""Trains the bundled model's transformer and text encoder."""

from __future__ import annotations

import itertools
import logging
import random
from dataclasses import dataclass

import torch
from torch import nn

from ..dit.geometry import Grid, frequencies
from ..dit.layout import make_layout
from ..dit.transformer import DiffusionTransformer3D
from ..text.tiny import UNKNOWN, TinyTextEncoder
from . import scenes as shapes
from .optimizer import Average, Clock, Optimizer, short_attention, training_dtype
from .train_vae import to_video

logger = logging.getLogger(__name__)

ALIASES = {
    "grey": "gray",
    "disc": "circle",
    "disk": "circle",
    "ball": "circle",
    "violet": "purple",
    "upwards": "up",
    "downwards": "down",
}


@dataclass(frozen=True)
class FlowPlan:
    """How text encoder and transformer are trained. `phases` = (steps, clips, latent frames, sparse
    attention).

    boost: see `Optimizer`. drop, unknown: how often a prompt is left out, and a word replaced by
    the unknown one. stars: how many times as often as any other shape a star is shown, the last one
    whose outline is learned. compile: fuse the visual blocks with torch.compile, which needs a C++
    compiler on the CPU. minutes: training ends then at the latest, the learning rate with it.
    """

    rate: float = 2e-3
    boost: float = 2.5
    average: float = 0.995
    copies: int = 3
    phases: tuple = ((2800, 32, 1, False), (2600, 8, 5, False), (700, 8, 5, True))
    drop: float = 0.1
    unknown: float = 0.02
    stars: float = 1.0
    compile: bool = True
    minutes: float | None = None


@dataclass(frozen=True)
class Pool:
    """Encoded training clips: latents fp16 [N, T, h, w, C] and the scene each one shows."""

    latents: torch.Tensor
    scenes: list

    def batch(self, count, frames, generator, stars=1.0):
        """Random clips cut to `frames` latent frames (the VAE is causal, so a prefix is a shorter
        clip), stars `stars` times as often.

        Returns latents fp32 [count, frames, h, w, C] and their combinations.
        """
        weights = [stars if scene.combination.shape == "star" else 1.0 for scene in self.scenes]
        rows = generator.choices(range(len(self.scenes)), weights, k=count)
        return self.latents[rows, :frames].float(), [self.scenes[i].combination for i in rows]


def pool_scenes(copies, seed):
    """The scenes of a pool: every training combination `copies` times, the same ones for the same
    seed."""
    generator = random.Random(seed)
    return [shapes.random_scene(c, generator) for c in shapes.training_combinations() * copies]


@torch.no_grad()
def encode_pool(vae, scenes):
    """Draw and encode scenes, four at a time."""
    device, latents = vae.quant_conv.weight.device, []
    for start in range(0, len(scenes), 4):
        clips = torch.stack([shapes.draw(scene) for scene in scenes[start : start + 4]])
        mean, _ = vae.encode(to_video(clips).to(device))
        latents.append(mean.movedim(1, -1).half().cpu())  # [4, T, h, w, C]
        if start % 100 == 0:
            logger.info("encoded %d of %d clips", start, len(scenes))
    return Pool(torch.cat(latents), scenes)


def vocabulary():
    """Every word that a training prompt can contain, in alphabetical order."""
    texts = [shapes.prompt(c, t) for c in shapes.combinations() for t in range(7)]
    return sorted(set(" ".join(texts).replace(",", " ").split()))


@torch.no_grad()
def start_local(dit, sharpness=1.7, pairs=4):
    """Let each self-attention head start out looking at one place relative to its own token.

    A query and a key with the constant parts u and R(-d) u attend most at distance d, R the rotary
    rotation: a bias of the two layers is all it takes, on the `pairs` fastest frequencies of each
    axis. Rotary angles are the only position this network has; heads that look past the border of
    the frame or clip tell it where the border is, which it is slow to find out by itself.
    """
    axes = dit.config.axes_dims
    places = itertools.cycle(
        [
            (0, 0, -3),
            (0, 0, 3),
            (0, -3, 0),
            (0, 3, 0),
            (-1, 0, 0),
            (1, 0, 0),
            (0, 0, 0),
            None,
            (0, 0, -7),
            (0, 0, 7),
            (0, -7, 0),
            (0, 7, 0),
            (-2, 0, 0),
            (2, 0, 0),
            (0, 0, 0),
            None,
        ]
    )
    strength = torch.cat([(torch.arange(dim // 2) < pairs).float() for dim in axes])  # [D/2]
    strength *= (len(strength) / strength.sum()).sqrt() * 2**0.5
    ladder = torch.cat([frequencies(dim // 2) for dim in axes])
    for block in dit.visual_transformer_blocks:
        attention = block.self_attention
        attention.query_norm.weight.fill_(sharpness)
        attention.key_norm.weight.fill_(sharpness)
        # [H, D/2, 2]
        query, key = (
            layer.bias.view(-1, len(strength), 2)
            for layer in (attention.to_query, attention.to_key)
        )
        for head in range(len(query)):
            place = next(places)
            if place is None:
                continue
            angle = ladder * torch.cat(
                [torch.full((dim // 2,), float(d)) for dim, d in zip(axes, place, strict=True)]
            )
            query[head] = strength[:, None] * torch.tensor([1.0, 0.0])
            key[head] = strength[:, None] * torch.stack([angle.cos(), -angle.sin()], -1)


def new_networks(dit_config, seed):
    """Untrained transformer and text encoder in one module; the transformer starts by predicting
    zero."""
    torch.manual_seed(seed)
    dit = DiffusionTransformer3D(dit_config)
    nn.init.zeros_(dit.out_layer.out_layer.weight)
    nn.init.zeros_(dit.out_layer.out_layer.bias)
    start_local(dit)
    text = TinyTextEncoder(vocabulary(), ALIASES, dit_config.in_text_dim, dit_config.in_text_dim2)
    return nn.ModuleDict({"transformer": dit, "text_encoder": text})


def flow_loss(networks, clean, prompts, plan, times, options):
    """Mean squared error of the velocity noise - clean at x = (1 - t) clean + t noise.

    clean: [B, T, h, w, C]; times: [B] in 0..1; options: (FlowPlan, generator, compute dtype). Only
    the first projection's weight is cast to the compute dtype: activations follow it, every master
    weight and all modulation stay fp32.
    """
    flow, generator, dtype = options
    dit, text, device = networks["transformer"], networks["text_encoder"], clean.device
    sequences = [
        text.tokens("" if generator.random() < flow.drop else prompt) for prompt in prompts
    ]
    sequences = [
        [s[0], *(UNKNOWN if generator.random() < flow.unknown else i for i in s[1:])]
        for s in sequences
    ]
    words = text(sequences)
    noise = torch.randn(clean.shape, device=device)
    t = times[:, None, None, None, None]
    noisy = (1 - t) * clean + t * noise
    condition = noisy.new_zeros(*noisy.shape[:-1], dit.config.in_channels - noisy.shape[-1])
    first = {
        name: dit.get_parameter(name).to(dtype) for name in ("visual_embeddings.in_layer.weight",)
    }
    inputs = (
        torch.cat([noisy, condition], -1),
        words.embeds,
        words.pooled,
        1000 * times,
        plan,
        words.lengths,
    )
    velocity = torch.func.functional_call(dit, first, inputs)
    return (velocity.float() - (noise - clean)).square().mean((1, 2, 3, 4))  # [B]


def sample_times(count, scale):
    """Times as the sampler visits them: u stratified in 0..1, t = scale u / (1 + (scale - 1) u).
    fp32 [count]."""
    u = (torch.randperm(count) + torch.rand(count)) / count
    return scale * u / (1 + (scale - 1) * u)


def train_flow(networks, pool, plan, preset, seed, on_average=None):
    """Train transformer and text encoder on the pool; returns (averaged networks, log of losses).

    on_average(averaged networks, losses) is called after every tenth of the steps, so that
    something loadable exists early. The log holds the mean loss of 20 steps, and of the noisiest
    quarter of their clips, where only the prompt can help.
    """
    torch.manual_seed(seed)
    generator, device = random.Random(seed), next(networks.parameters()).device
    dtype = training_dtype(device)
    schedule = [phase[1:] for phase in plan.phases for _ in range(phase[0])]
    optimizer, average = Optimizer(networks, boost=plan.boost), Average(networks, plan.average)
    clock = Clock(len(schedule), plan.minutes)
    plans, recent = {}, []
    dit = networks["transformer"]
    if plan.compile:  # after the average was copied, so that it stays an ordinary module
        dit.blocks = torch.compile(dit.blocks, dynamic=True)
    for step, (clips, frames, sparse) in enumerate(schedule):
        if clock.progress(step) == 1:
            break
        if (frames, sparse) not in plans:
            grid = Grid(frames, shapes.HEIGHT // 16, shapes.WIDTH // 16)
            plans[frames, sparse] = make_layout(
                preset.dit, grid, preset.scale_factor, preset.nabla if sparse else None, device
            )
        clean, words = pool.batch(clips, frames, generator, plan.stars)
        prompts = [shapes.random_prompt(c, generator) for c in words]
        times = sample_times(clips, preset.scheduler_scale).to(device)
        with short_attention(device):
            losses = flow_loss(
                networks,
                clean.to(device),
                prompts,
                plans[frames, sparse],
                times,
                (plan, generator, dtype),
            )
            optimizer.step(losses.mean(), clock.rate(step, plan.rate))
        average.update(networks, step)
        recent.append(torch.stack([times, losses.detach()]))
        if step % 20 == 19 or step + 1 == len(schedule):
            t, losses = torch.cat(recent, 1)
            clock.record(
                step,
                loss=losses.mean().item(),
                noisy=losses[t >= t.quantile(0.75)].mean().item(),
                frames=frames,
                sparse=sparse,
            )
            recent = []
        if on_average and step % (len(schedule) // 10 + 1) == len(schedule) // 10:
            on_average(average.module, clock.losses)
    if plan.compile:
        del dit.blocks
    return average.module, clock.losses
