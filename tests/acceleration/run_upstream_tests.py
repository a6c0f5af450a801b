# SPDX-License-Identifier: Apache-2.0
"""Runs diffusers' own tests of its Kandinsky 5 pipelines and their video VAE, as they are and
accelerated:

    python -m tests.acceleration.run_upstream_tests CHECKOUT [-k EXPRESSION]

CHECKOUT is a folder with a copy of diffusers' repository, whose tests run against the diffusers
that is installed. They need torchvision, parameterized and requests_mock. Where the hub cannot be
reached, the two tiny tokenizers that they fetch are replaced by ones of single bytes. Pictures are
64 x 64 everywhere, as in their own `test_inference`: most of the others draw 1024 x 1024, which
takes hours on a CPU. The command prints the outcomes of every test that does not pass twice, and
fails where one passes as it is and not accelerated, or where none passes.
"""

import argparse
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/pipelines/kandinsky5",
    "tests/models/autoencoders/test_models_autoencoder_hunyuan_video.py",
)
PIPELINES = ("T2V", "I2V", "T2I", "I2I")
SMALL = (64, 64)  # (width, height) of the pictures that are made
# the ids that the tests' text encoder has for what stands around a picture
SPECIAL = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}


class Outcomes:
    """A plugin of pytest: what became of each test, and why where it failed."""

    def __init__(self):
        self.seen: dict[str, str] = {}
        self.why: dict[str, str] = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition("::")[2]
        if report.failed:
            self.seen[name] = "failed"
            self.why[name] = str(report.longrepr).strip().splitlines()[-1]
        elif report.when == "call" or report.skipped:
            self.seen.setdefault(name, report.outcome)


def write_tokenizer(folder: Path, vocabulary: dict[str, int]) -> str:
    """The files of a tokenizer that merges nothing."""
    folder.joinpath("vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    folder.joinpath("merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return str(folder)


def words_of_templates() -> list[str]:
    """The words of the prompts and of the texts around them.

    As single bytes they would fill the few tokens that the tests allow, and a picture that stands
    behind them would be cut off.
    """
    import diffusers

    sources = [
        inspect.getsource(getattr(diffusers, f"Kandinsky5{task}Pipeline").__init__)
        for task in PIPELINES
    ]
    sources.append(" a red square")  # what the tests ask for
    return sorted(set(re.findall(r" ?[A-Za-z]+", " ".join(sources))))


def stand_in_tokenizers() -> None:
    """Let the names of the tests' tokenizers give ones of single bytes, where the hub cannot."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    words = {text: i for i, text in enumerate(symbols)}
    pieces = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    clip_words = {text: i + 3 for i, text in enumerate(pieces)}
    clip_words |= {"<|startoftext|>": 0, "<|endoftext|>": 2}

    def processor(folder: Path):
        files = write_tokenizer(folder, words | SPECIAL)
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(files)
        tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)[1:]})
        tokenizer.add_tokens(words_of_templates())
        # a picture of the size that is given: the tests' are tiny
        limits = {"min_pixels": 28 * 28, "max_pixels": 1 << 20}
        return transformers.Qwen2_5_VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(**limits),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen2VLVideoProcessor(),
        )

    def clip(folder: Path):
        return transformers.CLIPTokenizer.from_pretrained(write_tokenizer(folder, clip_words))

    for kind, make in (("AutoProcessor", processor), ("CLIPTokenizer", clip)):
        owner = getattr(transformers, kind)
        owner.from_pretrained = or_else(owner.from_pretrained, make)


def or_else(original, make):
    """A `from_pretrained` that makes a tokenizer where one of the tests' is not to be had."""
    unreachable = False

    def from_pretrained(name, *args, **kwargs):
        nonlocal unreachable
        if not str(name).startswith("hf-internal-testing/"):
            return original(name, *args, **kwargs)
        if not unreachable:  # asking takes long where nobody answers
            try:
                return original(name, *args, **kwargs)
            except OSError:
                unreachable = True
        with tempfile.TemporaryDirectory() as folder:
            return make(Path(folder))

    return from_pretrained


def once_made(kind: type, change) -> None:
    """Call `change` with every object of this class as soon as it is made."""

    @functools.wraps(kind.__init__)  # its signature says which parts a pipeline has
    def made(self, *args, stock_init=kind.__init__, **kwargs):
        stock_init(self, *args, **kwargs)
        change(self)

    kind.__init__ = made


def prepare(accelerate) -> None:
    """Make pictures small and, where `accelerate` is given, accelerate what is tested."""
    import diffusers

    def ready(pipeline):
        if hasattr(pipeline, "resolutions"):
            pipeline.resolutions = [SMALL]
        if accelerate and pipeline.transformer is not None:
            accelerate(pipeline)

    for task in PIPELINES:
        once_made(getattr(diffusers, f"Kandinsky5{task}Pipeline"), ready)
    if accelerate:
        once_made(diffusers.AutoencoderKLHunyuanVideo, accelerate)


def inside(checkout: Path, accelerated: bool, results: Path, options: list[str]) -> None:
    """Run the tests in this process and write their outcomes."""
    import pytest

    from kandinsky_model import accelerate

    # the checkout's folder of tests has the name of this repository's
    sys.path[:] = [str(checkout), *(path for path in sys.path if Path(path or ".") != ROOT)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    os.chdir(checkout)
    prepare(accelerate if accelerated else None)
    stand_in_tokenizers()
    outcomes = Outcomes()
    pytest.main(["-q", "--tb=line", "-p", "no:cacheprovider", *TESTS, *options], plugins=[outcomes])
    results.write_text(json.dumps([outcomes.seen, outcomes.why]), encoding="utf-8")


def run(checkout: Path, accelerated: bool, options: list[str]) -> tuple[dict, dict]:
    """Run the tests in a process of their own: name -> outcome, and name -> why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        command = [sys.executable, "-m", "tests.acceleration.run_upstream_tests", str(checkout)]
        command += ["--inside", "accelerated" if accelerated else "stock", "--results", results]
        subprocess.run([*map(str, command), *options], cwd=ROOT, check=True)
        seen, why = json.loads(results.read_text(encoding="utf-8"))
    return seen, why


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="a folder with diffusers' repository")
    parser.add_argument("--inside", choices=("stock", "accelerated"), help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)
    known, options = parser.parse_known_args()
    checkout = known.checkout.resolve()
    for tests in TESTS:
        if not (checkout / tests).exists():
            parser.error(f"a checkout of diffusers must hold {tests}, but {checkout} does not")
    if known.inside:
        inside(checkout, known.inside == "accelerated", known.results, options)
        return 0
    stock, _ = run(checkout, False, options)
    ours, why = run(checkout, True, options)
    for name in stock:
        if (stock[name], ours.get(name)) != ("passed", "passed"):
            print(f"{name}: {stock[name]}, accelerated {ours.get(name)}")
    lost = [name for name in stock if stock[name] == "passed" != ours.get(name)]
    for name in lost:
        print(f"only accelerated it fails: {name}: {why.get(name)}")
    print(
        f"as installed: {dict(Counter(stock.values()))}, accelerated: "
        f"{dict(Counter(ours.values()))}"
    )
    if "passed" not in stock.values():
        print("no test passes as it is; see above what they miss")
        return 1
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
