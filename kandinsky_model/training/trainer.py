# SPDX-License-Identifier: Apache-2.0
"""A LoRA, or all weights of a checkpoint, fitted to a folder of clips or pictures with captions.

The output folder gets the result, a curve of the losses, samples, and in `training/` the state to
resume from and the cache of the data.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from ..checkpoints.configs import infer_dit_config, read_dit_config
from ..checkpoints.headers import find_weights, read_headers
from ..checkpoints.load import empty_dit, load_dit
from ..checkpoints.locate import locate
from ..config import DiTConfig
from ..devices.available import choose_device, free_bytes
from ..devices.budget import Weights
from ..devices.parallel import processes
from ..dit.accounting import Job
from ..dit.geometry import Grid
from ..dit.transformer import DiffusionTransformer3D
from ..files import remove_leftovers
from .adapters import attach, check_rank
from .batches import Batch, Draws, Passes, draw
from .budget import Trained, TrainingWay, plan_training
from .cache import Cache, Sample, Wanted
from .config import TrainConfig
from .data import Bad, find_items
from .network import Computation, TrainNetwork
from .objective import Objective, trained_attention
from .optimizers import check_optimizer
from .outputs import save_lora, save_model
from .report import Gallery, save_curve
from .state import State, read_about

DEFAULTS = TrainConfig()
FOLDER, STATE, CACHE = "training", "state.safetensors", "cache"  # in the output folder
# settings that a resumed training may change, because no bit of the result depends on them
FREE = (
    "steps",
    "save_every",
    "sample_every",
    "samples",
    "memory_budget",
    "device",
    "bad_data",
    "cache",
)
# the shift of the timesteps by task, as in the published trainer
SHIFTS = {"t2i": 3.0, "i2i": 3.0}
VIDEO_SHIFT = 5.0
TOLD_EVERY = 10  # steps between two lines about the loss, which is a mean over them

_log = logging.getLogger(__name__)


def train(
    data: str | Path,
    out: str | Path,
    config: TrainConfig = DEFAULTS,
    resume: bool = False,
) -> Path:
    """Train on the folder `data`, laid out as `training.data` describes, and return the folder
    `out`.

    A LoRA is written to `out` as `lora.safetensors` and `config_lora.json`; all weights are written
    as a model's folder, with links to the parts that were not trained. Under `torchrun` the
    processes share the passes of every step.

    resume: go on from the state in `out`, to the same bits as without the interruption. The
    settings must be the same, except for `steps` and for when and where things are written.

    Raises ValueError for settings, data or a state that do not fit, OSError for files that cannot
    be read or written, RuntimeError when the loss stops being finite.
    """
    with processes(config.device) as (rank, world, device):
        trainer = Trainer(
            Path(data),
            Path(out),
            replace(config, device=device),
            rank,
            world,
        )
        trainer.begin(resume)
        while trainer.state.step < config.steps:
            trainer.advance()
        return trainer.out


class Trainer:
    """A training in the process `rank` of `world` that share it. The first one writes.

    `begin` does everything before the first step; then each `advance` takes a step.
    """

    def __init__(
        self,
        data: Path,
        out: Path,
        config: TrainConfig,
        rank: int = 0,
        world: int = 1,
    ):
        if config.passes % world:
            raise ValueError(
                f"the passes of a step must be a multiple of the {world} processes that share "
                f"them, got {config.passes}; give for example {-(-config.passes // world) * world}"
            )
        self.data = data
        self.out = out
        self.config = config
        self.rank = rank
        self.world = world
        self.device = choose_device(config.device)
        self.sources = locate(config.model)
        self.preset = self.sources.preset
        assert self.sources.dit is not None  # all parts were located
        self.weights = self.sources.dit
        if config.distill == "guidance" and self.preset.guidance == 1:
            raise ValueError(
                "guidance is distilled from a checkpoint that uses it, "
                f"but {self.preset.name} has none; choose another"
            )
        usual = "bf16" if self.device.type == "cuda" else "fp32"
        narrow = (config.dtype or usual) == "bf16"
        self.dtype = torch.bfloat16 if narrow else torch.float32
        check_optimizer(config)
        self.preset = replace(self.preset, dit=_described(self.weights))
        if config.lora:
            check_rank(empty_dit(self.preset.dit), config.lora)
        self.place = out / FOLDER / STATE
        self.spare: int | None = None  # bytes of the memory budget that samples may use

    def begin(self, resume: bool) -> None:
        """Prepare everything before the first step: data, network and state."""
        config = self.config
        self.about = asdict(config)
        earlier = self._check_state(resume)
        self._compare(earlier)
        samples = self._samples()
        self.about["data"] = [sample.latents.name + sample.text.name for sample in samples]
        self._compare(earlier)
        unknown = sorted(earlier.keys() - self.about.keys())
        if unknown:
            raise ValueError(
                f"a training goes on with the settings it began with, but {unknown[0]!r:.80} is "
                "none that this version knows; use the version that began it, or begin anew"
            )
        self.passes = Passes(samples, config.batch, config.seed)

        dit = load_dit(self.weights, dtype=self.dtype if config.lora else torch.float32)
        dit.compute_dtype = self.dtype
        computation = self._computation(dit, samples)
        self.parameters = self._attach(dit, computation)
        self.state = State(self.parameters, config)
        if resume:
            self.state.load(self.place)

        shown = replace(self.preset, guidance=1.0) if config.distill == "guidance" else self.preset
        self.gallery = Gallery(
            self.out / "samples",
            replace(self.sources, preset=shown),
            samples[: config.samples],
            self.device,
            config,
        )
        self._tell(
            "training %s numbers on %d samples in %d sizes, %d steps done",
            f"{sum(parameter.numel() for parameter in self.parameters.values()):,}",
            len(samples),
            len(self.passes.buckets),
            self.state.step,
        )
        if resume and self.rank == 0:
            self._restore()

    def _restore(self) -> None:
        """Write again what is made from the state. A process that was killed after it had written
        the state may have left older results, or none."""
        self._save_results()
        samples = self.gallery.paths(self.state.step)
        if self._samples_due() and not all(path.is_file() for path in samples):
            self._show()

    def _check_state(self, resume: bool) -> dict:
        """What the training to resume was about, or {}. Leftovers of a killed process go."""
        if resume and not self.place.is_file():
            raise FileNotFoundError(
                f"a training is resumed from its state, but there is no {self.place}; "
                "leave out --resume to begin one"
            )
        if not resume and self.place.is_file():
            raise ValueError(
                f"{self.out} holds a training already; "
                "go on with it by --resume, or choose another folder"
            )
        try:
            self.place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"the output {self.out} must be a folder that can be written, got {error}; "
                "choose another"
            ) from None
        if self.rank == 0:
            for folder in (self.out, self.place.parent):
                remove_leftovers(folder)
        return read_about(self.place) if resume else {}

    def _compare(self, earlier: dict) -> None:
        """ValueError where the training to resume, if any, was about something else than this one,
        as far as `about` is complete by now."""
        if not earlier:
            return
        # a state from before a setting existed was made with its default
        earlier = asdict(DEFAULTS) | earlier
        free = set(FREE)
        if self.config.schedule != "constant":
            free.remove("steps")  # which all learning rates depend on
        for name, now in json.loads(json.dumps(self.about)).items():
            before = earlier.get(name)
            if name in free or before == now:
                continue
            if name == "data":
                raise ValueError(
                    f"a training goes on with the data it began with, but {self.data} has "
                    "changed; restore it, or begin anew"
                )
            raise ValueError(
                f"a training goes on with the settings it began with, but {name} was {before} "
                f"and is {now}; give it as before, or begin anew in another folder"
            )

    def _samples(self) -> list[Sample]:
        """The data, encoded. The processes share the work."""
        config = self.config
        preset = self.preset
        lengths = config.lengths or (preset.frames,)
        self._check_lengths(lengths)
        trigger = config.lora.trigger if config.lora else ""
        sizes = config.sizes or preset.sizes
        wanted = Wanted(sizes, lengths, trigger, config.null_prompt)
        folder = Path(config.cache or self.place.with_name(CACHE))
        cache = Cache(
            folder,
            self.sources,
            wanted,
            self.device,
            self.dtype,
            config.memory_budget,
        )
        bad = Bad(config.bad_data)
        # what a training writes is not data, even where its output lies among the data
        written = [self.out / "samples", self.place.parent]
        if self.out.resolve() != self.data.resolve():
            written.append(self.out)
        items = find_items(self.data, bad, preset.task == "i2i", written)
        cache.fill(items[self.rank :: self.world], bad)
        self._wait()
        samples = cache.samples(items)
        if not samples:
            raise ValueError(
                f"{self.data} must hold something to train on, "
                f"but all {len(items)} files were skipped; see the warnings"
            )
        return samples

    def _check_lengths(self, lengths: tuple[int, ...]) -> None:
        preset = self.preset
        if preset.vae is None and max(lengths) > 1:
            does = "makes pictures, of 1 frame"
        elif preset.task == "i2v" and min(lengths) == 1:
            does = "learns what follows a first frame, in 5 frames or more"
        else:
            return
        raise ValueError(
            f"{preset.name} {does}, got lengths of {', '.join(map(str, lengths))}; leave them out"
        )

    def _computation(self, dit: DiffusionTransformer3D, samples: list[Sample]) -> Computation:
        """How passes are computed, so that memory suffices for the largest samples. Where memory is
        not limited, everything is kept."""
        config = self.config
        budget = config.memory_budget or free_bytes(self.device)
        checkpoint = budget is not None if config.checkpointing is None else config.checkpointing
        if budget is None or not checkpoint:
            return Computation(checkpoint)
        T, h, w = max((sample.shape for sample in samples), key=math.prod)
        # an editing model's text encoder also sees the picture, which takes as many tokens again
        texts = 2 if self.preset.task == "i2i" else 1
        job = Job(
            dit.config,
            Grid(T, h // 2, w // 2),
            self.dtype,
            config.batch,
            nabla=trained_attention(config, self.preset) is not None,
            text_tokens=self.preset.text_max_length * texts,
            on_cpu=self.device.type == "cpu",
        )
        trained = Trained.of(dit, config)
        placement = plan_training(job, Weights.of(dit), trained, budget)
        way = placement.stages["training"]
        assert isinstance(way, TrainingWay)
        self._tell("%s", placement)
        self.spare = budget - way.weights - trained.state
        return way.computation

    def _attach(
        self, dit: DiffusionTransformer3D, computation: Computation
    ) -> dict[str, torch.nn.Parameter]:
        """Make the network and its objective, and return the parameters in training by name."""
        config = self.config
        device = self.device
        if config.lora:
            self.network = TrainNetwork(dit.prepare(), device, computation)
            parameters = attach(dit, config.lora, config.seed, device)
            teacher = self.network
        else:
            self.network = teacher = TrainNetwork(dit, device, computation)
            if config.distill:
                teacher = TrainNetwork(copy.deepcopy(dit), device, computation)
            parameters = dict(dit.train().requires_grad_(True).named_parameters())
        self.objective = Objective(self.network, teacher, config, self.preset)
        return parameters

    def advance(self) -> None:
        """Take one step, and write what is due after it."""
        config = self.config
        step = self.state.step
        first = step * config.passes
        samples = sum(len(self.passes[first + i]) for i in range(config.passes))
        total = torch.zeros((), dtype=torch.float64)
        for i in range(self.rank, config.passes, self.world):
            loss = self.objective.losses(self.drawn(first + i)).sum() / samples
            loss.backward()
            total += loss.item()
        self._add_up(total)
        if not torch.isfinite(total):
            raise RuntimeError(
                f"the loss must stay finite, but step {step + 1} gave {total.item()}; "
                "go on from the last state with a smaller rate, and check the data"
            )
        self.state.update(total.item())
        self._after()

    def drawn(self, index: int) -> Batch:
        """The samples of pass `index`, with their random numbers."""
        config = self.config
        guided = config.distill == "guidance"  # which a dropped caption would have none of
        draws = Draws(
            config.seed,
            config.shift or SHIFTS.get(self.preset.task, VIDEO_SHIFT),
            0.0 if guided else config.drop,
            guided,
        )
        return draw(self.passes[index], draws, self.preset.task, self.device)

    def _add_up(self, total: Tensor) -> None:
        """Sum the loss and the gradients over the processes.

        The loss comes first. It is on the CPU, where the timeout is the longer one, and the others
        may have to wait for the first process while that draws samples.
        """
        if self.world > 1:
            dist.all_reduce(total)
            for parameter in self.parameters.values():
                dist.all_reduce(parameter.grad)

    def _wait(self) -> None:
        """Wait for the other processes."""
        if self.world > 1:
            dist.all_reduce(torch.zeros(()))

    def _after(self) -> None:
        """Write what is due after this step."""
        config, step = self.config, self.state.step
        last = step == config.steps
        if step % TOLD_EVERY == 0 or last:
            recent = self.state.losses[-TOLD_EVERY:]
            self._tell("step %d of %d, loss %.4g", step, config.steps, sum(recent) / len(recent))
        if self.rank:
            return
        if step % config.save_every == 0 or last:
            self.save()
        if self._samples_due():
            self._show()

    def _samples_due(self) -> bool:
        every, step = self.config.sample_every, self.state.step
        return every > 0 and (step % every == 0 or step == self.config.steps)

    def _show(self) -> None:
        """Draw samples. A training of days does not end because they cannot be drawn."""
        step = self.state.step
        layout_of = self.objective.layout
        try:
            with self.state.averaged(), torch.no_grad():
                for path in self.gallery.show(self.network, layout_of, step, self.spare):
                    _log.info("%s", path)
        except (ValueError, OSError, RuntimeError) as error:
            _log.warning("no samples after step %d: %s", step, error)

    def _draw_losses(self) -> None:
        """Draw the curve. A training goes on without the library that draws it."""
        try:
            save_curve(self.state.losses, self.out / "loss.png")
        except RuntimeError as error:
            _log.warning("no curve of the losses: %s", error)

    def save(self) -> None:
        """Write the state, then the results, which `_restore` can make from it. OSError where they
        cannot be written; the files that were there before stay."""
        with self._writing():
            self.state.save(self.place, self.about)
        self._save_results()

    def _save_results(self) -> None:
        """Write the weights and the curve of the losses."""
        result, lora = self.state.result, self.config.lora
        with self._writing():
            if lora:
                save_lora(self.out, result, lora, self.dtype, self.sources.name)
            else:
                save_model(self.out, self.network.dit, result, self.sources, self.dtype)
            self._draw_losses()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One sentence for a file that cannot be written in the body."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise OSError(
                f"a training must be able to write to {self.out}, but after step "
                f"{self.state.step} got {error}; make room, and go on with --resume "
                "from the state before"
            ) from None

    def _tell(self, line: str, *values: object) -> None:
        if self.rank == 0:
            _log.info(line, *values)


def _described(path: Path) -> DiTConfig:
    """The configuration of a transformer, from its config.json or the shapes of its tensors."""
    files, folder = find_weights(path, "transformer")
    config, _ = read_dit_config(folder)
    return config or infer_dit_config(read_headers(files))
