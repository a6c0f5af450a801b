# SPDX-License-Identifier: Apache-2.0
"""Training of the tiny model's transformer and text encoder on drawn clips, by flow matching."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import DiTConfig, Preset
from ..dit.geometry import Grid, frequencies
from ..dit.layout import Layout, make_layout
from ..dit.transformer import DiffusionTransformer3D, VisualBlock
from ..text.tiny import UNKNOWN, TinyTextEncoder
from ..vae.hunyuan import HunyuanVideoVAE
from . import scenes
from .optimizer import Average, Clock, Optimizer, short_attention, training_dtype
from .scenes import Combination, Scene
from .train_vae import to_video

logger = logging.getLogger(__name__)

TIME_UNIT = 1000  # the network takes 1000 t
RECORD_EVERY = 20  # steps between two entries of the log
SAVED_TIMES = 10  # `on_average` is called about so many times
ENCODE_BATCH = 4  # clips that the VAE encodes at a time

# Words that the text encoder takes for others, beside those of the prompts.
ALIASES = {
    "grey": "gray",
    "disc": "circle",
    "disk": "circle",
    "ball": "circle",
    "violet": "purple",
    "upwards": "up",
    "downwards": "down",
}

# Where a self-attention head looks at the start, relative to its own token, in tokens along (T, Y,
# X); None leaves a head at its random initialisation. Heads take turns.
PLACES = (
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
)


@dataclass(frozen=True)
class FlowRecipe:
    """How text encoder and transformer are trained.

    rate: the highest learning rate; boost: its factor for matrices, see `Optimizer`.
    average: the decay of the moving average of the weights.
    copies: scenes of each combination in the pool.
    phases: (steps, clips, latent frames, sparse attention).
    drop, unknown: the probabilities that a prompt is left out, and that a word of it is replaced by
        the unknown word.
    stars: how much more often than any other shape a star is shown. Its outline is learned last.
    compile: run the visual blocks under torch.compile, which needs a C++ compiler on the CPU.
    minutes: the training ends after so long, and its learning rate falls to zero by then.
    """

    rate: float = 2e-3
    boost: float = 2.5
    average: float = 0.995
    copies: int = 3
    phases: tuple[tuple[int, int, int, bool], ...] = (
        (2800, 32, 1, False),
        (2600, 8, 5, False),
        (700, 8, 5, True),
    )
    drop: float = 0.1
    unknown: float = 0.02
    stars: float = 1.0
    compile: bool = True
    minutes: float | None = None


@dataclass(frozen=True)
class Pool:
    """Encoded training clips: latents fp16 [n, T, h, w, C], and the scene that each one shows."""

    latents: Tensor
    scenes: list[Scene]

    def batch(
        self,
        count: int,
        frames: int,
        generator: random.Random,
        stars: float = 1.0,
    ) -> tuple[Tensor, list[Combination]]:
        """Random clips, cut to `frames` latent frames: latents fp32 [count, frames, h, w, C] and
        their combinations. A star comes `stars` times as often as another shape.

        The VAE is causal, so the first latent frames are those of a shorter clip.
        """
        weights = [stars if scene.combination.shape == "star" else 1.0 for scene in self.scenes]
        rows = generator.choices(range(len(self.scenes)), weights, k=count)
        combinations = [self.scenes[i].combination for i in rows]
        return self.latents[rows, :frames].float(), combinations


def pool_scenes(copies: int, seed: int) -> list[Scene]:
    """The scenes of a pool: every training combination `copies` times."""
    generator = random.Random(seed)
    combinations = scenes.training_combinations() * copies
    return [scenes.random_scene(combination, generator) for combination in combinations]


@torch.no_grad()
def encode_pool(vae: HunyuanVideoVAE, pool: list[Scene]) -> Pool:
    """Draw scenes and encode them."""
    device = vae.quant_conv.weight.device
    latents = []
    for start in range(0, len(pool), ENCODE_BATCH):
        clips = [scenes.draw(scene) for scene in pool[start : start + ENCODE_BATCH]]
        mean, _ = vae.encode(to_video(torch.stack(clips)).to(device))  # [n, C, T, h, w]
        latents.append(mean.movedim(1, -1).half().cpu())  # [n, T, h, w, C]
        if start % 100 == 0:
            logger.info("encoded %d of %d clips", start, len(pool))
    return Pool(torch.cat(latents), pool)


def vocabulary() -> list[str]:
    """Every word that a training prompt can contain, in alphabetical order."""
    texts = [
        scenes.prompt(combination, wording)
        for combination in scenes.combinations()
        for wording in range(len(scenes.WORDINGS))
    ]
    return sorted(set(" ".join(texts).replace(",", " ").split()))


@torch.no_grad()
def start_local(
    dit: DiffusionTransformer3D,
    sharpness: float = 1.7,
    pairs: int = 4,
) -> None:
    """Let each self-attention head start out looking at one place relative to its own token.

    Let R be the rotation of rotary embeddings. A query with the constant part u and a key with the
    constant part R(-d) u attend most at the distance d, so the biases of the two layers are all it
    takes, on the `pairs` fastest frequencies of each axis. sharpness: the norms' weights.

    Rotary angles are the only positions that this network is given. Heads that look past the border
    of the frame or of the clip tell it where the border is, which it is slow to find out by itself.
    """
    axes = dit.config.axes_dims
    places = itertools.cycle(PLACES)
    strength = torch.cat([(torch.arange(dim // 2) < pairs).float() for dim in axes])  # [D / 2]
    strength *= (len(strength) / strength.sum()).sqrt() * 2**0.5
    ladder = torch.cat([frequencies(dim // 2) for dim in axes])  # [D / 2]
    for block in dit.visual_transformer_blocks:
        attention = cast(VisualBlock, block).self_attention
        attention.query_norm.weight.fill_(sharpness)
        attention.key_norm.weight.fill_(sharpness)
        query = cast(Tensor, attention.to_query.bias).view(-1, len(strength), 2)  # [H, D / 2, 2]
        key = cast(Tensor, attention.to_key.bias).view(-1, len(strength), 2)  # [H, D / 2, 2]
        for head in range(len(query)):
            place = next(places)
            if place is None:
                continue
            distances = [
                torch.full((dim // 2,), float(distance))
                for dim, distance in zip(axes, place, strict=True)
            ]
            angle = ladder * torch.cat(distances)  # [D / 2]
            query[head] = strength[:, None] * torch.tensor([1.0, 0.0])
            key[head] = strength[:, None] * torch.stack([angle.cos(), -angle.sin()], -1)


def new_networks(config: DiTConfig, seed: int) -> nn.ModuleDict:
    """Untrained "transformer" and "text_encoder". The transformer starts by predicting zero."""
    torch.manual_seed(seed)
    dit = DiffusionTransformer3D(config)
    nn.init.zeros_(dit.out_layer.out_layer.weight)
    nn.init.zeros_(dit.out_layer.out_layer.bias)
    start_local(dit)
    text = TinyTextEncoder(
        vocabulary(),
        ALIASES,
        config.in_text_dim,
        config.in_text_dim2,
    )
    return nn.ModuleDict({"transformer": dit, "text_encoder": text})


@dataclass(frozen=True, eq=False)
class Clips:
    """What a step is taken on. clean: latents fp32 [B, T, h, w, C]. prompts: as token numbers.
    times: fp32 [B] in 0..1. layout: of the latents, with dense or sparse attention."""

    clean: Tensor
    prompts: list[list[int]]
    times: Tensor
    layout: Layout


def tokenized(
    text: TinyTextEncoder,
    prompts: Sequence[str],
    recipe: FlowRecipe,
    generator: random.Random,
) -> list[list[int]]:
    """Prompts as token numbers, some of them dropped, and some of their words made unknown."""
    kept = ["" if generator.random() < recipe.drop else prompt for prompt in prompts]
    sequences = []
    for start, *words in map(text.tokens, kept):
        words = [UNKNOWN if generator.random() < recipe.unknown else word for word in words]
        sequences.append([start, *words])
    return sequences


def flow_loss(
    networks: nn.ModuleDict,
    clips: Clips,
    dtype: torch.dtype,
) -> Tensor:
    """The mean square of the velocity's error at x = (1 - t) clean + t noise, of each clip: [B].

    Activations have `dtype`. To that end the first projection's weight is cast, and activations
    follow it; all weights themselves, and the modulations, stay in fp32.
    """
    dit = cast(DiffusionTransformer3D, networks["transformer"])
    words = networks["text_encoder"](clips.prompts)
    clean = clips.clean
    noise = torch.randn(clean.shape, device=clean.device)
    t = clips.times[:, None, None, None, None]  # [B, 1, 1, 1, 1]
    noisy = (1 - t) * clean + t * noise
    extra = dit.config.in_channels - noisy.shape[-1]
    condition = noisy.new_zeros(*noisy.shape[:-1], extra)
    x = torch.cat([noisy, condition], -1)  # [B, T, h, w, in_channels]
    first = "visual_embeddings.in_layer.weight"
    velocity = torch.func.functional_call(
        dit,
        {first: dit.get_parameter(first).to(dtype)},
        (x, words.embeds, words.pooled, TIME_UNIT * clips.times, clips.layout, words.lengths),
    )
    return (velocity.float() - (noise - clean)).square().mean((1, 2, 3, 4))


def sample_times(count: int, scale: float) -> Tensor:
    """Timesteps as the sampler visits them: t = scale u / (1 + (scale - 1) u) with u stratified in
    0..1. fp32 [count]."""
    u = (torch.randperm(count) + torch.rand(count)) / count
    return scale * u / (1 + (scale - 1) * u)


def train_flow(
    networks: nn.ModuleDict,
    pool: Pool,
    recipe: FlowRecipe,
    preset: Preset,
    seed: int,
    on_average: Callable[[nn.ModuleDict, list[dict]], None] | None = None,
) -> tuple[nn.ModuleDict, list[dict]]:
    """Train transformer and text encoder on the pool; returns the averaged networks and the losses.

    on_average: called with both after every tenth of the steps, so that something loadable exists
    early. An entry of the losses is a mean over 20 steps, and over the noisiest quarter of their
    clips, in which only the prompt can help.
    """
    torch.manual_seed(seed)
    generator = random.Random(seed)
    device = next(networks.parameters()).device
    dtype = training_dtype(device)
    schedule = [
        (count, frames, sparse)
        for steps, count, frames, sparse in recipe.phases
        for _ in range(steps)
    ]
    optimizer = Optimizer(networks, boost=recipe.boost)
    average = Average(networks, recipe.average)
    clock = Clock(len(schedule), recipe.minutes)
    layouts: dict[tuple[int, bool], Layout] = {}
    recent = []
    dit: Any = networks["transformer"]  # a method of which is replaced here
    text = cast(TinyTextEncoder, networks["text_encoder"])
    if recipe.compile:  # after the average was copied, which must stay an ordinary module
        dit.blocks = torch.compile(dit.blocks, dynamic=True)
    for step, (count, frames, sparse) in enumerate(schedule):
        if clock.progress(step) == 1:
            break
        if (frames, sparse) not in layouts:
            grid = Grid(frames, scenes.HEIGHT // 16, scenes.WIDTH // 16)
            nabla = preset.nabla if sparse else None
            layouts[frames, sparse] = make_layout(
                preset.dit, grid, preset.scale_factor, nabla, device
            )
        clean, combinations = pool.batch(
            count,
            frames,
            generator,
            recipe.stars,
        )
        prompts = [scenes.random_prompt(one, generator) for one in combinations]
        times = sample_times(count, preset.scheduler_scale).to(device)
        tokens = tokenized(
            text,
            prompts,
            recipe,
            generator,
        )
        clips = Clips(clean.to(device), tokens, times, layouts[frames, sparse])
        with short_attention(device):
            losses = flow_loss(networks, clips, dtype)
            optimizer.step(losses.mean(), clock.rate(step, recipe.rate))
        average.update(networks, step)
        recent.append(torch.stack([times, losses.detach()]))  # [2, B]
        if step % RECORD_EVERY == RECORD_EVERY - 1 or step + 1 == len(schedule):
            t, losses = torch.cat(recent, 1)
            recent = []
            clock.record(
                step,
                loss=losses.mean().item(),
                noisy=losses[t >= t.quantile(0.75)].mean().item(),
                frames=frames,
                sparse=sparse,
            )
        tenth = len(schedule) // SAVED_TIMES
        if on_average and step % (tenth + 1) == tenth:
            on_average(average.module, clock.losses)
    if recipe.compile:
        del dit.blocks
    return average.module, clock.losses
