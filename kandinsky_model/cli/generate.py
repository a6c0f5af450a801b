# SPDX-License-Identifier: Apache-2.0
"""Commands that make videos and pictures: generate, resume, decode and inspect."""

from __future__ import annotations

import logging
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import PRESETS
from ..files import read_limited
from .interrupts import INTERRUPTS
from .progress import Progress
from .saving import check_apart, check_not_inputs, save_somewhere

if TYPE_CHECKING:
    import torch

    from ..checkpoints.locate import Sources
    from ..config import Preset
    from ..pipeline import Kandinsky5
    from ..sampling.result import Video
    from ..sampling.settings import Settings

# The loggers that say what an option does: how many steps a cache saved, what an expanded prompt
# says, what lies where within a memory budget.
SPOKEN_FOR = {
    "cache": "kandinsky_model.sampling.step_cache",
    "expand": "kandinsky_model.text.qwen_clip",
    "memory": "kandinsky_model.pipeline",
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """One video to make. arguments: of `Kandinsky5.generate`, as JSON values. strip: where some of
    its frames go side by side."""

    output: Path
    strip: Path | None
    arguments: Mapping[str, Any]

    def stored(self) -> dict[str, Any]:
        """What a run file keeps of a job that is still to be done."""
        strip = self.strip and self.strip.name
        return {"output": self.output.name, "strip": strip, "arguments": dict(self.arguments)}

    @classmethod
    def of(cls, stored: Mapping[str, Any], beside: Path) -> Job:
        """The job that was stored, with its files beside another. Of their paths only the names
        count, so that a run file that somebody else wrote cannot choose a folder."""
        output = beside.with_name(Path(stored["output"]).name)
        strip = stored["strip"] and beside.with_name(Path(stored["strip"]).name)
        return cls(output, strip or None, stored["arguments"])


# generate


def generate(args: Namespace) -> None:
    from ..devices import parallel

    wanted = _wanted(args, _prompts(args))
    with parallel.processes(args.device) as (rank, world, device):
        # All processes share the run of one video, or each makes videos of its own.
        together = world > 1 and len(wanted) == 1 and not args.prompts
        writes = rank == 0 or not together
        model, jobs = _prepared(args, wanted, device, is_helper=not writes)
        model.together = together
        own = jobs if together else jobs[rank::world]
        for i, job in enumerate(own):
            _generate(model, job, own[i + 1 :], args.memory_budget, writes)


def _generate(
    model: Kandinsky5, job: Job, rest: Sequence[Job], memory_budget: int | None, writes: bool = True
) -> None:
    """Make one video. rest: the jobs to come. writes: whether this process is the one that writes
    it and shows progress."""
    with Progress(writes) as progress:
        with INTERRUPTS.guarded(), _interrupted_run_is_kept(job.output if writes else None, rest):
            callback = _holding_at_the_end(progress)
            result = model.generate(**job.arguments, callback=callback, memory_budget=memory_budget)
            assert not isinstance(result, list), "one prompt gives one video"
            latents = _save_latents(result, job.output) if writes else None
        if latents is not None:
            _finish(result, job, latents, progress)


def _holding_at_the_end(progress: Progress):
    """`progress`, which lets interruptions wait once the last step is done: latents come next."""

    def callback(stage, step, steps, latents) -> None:
        if stage == "sampling" and step == steps:
            INTERRUPTS.hold()
        progress(stage, step, steps, latents)

    return callback


def _settings(args: Namespace) -> dict[str, Any]:
    """The settings of `Kandinsky5.generate`; None where the command line says nothing."""
    width, height = args.size or (None, None)
    frames = args.frames
    if args.seconds is not None:
        frames = 4 * round(6 * args.seconds) + 1  # 24 frames per second, four to a latent frame
    return dict(
        negative_prompt=args.negative,
        seed=args.seed,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        scheduler_scale=args.scheduler_scale,
        attention=args.attention,
        precision=args.precision,
        cache=args.cache,
        vae_policy=args.vae_policy,
    )


def _prompts(args: Namespace) -> list[str]:
    """The prompt, or those of the file."""
    if (args.prompt is None) == (args.prompts is None):
        what = "neither" if args.prompt is None else "both"
        raise ValueError(
            f"generate takes a prompt or a file of prompts, got {what}; give one of them"
        )
    prompts = [args.prompt] if args.prompts is None else _lines(args.prompts)
    if not prompts:
        raise ValueError(
            f"a file of prompts has one on each line, got none in {args.prompts}; write some"
        )
    for prompt in prompts:
        _check_text("prompt", prompt)
    _check_text("negative prompt", args.negative)
    return prompts


def _lines(path: str) -> list[str]:
    """The lines of a file in UTF-8 that say something; of stdin for "-"."""
    data = sys.stdin.buffer.read() if path == "-" else read_limited(Path(path))
    lines = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            lines.append(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"a file of prompts must be UTF-8, but line {number} of {path} is not "
                f"({error.reason}); convert it, for example with iconv"
            ) from None
    return [line for line in lines if line]


def _check_text(name: str, text: str | None) -> None:
    """Raise ValueError for bytes of the command line that were no UTF-8."""
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {name} must be UTF-8, but its character {error.start + 1} is not; set the "
            "terminal to UTF-8"
        ) from None


