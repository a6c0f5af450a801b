# SPDX-License-Identifier: Apache-2.0
"""A training from a folder of clips to results that load: from the command line, stopped and
resumed, in one process and in two, and its steps one by one."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import kandinsky_model.training
from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints.load import load_dit
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.checkpoints.lora import Adapters
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import make_layout
from kandinsky_model.files import replacing
from kandinsky_model.training.config import LoRAConfig, TrainConfig
from kandinsky_model.training.trainer import Trainer, train

from ..dit.test_transformer import inputs, rel_l2
from ..support.train_folders import SMALL, clips

ROOT = Path(__file__).resolve().parents[2]
GRID = Grid(2, 4, 4)  # of clips of 5 frames and 64 x 64 pixels
SCALE = (1.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return clips(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(cache):
    return TrainConfig(
        lora=LoRAConfig(4),
        sizes=((64, 64),),
        lengths=(5,),
        batch=2,
        passes=2,
        rate=1e-2,
        warmup=2,
        steps=3,
        device="cpu",
        cache=str(cache),
    )


def begun(data, out, config, resume=False):
    trainer = Trainer(data, out, config)
    trainer.begin(resume)
    return trainer


def run(*words):
    """The exit status of the command line."""
    return main([str(word) for word in words])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Results


def test_the_room_offers_what_a_user_needs():
    room = kandinsky_model.training
    assert room.train is train
    assert room.TrainConfig is TrainConfig
    assert room.Trainer is Trainer
    assert set(room.__all__) <= set(dir(room))
    with pytest.raises(AttributeError, match="no attribute 'Run'"):
        room.Run  # noqa: B018
    code = (
        "import sys, kandinsky_model.training as t; t.TrainConfig; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_lora_from_the_command_line(data, cache, tmp_path, capsys):
    out = tmp_path / "out"
    words = [data, "-o", out, *SMALL, "--cache", cache, "--trigger", "zap", "--sample-every", 3]
    assert run("train", *words, "--steps", 3, "--seed", 5) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{out}\n"
    results = ["config_lora.json", "lora.safetensors", "loss.png", "samples", "training"]
    assert names(out) == results
    assert names(out / "samples") == ["step_000003_0.mp4", "step_000003_1.mp4"]
    assert Image.open(out / "loss.png").size == (560, 360)

    written = json.loads((out / "config_lora.json").read_text())
    assert (written["r"], written["lora_alpha"], len(written["target_modules"])) == (4, 4, 10)
    dit = load_dit(TINY / "transformer", dtype=torch.float32).prepare()
    layers = [
        name
        for name in dict(dit.named_modules())
        if name.endswith(tuple(written["target_modules"]))
    ]
    wanted = {f"{name}.lora_{half}.weight" for name in layers for half in "AB"}
    assert set(load_file(out / "lora.safetensors")) == wanted

    layout = make_layout(dit.config, GRID, SCALE)
    read = inputs(dit.config, GRID)
    before = dit(*read, layout)
    adapters = Adapters(dit)
    assert adapters.load(out).rank == 4
    assert adapters.prompt("a cat") == "zap a cat"
    assert rel_l2(dit(*read, layout), before) > 1e-3

    clip = ["--size", "64x64", "--frames", "5", "--steps", "2", "--device", "cpu"]
    assert (
        run(
            "generate",
            "a red circle",
            "--lora",
            out,
            *clip,
            "-o",
            tmp_path / "a.gif",
        )
        == 0
    )


def test_settings_on_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "kandinsky_model.training.trainer.train", lambda *arguments: seen.append(arguments)
    )
    options = ["--dtype", "bf16", "--distill", "guidance", "--lora-rank", "8", "--passes", "1"]
    assert run("train", "clips", "-o", "out", *options) == 0
    config = TrainConfig(
        lora=LoRAConfig(8),
        dtype="bf16",
        distill="guidance",
        passes=1,
    )
    assert seen == [("clips", "out", config, False)]


def test_all_weights_from_the_command_line(data, cache, tmp_path, capsys):
    small = [word for word in SMALL if word not in ("--lora-rank", "4")]
    words = [data, "-o", tmp_path / "out", *small, "--cache", cache, "--rate", 1e-4, "--ema", 0]
    assert run("train", *words, "--full", "--steps", 2) == 0, capsys.readouterr().err
    model = pipeline.load(tmp_path / "out", device="cpu")
    assert model.preset.name == "tiny"
    assert model.preset.nabla
    original = load_dit(TINY / "transformer", dtype=torch.float32).state_dict()
    trained = model.dit.state_dict()
    assert not any(torch.equal(trained[name], original[name]) for name in original)
    video = model.generate(
        "a red circle",
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=2,
        seed=1,
    )
    assert video.frames.shape == (5, 64, 64, 3)


def test_what_is_saved_is_what_was_trained(data, config, tmp_path):
    """Adapter and base as loaded from files equal the network in training, with the weights'
    average."""
    trainer = begun(data, tmp_path / "out", replace(config, lora=LoRAConfig(4, alpha=6.0)))
    for _ in range(2):
        trainer.advance()
    trainer.save()
    network = trainer.network
    layout = make_layout(network.config, GRID, SCALE, trainer.preset.nabla)
    read = inputs(network.config, GRID)
    with torch.no_grad():
        current = network(*read, layout)
        with trainer.state.averaged():
            averaged = network(*read, layout)
        assert torch.equal(network(*read, layout), current)
        assert rel_l2(averaged, current) > 1e-4
    dit = load_dit(TINY / "transformer", dtype=torch.float32).prepare()
    Adapters(dit).load(trainer.out)
    assert rel_l2(dit(*read, layout), averaged) <= 1e-6


# Steps


def test_training_fits_the_data(data, config, tmp_path):
    """The loss on one and the same pass, before and after."""
    trainer = begun(
        data,
        tmp_path / "out",
        replace(
            config,
            steps=15,
            ema=0.0,
            drop=0.0,
        ),
    )
    batch = trainer.drawn(10**6)

    def loss():
        with torch.no_grad():
            return trainer.objective.losses(batch).mean().item()

    before = loss()
    for _ in range(15):
        trainer.advance()
    after = loss()
    print(f"loss {before:.4f} before, {after:.4f} after")
    assert after < 0.9 * before


def test_gradients_are_added_up(data, config, tmp_path):
    """Two passes of two give the gradient of one pass of four."""
    trainer = begun(data, tmp_path / "out", config)
    parameters = trainer.parameters.values()
    gradients = []
    trainer.state.update = lambda _: gradients.extend(p.grad.clone() for p in parameters)
    trainer._after = lambda: None
    trainer.advance()
    for parameter in parameters:
        parameter.grad = None
    losses = [trainer.objective.losses(trainer.drawn(i)) for i in range(2)]
    torch.cat(losses).mean().backward()
    for parameter, added in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(added, parameter.grad, rtol=1e-5, atol=1e-8)
    assert any(gradient.any() for gradient in gradients)


def test_the_rate_warms_up_and_the_average_follows(data, config, tmp_path):
    config = replace(config, rate=1e-2, warmup=4, steps=6, ema=0.5)
    trainer = begun(data, tmp_path / "out", config)
    average = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    rates = []
    for step in range(6):
        trainer.advance()
        rates.append(trainer.state.optimizer.param_groups[0]["lr"])
        decay = min(0.5, (step + 1) / (step + 10))
        for name, parameter in trainer.parameters.items():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    result = trainer.state.result
    assert all(torch.allclose(result[name], average[name], atol=1e-7) for name in average)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_sixteen_bit_activations(data, config, tmp_path, full):
    """What is trained, and its state, stays in fp32; what is saved has the dtypes of a released
    checkpoint."""
    if full:
        config = replace(config, lora=None, rate=1e-4)
    trainer = begun(data, tmp_path / "out", replace(config, dtype="bf16"))
    trainer.advance()
    trainer.save()
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}
    moments = trainer.state.optimizer.state.values()
    assert {moment["exp_avg"].dtype for moment in moments} == {torch.float32}
    weights = "transformer/diffusion_pytorch_model.safetensors" if full else "lora.safetensors"
    saved = load_file(trainer.out / weights)
    wide_names = {name for name, tensor in saved.items() if tensor.dtype != torch.bfloat16}
    sensitive = {name for name in saved if "modulation" in name or "time_embeddings" in name}
    assert wide_names == (sensitive if full else set())

    wide = begun(data, tmp_path / "wide", config)
    wide.advance()
    assert 0 < abs(trainer.state.losses[0] / wide.state.losses[0] - 1) < 0.02


def test_a_loss_that_is_not_finite_stops(data, config, tmp_path):
    trainer = begun(data, tmp_path / "out", config)
    nan = torch.full((1,), float("nan"), requires_grad=True)
    trainer.objective.losses = lambda batch: nan
    with pytest.raises(RuntimeError, match="the loss must stay finite, but step 1 gave nan"):
        trainer.advance()


# Interruptions


@pytest.fixture
def one_thread():
    """As in the processes that are started: the number of threads decides in which order sums are
    taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def contents(path):
    """Every bit of a file but the order of its header."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in names}


def environment():
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }


def steps_of(out):
    """How many steps the saved state has."""
    path = out / "training" / "state.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        return file.get_slice("losses").get_shape()[0]


def test_a_killed_training_goes_on_to_the_same_bits(data, cache, tmp_path, one_thread):
    words = [data, *SMALL, "--cache", cache, "--save-every", 1]
    killed = tmp_path / "killed"
    whole = tmp_path / "whole"
    command = [sys.executable, "-m", "kandinsky_model", "train", *words, "-o", killed]
    process = subprocess.Popen(
        [*map(str, command), "--steps", "10000"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    begin = time.time()
    while steps_of(killed) < 2 and process.poll() is None and time.time() - begin < 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    done = steps_of(killed)
    with safe_open(killed / "lora.safetensors", framework="pt") as file:
        assert len(file.keys()) > 10  # whole, whenever the kill happened

    assert (
        run(
            "train",
            *words,
            "-o",
            killed,
            "--steps",
            done + 2,
            "--resume",
        )
        == 0
    )
    assert run("train", *words, "-o", whole, "--steps", done + 2) == 0
    assert steps_of(killed) == steps_of(whole) == done + 2
    for name in ("lora.safetensors", "training/state.safetensors"):
        assert contents(killed / name) == contents(whole / name), name
    assert (killed / "loss.png").read_bytes() == (whole / "loss.png").read_bytes()


def test_two_processes_equal_one(data, cache, tmp_path):
    words = ["train", data, *SMALL, "--ema", 0, "--steps", 3, "--cache", cache]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    package = ["-m", "kandinsky_model"]
    command = [sys.executable, *launcher, *package, *words, "-o", tmp_path / "two"]
    done = subprocess.run(
        [str(word) for word in command],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr.count("step 3 of 3") == 1, done.stderr
    assert run(*words, "-o", tmp_path / "one") == 0
    two, one = (load_file(tmp_path / name / "lora.safetensors") for name in ("two", "one"))
    worst = max(rel_l2(two[name], one[name]) for name in one)
    print(f"two processes: rel_l2 {worst:.2g} at most")
    assert worst <= 1e-4


def test_refusals(data, config, tmp_path):
    out = tmp_path / "out"
    config = replace(config, steps=1)
    with pytest.raises(FileNotFoundError, match="leave out --resume"):
        train(data, out, config, resume=True)
    train(data, out, config)
    longer = replace(config, steps=2)
    for changes, message in (
        ({"rate": 1e-3}, "rate was 0.01 and is 0.001"),
        ({"lora": LoRAConfig(8)}, "lora was .*8"),
        ({"drop": 0.1}, "drop was 0.5 and is 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(data, out, replace(longer, **changes), resume=True)
    with pytest.raises(ValueError, match="holds a training already; go on with it by --resume"):
        train(data, out, config)
    more = clips(tmp_path / "more", 2)
    with pytest.raises(ValueError, match="more has changed; restore it"):
        train(more, out, longer, resume=True)
    with pytest.raises(
        ValueError, match="multiple of the 3 processes .* got 2; give for example 3"
    ):
        Trainer(data, out, config, 0, 3)
    train(data, out, longer, resume=True)
    assert steps_of(out) == 2


def test_what_is_in_the_way_is_told_in_one_sentence(data, config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the output .*file must be a folder that can be written"):
        train(data, tmp_path / "file", config)
    trainer = begun(data, tmp_path / "out", replace(config, cache=str(tmp_path / "cache")))
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
    with pytest.raises(OSError, match="the cache must stay as it is while a training runs"):
        trainer.advance()


def test_a_full_disk_keeps_the_last_state(data, config, tmp_path):
    resource = pytest.importorskip("resource")
    trainer = begun(data, tmp_path / "out", replace(config, steps=10, save_every=1))
    trainer.advance()
    before = {path: path.read_bytes() for path in trainer.out.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        words = "after step 2 got .*go on with --resume from the state before"
        with pytest.raises(OSError, match=words):
            trainer.advance()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = {path: path.read_bytes() for path in trainer.out.rglob("*") if path.is_file()}
    assert after == before
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    with replacing(tmp_path / "lora.safetensors") as target:
        target.write_bytes(b"")
        name = target.parent.name.replace(f"-{os.getpid()}-", f"-{killed.pid}-")
    (trainer.out / name).mkdir()
    resumed = begun(data, trainer.out, trainer.config, resume=True)
    assert resumed.state.step == 1
    assert not list(trainer.out.glob(".*"))


def test_a_training_goes_on_without_matplotlib(data, config, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = begun(data, tmp_path / "out", replace(config, steps=1))
    trainer.advance()
    assert (trainer.out / "lora.safetensors").is_file()
    assert not (trainer.out / "loss.png").exists()
    assert "no curve of the losses: charts require matplotlib" in caplog.text
