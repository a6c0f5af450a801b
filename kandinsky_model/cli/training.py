# SPDX-License-Identifier: Apache-2.0
"""Commands that train."""

from __future__ import annotations

import json
from argparse import Namespace
from itertools import cycle, islice
from pathlib import Path

from .saving import check_not_inputs

# Arguments of `train` that have the names of TrainConfig's fields; None takes the default there.
GIVEN = (
    "model",
    "steps",
    "batch",
    "passes",
    "rate",
    "warmup",
    "schedule",
    "optimizer",
    "ema",
    "drop",
    "seed",
    "save_every",
    "sample_every",
    "attention",
    "distill",
    "dtype",
    "bad_data",
    "cache",
    "memory_budget",
    "device",
)
WORDS = ("color", "background", "color_and_background", "shape", "motion", "all")  # of check-tiny


def train(args: Namespace) -> None:
    from ..training import LoRAConfig, TrainConfig
    from ..training.outputs import LORA_CONFIG, LORA_WEIGHTS
    from ..training.trainer import train

    if args.full and args.trigger:
        raise ValueError(
            "a trigger calls a LoRA, so it does not go with --full; leave one of them out"
        )
    if args.full and args.lora_alpha is not None:
        raise ValueError(
            "--lora-alpha is the factor of a LoRA, so it does not go with --full; "
            "leave one of them out"
        )
    results = ("transformer",) if args.full else (LORA_WEIGHTS, LORA_CONFIG)
    written = [Path(args.output, name) for name in (*results, "samples", "training")]
    check_not_inputs(written, [args.data, *_model_files(args.model)])
    given = {name: getattr(args, name) for name in GIVEN if getattr(args, name) is not None}
    lora = None
    if not args.full:
        lora = LoRAConfig(args.lora_rank, args.lora_alpha, trigger=args.trigger)
    sizes = tuple((height, width) for width, height in args.size or ()) or None
    config = TrainConfig(lora=lora, lengths=args.frames, sizes=sizes, **given)
    try:
        print(train(args.data, args.output, config, args.resume))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "after the last state that was saved; go on with the same command and --resume"
        ) from None


def _model_files(model: str | None) -> list[Path]:
    """What is read of a model that lies in a file or folder; nothing where it is a preset."""
    if model is None:
        return []
    folder = Path(model)
    parts = [path for path in folder.glob("*") if path.is_dir()]
    return [folder, folder / "model_index.json", *parts, *folder.glob("*/**/*")]


def draw_clips(args: Namespace) -> None:
    import random

    from ..media import video
    from ..tiny import scenes

    folder = Path(args.folder)
    generator = random.Random(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(
            f"clips are drawn into a new or empty folder, but {folder} holds something; choose "
            "another"
        )
    for i in range(args.count):
        scene = scenes.training_scene(generator.randrange(10**6), generator)
        caption = scenes.prompt(scene.combination, i % scenes.FULL)
        (folder / f"clip{i:04}.txt").write_text(caption + "\n", encoding="utf-8")
        video.save(scenes.draw(scene), folder / f"clip{i:04}.mp4")
    print(f"{args.count} clips with captions in {folder}")


def train_tiny(args: Namespace) -> None:
    from ..tiny.recipe import train_tiny

    print(train_tiny(args.output, seed=args.seed, resume=args.resume, device=args.device))


def check_tiny(args: Namespace) -> None:
    from ..checkpoints.locate import TINY
    from ..media.video import check_output
    from ..tiny.check import check_tiny
    from ..tiny.scenes import held_out

    folder = args.folder or TINY
    if args.json:  # before minutes of drawing
        output = Path(args.json)
        check_output(output, (output.suffix.lower(),))
        log = Path(folder, "training.json")
        check_not_inputs([output], [*_model_files(str(folder)), log, args.lora])
    combinations = tuple(islice(cycle(held_out()), args.count))
    result = check_tiny(
        folder,
        args.seed,
        args.steps,
        args.guidance,
        combinations,
        args.quantize,
        args.lora,
    )
    print(f"{result['prompts']} prompts of combinations that were never in training")
    for word in WORDS:
        before = f", unquantised {result['unquantized'][word]:6.1%}" if args.quantize else ""
        print(f"{word.replace('_', ' '):21} {result[word]:6.1%}{before}")
    if args.quantize:
        psnr = sorted(sample["psnr"] for sample in result["samples"])
        print(
            f"PSNR of the frames against the unquantised: median {psnr[len(psnr) // 2]:.1f} dB, "
            f"worst {psnr[0]:.1f} dB"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(args.json)
