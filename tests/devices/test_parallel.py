# SPDX-License-Identifier: Apache-2.0
"""Runs shared by several processes give what one process gives, to rounding; who can share what;
the command line under torchrun."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from kandinsky_model.__main__ import main
from kandinsky_model.config import DiTConfig, NablaConfig
from kandinsky_model.devices.parallel import LostPeer, Ranks, from_first, share
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import make_layout
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.sampling.result import load_latents
from kandinsky_model.sampling.run import Run
from kandinsky_model.sampling.sampler import Sampling, noise, sample
from kandinsky_model.sampling.step_cache import FirstBlockCache, MagCache
from kandinsky_model.text.embeddings import Conditioning

from ..support import tiny_models
from ..support.plain_dit import random_state

ROOT = Path(__file__).resolve().parents[2]
CONFIG = DiTConfig(
    in_text_dim=32,
    in_text_dim2=16,
    time_dim=32,
    model_dim=256,
    ff_dim=256,
    num_text_blocks=1,
    num_visual_blocks=2,
    visual_cond=True,
)
# 297 tokens: no two ranks can have as many
GRID = Grid(3, 9, 11)
NABLA = NablaConfig(0.6, (3, 1, 1))
CASES = {  # guidance, NABLA, step cache
    "guided": (3.0, None, None),
    "dense": (1.0, None, None),
    "nabla": (1.0, NABLA, None),
    "guided nabla": (3.0, NABLA, None),
    "mag": (3.0, None, MagCache(((1.0,) * 4,) * 2, retention=0.0)),
    "first-block": (1.0, NABLA, FirstBlockCache(threshold=0.5)),
}


def run(name, ranks_of=None):
    """The latents of one case: a batch of two prompts of different lengths."""
    guidance, nabla, cache = CASES[name]
    dit = DiffusionTransformer3D(CONFIG)
    dit.load_state_dict(random_state(CONFIG))
    layout = make_layout(
        CONFIG,
        GRID,
        (1.0, 2.0, 2.0),
        nabla,
        ranks=ranks_of and ranks_of(CONFIG.num_heads, guidance != 1.0),
    )
    g = torch.Generator().manual_seed(1)
    cond, uncond = (
        Conditioning(
            torch.randn(2, length, 32, generator=g),
            torch.tensor([length, 4]),
            torch.randn(2, 16, generator=g),
        )
        for length in (7, 5)
    )
    start = noise(1, (2, GRID.T, 2 * GRID.Y, 2 * GRID.X, 16))
    *_, (_, latents) = sample(
        dit.requires_grad_(False).prepare(),
        start,
        cond,
        layout,
        Sampling(4, 5.0, guidance, cache=cache),
        uncond,
    )
    return latents


def work(rank, world, folder, names):
    """One of the processes: all cases, and what goes from the first process to the others."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    assert Ranks.of(CONFIG.num_heads, guided=False).size == world
    results = {name: run(name, Ranks.of) for name in names}
    results["told"] = torch.tensor(list(from_first(lambda: bytes([1, 2, 3] if rank == 0 else [9]))))
    try:
        from_first(lambda: {}[0])
    except KeyError:
        results["failure"] = torch.tensor([rank])
    except LostPeer as error:
        assert f"process {rank} of {world} cannot go on" in str(error)
        results["failure"] = torch.tensor([20 + rank])
    save_file(results, f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world", "names"), [(2, list(CASES)), (4, ["guided nabla", "nabla"])], ids=["two", "four"]
)
def test_shared_runs_equal_a_single_process(world, names, tmp_path):
    mp.spawn(work, (world, str(tmp_path), names), world)
    alone = {name: run(name) for name in names}
    for rank in range(world):
        results = load_file(tmp_path / f"{rank}.safetensors")
        for name in names:
            error = ((results[name] - alone[name]).norm() / alone[name].norm()).item()
            print(f"{name}, rank {rank} of {world}: rel_l2 {error:.2g}")
            assert error <= 1e-5, name
        assert results["told"].tolist() == [1, 2, 3]
        assert results["failure"].item() == (0 if rank == 0 else 20 + rank)


@pytest.mark.parametrize(
    ("world", "heads", "guided", "wanted"),
    [
        (2, 28, True, (2, 1)),
        (2, 28, False, (1, 2)),
        (4, 28, True, (2, 2)),
        (8, 28, True, (2, 4)),
        (7, 28, True, (1, 7)),
        (8, 32, False, (1, 8)),
        (1, 28, True, (1, 1)),
        (14, 28, True, (2, 7)),
    ],
)
def test_passes_are_shared_first(world, heads, guided, wanted):
    assert share(world, heads, guided) == wanted


@pytest.mark.parametrize(
    ("world", "heads", "guided", "words"),
    [
        (8, 28, False, "28 heads can be shared by 1, 2, 4, 7, 14, 28 processes, got 8"),
        (
            6,
            28,
            True,
            "28 heads and two passes of guidance can be shared by 1, 2, 4, 7, 8, 14, 28, 56 "
            "processes, got 6",
        ),
        (
            3,
            32,
            True,
            "can be shared by 1, 2, 4, 8, 16, 32, 64 processes, got 3; start one of these numbers",
        ),
    ],
)
def test_who_cannot_share(world, heads, guided, words):
    with pytest.raises(ValueError, match=words) as caught:
        share(world, heads, guided)
    assert "\n" not in str(caught.value)


# Under torchrun


def torchrun(count, *arguments, cwd, program=("-m", "kandinsky_model")):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(count),
        *map(str, program),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny"))


