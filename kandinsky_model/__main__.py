# SPDX-License-Identifier: Apache-2.0
"""The command line: `kandinsky generate "prompt" -o out.mp4`, and what belongs to it.

Every failure is one sentence on stderr and exit status 2 (with --debug the traceback); an interrupt exits with 130.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from pathlib import Path

from .config import CACHES, PRESETS, QUANTIZATIONS

NOT_A_TERMINAL_IS_QUIET = None  # tqdm's word for it


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one sentence."""

    def error(self, message):
        self.exit(2, f"kandinsky: {message}; see {self.prog} --help\n")


class Progress:
    """One bar for the whole run: its label is the stage, its length the sampling steps. Silent where stderr is no terminal."""

    def __init__(self):
        from tqdm import tqdm

        layout = "{desc:9} {n_fmt:>3}/{total_fmt} |{bar}| {elapsed} passed, {remaining} left, {rate_inv_fmt}"
        self.bar = tqdm(desc="text", total=1, unit="step", leave=False, file=sys.stderr, disable=NOT_A_TERMINAL_IS_QUIET,
                        bar_format=layout, dynamic_ncols=True)

    def __call__(self, stage, step=None, steps=None, latents=None):
        begins = stage == "sampling" and step == 0
        self.bar.set_description_str(stage, refresh=not step and not begins)
        if begins:
            self.bar.reset(steps)  # the clock starts here, so that seconds per step are those of steps
        elif stage == "sampling":
            self.bar.update()

    def tell(self, line: str) -> None:
        """A line that stays above the bar, on a terminal only."""
        if not self.bar.disable:
            self.bar.write(line, file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def generate(args) -> None:
    from . import clip, pipeline, video

    width, height = args.size or (None, None)
    # 24 frames per second, four to a latent frame.
    frames = args.frames if args.seconds is None else 4 * round(6 * args.seconds) + 1
    settings = dict(
        negative_prompt=args.negative, seed=args.seed, num_frames=frames, height=height, width=width, num_inference_steps=args.steps,
        guidance_scale=args.guidance, scheduler_scale=args.scheduler_scale, attention=args.attention, precision=args.precision,
        cache=args.cache, vae_policy=args.vae_policy)
    clip.check_settings(args.prompt, **settings)
    if args.cache not in (None, "none"):  # how many passes it saved is worth a line
        logging.getLogger(f"{__package__}.sampler").setLevel(logging.INFO)
    output = video.check_output(args.output)
    video.check_output(clip.latents_path(output), (".safetensors",))
    strip = video.check_output(args.strip, (".png",)) if args.strip else None
    model = pipeline.load(args.model, device=args.device, revision=args.revision, quantize=args.quantize)
    for path, scale in args.lora:
        model.lora.load(path, scale=scale)
    if args.offload:
        model.enable_model_cpu_offload()
    with Progress() as progress:
        result = model.generate(args.prompt, callback=progress, memory_budget=args.memory_budget, image=args.image, **settings)
        latents = result.save_latents(clip.latents_path(output))  # first: from here on nothing that fails can cost the sampling
        written = _finish(result, output, progress)
        if strip:
            written += video.save(video.strip(result.frames), strip, comment=result.settings.to_json())
    _tell(written, result.settings, latents)


def decode(args) -> None:
    from . import clip, pipeline, video

    _, settings = clip.load_latents(args.latents)
    output = video.check_output(args.output or re.sub(r"(\.latents)?\.safetensors$", ".mp4", args.latents))
    model = pipeline.load(args.model or settings.model, device=args.device, parts=("vae",))
    with Progress() as progress:
        result = model.open(args.latents, args.memory_budget, **({"vae_policy": args.vae_policy} if args.vae_policy else {}))
        written = _finish(result, output, progress)
    _tell(written, result.settings, args.latents)


def _finish(result, output: Path, progress: Progress) -> list[Path]:
    progress("decoding")
    return result.save(output, latents=False, notify=progress.tell)


def _tell(written, settings, latents) -> None:
    for path in written:
        print(path)
    print(f"seed {settings.seed}, {settings.num_frames} frames of {settings.width}x{settings.height}, {settings.vae_policy} decoding, "
          f"latents in {latents}")


def doctor(args) -> None:
    from .doctor import report

    for line in report():
        print(line)


def verify(args) -> None:
    from .verify import verify as lines_about

    for line in lines_about(args.path):
        print(line)


def quantize(args) -> None:
    from .quant_file import quantize_file

    for line in quantize_file(args.model, args.folder, args.mode):
        print(line)


def download(args) -> None:
    from .locate import locate

    sources = locate(args.preset, args.revision)
    for name in ("dit", "vae", "text_encoder", "text_encoder_2"):
        if getattr(sources, name) is not None:
            print(f"{name.replace('_', ' '):14} {getattr(sources, name)}")


def presets(args) -> None:
    print(f"{'preset':30} {'task':4} {'steps':>5} {'guidance':>8} {'attention':10} {'frames':>6} {'size':9} published in")
    for preset in PRESETS.values():
        attention = f"nabla {preset.nabla.keep_mass}" if preset.nabla else "dense"
        height, width = preset.sizes[0]
        print(f"{preset.name:30} {preset.task:4} {preset.steps:5} {preset.guidance:8} {attention:10} {preset.frames:6} "
              f"{f'{width}x{height}':9} {preset.repo or 'this package'}")


def train_tiny(args) -> None:
    from .train_tiny import train_tiny

    print(train_tiny(args.output, seed=args.seed, resume=args.resume, device=args.device))


def check_tiny(args) -> None:
    from .check_tiny import check_tiny
    from .locate import TINY
    from .shapes import held_out

    result = check_tiny(args.folder or TINY, args.seed, args.steps, args.guidance, held_out()[: args.count], args.quantize)
    print(f"{result['prompts']} prompts of combinations that were never in training")
    for word in ("color", "background", "color_and_background", "shape", "motion", "all"):
        before = f", unquantised {result['unquantized'][word]:6.1%}" if args.quantize else ""
        print(f"{word.replace('_', ' '):21} {result[word]:6.1%}{before}")
    if args.quantize:
        psnr = sorted(sample["psnr"] for sample in result["samples"])
        print(f"PSNR of the frames against the unquantised: median {psnr[len(psnr) // 2]:.1f} dB, worst {psnr[0]:.1f} dB")
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(args.json)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"a size is WIDTHxHEIGHT in pixels, such as 768x512, got {text!r}")
    return int(match[1]), int(match[2])


