# SPDX-License-Identifier: Apache-2.0
"""The grammar of the command line: every command, its arguments and their help."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .. import __version__
from ..config import CACHES, QUANTIZATIONS, TEXT_QUANTIZATIONS
from ..training.config import DISTILLATIONS, OPTIMIZERS, SCHEDULES, TrainConfig
from . import config, generate, models, training


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one sentence."""

    def error(self, message: str):
        self.exit(2, f"kandinsky: {message}; see {self.prog} --help\n")


def _size(text: str) -> tuple[int, int]:
    """(width, height) of "768x512"."""
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"a size is WIDTHxHEIGHT in pixels, such as 768x512, got {text!r}"
        )
    return int(match[1]), int(match[2])


def _bytes(text: str) -> int:
    """The bytes of "12GB"."""
    from ..devices.available import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _seeds(text: str) -> int | list[int]:
    """[1, 2, 3] of "1,2,3"; 4 of "4", which is a number of seeds."""
    try:
        seeds = [int(one) for one in text.split(",") if one.strip()]
    except ValueError:
        seeds = []
    if not seeds or (len(seeds) == 1 and seeds[0] < 1):
        raise argparse.ArgumentTypeError(
            f"seeds are a list such as 1,2,3 or a number of them from 1 on, got {text!r}"
        )
    return seeds if "," in text else seeds[0]


def _generate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", nargs="?")
    command.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt on each line instead, - for stdin; under torchrun they are spread over "
        "processes",
    )
    command.add_argument(
        "--seeds",
        type=_seeds,
        metavar="LIST|N",
        help="make a video with each of these seeds (1,2,3), or with N seeds from --seed on",
    )
    command.add_argument(
        "-o",
        "--output",
        help=".mp4, .webm, .gif, .png or .jpg (default: out.mp4, pictures out.png); several "
        "frames as pictures: <name>_000.png, ...",
    )
    command.add_argument(
        "--attention", choices=("nabla", "dense"), help="default: what the model was trained with"
    )
    command.add_argument(
        "--cache", choices=CACHES, help="reuse what the blocks did at earlier steps (default: none)"
    )
    command.add_argument("--strip", metavar="FILE.png", help="also write some frames side by side")
    command.add_argument(
        "--config",
        metavar="FILE",
        help="take options from a .yaml or .json file, or the settings of a file that generate "
        "has made; other options go before them",
    )
    _sampling_arguments(command)
    _decoding_arguments(command)


def _inspect_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(vae_policy=None, attention="nabla", cache=None)
    command.add_argument("prompt")
    command.add_argument(
        "-o", "--output", default="inspection", metavar="FOLDER", help="default: inspection"
    )
    command.add_argument(
        "--keep-mass",
        type=float,
        help="the probability to keep, in 0..1 (default: what the model was trained with)",
    )
    command.add_argument(
        "--maps",
        type=int,
        nargs="*",
        metavar="STEP",
        help="steps to draw maps of (default: first, middle and last)",
    )
    _sampling_arguments(command)
    _vae_argument(command)
    _device_arguments(command)