def _wanted(args: Namespace, prompts: Sequence[str]) -> list[tuple[str, int | None]]:
    """Prompt and seed of every video, with settings that fit: each prompt with each of the seeds,
    or with --seed plus its own number."""
    from ..sampling.settings import check_settings

    if args.seeds is None:
        first = args.seed
        wanted = [(one, None if first is None else first + i) for i, one in enumerate(prompts)]
    else:
        wanted = [(prompt, seed) for prompt in prompts for seed in _seeds(args)]
    for prompt, seed in wanted:
        check_settings(prompt, **_settings(args) | {"seed": seed})
    return wanted


def _seeds(args: Namespace) -> Sequence[int]:
    if isinstance(args.seeds, int):
        first = args.seed or 0
        return range(first, first + args.seeds)
    if args.seed is not None:
        raise ValueError(
            "a list of seeds needs no other seed, got --seeds and --seed; leave one of them out"
        )
    return args.seeds


def _prepared(
    args: Namespace,
    wanted: Sequence[tuple[str, int | None]],
    device_name: str | None,
    is_helper: bool,
) -> tuple[Kandinsky5, list[Job]]:
    """The model, and what it is to make. All that can be checked without weights is checked first.

    is_helper: whether another process reads prompts, decodes and writes.
    """
    from ..checkpoints.locate import PARTS, locate
    from ..devices.available import choose_device

    _speak_for(args)
    jobs = _jobs(args, wanted) if args.output else None
    _check_files(args)
    if args.model in PRESETS:
        _check_preset(args, PRESETS[args.model])  # before anything is downloaded
    device = choose_device(device_name)
    parts = ("dit",) if is_helper else PARTS
    places = _places(args)
    sources = locate(args.model, args.revision, places=places, parts=parts, preset=args.preset)
    _check_preset(args, sources.preset)
    if jobs is None:
        args.output = "out.png" if sources.preset.vae is None else "out.mp4"
        jobs = _jobs(args, wanted)
    return _loaded(args, sources, device), jobs


def _places(args: Namespace) -> dict[str, str]:
    """Where parts lie that do not lie with the model."""
    names = ("vae", "text_encoder", "clip")
    given = {name: getattr(args, name, None) for name in names}
    return {name: place for name, place in given.items() if place}


def _speak_for(args: Namespace) -> None:
    """Let the loggers of the chosen options speak."""
    chosen = {
        "cache": args.cache not in (None, "none"),
        "expand": args.expand,
        "memory": args.memory_budget,
    }
    for option, name in SPOKEN_FOR.items():
        if chosen[option]:
            logging.getLogger(name).setLevel(logging.INFO)


def _jobs(args: Namespace, wanted: Sequence[tuple[str, int | None]]) -> list[Job]:
    """Where each video goes, if it could be written now. Several have numbers."""
    from ..media import video
    from ..sampling.result import latents_path

    is_single = len(wanted) == 1 and args.prompts is None

    def named(name: str, i: int) -> Path:
        path = Path(name)
        return path if is_single else path.with_name(f"{path.stem}_{i:03}{path.suffix}")

    jobs = []
    for i, (prompt, seed) in enumerate(wanted):
        output = video.check_output(named(args.output, i))
        latents = video.check_output(latents_path(output), (".safetensors",))
        strip = video.check_output(named(args.strip, i), (".png",)) if args.strip else None
        written = [output, latents, _run_path(output), *([strip] if strip else [])]
        check_not_inputs(written, _inputs(args))
        if strip:
            check_apart(output, strip)
        arguments = _arguments(args) | {"prompt": prompt, "seed": seed}
        jobs.append(Job(output, strip, arguments))
    return jobs


