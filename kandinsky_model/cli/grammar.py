# SPDX-License-Identifier: Apache-2.0
"""The grammar of the command line."""

from __future__ import annotations

import argparse
import re

from ..config import CACHES, QUANTIZATIONS
from ..training.config import DISTILLATIONS, OPTIMIZERS, SCHEDULES, TrainConfig
from . import generate, models, training


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one sentence."""

    def error(self, message):
        self.exit(2, f"kandinsky: {message}; see {self.prog} --help\n")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"a size is WIDTHxHEIGHT in pixels, such as 768x512, got {text!r}"
        )
    return int(match[1]), int(match[2])


def _bytes(text: str) -> int:
    from ..devices.available import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _generate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt", nargs="?")
    command.add_argument(
        "--prompts",
        metavar="FILE",
        help="one prompt on each line instead; under torchrun they are spread over processes",
    )
    command.add_argument(
        "-o",
        "--output",
        help=".mp4, .gif or .png (default: out.mp4, pictures "
        "out.png); several frames as png: "
        "<name>_000.png, ...",
    )
    command.add_argument(
        "--attention", choices=("nabla", "dense"), help="default: what the model was trained with"
    )
    command.add_argument(
        "--cache", choices=CACHES, help="reuse what the blocks did at earlier steps (default: none)"
    )
    command.add_argument("--strip", metavar="FILE.png", help="also write some frames side by side")
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
        help="of the latents; reference rounds as the official code does",
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
    command.add_argument(
        "--vae", metavar="PATH", help="a VAE's folder or file (default: where the model lies)"
    )
    command.add_argument(
        "--vae-policy",
        choices=("global", "official", "preview"),
        help="decode in one piece, in the published pipeline's tiles, or to "
        "colours only (default: one piece while the "
        "clip is small)",
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
        help="what the run may use of the device, such as 12GB: weights are "
        "streamed and work is done in parts to keep "
        "within it, as the plan printed first says (default: what is free)",
    )


def _quantize_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(chatty=True)
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


def _download_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("preset", help="a preset (kandinsky presets) or a hub repository")
    command.add_argument("--revision", help="commit, branch or tag of the hub repository")


def _train_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(chatty=True)
    command.add_argument(
        "data",
        help="a folder of clips or pictures, each with a caption in a .txt or .caption of its "
        "name, or in captions.jsonl, metadata.jsonl or metadata.csv; folders in it are read too",
    )
    command.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="where all that comes of it goes"
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
        help="cut each clip to the longest of these that it has, "
        "4k + 1; may be repeated (default: the preset's)",
    )
    for name, kind, text in (
        ("steps", int, "of the optimizer"),
        ("batch", int, "samples of a pass"),
        ("passes", int, "of a step, whose gradients are added up; torchrun's processes share them"),
        ("rate", float, "of learning"),
        ("warmup", int, "steps until the full rate"),
        ("ema", float, "decay of the weights' average, which is what is kept; 0: none"),
        ("drop", float, "how often a caption is left out"),
        ("seed", int, "of all random numbers"),
        ("save-every", int, "steps"),
        ("sample-every", int, "steps; 0: no samples"),
    ):
        command.add_argument(
            f"--{name}",
            type=kind,
            help=f"{text} (default: {getattr(TrainConfig, name.replace('-', '_'))})",
        )
    command.add_argument(
        "--attention", choices=("nabla", "dense"), help="default: what the model was trained with"
    )
    command.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="of the rate after the warm-up; all but constant fall to zero (default: constant)",
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
        help="fit what the same weights do with dense "
        "attention (the default of this option), or with guidance, in one pass",
    )
    command.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        help="of activations and of weights that are not trained (default: bf16 on CUDA)",
    )
    command.add_argument(
        "--bad-data", choices=("stop", "skip"), help="at a file that cannot be used (default: stop)"
    )
    command.add_argument(
        "--cache",
        metavar="FOLDER",
        help="of latents and embeddings (default: training/cache in the output)",
    )
    _device_arguments(command)


def _draw_clips_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("folder", help="a new or empty folder")
    command.add_argument("--count", type=int, default=64, help="default: 64")
    command.add_argument("--seed", type=int, default=0)


def _train_tiny_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(chatty=True)
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
    command.set_defaults(chatty=True)
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


def parser() -> argparse.ArgumentParser:
    """The command line's grammar; each command's function is `run` of what it parses."""
    kandinsky = Parser(prog="kandinsky", description="Videos and pictures with Kandinsky 5.0.")
    subparsers = kandinsky.add_subparsers(required=True, metavar="command")
    for run, arguments, text in (
        (generate.generate, _generate_arguments, "make a video or a picture from a prompt"),
        (generate.resume, _resume_arguments, "go on with an interrupted run"),
        (generate.decode, _decode_arguments, "decode saved latents again"),
        (models.presets, None, "list the released checkpoints"),
        (
            models.download,
            _download_arguments,
            "fetch what a preset needs into the hub "
            "library's cache; afterwards no network is "
            "needed",
        ),
        (
            models.quantize,
            _quantize_arguments,
            "write a transformer with its large weights in 8 bits, and what that does to them",
        ),
        (
            models.verify,
            _verify_arguments,
            "say what a file or folder of weights is, and whether it is whole",
        ),
        (
            models.comfyui,
            lambda command: command.add_argument(
                "path", help="the folder that holds ComfyUI's main.py"
            ),
            "put the nodes and example workflows into a ComfyUI",
        ),
        (models.doctor, None, "show what this machine offers, and what runs for each operator"),
        (
            generate.inspect,
            _inspect_arguments,
            "draw which blocks of attention a model keeps while it samples a prompt",
        ),
        (
            training.train,
            _train_arguments,
            "fit a LoRA, or all weights, to a folder of clips or pictures with captions",
        ),
        (
            training.draw_clips,
            _draw_clips_arguments,
            "draw clips of simple shapes with captions, to try training on",
        ),
        (training.train_tiny, _train_tiny_arguments, "train the bundled model from nothing"),
        (
            training.check_tiny,
            _check_tiny_arguments,
            "measure how often the bundled model draws what is asked",
        ),
    ):
        command = subparsers.add_parser(run.__name__.replace("_", "-"), help=text, description=text)
        command.set_defaults(run=run, chatty=False)
        command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        if arguments:
            arguments(command)
    return kandinsky