def _lora(text: str) -> tuple[str, float]:
    path, _, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if path else (text, 1.0)
    except ValueError:  # a colon of the path's own
        return text, 1.0


def _bytes(text: str) -> int:
    from .memory import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _generate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("prompt")
    command.add_argument("-o", "--output", default="out.mp4", help=".mp4, .gif or .png; several frames as png: <name>_000.png, ...")
    command.add_argument("--model", default="tiny", help="a preset (kandinsky presets), a local path or a hub repository (default: tiny)")
    command.add_argument("--revision", help="commit, branch or tag of the hub repository")
    length = command.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, help="length at 24 frames per second")
    length.add_argument("--frames", type=int, help="number of frames, 4k + 1")
    command.add_argument("--size", type=_size, metavar="WxH", help="width and height in pixels, multiples of 16")
    command.add_argument("--steps", type=int)
    command.add_argument("--guidance", type=float, help="1 means none, and halves the work")
    command.add_argument("--scheduler-scale", type=float, help="above 1, more of the steps go to the noisy end")
    command.add_argument("--seed", type=int, help="the same seed gives the same video (default: random, and printed)")
    command.add_argument("--negative", metavar="PROMPT", help="what to steer away from (default: the model's own)")
    command.add_argument("--attention", choices=("nabla", "dense"), help="default: what the model was trained with")
    command.add_argument("--precision", choices=("fp32", "reference"), help="of the latents; reference rounds as the official code does")
    command.add_argument("--cache", choices=CACHES, help="reuse what the blocks did at earlier steps (default: none)")
    command.add_argument("--image", metavar="FILE", help="the first frame, for image-to-video checkpoints")
    command.add_argument("--lora", type=_lora, action="append", default=[], metavar="PATH[:SCALE]", help="a LoRA; may be repeated")
    command.add_argument("--quantize", choices=QUANTIZATIONS, metavar="MODE",
                         help=f"keep the transformer's large weights in 8 bits: {', '.join(QUANTIZATIONS)} (default: as stored)")
    command.add_argument("--offload", action="store_true", help="keep on the GPU only the part that is working")
    command.add_argument("--strip", metavar="FILE.png", help="also write some frames side by side")
    _decoding_arguments(command)


