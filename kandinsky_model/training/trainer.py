# SPDX-License-Identifier: Apache-2.0
"""`kandinsky train`: a LoRA or all weights of a checkpoint, fitted to a folder of clips or pictures
with captions.

The loss is the mean square of the velocity's error at x = (1 - t) clean + t noise, as in `sampler`.
In a folder of its own, a run leaves what it made after every so many steps, a curve of its losses,
samples, and in `training/` its state and the cache of its data.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoints.load import load_dit
from ..checkpoints.locate import locate
from ..config import NABLA_FOR_DENSE, NablaConfig
from ..devices.available import choose_device, free_bytes
from ..devices.budget import Weights
from ..devices.parallel import processes
from ..dit.accounting import Job
from ..dit.geometry import Grid
from ..dit.layout import Layout, make_layout
from ..dit.transformer import DiffusionTransformer3D
from ..files import remove_leftovers
from ..sampling.given import model_input, with_frames
from ..sampling.sampler import TIME_UNIT
from ..text.embeddings import Conditioning
from .adapters import attach, switched_off
from .batches import Batch, Draws, Passes, draw
from .budget import Trained, plan_training
from .cache import Cache, Sample, Wanted
from .config import TrainConfig
from .data import Bad, find_items
from .network import Computation, TrainNetwork
from .outputs import save_lora, save_model
from .report import Gallery, save_curve
from .state import State, read_about

_log = logging.getLogger(__name__)
STATE, FREE = (
    "state.safetensors",
    (
        "steps",
        "save_every",
        "sample_every",
        "samples",
        "memory_budget",
        "device",
        "bad_data",
        "cache",
    ),
)
DEFAULTS = TrainConfig()
SHIFTS = {"t2i": 3.0, "i2i": 3.0}  # of the published trainer; 5 for videos


def train(
    data: str | Path, out: str | Path, config: TrainConfig = DEFAULTS, resume: bool = False
) -> Path:
    """Train on the folder `data`, as `train_data` describes it, and return the folder `out` with
    what came of it.

    A LoRA is `lora.safetensors` with `config_lora.json`, in official form; all weights are a
    model's folder, with links to the parts that were not trained. resume: go on from the state in
    `out`, with the same settings, to the same bits as if never stopped; `steps` and how often
    things are written may differ. Under `torchrun` the processes share the passes of every step.
    Raises ValueError for settings, data or a state that do not fit, OSError for files, RuntimeError
    when the loss stops being finite.
    """
    with processes(config.device) as (rank, world, device):
        run = Run(Path(data), Path(out), replace(config, device=device), rank, world)
        run.begin(resume)
        while run.state.step < config.steps:
            run.advance()
        return run.out


class Run:
    """A training in one process, or in one of `world`. The first of them writes."""

    def __init__(self, data: Path, out: Path, config: TrainConfig, rank: int = 0, world: int = 1):
        if config.passes % world:
            raise ValueError(
                f"the passes of a step must be a multiple of the {world} processes "
                f"that share them, got {config.passes}; "
                f"give for example {-(-config.passes // world) * world}"
            )
        self.data, self.out, self.config, self.rank, self.world = data, out, config, rank, world
        self.device, self.sources = choose_device(config.device), locate(config.model)
        self.preset = self.sources.preset
        if config.distill == "guidance" and self.preset.guidance == 1:
            raise ValueError(
                "guidance is distilled from a checkpoint that uses it, but "
                f"{self.preset.name} has none; choose another"
            )
        self.dtype = (
            torch.bfloat16
            if (config.dtype or ("bf16" if self.device.type == "cuda" else "fp32")) == "bf16"
            else torch.float32
        )
        self.place = out / "training" / STATE
        self.layouts: dict[tuple, Layout] = {}
        # bytes of the memory budget beside weights and what is trained
        self.left: int | None = None

    def begin(self, resume: bool) -> None:
        """Everything before the first step."""
        self.about, about = asdict(self.config), self._check_state(resume)
        self._compare(about)
        self.samples = self._samples()
        self.about["data"] = [sample.latents.name + sample.text.name for sample in self.samples]
        self._compare(about)
        self.passes = Passes(self.samples, self.config.batch, self.config.seed)
        self.network, self.parameters = self._network()
        config = self.config
        self.state = State(self.parameters, config.rate, config.betas, config.decay, config.ema)
        if resume:
            self.state.load(self.place)
        shown = replace(self.preset, guidance=1.0) if config.distill == "guidance" else self.preset
        self.gallery = Gallery(
            self.out / "samples",
            replace(self.sources, preset=shown),
            self.samples[: config.samples],
            self.device,
            config.sample_steps,
            config.seed,
        )
        count = sum(parameter.numel() for parameter in self.parameters.values())
        self._tell(
            "training %s numbers on %d samples in %d sizes, %d steps done",
            f"{count:,}",
            len(self.samples),
            len(self.passes.buckets),
            self.state.step,
        )

    def _check_state(self, resume: bool) -> dict:
        if resume and not self.place.is_file():
            raise FileNotFoundError(
                "a training is resumed from its state, but there is no "
                f"{self.place}; leave out --resume to begin one"
            )
        if not resume and self.place.is_file():
            raise ValueError(
                f"{self.out} holds a training already; go on with it by --resume, or "
                "choose another folder"
            )
        self.place.parent.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            for folder in (self.out, self.place.parent):
                remove_leftovers(folder)
        return read_about(self.place) if resume else {}

    def _compare(self, about: dict) -> None:
        """ValueError unless the state, if there is one, is of a run like this one, as far as that
        is known by now."""
        now = json.loads(json.dumps(self.about))
        for name in (
            name for name in now if about and name not in FREE and about.get(name) != now[name]
        ):
            if name == "data":
                raise ValueError(
                    "a training goes on with the data it began with, but "
                    f"{self.data} has changed; restore it, or begin anew"
                )
            raise ValueError(
                f"a training goes on with the settings it began with, but {name} was "
                f"{about.get(name)} and is {now[name]}; "
                "give it as before, or begin anew in another folder"
            )

    def _samples(self) -> list[Sample]:
        config, preset = self.config, self.preset
        trigger, lengths = (
            config.lora.trigger if config.lora else "",
            config.lengths or (preset.frames,),
        )
        if preset.vae is None and max(lengths) > 1 or preset.task == "i2v" and min(lengths) == 1:
            does = (
                "makes pictures, of 1 frame"
                if preset.vae is None
                else ("learns what follows a first frame, in 5 frames or more")
            )
            raise ValueError(
                f"{preset.name} {does}, got lengths of "
                f"{', '.join(map(str, lengths))}; leave them out"
            )
        wanted = Wanted(config.sizes or preset.sizes, lengths, trigger, config.null_prompt)
        folder = Path(config.cache or self.place.parent / "cache")
        cache = Cache(folder, self.sources, wanted, self.device, self.dtype, config.memory_budget)
        bad = Bad(config.bad_data)
        items = find_items(self.data, bad, edits=preset.task == "i2i")
        cache.fill(items[self.rank :: self.world], bad)
        self._wait()
        samples = cache.samples(items)
        if not samples:
            raise ValueError(
                f"{self.data} must hold something to train on, but all {len(items)} "
                "files were skipped; see the warnings"
            )
        return samples

    def _network(self) -> tuple[TrainNetwork, dict[str, torch.nn.Parameter]]:
        config, full = self.config, self.config.lora is None
        dit = load_dit(self.sources.dit, dtype=torch.float32 if full else self.dtype)
        dit.compute_dtype, self.preset = self.dtype, replace(self.preset, dit=dit.config)
        way = self._way(dit)
        self.teacher = network = TrainNetwork(dit if full else dit.prepare(), self.device, way)
        if not full:
            return network, attach(dit, config.lora, config.seed, self.device)
        if config.distill:
            self.teacher = TrainNetwork(copy.deepcopy(dit), self.device, way)
        return network, dict(dit.train().requires_grad_(True).named_parameters())

    def _way(self, dit: DiffusionTransformer3D) -> Computation:
        """How passes are computed: so that memory suffices for the largest samples, or, where there
        is no limit, with everything kept."""
        config, budget = self.config, self.config.memory_budget or free_bytes(self.device)
        checkpoint = budget is not None if config.checkpointing is None else config.checkpointing
        if budget is None or not checkpoint:
            return Computation(checkpoint)
        T, h, w = max((sample.shape for sample in self.samples), key=math.prod)
        tokens = self.preset.text_max_length * (2 if self.preset.task == "i2i" else 1)
        job = Job(
            dit.config,
            Grid(T, h // 2, w // 2),
            self.dtype,
            config.batch,
            nabla=self.nabla is not None,
            text_tokens=tokens,
            on_cpu=self.device.type == "cpu",
        )
        weights, trained = Weights.of(dit), Trained.of(dit, config)
        placement = plan_training(job, weights, trained, budget)
        stage = placement.stages["training"]
        self._tell("%s", placement)
        self.left = budget - stage.weights - trained.state
        return stage.computation

    @property
    def nabla(self) -> NablaConfig | None:
        """The sparse attention that is trained, if any."""
        wanted = self.config.attention or (
            "nabla" if self.preset.nabla or self.config.distill == "dense" else "dense"
        )
        return (self.preset.nabla or NABLA_FOR_DENSE) if wanted == "nabla" else None

    def layout(self, shape: tuple[int, int, int], dense: bool = False) -> Layout:
        """For latents of T, h, w: with the attention that is trained, or dense."""
        key = (shape, dense)
        if key not in self.layouts:
            T, h, w = shape
            nabla = None if dense else self.nabla
            self.layouts[key] = make_layout(
                self.preset.dit,
                Grid(T, h // 2, w // 2),
                self.preset.scale_factor,
                nabla,
                self.device,
            )
        return self.layouts[key]

    def advance(self) -> None:
        """One step, and what is due after it."""
        config, first = self.config, self.state.step * self.config.passes
        count = sum(len(self.passes[first + i]) for i in range(config.passes))
        total = torch.zeros((), dtype=torch.float64)
        for i in range(self.rank, config.passes, self.world):
            loss = self._losses(self.drawn(first + i)).sum() / count
            loss.backward()
            total += loss.item()
        self._add_up(total)
        if not torch.isfinite(total):
            raise RuntimeError(
                f"the loss must stay finite, but step {self.state.step + 1} gave "
                f"{total.item()}; go on from the last state "
                "with a smaller rate, and check the data"
            )
        self.state.update(
            config.rate * min(1.0, (self.state.step + 1) / max(1, config.warmup)),
            config.clip,
            total.item(),
        )
        self._after()

    def drawn(self, index: int) -> Batch:
        """The samples of a pass, with their random numbers."""
        guided = self.config.distill == "guidance"  # of which a caption that is left out has none
        how = Draws(
            self.config.seed,
            self.config.shift or SHIFTS.get(self.preset.task, 5.0),
            0.0 if guided else self.config.drop,
            guided,
        )
        return draw(self.passes[index], how, self.preset.task, self.device)

    def _losses(self, batch: Batch) -> Tensor:
        """[B]: of each sample; frames that are given do not count."""
        frames = batch.given.frames
        x = model_input(self.network.dit, with_frames(batch.noisy, frames), batch.given)
        shape = tuple(x.shape[1:4])
        wanted = self._taught(x, batch) if self.config.distill else batch.noise - batch.clean
        error = (
            self._velocity(self.network, x, batch.times, batch.cond, self.layout(shape)) - wanted
        )
        return error[:, len(frames) :].square().mean((1, 2, 3, 4))

    def _velocity(
        self, network: TrainNetwork, x: Tensor, times: Tensor, text: Conditioning, layout: Layout
    ) -> Tensor:
        return network(x, text.embeds, text.pooled, TIME_UNIT * times, layout, text.lengths).float()

    @torch.no_grad()
    def _taught(self, x: Tensor, batch: Batch) -> Tensor:
        """The velocity of the checkpoint as it was, with dense attention or with guidance."""
        shape = tuple(x.shape[1:4])
        with switched_off(self.teacher.dit):
            if self.config.distill == "dense":
                return self._velocity(
                    self.teacher, x, batch.times, batch.cond, self.layout(shape, dense=True)
                )
            told, untold = (
                self._velocity(self.teacher, x, batch.times, text, self.layout(shape))
                for text in (batch.cond, batch.null)
            )
        return untold + self.preset.guidance * (told - untold)

    def _add_up(self, total: Tensor) -> None:
        """The loss and the gradients of all processes, in each. The loss first: it waits longer for
        a process that draws samples."""
        if self.world > 1:
            dist.all_reduce(total)
            for parameter in self.parameters.values():
                dist.all_reduce(parameter.grad)

    def _wait(self) -> None:
        if self.world > 1:
            dist.all_reduce(torch.zeros(()))

    def _after(self) -> None:
        """Write what is due."""
        config, step = self.config, self.state.step
        if step % 10 == 0 or step == config.steps:
            recent = self.state.losses[-10:]
            self._tell("step %d of %d, loss %.4g", step, config.steps, sum(recent) / len(recent))
        if self.rank:
            return
        if step % config.save_every == 0 or step == config.steps:
            self.save()
        if config.sample_every and (step % config.sample_every == 0 or step == config.steps):
            self._show(step)

    def _show(self, step: int) -> None:
        """Samples; a training of days does not end for the want of one."""
        try:
            with self.state.averaged(), torch.no_grad():
                for path in self.gallery.show(self.network, self.layout, step, self.left):
                    _log.info("%s", path)
        except (ValueError, OSError, RuntimeError) as error:
            _log.warning("no samples after step %d: %s", step, error)

    def _draw_losses(self) -> None:
        """The curve; a training goes on without what it takes to draw one."""
        try:
            save_curve(self.state.losses, self.out / "loss.png")
        except RuntimeError as error:
            _log.warning("no curve of the losses: %s", error)

    def save(self) -> None:
        """The state, what can be used of it, and the curve. OSError where they cannot be written;
        what was there before then stays."""
        try:
            self.state.save(self.place, self.about)
            if self.config.lora:
                save_lora(
                    self.out, self.state.result, self.config.lora, self.dtype, self.sources.name
                )
            else:
                save_model(self.out, self.network.dit, self.state.result, self.sources, self.dtype)
            self._draw_losses()
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"a training must be able to write to {self.out}, but after step "
                f"{self.state.step} got {error}; make room, and "
                "go on with --resume from the state before"
            ) from None

    def _tell(self, line: str, *values) -> None:
        if self.rank == 0:
            _log.info(line, *values)
