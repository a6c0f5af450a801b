# SPDX-License-Identifier: Apache-2.0
"""What NABLA keeps: recorded while a model samples, and drawn as curves over the steps and maps of
blocks."""

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

from .config import NablaConfig
from .dit.transformer import DiffusionTransformer3D
from .media import chart

CURVE = 100  # parts of a mass curve
LARGEST_MAP = 256  # blocks of a side of a map that is kept; larger ones are averaged down to it


class Watch:
    """A context in which every pass of `dit` leaves a record of its selections.

    passes: of the network in a step, 2 with guidance. maps_at: steps whose maps are kept, of the
    pass with the prompt and its first sample. Afterwards, for L layers, n whole steps and H heads,
    all fp32 on the CPU and means over samples and rows: `density` and `mass` [L, n, passes, H], the
    kept share of all blocks and of the pooled map's probability; `curves` [L, H, CURVE + 1], the
    probability in the heaviest share i / CURVE of a row's blocks, mean over steps and passes;
    `maps` {step: [L, H, N, N]}, 1 where a block is kept.
    """

    def __init__(self, dit: DiffusionTransformer3D, passes: int, maps_at: Sequence[int] = ()):
        self._attentions = [block.self_attention for block in dit.visual_transformer_blocks]
        self._heads, self._passes, self._maps_at = dit.config.num_heads, passes, set(maps_at)
        # of each layer the passes, of each pass its groups of heads
        self._seen: list[list[list[dict]]] = [[] for _ in self._attentions]
        self.steps, self.maps = 0, {}

    def __enter__(self) -> Watch:
        for attention, passes in zip(self._attentions, self._seen, strict=True):
            attention.watch = partial(self._see, passes)
        return self

    def __exit__(self, *_) -> None:
        for attention in self._attentions:
            attention.watch = None
        self.steps = min(map(len, self._seen)) // self._passes
        if self.steps:
            self.density, self.mass = (
                self._joined(name).unflatten(1, (-1, self._passes)) for name in ("density", "mass")
            )
            self.curves = self._joined("curve").mean(1)
        for step in sorted(self._maps_at & set(range(self.steps))):
            self.maps[step] = torch.stack(
                [
                    torch.cat([group["map"] for group in passes[step * self._passes]])
                    for passes in self._seen
                ]
            )

    def _see(
        self, passes: list[list[dict]], query_means: Tensor, key_means: Tensor, selection: Tensor
    ) -> None:
        # heads may come in groups
        if not passes or sum(len(group["density"]) for group in passes[-1]) == self._heads:
            passes.append([])
        step, branch = divmod(len(passes) - 1, self._passes)
        passes[-1].append(
            _measure(query_means, key_means, selection, branch == 0 and step in self._maps_at)
        )

    def _joined(self, name: str) -> Tensor:
        """[L, n * passes, H, ...] of what `_measure` calls so."""
        whole = self.steps * self._passes
        return torch.stack(
            [
                torch.stack(
                    [torch.cat([group[name] for group in groups]) for groups in passes[:whole]]
                )
                for passes in self._seen
            ]
        )


@torch.no_grad()
def _measure(
    query_means: Tensor, key_means: Tensor, selection: Tensor, with_map: bool
) -> dict[str, Tensor]:
    """Of some heads [B, H, N, D]; one head's pooled map at a time, as `select_blocks` sees it:
    softmax(query key^T / sqrt(D))."""
    N, D = query_means.shape[2:]
    # of a curve that is linear between whole blocks
    points = torch.arange(CURVE + 1, device=query_means.device) * N / CURVE
    below = points.floor().long().clamp(max=N - 1)
    found: dict[str, list[Tensor]] = {"density": [], "mass": [], "curve": [], "map": []}
    for head in range(query_means.shape[1]):
        # [B, N, N]
        share = torch.softmax(
            query_means[:, head].float() @ key_means[:, head].float().mT / math.sqrt(D), -1
        )
        keep = unpack_selection(selection[:, head : head + 1], N)[:, 0]
        found["density"].append(keep.float().mean())
        found["mass"].append((share * keep).sum(-1).mean())
        sums = pad(share.sort(-1, descending=True).values.mean((0, 1)).cumsum(0), (1, 0))  # [N + 1]
        found["curve"].append(torch.lerp(sums[below], sums[below + 1], points - below))
        if with_map:
            size = min(N, LARGEST_MAP)
            found["map"].append(
                interpolate(keep[:1, None].float(), (size, size), mode="area")[0, 0]
            )
    return {name: torch.stack(tensors).cpu() for name, tensors in found.items() if tensors}


def inspect(
    model,
    prompt: str,
    folder: str | Path,
    keep_mass: float | None = None,
    maps_at: Sequence[int] | None = None,
    **settings,
) -> Watch:
    """Sample `prompt` with `model` (a Kandinsky5) and write to `folder` what NABLA kept; nothing is
    decoded.

    keep_mass: None takes the checkpoint's own, 0.9 where it was trained with dense attention.
    maps_at: steps to draw maps of, None for the first, middle and last. settings: as
    `Kandinsky5.generate` takes them. Files: density.png, mass.png and curves.png, one
    blocks_<step>.png for each step drawn, and numbers.json. Raises RuntimeError without matplotlib,
    ValueError for steps that there are not, and as `generate` does.
    """
    from .config import NABLA_FOR_DENSE

    chart.require()
    nabla, before = model.preset.nabla or NABLA_FOR_DENSE, model.preset
    nabla = nabla if keep_mass is None else NablaConfig(keep_mass, nabla.window)
    steps = settings.get("num_inference_steps") or before.steps
    maps_at = sorted({0, steps // 2, steps - 1}) if maps_at is None else list(maps_at)
    if wrong := [step for step in maps_at if not 0 <= step < steps]:
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
    draw(
        watch,
        folder,
        {
            "prompt": prompt,
            "model": model.name,
            "keep_mass": nabla.keep_mass,
            "window": list(nabla.window),
        },
    )
    return watch


def draw(watch: Watch, folder: Path, about: dict) -> None:
    """The pictures and numbers of `inspect`; `about` goes into numbers.json as well."""
    density, mass = (x.mean((2, 3)) for x in (watch.density, watch.mass))  # [L, n]
    what = f"{about['model']}, keep_mass {about['keep_mass']:g}"
    steps, shares = range(watch.steps), torch.linspace(0, 1, CURVE + 1).tolist()
    blocks = "share of a row's blocks, heaviest first"
    for name, title, values, xs, x, y in (
        ("density", "Density", density, steps, "step", "kept blocks / all blocks"),
        ("mass", "Mass", mass, steps, "step", "kept probability"),
        ("curves", "Where the probability is", watch.curves.mean(1), shares, blocks, "probability"),
    ):
        figure = chart.figure()
        axes = figure.subplots()
        chart.describe(axes, f"{title}: {what}", x, y)
        chart.curves(
            axes,
            {
                f"layer {i}": list(zip(xs, layer, strict=True))
                for i, layer in enumerate(values.tolist())
            },
        )
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
