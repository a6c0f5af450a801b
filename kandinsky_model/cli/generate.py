# SPDX-License-Identifier: Apache-2.0
"""What each command of the command line does with its parsed arguments; `__main__` has the
grammar."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .progress import Progress

# The loggers that say what an option does: how many steps a cache saved, what an expanded prompt
# says, what lies where within a memory budget.
SPOKEN_FOR = {
    "cache": "kandinsky_model.sampling.step_cache",
    "expand": "kandinsky_model.text.qwen_clip",
    "memory": "kandinsky_model.pipeline",
}


def generate(args) -> None:
    from ..devices import parallel

    settings, prompts = _settings(args), _prompts(args)
    with parallel.processes(args.device) as (rank, world, device):
        # all processes share the run of one prompt, or each has prompts of its own
        together = world > 1 and not args.prompts
        model, outputs = _generator(
            args, len(prompts), device, ("dit",) if together and rank else None
        )
        model.together = together
        shared = settings | {
            "image": args.image and str(Path(args.image).absolute()),
            "last_image": args.last_image and str(Path(args.last_image).absolute()),
            "expand_prompt": args.expand,
        }
        jobs = [
            {
                "output": output.name,
                "strip": strip and strip.name,
                "arguments": shared
                | {"prompt": prompt, "seed": None if args.seed is None else args.seed + i},
            }
            for i, (prompt, (output, strip)) in enumerate(zip(prompts, outputs, strict=True))
        ]
        own = range(0 if together else rank, len(prompts), 1 if together else world)
        for i in own:
            output, strip = outputs[i]
            writes = rank == 0 or not together
            rest = [jobs[j] for j in own if j > i]
            with Progress(writes) as progress, _kept(output if writes else None, rest):
                result = model.generate(
                    **jobs[i]["arguments"], callback=progress, memory_budget=args.memory_budget
                )
                if writes:
                    _keep(result, output, strip, progress)


def _settings(args) -> dict:
    width, height = args.size or (None, None)
    # 24 frames per second, four to a latent frame.
    frames = args.frames if args.seconds is None else 4 * round(6 * args.seconds) + 1
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


def _prompts(args) -> list[str]:
    """The prompt, or those of the file, with settings that fit."""
    from ..sampling.settings import check_settings

    if (args.prompt is None) == (args.prompts is None):
        what = "neither" if args.prompt is None else "both"
        raise ValueError(
            f"generate takes a prompt or a file of prompts, got {what}; give one of them"
        )
    lines = (
        [args.prompt]
        if args.prompts is None
        else Path(args.prompts).read_text(encoding="utf-8").splitlines()
    )
    prompts = lines if args.prompts is None else [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(
            f"a file of prompts has one on each line, got none in {args.prompts}; write some"
        )
    for prompt in prompts:
        check_settings(prompt, **_settings(args))
    return prompts


def _generator(args, count: int, device: str | None, parts: tuple[str, ...] | None):
    """The model, and where its results go: one (output, strip) for each prompt."""
    from ..checkpoints.locate import PARTS, locate
    from ..devices.available import choose_device

    chosen = {
        "cache": args.cache not in (None, "none"),
        "expand": args.expand,
        "memory": args.memory_budget,
    }
    for option, name in SPOKEN_FOR.items():
        if chosen[option]:
            logging.getLogger(name).setLevel(logging.INFO)
    outputs = _outputs(args, count) if args.output else None
    device, sources = (
        choose_device(device),
        locate(
            args.model,
            args.revision,
            places={"vae": args.vae} if args.vae else None,
            parts=parts or PARTS,
            preset=args.preset,
        ),
    )
    if outputs is None:
        args.output = "out.png" if sources.preset.vae is None else "out.mp4"
        outputs = _outputs(args, count)
    return _loaded(args, sources, device), outputs


def _loaded(args, sources, device):
    """The model with its LoRAs. What can be known to be wrong is said before anything is read."""
    from .. import pipeline
    from ..checkpoints.lora import find_adapter
    from ..sampling.step_cache import make_cache

    make_cache(args.cache or "none", sources.preset.name)
    for path, _ in args.lora:
        find_adapter(path)
    model = pipeline.Kandinsky5.from_sources(
        sources, device, text_cache=args.text_cache, quantize=args.quantize
    )
    for path, scale in args.lora:
        model.lora.load(path, scale=scale)
    if args.offload:
        model.enable_model_cpu_offload()
    return model


def inspect(args) -> None:
    from ..checkpoints.locate import locate
    from ..devices.available import choose_device
    from ..inspection import inspect
    from ..sampling.settings import check_settings

    settings = _settings(args)
    check_settings(args.prompt, **settings)
    device = choose_device(args.device)
    model = _loaded(
        args,
        locate(
            args.model,
            args.revision,
            parts=("text", "dit", "vae") if args.image else ("text", "dit"),
            preset=args.preset,
        ),
        device,
    )
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
    for layer, (density, mass) in enumerate(
        zip(watch.density.mean((1, 2, 3)), watch.mass.mean((1, 2, 3)), strict=True)
    ):
        print(f"layer {layer:2}: {density:6.1%} of the blocks hold {mass:6.1%} of the probability")
    print(f"all layers: {watch.density.mean():.1%} of the blocks; pictures in {args.output}")


def resume(args) -> None:
    from ..config import PARTS
    from ..media import video
    from ..sampling.run import Run

    run = Run.load(args.run_file)
    settings = run.settings[0]
    stem = re.sub(r"(\.run)?\.safetensors$", "", args.run_file)
    output = video.check_output(
        args.output or f"{stem}{'.mp4' if settings.num_frames > 1 else '.png'}"
    )
    model = _named(
        args.model,
        settings,
        device=args.device,
        parts=PARTS if run.rest else ("dit", "vae"),
        quantize=settings.quantization or None,
        preset=args.preset or settings.preset or None,
    )
    for path, scale in args.lora or map(scaled_path, settings.lora):
        model.lora.load(path, scale=scale)
    if args.memory_budget:
        logging.getLogger(SPOKEN_FOR["memory"]).setLevel(logging.INFO)
    with Progress() as progress, _kept(output, run.rest):
        (result,) = model.resume(run, progress, args.memory_budget)
        _keep(result, output, None, progress)
    for i, job in enumerate(run.rest):
        # Names alone: a file that somebody else wrote cannot choose a folder.
        output = video.check_output(output.with_name(Path(job["output"]).name))
        strip = job["strip"] and output.with_name(Path(job["strip"]).name)
        with Progress() as progress, _kept(output, run.rest[i + 1 :]):
            result = model.generate(
                **job["arguments"], callback=progress, memory_budget=args.memory_budget
            )
            _keep(result, output, strip, progress)


def _named(model: str | None, settings, **options):
    """The model that the user names, or the one that the file names, for which nothing is
    downloaded."""
    from .. import pipeline

    if model:
        return pipeline.load(model, **options)
    return pipeline.load_again(settings, **options)


def _outputs(args, count: int) -> list[tuple[Path, Path | None]]:
    """Where videos and strips go, if they could be written now; several are numbered."""
    from ..media import video
    from ..sampling import result as clip

    def named(name: str, i: int) -> Path:
        path = Path(name)
        return path if args.prompts is None else path.with_name(f"{path.stem}_{i:03}{path.suffix}")

    outputs = []
    for i in range(count):
        output = video.check_output(named(args.output, i))
        video.check_output(clip.latents_path(output), (".safetensors",))
        outputs.append(
            (output, video.check_output(named(args.strip, i), (".png",)) if args.strip else None)
        )
    return outputs


@contextmanager
def _kept(output: Path | None, rest: Sequence[Mapping] = ()):
    """An interruption of what is sampled inside leaves a file, and says how to go on; without an
    output another process does that. rest: the jobs of a file of prompts that were to come."""
    from ..sampling.run import Interrupted

    try:
        yield
    except Interrupted as stop:
        if output is None:
            raise
        run = replace(stop.run, rest=tuple(rest))
        path = run.save(output.with_name(f"{output.stem}.run.safetensors"))
        raise KeyboardInterrupt(f"{stop}; go on with: kandinsky resume {path}") from None


def _keep(result, output: Path, strip: Path | None, progress: Progress) -> None:
    from ..media import video
    from ..sampling import result as clip

    # first: from here on nothing that fails can cost the sampling
    latents = result.save_latents(clip.latents_path(output))
    written = _finish(result, output, progress)
    if strip:
        written += video.save(video.strip(result.frames), strip, comment=result.settings.to_json())
    _tell(written, result.settings, latents)


def decode(args) -> None:
    from ..media import video
    from ..sampling import result as clip

    _, settings = clip.load_latents(args.latents)
    output = video.check_output(
        args.output or re.sub(r"(\.latents)?\.safetensors$", ".mp4", args.latents)
    )
    places = {"vae": args.vae} if args.vae else {}
    model = _named(args.model, settings, device=args.device, parts=("vae",), **places)
    with Progress() as progress:
        result = model.open(
            args.latents,
            args.memory_budget,
            **({"vae_policy": args.vae_policy} if args.vae_policy else {}),
        )
        written = _finish(result, output, progress)
    _tell(written, result.settings, args.latents)


def _finish(result, output: Path, progress: Progress) -> list[Path]:
    progress("decoding")
    return result.save(output, latents=False, notify=progress.tell)


def _tell(written, settings, latents) -> None:
    for path in written:
        print(path)
    frames = "1 frame" if settings.num_frames == 1 else f"{settings.num_frames} frames"
    print(
        f"seed {settings.seed}, {frames} of {settings.width}x{settings.height}, "
        f"{settings.vae_policy} decoding, "
        f"latents in {latents}"
    )


def scaled_path(text: str) -> tuple[str, float]:
    """A path and the scale behind its last colon, or 1."""
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # a colon of the path's own
        return text, 1.0
