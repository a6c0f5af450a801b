# SPDX-License-Identifier: Apache-2.0
"""Settings of a training: learning rates, optimisers, what is refused before any work, and that
equal trainings leave equal files."""

import json
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints.load import empty_dit
from kandinsky_model.config import LITE_DIT
from kandinsky_model.training import LoRAConfig, TrainConfig, Trainer, train
from kandinsky_model.training.budget import Trained
from kandinsky_model.training.optimizers import learning_rate
from kandinsky_model.training.state import ABOUT, read_about
from kandinsky_model.training.tensors import write_tensors

from ..fuzz.kills_training import LORA, contents
from ..support.train_folders import pictures

STATE = "training/state.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a small training without samples."""
    return replace(LORA, sample_every=0, cache=str(tmp_path_factory.mktemp("cache")))


# Learning rates


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.05, 0.1, 0.1, 0.1, 0.1, 0.1]),
        ("linear", [0.05, 0.1, 0.1, 0.075, 0.05, 0.025]),
        ("cosine", [0.05, 0.1, 0.1, 0.0853553, 0.05, 0.0146447]),
    ],
)
def test_the_rate_over_the_steps(schedule, rates):
    config = TrainConfig(rate=0.1, warmup=2, steps=6, schedule=schedule)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx(rates, rel=1e-5)


def test_a_schedule_that_ends_needs_the_same_steps(data, config, tmp_path):
    falling = replace(config, schedule="cosine")
    train(data, tmp_path, falling)
    with pytest.raises(ValueError, match="steps was 2 and is 3; give it as before"):
        train(data, tmp_path, replace(falling, steps=3), resume=True)


def test_options_on_the_command_line(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        "kandinsky_model.training.trainer.train", lambda *arguments: seen.append(arguments[2])
    )
    options = ["--schedule", "linear", "--optimizer", "adamw8bit", "--lora-alpha", "16"]
    assert main(["train", "clips", "-o", "out", *options]) == 0
    lora = LoRAConfig(32, 16.0)
    assert seen == [TrainConfig(lora=lora, schedule="linear", optimizer="adamw8bit")]
    assert main(["train", "clips", "-o", "out", "--full", "--lora-alpha", "16"]) == 2
    assert "--lora-alpha is the factor of a LoRA" in capsys.readouterr().err


# Optimisers


def test_moments_of_8_bits(data, config, tmp_path):
    """Resumed to the same bits, and counted as the bytes that they take."""
    pytest.importorskip("bitsandbytes")
    eight = replace(config, lora=LoRAConfig(32), optimizer="adamw8bit", steps=3)
    trainer = Trainer(data, tmp_path / "whole", eight)
    trainer.begin(resume=False)
    for _ in range(3):
        trainer.advance()
    moments = load_file(trainer.out / STATE)
    kinds = {moments[name].dtype for name in moments if name.startswith("state1.")}
    assert kinds == {torch.uint8}
    kept = [name for name in moments if name.startswith(("state", "absmax"))]
    counted = Trained.of(trainer.network.dit, eight).moments
    assert sum(moments[name].nbytes for name in kept) == counted

    train(data, tmp_path / "stopped", replace(eight, steps=2))
    train(data, tmp_path / "stopped", eight, resume=True)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_moments_of_8_bits_take_a_quarter():
    dit = empty_dit(LITE_DIT)
    wide, eight = (
        Trained.of(dit, TrainConfig(lora=None, optimizer=name)).moments
        for name in ("adamw", "adamw8bit")
    )
    assert 0.25 < eight / wide < 0.26