def _sampling_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        default="tiny",
        help="a preset (kandinsky presets), a local path or a hub repository (default: tiny)",
    )
    command.add_argument("--revision", help="commit, branch or tag of the hub repository")
    command.add_argument("--preset", help="whose settings to take (default: those of the model)")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="length at 24 frames per second")
    length.add_argument("--frames", type=int, help="number of frames, 4k + 1")
    command.add_argument(
        "--size", type=_size, metavar="WxH", help="width and height in pixels, multiples of 16"
    )
    command.add_argument("--steps", type=int)
    command.add_argument("--guidance", type=float, help="1 means none, and halves the work")
    command.add_argument(
        "--scheduler-scale", type=float, help="above 1, more of the steps go to the noisy end"
    )
    command.add_argument(
        "--seed", type=int, help="the same seed gives the same video (default: random, and printed)"
    )
    command.add_argument(
        "--negative", metavar="PROMPT", help="what to steer away from (default: the model's own)"
    )
    command.add_argument(
        "--precision",
        choices=("fp32", "reference"),
        help="precision of the latents; reference rounds as the official code does",
    )
    command.add_argument(
        "--image",
        metavar="FILE",
        help="the first frame, or the picture to edit, for checkpoints that take one",
    )
    command.add_argument(
        "--last-image",
        metavar="FILE",
        help="the last frame, for image-to-video checkpoints (untrained)",
    )
    command.add_argument(
        "--lora",
        type=generate.scaled_path,
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="a LoRA; may be repeated",
    )
    command.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        metavar="MODE",
        help="keep the transformer's large weights in 8 bits: "
        f"{', '.join(QUANTIZATIONS)} (default: as stored)",
    )
    _text_arguments(command)
    command.add_argument(
        "--expand",
        action="store_true",
        help="let the text encoder's language model rewrite the prompt in detail first",
    )
    command.add_argument(
        "--no-text-cache",
        dest="text_cache",
        action="store_false",
        help="neither use nor keep embedded prompts on disk",
    )
    command.add_argument(
        "--offload", action="store_true", help="keep on the GPU only the part that is working"
    )


def _text_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--text-encoder",
        metavar="PATH",
        help="a folder or file of Qwen2.5-VL-7B (default: where the model lies)",
    )
    command.add_argument(
        "--clip",
        metavar="PATH",
        help="a folder or file of CLIP ViT-L/14 (default: where the model lies)",
    )
    command.add_argument(
        "--text-quantize",
        choices=TEXT_QUANTIZATIONS,
        metavar="MODE",
        help="keep the language model that reads prompts in 8 or 4 bits: "
        f"{', '.join(TEXT_QUANTIZATIONS)} (default: as stored; int4 needs bitsandbytes)",
    )


def _vae_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--vae", metavar="PATH", help="a VAE's folder or file (default: where the model lies)"
    )


def _resume_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_file", metavar="run", help="a .run.safetensors file")
    command.add_argument("-o", "--output", help="default: the name of the run, as .mp4 or .png")
    command.add_argument("--model", help="default: the model that began the run")
    command.add_argument(
        "--lora",
        type=generate.scaled_path,
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="where the run's LoRAs are now, in their order (default: where they were)",
    )
    command.add_argument("--preset", help="default: the one that began the run")
    _text_arguments(command)
    _vae_argument(command)
    _device_arguments(command)


def _decode_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("latents", help="a .latents.safetensors file")
    command.add_argument("-o", "--output", help="default: the name of the latents, as .mp4")
    command.add_argument(
        "--model", help="whose VAE to use (default: the model that made the latents)"
    )
    _decoding_arguments(command)


def _decoding_arguments(command: argparse.ArgumentParser) -> None:
    _device_arguments(command)
    _vae_argument(command)
    command.add_argument(
        "--vae-policy",
        choices=("global", "official", "preview"),
        help="decode in one piece, in the published pipeline's tiles, or to colours only (default: "
        "one piece while the clip is small)",
    )


def _device_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)"
    )
    command.add_argument(
        "--memory",
        "--memory-budget",
        type=_bytes,
        metavar="SIZE",
        dest="memory_budget",
        help="memory of the device that the run may use, such as 12GB: weights are streamed and "
        "work is done in parts to keep within it, as is printed first (default: what is free)",
    )


def _quantize_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="a preset, a local path or a hub repository")
    command.add_argument(
        "folder", help="a new or empty folder, to stand as transformer/ in a model's folder"
    )
    command.add_argument(
        "--mode",
        choices=QUANTIZATIONS,
        default="int8",
        help="default: int8; -dynamic: multiply in 8 bits too",
    )


def _verify_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", help="a file, or a folder of one network or of a whole model")
    command.add_argument(
        "--values", action="store_true", help="also read all tensors, and refuse NaN and infinity"
    )


def _doctor_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")


def _comfyui_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", help="the folder that holds ComfyUI's main.py")


