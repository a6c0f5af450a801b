# SPDX-License-Identifier: Apache-2.0
"""Interrupted runs: what is kept, that going on gives the bits of a run in one piece, and
refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.sampling.result import load_latents
from kandinsky_model.sampling.run import Interrupted, Run

from ..support import tiny_models
from ..support.tiny_models import SMALL, SMALL_ARGS

PROMPT = "a red circle moving right"
STEPS = dict(SMALL, num_inference_steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder):
    return pipeline.load(folder, device="cpu")


def stop_after(count):
    """A callback that acts like Ctrl-C once so many steps are done."""

    def callback(stage, step, steps, latents):
        if stage == "sampling" and step == count:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_going_on_gives_the_same_bits(model, tmp_path, count):
    prompts = [PROMPT, "a blue square"]
    wanted = model.generate(prompts, "green", seed=3, **STEPS)
    with pytest.raises(Interrupted, match=f"after {count} of 4 steps") as caught:
        model.generate(prompts, "green", seed=3, callback=stop_after(count), **STEPS)
    for run in (caught.value.run, Run.load(caught.value.run.save(tmp_path / "a.run.safetensors"))):
        model.text = None  # everything a prompt can say is in the run
        again = model.resume(run)
        assert [video.settings for video in again] == [video.settings for video in wanted]
        assert all(
            torch.equal(ours.latents, theirs.latents)
            for ours, theirs in zip(again, wanted, strict=True)
        )


def test_pictures_and_precision_are_kept(model, tmp_path):
    model.preset = replace(model.preset, task="i2v", sizes=((96, 96),))
    image = torch.randint(256, (60, 100, 3), dtype=torch.uint8)
    settings = dict(
        image=image,
        last_image=255 - image,
        num_frames=25,
        num_inference_steps=3,
        precision="reference",
        cache="first-block",
    )
    wanted = model.generate(PROMPT, seed=1, **settings)
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, seed=1, callback=stop_after(1), **settings)
    run = Run.load(caught.value.run.save(tmp_path / "a.run.safetensors"))
    assert run.latents.dtype == torch.bfloat16 and set(run.given.frames) == {0, 6}
    (again,) = model.resume(run)
    assert again.settings == wanted.settings
    assert torch.equal(again.latents[:, -1:], wanted.latents[:, -1:])
    # the cache has forgotten what it knew
    assert (again.latents - wanted.latents).norm() <= 0.1 * wanted.latents.norm()


def test_other_exceptions_pass_as_they_are(model):
    def fail(stage, *_):
        raise ZeroDivisionError(stage)

    with pytest.raises(ZeroDivisionError, match="text"):
        model.generate(PROMPT, callback=fail, **STEPS)


def test_a_file_is_whole_or_absent(model, tmp_path, monkeypatch):
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, callback=stop_after(1), **STEPS)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        caught.value.run.save(tmp_path / "a.run.safetensors")
    assert not list(tmp_path.iterdir())
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="must hold an interrupted run"):
        Run.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        Run.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("mode", ["", "int8"])
def test_command_line(folder, tmp_path, monkeypatch, capsys, mode):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "generate",
        PROMPT,
        *SMALL_ARGS,
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--seed",
        "5",
    ]
    arguments += ["--quantize", mode] if mode else []
    assert main([*arguments, "-o", "whole.mp4"]) == 0
    real = pipeline.sample
    monkeypatch.setattr(pipeline, "sample", lambda *args: interrupted(real(*args)))
    capsys.readouterr()
    assert main([*arguments, "-o", "a.mp4"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "kandinsky: interrupted after 1 of 2 steps; go on with: kandinsky "
        "resume a.run.safetensors\n",
    )
    monkeypatch.setattr(pipeline, "sample", real)
    assert main(["resume", "a.run.safetensors", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("a.mp4\nseed 5, 5 frames of 80x64")
    (one, settings), (other, same) = (
        load_latents(f"{name}.latents.safetensors") for name in ("whole", "a")
    )
    assert torch.equal(one, other) and settings == same and settings.quantization == mode
    assert main(["resume", "whole.latents.safetensors"]) == 2
    assert "must hold an interrupted run" in capsys.readouterr().err


def interrupted(steps):
    yield next(steps)
    raise KeyboardInterrupt
