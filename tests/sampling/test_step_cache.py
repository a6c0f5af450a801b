# SPDX-License-Identifier: Apache-2.0
"""Cached steps: published schedules of MagCache, branches that never mix, and runs that leave
nothing behind."""

import itertools
import logging

import pytest
import torch

from kandinsky_model.config import PRESETS
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import Chunks, make_layout
from kandinsky_model.sampling.sampler import Sampling, noise, sample
from kandinsky_model.sampling.step_cache import FirstBlockCache, MagCache, make_cache
from kandinsky_model.text.embeddings import Conditioning

from ..dit.test_transformer import CONFIG, NABLA, SCALE, build

GRID = Grid(2, 8, 9)


def run(cache, guidance=3.0, steps=6, stop=None, tokens=10**6):
    g = torch.Generator().manual_seed(4)
    cond, uncond = (
        Conditioning(
            torch.randn(1, n, CONFIG.in_text_dim, generator=g),
            None,
            torch.randn(1, CONFIG.in_text_dim2, generator=g),
        )
        for n in (5, 3)
    )
    layout = make_layout(CONFIG, GRID, SCALE, NABLA, chunks=Chunks(None, tokens))
    start = noise(1, (1, GRID.T, 2 * GRID.Y, 2 * GRID.X, 16))
    sampling = Sampling(steps, 5.0, guidance, cache=cache)
    steps = sample(build(), start, cond, layout, sampling, uncond if sampling.guided else None)
    *_, (_, latents) = itertools.islice(steps, stop)
    return latents


@pytest.mark.parametrize(
    "preset, branches, computed",
    [
        ("t2v-lite-sft-5s", 2, 48),
        ("t2v-lite-sft-10s", 2, 48),
        ("i2v-lite-5s", 2, 48),
        ("t2i-lite-sft", 2, 46),
        ("t2v-lite-nocfg-5s", 1, 24),
        ("t2v-lite-nocfg-10s", 1, 24),
        ("i2v-pro-sft-5s-hd", 2, 50),
    ],
)
def test_published_schedules(preset, branches, computed):
    """The number of passes that the official rule computes at 50 steps, from a simulation of its
    description."""
    cache = make_cache("mag", preset)
    assert sum(sum(cache.schedule(50, branch)) for branch in range(branches)) == computed
    assert all(cache.schedule(50, 0)[:10])
    assert not all(cache.schedule(50, 0)[10:])


def test_published_pattern():
    pattern = "".join(
        "x" if computed else "."
        for computed in make_cache("mag", "t2v-lite-sft-5s").schedule(50, 0)
    )
    assert pattern == "xxxxxxxxxx..x..x..x..x..x..x..x..x..x..x..x..x..xx"


@pytest.mark.parametrize("steps", [1, 2, 16, 25, 100])
def test_schedule_belongs_to_the_steps_of_the_run(steps):
    runs = make_cache("mag", "t2v-pro-sft-5s").schedule(steps, 1)
    assert len(runs) == steps
    assert runs[0]
    assert all(runs[: steps // 5])
    # two in a row at most
    assert not any(
        not a and not b and not c for a, b, c in zip(runs, runs[1:], runs[2:], strict=False)
    )


def test_nothing_skipped_is_the_plain_run(caplog):
    plain = run(None)
    with caplog.at_level(logging.INFO, "kandinsky_model"):
        for cache in (MagCache(((1.0,) * 6,) * 2, threshold=0.0), FirstBlockCache(threshold=0.0)):
            torch.testing.assert_close(run(cache), plain, rtol=1e-5, atol=1e-5)
    assert caplog.text.count("12 of 12 passes were computed, 0 reused") == 2


def test_branches_never_mix(caplog):
    """Passes with and without the prompt remember changes of their own."""
    changes = {}

    class Watched(MagCache):
        def branches(self, *args):
            made = super().branches(*args)
            changes.update(enumerate(made))
            return made

    with caplog.at_level(logging.INFO, "kandinsky_model"):
        run(Watched(((1.0,) * 6,) * 2, retention=0.0))
    assert "4 of 12 passes were computed, 8 reused" in caplog.text  # steps 0 and 3 of each branch
    assert changes[0].computed == changes[1].computed == 2
    assert not torch.equal(changes[0].change, changes[1].change)


def test_first_block_cache_skips_by_what_it_sees(caplog):
    with caplog.at_level(logging.INFO, "kandinsky_model"):
        cached = run(FirstBlockCache(threshold=1e9, most_skipped=2), guidance=1.0)
        plain = run(None, guidance=1.0)
    assert "2 of 6 passes were computed, 4 reused" in caplog.text
    assert 0 < (cached - plain).norm() / plain.norm() < 0.5


def test_an_interrupted_run_leaves_nothing_behind():
    cache = MagCache(((1.0,) * 6,) * 2, retention=0.0)
    whole = run(cache)
    run(cache, stop=3)
    assert torch.equal(run(cache), whole)


@pytest.mark.parametrize(
    "cache",
    [MagCache(((1.0,) * 6,) * 2, retention=0.0), FirstBlockCache(threshold=1e9, most_skipped=2)],
)
def test_blocks_that_overwrite_their_input_are_remembered_alike(cache):
    torch.testing.assert_close(run(cache, tokens=40), run(cache), rtol=1e-5, atol=1e-5)


def test_refusals():
    assert make_cache("none", "") is None
    with pytest.raises(
        ValueError, match="requires a preset with calibrated ratios .*got tiny; use first-block"
    ):
        make_cache("mag", "tiny")
    with pytest.raises(ValueError, match="cache must be none or mag or first-block, got 'big'"):
        make_cache("big", "tiny")
    with pytest.raises(ValueError, match="calibrated without guidance"):
        run(make_cache("mag", "t2v-lite-nocfg-5s"))
    assert all(make_cache("mag", name) for name in PRESETS if name.startswith("t2v-pro-sft"))