def _download_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("preset", help="a preset (kandinsky presets) or a hub repository")
    command.add_argument("--revision", help="commit, branch or tag of the hub repository")


# Options of `train` that are numbers: name, type, help. Their defaults are those of TrainConfig.
TRAINING_NUMBERS = (
    ("steps", int, "steps of the optimizer"),
    ("batch", int, "samples of one pass"),
    (
        "passes",
        int,
        "passes of one step, whose gradients are added up; torchrun's processes share them",
    ),
    ("rate", float, "learning rate"),
    ("warmup", int, "steps until the full learning rate"),
    ("ema", float, "decay of the weights' average, which is what is kept; 0: none"),
    ("drop", float, "how often a caption is left out"),
    ("seed", int, "seed of all random numbers"),
    ("save-every", int, "steps between saved states"),
    ("sample-every", int, "steps between samples; 0: no samples"),
)


def _train_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "data",
        help="a folder of clips or pictures, each with a caption in a .txt or .caption of its "
        "name, or in captions.jsonl, metadata.jsonl or metadata.csv; folders in it are read too",
    )
    command.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="where states and results go"
    )
    command.add_argument(
        "--model", default="tiny", help="a preset, a local path or a hub repository (default: tiny)"
    )
    what = command.add_mutually_exclusive_group()
    what.add_argument(
        "--lora-rank",
        type=int,
        default=32,
        metavar="R",
        help="train a LoRA of this rank (default: 32)",
    )
    what.add_argument("--full", action="store_true", help="train all weights instead")
    command.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="the LoRA counts A / R times (default: R, which is once)",
    )
    command.add_argument(
        "--trigger",
        default="",
        help="words that call the LoRA: put before every caption, and later every prompt",
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on with the training in the folder, to the same bits",
    )
    command.add_argument(
        "--size",
        type=_size,
        action="append",
        metavar="WxH",
        help="cut each clip to the nearest of these; may be repeated (default: the preset's)",
    )
    command.add_argument(
        "--frames",
        type=int,
        action="append",
        metavar="N",
        help="cut each clip to the longest of these lengths that it has, 4k + 1; may be repeated "
        "(default: the preset's)",
    )
    for name, kind, text in TRAINING_NUMBERS:
        default = getattr(TrainConfig, name.replace("-", "_"))
        command.add_argument(f"--{name}", type=kind, help=f"{text} (default: {default})")
    command.add_argument(
        "--attention", choices=("nabla", "dense"), help="default: what the model was trained with"
    )
    command.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="course of the rate after the warm-up; all but constant fall to zero (default: "
        "constant)",
    )
    command.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="adamw8bit keeps moments in 8 bits and needs bitsandbytes (default: adamw)",
    )
    command.add_argument(
        "--distill",
        nargs="?",
        const="dense",
        choices=DISTILLATIONS,
        help="fit what the same weights do with dense attention (the default of this option), or "
        "with guidance, in one pass",
    )
    command.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        help="dtype of activations and of weights that are not trained (default: bf16 on CUDA)",
    )
    command.add_argument(
        "--bad-data",
        choices=("stop", "skip"),
        help="what to do at a file that cannot be used (default: stop)",
    )
    command.add_argument(
        "--cache",
        metavar="FOLDER",
        help="where latents and embeddings are kept (default: training/cache in the output)",
    )
    _device_arguments(command)


def _draw_clips_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", help="a new or empty folder")
    command.add_argument("--count", type=int, default=64, help="default: 64")
    command.add_argument("--seed", type=int, default=0)


def _train_tiny_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-o",
        "--output",
        default="tiny",
        metavar="FOLDER",
        help="where the model goes (default: tiny)",
    )
    command.add_argument("--seed", type=int, default=2026)
    command.add_argument(
        "--resume", action="store_true", help="train what is in the folder further"
    )
    command.add_argument("--device", default="cpu")


