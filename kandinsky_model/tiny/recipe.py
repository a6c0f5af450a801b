# SPDX-License-Identifier: Apache-2.0
"""Train the bundled tiny checkpoint: VAE, text encoder and diffusion transformer, on clips drawn by
`shapes`.

Stages: `vae` (reconstruct), `pool` (encode clips once), `flow` (flow matching over the pool). Each
leaves a complete, loadable folder behind and one entry in training.json; a later run resumes after
it.
"""

import copy
import itertools
import json
import logging
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..checkpoints.load import load_dit, load_vae, save_dit, save_vae
from ..config import PRESETS
from ..dit.geometry import Grid, frequencies
from ..dit.layout import make_plan
from ..dit.transformer import DiffusionTransformer3D
from ..text.tiny import UNKNOWN, TinyTextEncoder
from ..vae.hunyuan import (
    CausalConv3d,
    Downsample,
    FrameCausalAttention,
    HunyuanVideoVAE,
    ResnetBlock,
    Upsample,
    sample_posterior,
)
from . import scenes as shapes
from .optimizer import Average, Clock, Optimizer, machine, short_attention, training_dtype

logger = logging.getLogger(__name__)
LOG_NAME, POOL_NAME = "training.json", "pool.safetensors"
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
            plans[frames, sparse] = make_plan(
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


def save_networks(networks, folder, preset, dtype=torch.float16):
    """Write transformer/ and text_encoder/ of a bundle, weights stored as `dtype`."""
    save_dit(copy.deepcopy(networks["transformer"]).to(dtype), folder / "transformer", preset.nabla)
    networks["text_encoder"].save(folder / "text_encoder", dtype)


def load_networks(folder):
    """The two networks of a bundle, in fp32 and trainable."""
    dit = load_dit(folder / "transformer", dtype=torch.float32)
    return (
        nn.ModuleDict(
            {"transformer": dit, "text_encoder": TinyTextEncoder.load(folder / "text_encoder")}
        )
        .train()
        .requires_grad_(True)
    )


def write_log(folder, entry):
    """Put a stage's entry into training.json: it replaces an earlier state of the same run (same
    stage and seed), or comes last."""
    stages = [
        old
        for old in read_log(folder)
        if (old["stage"], old["seed"]) != (entry["stage"], entry["seed"])
    ]
    (folder / LOG_NAME).write_text(json.dumps({"stages": [*stages, entry]}, indent=1) + "\n")


def read_log(folder):
    """The stages that training.json of `folder` tells of, none where it is missing."""
    return (
        json.loads((folder / LOG_NAME).read_text())["stages"]
        if (folder / LOG_NAME).is_file()
        else []
    )


def train_tiny(out_dir, seed=2026, vae_plan=None, flow_plan=None, resume=False, device="cpu"):
    """Train the bundle into `out_dir`: vae/, transformer/, text_encoder/ and training.json with
    seed, plans, losses and machine.

    With `resume` an existing vae/ is kept, or trained further where a `vae_plan` is given, and
    existing networks are trained further; each time with a fresh optimizer and other random
    numbers. training.json gets one more entry per stage run, so that it tells how the weights came
    about. Returns the folder. Encoded clips stay in out_dir/pool.safetensors, which is not part of
    the bundle.
    """
    folder, preset = Path(out_dir), PRESETS["tiny"]
    folder.mkdir(parents=True, exist_ok=True)
    if not resume:
        (folder / LOG_NAME).unlink(missing_ok=True)
    vae_known = resume and (folder / "vae").is_dir()
    if vae_plan or not vae_known:
        entry, vae_plan = _entry(folder, "vae", seed, vae_known, vae_plan or VAEPlan())
        start = load_vae(folder / "vae", dtype=torch.float32) if vae_known else None
        vae, losses = train_vae(preset.vae, vae_plan, entry["seed"], device, start)
        save_vae(vae.half(), folder / "vae")
        (folder / POOL_NAME).unlink(missing_ok=True)
        write_log(folder, {**entry, "seconds": losses[-1]["seconds"], "losses": losses})
    flow_plan = flow_plan or FlowPlan()
    pool = make_pool(folder, flow_plan.copies, seed, device)

    known = resume and (folder / "transformer").is_dir()
    networks = (load_networks(folder) if known else new_networks(preset.dit, seed)).to(device)
    entry, flow_plan = _entry(folder, "flow", seed, known, flow_plan)

    def keep(average, losses):
        save_networks(average, folder, preset)
        if losses:
            write_log(
                folder,
                {
                    **entry,
                    "steps": losses[-1]["step"] + 1,
                    "seconds": losses[-1]["seconds"],
                    "losses": losses,
                },
            )

    keep(*train_flow(networks, pool, flow_plan, preset, entry["seed"], keep))
    return folder


def _entry(folder, stage, seed, continued, plan):
    """The head of a stage's log entry, and its plan. The seed grows by one with each earlier run of
    the stage."""
    seed += sum(old["stage"] == stage for old in read_log(folder))
    return {
        "stage": stage,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "seed": seed,
        "machine": machine(),
        "continued": continued,
        "plan": asdict(plan),
    }, plan


def make_pool(folder, copies, seed, device):
    """The pool of `folder`, from its file or encoded now."""
    path, scenes = folder / POOL_NAME, pool_scenes(copies, seed)
    if path.is_file() and len(latents := load_file(path)["latents"]) == len(scenes):
        return Pool(latents, scenes)
    pool = encode_pool(load_vae(folder / "vae", dtype=torch.float32, device=device), scenes)
    save_file({"latents": pool.latents}, path)
    return pool
