# SPDX-License-Identifier: Apache-2.0
"""What NABLA keeps, recorded while a model samples, and drawn as curves over the steps and as maps
of blocks. B samples, H heads, N blocks, D head dim, L layers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from kandinsky_kernels import unpack_selection

from .config import NABLA_FOR_DENSE, NablaConfig
from .dit.transformer import DiffusionTransformer3D
from .media import chart

CURVE = 100  # parts that the share of a row's blocks is divided into, for the mass curve
FILES = ("density.png", "mass.png", "curves.png", "numbers.json")  # besides blocks_<step>.png
LARGEST_MAP = 256  # a map of more blocks a side is averaged down to this before it is kept


class Watch:
    """A context in which every pass of `dit` leaves a record of the blocks that it selects.

    passes: how often the network runs in a step, 2 with guidance. maps_at: steps whose maps are
    kept, of the pass with the prompt and the first sample. After n whole steps it has, in fp32 on
    the CPU and as means over samples and rows:

    - `density` [L, n, passes, H], the kept share of all blocks;
    - `mass` [L, n, passes, H], the probability in the kept blocks, by the map of block means;
    - `curves` [L, H, CURVE + 1], the probability in the heaviest i / CURVE of a row's blocks, as
      a mean over steps and passes;
    - `maps` {step: [L, H, N, N]}, 1 where a block is kept.
    """

    def __init__(
        self,
        dit: DiffusionTransformer3D,
        passes: int,
        maps_at: Sequence[int] = (),
    ):
        self._attentions = dit.attentions
        self._heads = dit.config.num_heads
        self._passes = passes
        self._maps_at = set(maps_at)
        # For each layer its passes, for each pass its groups of heads, for each group what
        # `measure` gave.
        self._seen: list[list[list[dict[str, Tensor]]]] = [[] for _ in self._attentions]
        self.steps = 0
        self.maps: dict[int, Tensor] = {}

    def __enter__(self) -> Watch:
        for attention, passes in zip(self._attentions, self._seen, strict=True):
            attention.watch = partial(self._see, passes)
        return self

    def __exit__(self, *_) -> None:
        for attention in self._attentions:
            attention.watch = None
        self.steps = min(map(len, self._seen)) // self._passes
        if self.steps:
            self.density = self._joined("density").unflatten(1, (-1, self._passes))
            self.mass = self._joined("mass").unflatten(1, (-1, self._passes))
            self.curves = self._joined("curve").mean(1)
        for step in sorted(self._maps_at & set(range(self.steps))):
            layers = [_heads(passes[step * self._passes], "map") for passes in self._seen]
            self.maps[step] = torch.stack(layers)  # [L, H, N, N]

    def _see(
        self,
        passes: list[list[dict[str, Tensor]]],
        query_means: Tensor,
        key_means: Tensor,
        selection: Tensor,
    ) -> None:
        """Called by one layer, whose `passes` these are, for some of its heads or all."""
        if not passes or sum(len(group["density"]) for group in passes[-1]) == self._heads:
            passes.append([])  # the pass before has all its heads
        step, branch = divmod(len(passes) - 1, self._passes)
        with_map = branch == 0 and step in self._maps_at
        passes[-1].append(
            measure(
                query_means,
                key_means,
                selection,
                with_map,
            )
        )

    def _joined(self, name: str) -> Tensor:
        """[L, n * passes, H, ...]: what `measure` calls `name`, of all whole steps."""
        whole = self.steps * self._passes
        layers = [[_heads(groups, name) for groups in passes[:whole]] for passes in self._seen]
        return torch.stack([torch.stack(layer) for layer in layers])


def _heads(groups: list[dict[str, Tensor]], name: str) -> Tensor:
    """[H, ...]: what `measure` calls `name`, of all groups of heads of one pass."""
    return torch.cat([group[name] for group in groups])


@torch.no_grad()
def measure(
    query_means: Tensor,
    key_means: Tensor,
    selection: Tensor,
    with_map: bool,
) -> dict[str, Tensor]:
    """Density, mass and curve of some heads, and with_map what is kept: [H], [H], [H, CURVE + 1],
    [H, N, N].

    query_means, key_means: [B, H, N, D]; selection: packed, of the same heads. Probabilities are
    those that `select_blocks` sees, softmax(query_means key_means^T / sqrt(D)), made for one head
    at a time.
    """
    N, D = query_means.shape[2:]
    # Where a curve is read: it is linear between whole numbers of blocks.
    points = torch.arange(CURVE + 1, device=query_means.device) * N / CURVE
    below = points.floor().long().clamp(max=N - 1)
    found: dict[str, list[Tensor]] = {
        "density": [],
        "mass": [],
        "curve": [],
        "map": [],
    }
    for head in range(query_means.shape[1]):
        query = query_means[:, head].float()  # [B, N, D]
        key = key_means[:, head].float()  # [B, N, D]
        share = torch.softmax(query @ key.mT / math.sqrt(D), -1)  # [B, N, N]
        keep = unpack_selection(selection[:, head : head + 1], N)[:, 0]  # bool [B, N, N]
        found["density"].append(keep.float().mean())
        found["mass"].append((share * keep).sum(-1).mean())
        heaviest = share.sort(-1, descending=True).values.mean((0, 1))  # [N]
        sums = pad(heaviest.cumsum(0), (1, 0))  # [N + 1]
        found["curve"].append(torch.lerp(sums[below], sums[below + 1], points - below))
        if with_map:
            size = min(N, LARGEST_MAP)
            first = keep[:1, None].float()  # [1, 1, N, N]
            found["map"].append(interpolate(first, (size, size), mode="area")[0, 0])
    return {name: torch.stack(tensors).cpu() for name, tensors in found.items() if tensors}


def inspect(
    model,
    prompt: str,
    folder: str | Path,
    keep_mass: float | None = None,
    maps_at: Sequence[int] | None = None,
    **settings,
) -> Watch:
    """Sample `prompt` with `model` (a Kandinsky5) and write to `folder` what NABLA kept. Nothing is
    decoded.

    keep_mass: None takes the checkpoint's own, 0.9 where it was trained with dense attention.
    maps_at: steps to draw maps of, None for the first, middle and last. settings: as
    `Kandinsky5.generate` takes them. Files: density.png, mass.png and curves.png, one
    blocks_<step>.png for each step drawn, and numbers.json. Raises RuntimeError without matplotlib,
    ValueError for steps that the run does not have, and as `generate` does.
    """
    chart.require()
    before = model.preset
    nabla = before.nabla or NABLA_FOR_DENSE
    if keep_mass is not None:
        nabla = NablaConfig(keep_mass, nabla.window)
    steps = settings.get("num_inference_steps") or before.steps
    maps_at = sorted({0, steps // 2, steps - 1}) if maps_at is None else list(maps_at)
    wrong = [step for step in maps_at if not 0 <= step < steps]
    if wrong:
        raise ValueError(
            f"maps can be drawn of the steps 0 to {steps - 1}, got {wrong[0]}; name others"
        )
    guidance = settings.get("guidance_scale")
    guided = (before.guidance if guidance is None else guidance) != 1
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.preset = replace(before, nabla=nabla)
    try:
        with Watch(model.dit, 2 if guided else 1, maps_at) as watch:
            model.generate(prompt, attention="nabla", **settings)
    finally:
        model.preset = before
    about = {
        "prompt": prompt,
        "model": model.name,
        "keep_mass": nabla.keep_mass,
        "window": list(nabla.window),
    }
    draw(watch, folder, about)
    return watch


def draw(
    watch: Watch,
    folder: Path,
    about: dict,
) -> None:
    """Write the pictures and numbers of `inspect`; `about` goes into numbers.json as well."""
    what = f"{about['model']}, keep_mass {about['keep_mass']:g}"
    density = watch.density.mean((2, 3))  # [L, n]
    mass = watch.mass.mean((2, 3))  # [L, n]
    curves = watch.curves.mean(1)  # [L, CURVE + 1]
    steps = range(watch.steps)
    shares = torch.linspace(0, 1, CURVE + 1).tolist()
    blocks = "share of a row's blocks, heaviest first"
    for name, title, values, xs, x, y in (
        ("density", "Density", density, steps, "step", "kept blocks / all blocks"),
        ("mass", "Mass", mass, steps, "step", "kept probability"),
        ("curves", "Where the probability is", curves, shares, blocks, "probability"),
    ):
        layers = {
            f"layer {i}": list(zip(xs, layer, strict=True))
            for i, layer in enumerate(values.tolist())
        }
        figure = chart.figure()
        axes = figure.subplots()
        chart.describe(axes, f"{title}: {what}", x, y)
        chart.curves(axes, layers)
        figure.savefig(folder / f"{name}.png")
    for step, maps in watch.maps.items():
        title = f"Kept blocks (white) at step {step}: queries down, keys across"
        figure = chart.grid_of_maps(maps, title, "layer", "head")
        figure.savefig(folder / f"blocks_{step:03}.png")
    numbers = {
        **about,
        "density": watch.density.tolist(),
        "mass": watch.mass.tolist(),
        "curves": watch.curves.tolist(),
        "axes": "density, mass: layer, step, pass (prompt, negative), head; curves: layer, "
        "head, share of blocks in percent",
    }
    (folder / "numbers.json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")