def _check_tiny_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "folder", nargs="?", help="a folder of train-tiny (default: the bundled model)"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int)
    command.add_argument("--guidance", type=float)
    command.add_argument(
        "--quantize", choices=QUANTIZATIONS, help="also compare with the unquantised model"
    )
    command.add_argument("--lora", metavar="PATH", help="an adapter to draw with")
    command.add_argument(
        "--count",
        type=int,
        default=48,
        help="how many prompts (default: 48); after 48 they come again, with other noise",
    )
    command.add_argument("--json", metavar="FILE", help="also write every verdict")


@dataclass(frozen=True)
class Command:
    """One command. run: does what it is for; its name, with dashes, is that of the command.
    arguments: adds its own arguments to a parser. chatty: whether its log is part of its output,
    as it is for work of minutes and hours."""

    run: Callable[[argparse.Namespace], None]
    text: str
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    chatty: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__.replace("_", "-")


COMMANDS = (
    Command(generate.generate, "make a video or a picture from a prompt", _generate_arguments),
    Command(generate.resume, "go on with an interrupted run", _resume_arguments),
    Command(generate.decode, "decode saved latents again", _decode_arguments),
    Command(models.presets, "list the released checkpoints"),
    Command(
        models.download,
        "fetch what a preset needs into the hub library's cache; afterwards no network is needed",
        _download_arguments,
    ),
    Command(
        models.quantize,
        "write a transformer with its large weights in 8 bits, and what that does to them",
        _quantize_arguments,
        chatty=True,
    ),
    Command(
        models.verify,
        "say what a file or folder of weights is, and whether it is whole",
        _verify_arguments,
    ),
    Command(
        models.comfyui,
        "put the nodes and example workflows into a ComfyUI",
        _comfyui_arguments,
    ),
    Command(
        models.doctor,
        "show what this machine offers, and what runs for each operator",
        _doctor_arguments,
    ),
    Command(
        generate.inspect,
        "draw which blocks of attention a model keeps while it samples a prompt",
        _inspect_arguments,
    ),
    Command(
        training.train,
        "fit a LoRA, or all weights, to a folder of clips or pictures with captions",
        _train_arguments,
        chatty=True,
    ),
    Command(
        training.draw_clips,
        "draw clips of simple shapes with captions, to try training on",
        _draw_clips_arguments,
    ),
    Command(
        training.train_tiny,
        "train the bundled model from nothing",
        _train_tiny_arguments,
        chatty=True,
    ),
    Command(
        training.check_tiny,
        "measure how often the bundled model draws what is asked",
        _check_tiny_arguments,
        chatty=True,
    ),
)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it parses has the command's function as `run`."""
    kandinsky = Parser(prog="kandinsky", description="Videos and pictures with Kandinsky 5.0.")
    kandinsky.add_argument("--version", action="version", version=f"kandinsky {__version__}")
    subparsers = kandinsky.add_subparsers(required=True, metavar="command")
    for one in COMMANDS:
        command = subparsers.add_parser(one.name, help=one.text, description=one.text)
        command.set_defaults(run=one.run, chatty=one.chatty)
        command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        one.arguments(command)
    return kandinsky


def _replaced(args: argparse.Namespace) -> set[str]:
    """Options of a configuration in whose place the command line says something else."""
    replaced: set[str] = set()
    for options in (("seconds", "frames"), ("prompt", "prompts")):
        if any(getattr(args, option) is not None for option in options):
            replaced.update(options)
    if isinstance(args.seeds, list):
        replaced.add("seed")
    if args.seed is not None:
        replaced.add("seeds")
    return replaced


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line, without the program's name, and of the file that its
    --config names. What the line says itself goes before the file.

    Raises ValueError or OSError for a file that has no such settings.
    """
    kandinsky = parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what could come next
        import argcomplete

        argcomplete.autocomplete(kandinsky)
    args = kandinsky.parse_args(words)
    if getattr(args, "config", None) is None:
        return args
    options, prompt = config.command_line(args.config, _replaced(args))
    prompt_words = [] if prompt is None else ["--", prompt]
    return kandinsky.parse_args([words[0], *options, *words[1:], *prompt_words])