def _arguments(args: Namespace) -> dict[str, Any]:
    """What all videos of a command have in common. Paths are absolute, because a run file may be
    gone on with from another folder."""
    return _settings(args) | {
        "image": args.image and str(Path(args.image).absolute()),
        "last_image": args.last_image and str(Path(args.last_image).absolute()),
        "expand_prompt": args.expand,
    }


def _inputs(args: Namespace) -> list[str | None]:
    """The files that `generate` and `inspect` read."""
    adapters = [path for path, _ in args.lora]
    names = ("image", "last_image", "prompts", "config", "model")
    files = [getattr(args, name, None) for name in names]
    return [*files, *_places(args).values(), *adapters]


def _check_files(args: Namespace) -> None:
    """Raise for pictures that cannot be read and adapters that are not there."""
    from ..checkpoints.lora import find_adapter
    from ..media.picture import read_image

    for path in (args.image, args.last_image):
        if path is not None:
            read_image(path)
    for path, _ in args.lora:
        find_adapter(path)


def _check_preset(args: Namespace, preset: Preset) -> None:
    """Raise ValueError for a cache that the preset lacks."""
    from ..sampling.step_cache import make_cache

    make_cache(args.cache or "none", preset.name)


def _loaded(args: Namespace, sources: Sources, device: torch.device) -> Kandinsky5:
    from .. import pipeline

    model = pipeline.Kandinsky5.from_sources(
        sources,
        device,
        text_cache=args.text_cache,
        quantize=args.quantize,
        text_quantize=args.text_quantize,
    )
    for path, scale in args.lora:
        model.lora.load(path, scale=scale)
    if args.offload:
        model.enable_model_cpu_offload()
    return model


# What is kept and written


@contextmanager
def _interrupted_run_is_kept(output: Path | None, rest: Sequence[Job] = ()) -> Iterator[None]:
    """Save the run that was interrupted inside, or that another process has left, and say how to
    go on. output: what it was to become; None where another process saves it. rest: the jobs that
    were to come."""
    from ..devices.parallel import LostPeer
    from ..sampling.run import Interrupted

    try:
        yield
    except (Interrupted, LostPeer) as stop:
        if output is None or stop.run is None:
            raise
        run = replace(stop.run, rest=tuple(job.stored() for job in rest))
        path = save_somewhere(run.save, _run_path(output), "the run")
        kind = LostPeer if isinstance(stop, LostPeer) else KeyboardInterrupt
        raise kind(f"{stop}; go on with: kandinsky resume {path}") from None


def _run_path(output: Path) -> Path:
    """Where an interrupted run is kept."""
    return output.with_name(f"{output.stem}.run.safetensors")


def _save_latents(result: Video, output: Path) -> Path:
    from ..sampling.result import latents_path

    path = save_somewhere(result.save_latents, latents_path(output), "the latents")
    INTERRUPTS.say(f"; go on with: kandinsky decode {path}")
    return path


def _finish(result: Video, job: Job, latents: Path, progress: Progress) -> None:
    """Decode, write and report. The latents are saved already, so nothing that fails or stops here
    costs the sampling."""
    from ..media import video

    try:
        written = _decoded(result, job.output, progress)
        if job.strip:
            comment = result.settings.to_json()
            written += video.save(video.strip(result.frames), job.strip, comment=comment)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; go on with: kandinsky decode {latents}") from None
    except Exception:
        _log.warning("the latents are in %s; go on with: kandinsky decode %s", latents, latents)
        raise
    _report(written, result.settings, latents, progress)


def _decoded(result: Video, output: Path, progress: Progress) -> list[Path]:
    progress("decoding")
    return result.save(output, latents=False, notify=progress.tell)


def _report(
    written: Sequence[Path], settings: Settings, latents: Path | str, progress: Progress
) -> None:
    for path in written:
        progress.print(path)
    frames = "1 frame" if settings.num_frames == 1 else f"{settings.num_frames} frames"
    progress.print(
        f"seed {settings.seed}, {frames} of {settings.width}x{settings.height}, "
        f"{settings.vae_policy} decoding, latents in {latents}"
    )


# resume, decode, inspect