def _decode_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("latents", help="a .latents.safetensors file")
    command.add_argument("-o", "--output", help="default: the name of the latents, as .mp4")
    command.add_argument("--model", help="whose VAE to use (default: the model that made the latents)")
    _decoding_arguments(command)


def _decoding_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: CUDA where there is one)")
    command.add_argument("--vae-policy", choices=("global", "official", "preview"),
                         help="decode in one piece, in the published pipeline's tiles, or to colours only (default: one piece while the "
                              "clip is small)")
    command.add_argument("--memory-budget", type=_bytes, metavar="SIZE",
                         help="what decoding may use, such as 10GB; less takes longer and gives the same frames (default: what is free)")


def _quantize_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(chatty=True)
    command.add_argument("model", help="a preset, a local path or a hub repository")
    command.add_argument("folder", help="a new or empty folder, to stand as transformer/ in a model's folder")
    command.add_argument("--mode", choices=QUANTIZATIONS, default="int8", help="default: int8; -dynamic: multiply in 8 bits too")


def _download_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("preset", help="a preset (kandinsky presets) or a hub repository")
    command.add_argument("--revision", help="commit, branch or tag of the hub repository")


def _train_tiny_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(chatty=True)
    command.add_argument("-o", "--output", default="tiny", metavar="FOLDER", help="where the model goes (default: tiny)")
    command.add_argument("--seed", type=int, default=2026)
    command.add_argument("--resume", action="store_true", help="train what is in the folder further")
    command.add_argument("--device", default="cpu")


def _check_tiny_arguments(command: argparse.ArgumentParser) -> None:
    command.set_defaults(chatty=True)
    command.add_argument("folder", nargs="?", help="a folder of train-tiny (default: the bundled model)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int)
    command.add_argument("--guidance", type=float)
    command.add_argument("--quantize", choices=QUANTIZATIONS, help="also compare with the unquantised model")
    command.add_argument("--count", type=int, help="only the first of the 48 prompts")
    command.add_argument("--json", metavar="FILE", help="also write every verdict")


def parser() -> argparse.ArgumentParser:
    """The command line's grammar; each command's function is `run` of what it parses."""
    kandinsky = Parser(prog="kandinsky", description="Text to video with Kandinsky 5.0.")
    commands = kandinsky.add_subparsers(required=True, metavar="command")
    for run, arguments, text in (
        (generate, _generate_arguments, "make a video from a prompt"),
        (decode, _decode_arguments, "decode saved latents again"),
        (presets, None, "list the released checkpoints"),
        (download, _download_arguments, "fetch what a preset needs into the hub library's cache; afterwards no network is needed"),
        (quantize, _quantize_arguments, "write a transformer with its large weights in 8 bits, and say how far they are from the original"),
        (verify, lambda command: command.add_argument("path"), "say what a file or folder of weights is, and whether it is whole"),
        (doctor, None, "show what this machine offers, and what runs for each operator"),
        (train_tiny, _train_tiny_arguments, "train the bundled model from nothing"),
        (check_tiny, _check_tiny_arguments, "measure how often the bundled model draws what is asked"),
    ):
        command = commands.add_parser(run.__name__.replace("_", "-"), help=text, description=text)
        command.set_defaults(run=run, chatty=False)
        command.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        if arguments:
            arguments(command)
    return kandinsky


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s" if args.chatty else "note: %(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO if args.chatty else logging.WARNING)
    if not sys.stderr.isatty():  # before the hub library and transformers are imported: they read it then
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("kandinsky: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"kandinsky: {_one_sentence(error)}", file=sys.stderr)
        return 2
    return 0


def _one_sentence(error: Exception) -> str:
    """Our own errors are one sentence already; of a foreign one, the type and the first line, which is where the matter is."""
    lines = str(error).strip().splitlines() or ["no message"]
    ours = isinstance(error, (ValueError, TypeError, RuntimeError, OSError)) and len(lines) == 1
    return lines[0] if ours else f"{type(error).__name__}: {lines[0]} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