def test_an_optimizer_without_its_library_is_refused_before_any_work(
    data, config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(RuntimeError, match="requires bitsandbytes, which cannot be imported"):
        train(data, tmp_path / "out", replace(config, optimizer="adamw8bit"))
    assert not (tmp_path / "out").exists()


# What is refused


def test_a_rank_that_no_layer_can_have_is_refused_before_any_work(data, config, tmp_path):
    words = "rank of a LoRA must be at most 256, the smaller side of .*, got 100000"
    with pytest.raises(ValueError, match=words):
        train(data, tmp_path / "out", replace(config, lora=LoRAConfig(100_000)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be an int, got 2.5"),
        ({"batch": True}, TypeError, "batch must be an int, got True"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 2**64}, ValueError, "seed must be at most"),
        ({"samples": -1}, ValueError, "samples must be at least 0"),
        ({"sample_steps": 0}, ValueError, "sample_steps must be at least 1, got 0"),
        ({"rate": float("nan")}, ValueError, "rate must lie between 0 and 1"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas and decay must lie in 0..1 below 1"),
        ({"decay": -0.1}, ValueError, "betas and decay must lie in 0..1 below 1"),
        ({"clip": 0.0}, ValueError, "clip and shift must be positive"),
        ({"shift": 0.0}, ValueError, "clip and shift must be positive"),
        ({"schedule": "step"}, ValueError, "schedule must be constant or linear or cosine"),
        ({"optimizer": "sgd"}, ValueError, "optimizer must be adamw or adamw8bit, got 'sgd'"),
    ],
)
def test_impossible_settings_are_refused(changes, error, words):
    with pytest.raises(error, match=words):
        TrainConfig(**changes)


def test_scalars_of_numpy_are_ints():
    config = TrainConfig(steps=numpy.int64(3), lora=LoRAConfig(numpy.int32(4)))
    assert type(config.steps) is int
    assert type(config.lora.rank) is int


def spoil_name(tensors):
    tensors["x" + tensors.popitem()[0]] = torch.zeros(1)


def spoil_shape(tensors):
    name = next(name for name in tensors if name.startswith("exp_avg."))
    tensors[name] = tensors[name][:1]


def spoil_losses(tensors):
    tensors["losses"] = torch.zeros(0)


@pytest.mark.parametrize("spoil", [spoil_name, spoil_shape, spoil_losses])
def test_the_state_of_something_else_is_refused(data, config, tmp_path, spoil):
    train(data, tmp_path, config)
    about = json.dumps(read_about(tmp_path / STATE))
    tensors = load_file(tmp_path / STATE)
    spoil(tensors)
    save_file(tensors, tmp_path / STATE, {ABOUT: about})
    with pytest.raises(ValueError, match="must hold the state of this training, but 1 tensors are"):
        train(data, tmp_path, config, resume=True)


def test_a_state_with_a_setting_that_nobody_knows_is_refused(data, config, tmp_path):
    train(data, tmp_path, config)
    about = read_about(tmp_path / STATE) | {"surprise": 1}
    save_file(load_file(tmp_path / STATE), tmp_path / STATE, {ABOUT: json.dumps(about)})
    with pytest.raises(ValueError, match="but 'surprise' is none that this version knows"):
        train(data, tmp_path, config, resume=True)


@pytest.mark.parametrize("about", ["[1]", "{", "[" * 100_000])
def test_a_state_that_does_not_say_of_what_is_refused(tmp_path, about):
    save_file({"losses": torch.zeros(1)}, tmp_path / "s.safetensors", {ABOUT: about})
    with pytest.raises(ValueError, match="but does not say of which"):
        read_about(tmp_path / "s.safetensors")


# Equal trainings


def test_equal_tensors_are_equal_files(tmp_path):
    """Whatever order the library has for the metadata of a header."""
    metadata = {f"key {i}": 'a "quoted" \n é' for i in range(6)}
    tensors = {"a": torch.ones(3, 3).T[:2], "b": torch.zeros(2, dtype=torch.bfloat16)}
    written = set()
    for i in range(20):
        path = tmp_path / f"{i}.safetensors"
        write_tensors(path, tensors, dict(reversed(metadata.items())) if i % 2 else metadata)
        written.add(path.read_bytes())
    assert len(written) == 1
    assert torch.equal(load_file(path)["a"], tensors["a"])


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_equal_trainings_leave_equal_files(data, config, tmp_path, full):
    settings = replace(config, sample_every=2, samples=1, sample_steps=1)
    if full:
        settings = replace(settings, lora=None, rate=1e-4)
    one, two = (contents(train(data, tmp_path / name, settings)) for name in ("one", "two"))
    assert STATE in one
    assert "samples/step_000002_0.png" in one
    assert one == two