def resume(args: Namespace) -> None:
    """An interruption replaces the run file by one that is further on, unless the output has
    another name."""
    from ..config import PARTS
    from ..media import video
    from ..sampling.result import latents_path
    from ..sampling.run import Run

    run = Run.load(args.run_file)
    settings = run.settings[0]
    stem = re.sub(r"(\.run)?\.safetensors$", "", args.run_file)
    suffix = ".mp4" if settings.num_frames > 1 else ".png"
    output = video.check_output(args.output or f"{stem}{suffix}")
    rest = [Job.of(stored, output) for stored in run.rest]
    inputs = [args.run_file, args.model, settings.image, settings.last_image]
    inputs += [*_places(args).values(), *(path for path, _ in args.lora)]
    inputs += [job.arguments.get(name) for job in rest for name in ("image", "last_image")]
    for path in (output, *(job.output for job in rest)):
        check_not_inputs([video.check_output(path), latents_path(path)], inputs)
    check_not_inputs([job.strip for job in rest if job.strip], inputs)
    model = _named(
        args.model,
        settings,
        device=args.device,
        parts=PARTS if rest else ("dit", "vae"),
        quantize=settings.quantization or None,
        preset=args.preset or settings.preset or None,
        text_quantize=args.text_quantize,
        **_places(args),
    )
    for path, scale in args.lora or map(scaled_path, settings.lora):
        model.lora.load(path, scale=scale)
    if args.memory_budget:
        logging.getLogger(SPOKEN_FOR["memory"]).setLevel(logging.INFO)
    with Progress() as progress:
        with INTERRUPTS.guarded(), _interrupted_run_is_kept(output, rest):
            callback = _holding_at_the_end(progress)
            (result,) = model.resume(run, callback, args.memory_budget)
            latents = _save_latents(result, output)
        _finish(result, Job(output, None, {}), latents, progress)
    for i, job in enumerate(rest):
        _generate(model, job, rest[i + 1 :], args.memory_budget)


def _named(model: str | None, settings: Settings, **options: Any) -> Kandinsky5:
    """The model that the user names, or the one that the file names, for which nothing is
    downloaded."""
    from .. import pipeline

    if model:
        return pipeline.load(model, **options)
    return pipeline.load_again(settings, **options)


def decode(args: Namespace) -> None:
    from ..media import video
    from ..sampling.result import load_latents

    _, settings = load_latents(args.latents)
    default = re.sub(r"(\.latents)?\.safetensors$", ".mp4", args.latents)
    output = video.check_output(args.output or default)
    check_not_inputs([output], [args.latents, args.model, args.vae])
    places = _places(args)
    model = _named(args.model, settings, device=args.device, parts=("vae",), **places)
    changes = {"vae_policy": args.vae_policy} if args.vae_policy else {}
    with Progress() as progress:
        result = model.open(args.latents, args.memory_budget, **changes)
        written = _decoded(result, output, progress)
        _report(written, result.settings, args.latents, progress)


def inspect(args: Namespace) -> None:
    from ..checkpoints.locate import locate
    from ..devices.available import choose_device
    from ..inspection import FILES, inspect
    from ..sampling.settings import check_settings

    settings = _settings(args)
    _check_text("prompt", args.prompt)
    _check_text("negative prompt", args.negative)
    check_settings(args.prompt, **settings)
    _check_files(args)
    pictures = [Path(args.output, name) for name in ("blocks.png", *FILES)]
    check_not_inputs(pictures, _inputs(args))
    device = choose_device(args.device)
    parts = ("text", "dit", "vae") if args.image else ("text", "dit")
    places = _places(args)
    sources = locate(args.model, args.revision, places=places, parts=parts, preset=args.preset)
    model = _loaded(args, sources, device)
    del settings["attention"]
    with Progress() as progress:
        watch = inspect(
            model,
            args.prompt,
            args.output,
            args.keep_mass,
            args.maps,
            callback=progress,
            image=args.image,
            last_image=args.last_image,
            memory_budget=args.memory_budget,
            expand_prompt=args.expand,
            **settings,
        )
    densities = watch.density.mean((1, 2, 3))
    masses = watch.mass.mean((1, 2, 3))
    for layer, (density, mass) in enumerate(zip(densities, masses, strict=True)):
        print(f"layer {layer:2}: {density:6.1%} of the blocks hold {mass:6.1%} of the probability")
    print(f"all layers: {watch.density.mean():.1%} of the blocks; pictures in {args.output}")


def scaled_path(text: str) -> tuple[str, float]:
    """A path and the scale behind its last colon, or 1."""
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # a colon of the path's own
        return text, 1.0
