# SPDX-License-Identifier: Apache-2.0
"""Trainings that end while they write, and what resuming makes of them. The command `python -m
tests.fuzz.kills_training` tries every write; here it is some of them, by a fixed seed."""

import random
from dataclasses import replace

import pytest

from kandinsky_model.training.trainer import Trainer, train

from ..fuzz.kills_training import LORA, SCENARIOS, Sweep, contents
from ..support.train_folders import pictures

TRIED = {"lora": 4, "full": 1, "cache": 2}  # writes of each scenario


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_training_that_ends_while_it_writes_is_recovered(name, tmp_path):
    sweep = Sweep(name, tmp_path)
    assert len(sweep.writes) > 20, sweep.writes
    for at in random.Random(name).sample(range(len(sweep.writes)), TRIED[name]):
        for kind in ("kill", "full"):
            sweep.strike(at, kind)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(data, settings, what they leave)."""
    root = tmp_path_factory.mktemp("whole")
    data = pictures(root / "data")
    config = replace(LORA, cache=str(root / "cache"), lora=replace(LORA.lora, alpha=6.0))
    return data, config, contents(train(data, root / "out", config))


@pytest.mark.parametrize("lost", ["_save_results", "_show"])
def test_resuming_makes_what_the_last_save_did_not(whole, tmp_path, monkeypatch, lost):
    """The last state was saved, and then the process ended. No step is left to do, but results are:
    they would be stale, or missing."""
    data, config, wanted = whole
    out = tmp_path / "out"

    real = getattr(Trainer, lost)

    def end(trainer):
        if trainer.state.step == config.steps:
            raise KeyboardInterrupt
        real(trainer)

    monkeypatch.setattr(Trainer, lost, end)
    with pytest.raises(KeyboardInterrupt):
        train(data, out, config)
    assert contents(out) != wanted
    monkeypatch.undo()
    train(data, out, config, resume=True)
    assert contents(out) == wanted
    (out / "lora.safetensors").unlink()
    train(data, out, config, resume=True)
    assert contents(out) == wanted