def test_generate_writes_once_and_the_same(folder, tmp_path):
    arguments = ["--model", str(folder), *tiny_models.SMALL_ARGS, "--device", "cpu", "--seed", "3"]
    done = torchrun(2, "generate", "a red circle", *arguments, "-o", "a.gif", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.count("a.gif") == 1, done.stderr
    assert main(["generate", "a red circle", *arguments, "-o", str(tmp_path / "b.gif")]) == 0
    (shared, settings), (alone, same) = (
        load_latents(tmp_path / f"{name}.latents.safetensors") for name in "ab"
    )
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)
    assert settings == same


def test_what_cannot_be_shared_is_one_sentence(folder, tmp_path):
    """The random model has one head."""
    done = torchrun(
        2,
        "generate",
        "a red circle",
        "--model",
        str(folder),
        *tiny_models.SMALL_ARGS,
        "--device",
        "cpu",
        "--guidance",
        "1",
        cwd=tmp_path,
    )
    assert done.returncode
    assert sorted(complaints(done)) == [
        "1 heads can be shared by 1 processes, got 2; start one of these numbers, or "
        "give every process prompts of its own with --prompts",
        lost(1),
    ]


def complaints(done):
    """What the processes said to the user."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("kandinsky: ")]
    return [line.removeprefix("kandinsky: ") for line in lines]


def lost(rank):
    return (
        f"process {rank} of 2 cannot go on, because another process of this run has ended; "
        "see what that one says, and start all of them again"
    )


# The command of one rank that meets with something at its second step.
FATE = """
import os, signal, sys, time
import torch
from kandinsky_model.__main__ import main
from kandinsky_model.devices.parallel import Ranks

seen = []
both = Ranks.both

def meet(self, velocity):
    seen.append(1)
    if os.environ["RANK"] in sys.argv[1].split(",") and len(seen) == 2:
        {fate}
    return both(self, velocity)

Ranks.both = meet
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(("rank", "fate"), [(0, "killed"), (1, "failed")])
def test_when_one_process_ends_the_other_says_so_and_stops(folder, tmp_path, rank, fate):
    deeds = {
        "killed": "os.kill(os.getpid(), signal.SIGKILL)",
        "failed": 'raise RuntimeError("the card is on fire; call for help")',
    }
    (tmp_path / "run.py").write_text(FATE.format(fate=deeds[fate]))
    arguments = ["generate", "a", "--model", str(folder), *tiny_models.SMALL_ARGS]
    done = torchrun(
        2, str(rank), *arguments, "--device", "cpu", cwd=tmp_path, program=[tmp_path / "run.py"]
    )
    assert done.returncode
    said = complaints(done)
    if fate == "failed":
        said.remove("the card is on fire; call for help")
    kept = "; go on with: kandinsky resume out.run.safetensors" if rank == 1 else ""
    stopped = f"process {1 - rank} of 2 was interrupted after 1 of 2 steps{kept}"
    assert said in ([lost(1 - rank) + kept], [stopped])  # by what it met with first
    statuses = dict(re.findall(r"rank +: (\d) .*\n +exitcode +: (\S+) ", done.stderr))
    assert statuses.pop(str(rank)) == ("2" if fate == "failed" else "-9")
    assert statuses in ({}, {str(1 - rank): "2" if said != [stopped] else "143"})
    if kept:
        assert Run.load(tmp_path / "out.run.safetensors").step == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_shared_run_that_is_stopped_can_go_on(folder, tmp_path, number):
    """Whoever stops torchrun, by any signal, finds what was sampled, once, and goes on from it."""
    kill = f"os.environ['RANK'] == '0' and os.kill(os.getppid(), {int(number)})"
    fate = f"torch.distributed.barrier(); {kill}; time.sleep(60)"
    (tmp_path / "run.py").write_text(FATE.format(fate=fate))
    arguments = ["--model", str(folder), *tiny_models.SMALL_ARGS, "--device", "cpu", "--seed", "3"]
    done = torchrun(
        2,
        "0,1",
        "generate",
        "a red circle",
        *arguments,
        "-o",
        "a.gif",
        cwd=tmp_path,
        program=[tmp_path / "run.py"],
    )
    assert done.returncode
    kept = "; go on with: kandinsky resume a.run.safetensors"
    first, second = sorted(complaints(done))
    stopped = "process {} of 2 was interrupted after 1 of 2 steps"
    assert first in (stopped.format(0) + kept, lost(0) + kept)
    assert second in (stopped.format(1), lost(1))
    assert Run.load(tmp_path / "a.run.safetensors").step == 1
    assert main(["resume", str(tmp_path / "a.run.safetensors"), "-o", str(tmp_path / "a.gif")]) == 0
    assert main(["generate", "a red circle", *arguments, "-o", str(tmp_path / "b.gif")]) == 0
    went_on, alone = (load_latents(tmp_path / f"{name}.latents.safetensors")[0] for name in "ab")
    torch.testing.assert_close(went_on, alone, rtol=0, atol=1e-5)


def test_prompts_of_a_file_are_spread(folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\na green circle\n")
    arguments = [
        "generate",
        "--prompts",
        "prompts.txt",
        "--model",
        str(folder),
        *tiny_models.SMALL_ARGS,
        "--device",
        "cpu",
        "--seed",
        "3",
    ]
    done = torchrun(2, *arguments, "-o", "a.gif", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.gif")) == [
        "a_000.gif",
        "a_001.gif",
        "a_002.gif",
    ]
    settings = [load_latents(tmp_path / f"a_00{i}.latents.safetensors")[1] for i in range(3)]
    assert [(one.prompt, one.seed) for one in settings] == [
        ("a red circle", 3),
        ("a blue square", 4),
        ("a green circle", 5),
    ]
