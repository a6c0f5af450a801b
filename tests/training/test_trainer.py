# SPDX-License-Identifier: Apache-2.0
"""`kandinsky train` from a folder to what loads: adapters, whole models, stopped and gone on with,
in one process and in two."""

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

from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints.load import load_dit
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.checkpoints.lora import Adapters
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import make_layout
from kandinsky_model.files import replacing
from kandinsky_model.training.config import LoRAConfig, TrainConfig
from kandinsky_model.training.trainer import Run, train

from ..dit.test_transformer import inputs, rel_l2
from ..support.train_folders import SMALL, clips

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(
    lora=LoRAConfig(4),
    sizes=((64, 64),),
    lengths=(5,),
    batch=2,
    passes=2,
    rate=1e-2,
    warmup=2,
    steps=3,
    device="cpu",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return clips(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def begun(data, out, config, resume=False):
    run = Run(data, out, config)
    run.begin(resume)
    return run


def test_a_lora_from_the_command_line(data, cache, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        str(data),
        "-o",
        str(out),
        *SMALL,
        "--device",
        "cpu",
        "--cache",
        str(cache),
        "--trigger",
        "zap",
        "--sample-every",
        "3",
    ]
    assert main(["train", *arguments, "--steps", "3", "--seed", "5"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out == f"{out}\n"
    assert sorted(path.name for path in out.iterdir()) == [
        "config_lora.json",
        "lora.safetensors",
        "loss.png",
        "samples",
        "training",
    ]
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "step_000003_0.mp4",
        "step_000003_1.mp4",
    ]
    assert Image.open(out / "loss.png").size == (560, 360)
    written = json.loads((out / "config_lora.json").read_text())
    assert (written["r"], written["lora_alpha"], len(written["target_modules"])) == (4, 4, 10)
    dit = load_dit(TINY / "transformer", dtype=torch.float32).prepare()
    wanted = {
        f"{name}.lora_{half}.weight"
        for name in dict(dit.named_modules())
        for half in "AB"
        if name.endswith(tuple(written["target_modules"]))
    }
    assert set(load_file(out / "lora.safetensors")) == wanted
    plan, read = (
        make_layout(dit.config, Grid(2, 4, 4), (1.0, 1.0, 1.0)),
        inputs(dit.config, Grid(2, 4, 4)),
    )
    before = dit(*read, plan)
    adapters = Adapters(dit)
    assert adapters.load(out).rank == 4 and adapters.prompt("a cat") == "zap a cat"
    assert rel_l2(dit(*read, plan), before) > 1e-3
    assert (
        main(
            [
                "generate",
                "a red circle",
                "--lora",
                str(out),
                "--size",
                "64x64",
                "--frames",
                "5",
                "--steps",
                "2",
                "--device",
                "cpu",
                "-o",
                str(tmp_path / "a.gif"),
            ]
        )
        == 0
    )


def test_settings_on_the_command_line(monkeypatch):
    import kandinsky_model.training.trainer

    seen = []
    monkeypatch.setattr(
        kandinsky_model.training.trainer, "train", lambda *arguments: seen.append(arguments)
    )
    assert (
        main(
            [
                "train",
                "clips",
                "-o",
                "out",
                "--dtype",
                "bf16",
                "--distill",
                "guidance",
                "--lora-rank",
                "8",
                "--passes",
                "1",
            ]
        )
        == 0
    )
    assert seen == [
        (
            "clips",
            "out",
            TrainConfig(lora=LoRAConfig(8), dtype="bf16", distill="guidance", passes=1),
            False,
        )
    ]


def test_all_weights_from_the_command_line(data, cache, tmp_path, capsys):
    arguments = [
        str(data),
        "-o",
        str(tmp_path / "out"),
        *SMALL,
        "--device",
        "cpu",
        "--cache",
        str(cache),
    ]
    arguments = [word for word in arguments if word not in ("--lora-rank", "4")] + [
        "--rate",
        "1e-4",
        "--ema",
        "0",
    ]
    assert main(["train", *arguments, "--full", "--steps", "2"]) == 0, capsys.readouterr().err
    model, original = (
        pipeline.load(tmp_path / "out", device="cpu"),
        load_dit(TINY / "transformer", dtype=torch.float32),
    )
    assert model.preset.name == "tiny" and model.preset.nabla
    changed = [
        name
        for name, tensor in model.dit.state_dict().items()
        if not torch.equal(tensor, original.state_dict()[name])
    ]
    assert len(changed) == len(original.state_dict())
    assert model.generate(
        "a red circle", height=64, width=64, num_frames=5, num_inference_steps=2, seed=1
    ).frames.shape == (5, 64, 64, 3)


def test_what_is_saved_is_what_was_trained(data, cache, tmp_path):
    """Adapter and base as loaded from files equal the network in training, with the weights'
    average."""
    run = begun(
        data, tmp_path / "out", replace(CONFIG, cache=str(cache), lora=LoRAConfig(4, alpha=6.0))
    )
    for _ in range(2):
        run.advance()
    run.save()
    plan, read = (
        make_layout(run.network.config, Grid(2, 4, 4), (1.0, 1.0, 1.0), run.preset.nabla),
        inputs(run.network.config, Grid(2, 4, 4)),
    )
    with torch.no_grad():
        current = run.network(*read, plan)
        with run.state.averaged():
            averaged = run.network(*read, plan)
        assert torch.equal(run.network(*read, plan), current) and rel_l2(averaged, current) > 1e-4
    dit = load_dit(TINY / "transformer", dtype=torch.float32).prepare()
    Adapters(dit).load(run.out)
    assert rel_l2(dit(*read, plan), averaged) <= 1e-6


def test_training_fits_the_data(data, cache, tmp_path):
    """The loss on one and the same pass, before and after."""
    run = begun(
        data, tmp_path / "out", replace(CONFIG, cache=str(cache), steps=15, ema=0.0, drop=0.0)
    )

    def loss():
        with torch.no_grad():
            return run._losses(run.drawn(10**6)).mean().item()

    before = loss()
    for _ in range(15):
        run.advance()
    print(f"loss {before:.4f} before, {loss():.4f} after")
    assert loss() < 0.9 * before


def test_gradients_are_added_up(data, cache, tmp_path):
    """Two passes of two give the gradient of one pass of four."""
    run, gradients = begun(data, tmp_path / "out", replace(CONFIG, cache=str(cache))), []
    run.state.update = lambda *_: gradients.extend(
        parameter.grad.clone() for parameter in run.parameters.values()
    )
    run._after = lambda: None
    run.advance()
    for parameter in run.parameters.values():
        parameter.grad = None
    torch.cat([run._losses(run.drawn(i)) for i in range(2)]).mean().backward()
    for parameter, added in zip(run.parameters.values(), gradients, strict=True):
        torch.testing.assert_close(added, parameter.grad, rtol=1e-5, atol=1e-8)
    assert any(gradient.any() for gradient in gradients)


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


def start(*arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "kandinsky_model", "train", *map(str, arguments), "--device", "cpu"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_of(out):
    path = out / "training" / "state.safetensors"
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        return file.get_slice("losses").get_shape()[0]


def test_a_killed_training_goes_on_to_the_same_bits(data, cache, tmp_path, one_thread):
    arguments = [data, *SMALL, "--cache", cache, "--save-every", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process, begin = start(*arguments, "-o", killed, "--steps", "10000"), time.time()
    while steps_of(killed) < 2 and process.poll() is None and time.time() - begin < 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    done = steps_of(killed)
    # whole, whenever it happened
    with safe_open(killed / "lora.safetensors", framework="pt") as file:
        assert len(file.keys()) > 10
    for out, resume in ((killed, ["--resume"]), (whole, [])):
        assert (
            main(
                [
                    "train",
                    *map(str, arguments),
                    "-o",
                    str(out),
                    "--steps",
                    str(done + 2),
                    "--device",
                    "cpu",
                    *resume,
                ]
            )
            == 0
        )
    assert steps_of(killed) == steps_of(whole) == done + 2
    for name in ("lora.safetensors", "training/state.safetensors"):
        assert contents(killed / name) == contents(whole / name), name
    assert (killed / "loss.png").read_bytes() == (whole / "loss.png").read_bytes()


def test_two_processes_equal_one(data, cache, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "kandinsky_model",
        "train",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [
        str(data),
        *SMALL,
        "--ema",
        "0",
        "--steps",
        "3",
        "--cache",
        str(cache),
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [*command, *arguments, "-o", str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stderr.count("step 3 of 3") == 1, done.stderr
    assert main(["train", *arguments, "-o", str(tmp_path / "one")]) == 0
    two, one = (load_file(tmp_path / name / "lora.safetensors") for name in ("two", "one"))
    worst = max(rel_l2(two[name], one[name]) for name in one)
    print(f"two processes: rel_l2 {worst:.2g} at most")
    assert worst <= 1e-4


def test_refusals(data, cache, tmp_path):
    out = tmp_path / "out"
    config = replace(CONFIG, cache=str(cache), steps=1)
    with pytest.raises(FileNotFoundError, match="leave out --resume"):
        train(data, out, config, resume=True)
    train(data, out, config)
    for changes, message in (
        ({"rate": 1e-3}, "rate was 0.01 and is 0.001"),
        ({"lora": LoRAConfig(8)}, "lora was .*8"),
        ({"drop": 0.1}, "drop was 0.5 and is 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(data, out, replace(config, steps=2, **changes), resume=True)
    with pytest.raises(ValueError, match="holds a training already; go on with it by --resume"):
        train(data, out, config)
    more = clips(tmp_path / "more", 2)
    with pytest.raises(ValueError, match="more has changed; restore it"):
        train(more, out, replace(config, steps=2), resume=True)
    with pytest.raises(
        ValueError, match="multiple of the 3 processes .* got 2; give for example 3"
    ):
        Run(data, out, config, 0, 3)
    train(data, out, replace(config, steps=2), resume=True)
    assert steps_of(out) == 2


@pytest.mark.parametrize("full", [False, True])
def test_sixteen_bit_activations(data, cache, tmp_path, full):
    """What is trained, and its state, stays in fp32; what is saved has the dtypes of a released
    checkpoint."""
    changes = {"lora": None, "rate": 1e-4} if full else {}
    run = begun(data, tmp_path / "out", replace(CONFIG, cache=str(cache), dtype="bf16", **changes))
    run.advance()
    run.save()
    assert {parameter.dtype for parameter in run.parameters.values()} == {torch.float32}
    assert {moments["exp_avg"].dtype for moments in run.state.optimizer.state.values()} == {
        torch.float32
    }
    saved = load_file(
        run.out
        / ("transformer/diffusion_pytorch_model.safetensors" if full else "lora.safetensors")
    )
    assert {name for name, tensor in saved.items() if tensor.dtype != torch.bfloat16} == {
        name for name in saved if full and ("modulation" in name or "time_embeddings" in name)
    }
    wide = begun(data, tmp_path / "wide", replace(CONFIG, cache=str(cache), **changes))
    wide.advance()
    assert 0 < abs(run.state.losses[0] / wide.state.losses[0] - 1) < 0.02


def test_the_rate_warms_up_and_the_average_follows(data, cache, tmp_path):
    run, rates = (
        begun(
            data,
            tmp_path / "out",
            replace(CONFIG, cache=str(cache), rate=1e-2, warmup=4, steps=6, ema=0.5),
        ),
        [],
    )
    expected = {name: parameter.detach().clone() for name, parameter in run.parameters.items()}
    for step in range(6):
        run.advance()
        rates.append(run.state.optimizer.param_groups[0]["lr"])
        for name, parameter in run.parameters.items():
            decay = min(0.5, (step + 1) / (step + 10))
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert all(
        torch.allclose(run.state.result[name], expected[name], atol=1e-7) for name in expected
    )


def test_a_full_disk_keeps_the_last_state(data, cache, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    run = begun(data, tmp_path / "out", replace(CONFIG, cache=str(cache), steps=10, save_every=1))
    run.advance()
    before = {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            OSError, match="after step 2 got .*go on with --resume from the state before"
        ):
            run.advance()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()} == before
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    with replacing(tmp_path / "lora.safetensors") as target:
        target.write_bytes(b"")
        name = target.parent.name.replace(f"-{os.getpid()}-", f"-{killed.pid}-")
    (run.out / name).mkdir()
    assert begun(data, run.out, run.config, resume=True).state.step == 1
    assert not list(run.out.glob(".*"))


def test_a_training_goes_on_without_matplotlib(data, cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = begun(data, tmp_path / "out", replace(CONFIG, cache=str(cache), steps=1))
    run.advance()
    assert (run.out / "lora.safetensors").is_file() and not (run.out / "loss.png").exists()
    assert "no curve of the losses: charts require matplotlib" in caplog.text


def test_a_loss_that_is_not_finite_stops(data, cache, tmp_path):
    run = begun(data, tmp_path / "out", replace(CONFIG, cache=str(cache)))
    run._losses = lambda batch: torch.full((1,), float("nan"), requires_grad=True)
    with pytest.raises(RuntimeError, match="the loss must stay finite, but step 1 gave nan"):
        run.advance()
