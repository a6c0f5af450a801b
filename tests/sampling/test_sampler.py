# SPDX-License-Identifier: Apache-2.0
"""The schedule's check values, Euler and guidance against a transformer that is a formula, first
frames, and golden runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from kandinsky_model.config import DiTConfig, NablaConfig
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import make_layout
from kandinsky_model.dit.modulation import Modulations, ShiftScale
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.sampling import sampler
from kandinsky_model.sampling.given import Given, normalize_first_frame
from kandinsky_model.sampling.sampler import Sampling, noise, sample, schedule
from kandinsky_model.text.embeddings import Conditioning

from ..conftest import shared_data
from ..support.plain_dit import random_state

SHAPE = (2, 3, 4, 6, 16)
WORDS, NOTHING = (
    Conditioning(
        torch.full((2, length, 8), value), torch.tensor([length, 2]), torch.full((2, 4), value)
    )
    for length, value in ((5, 1.0), (3, -1.0))
)


class Formula:
    """Stands in for the transformer: its velocity is `rule(x, time, embeds)`; it remembers what it
    was given."""

    def __init__(self, rule, visual_cond=True):
        self.rule = rule
        self.calls = []
        self.config = DiTConfig(visual_cond=visual_cond)

    def modulate(self, time, pooled):
        return SimpleNamespace(step=lambda i: Modulations([], [], ShiftScale(time[i], pooled)))

    def __call__(self, x, text, pooled, time, layout, text_lengths, modulations):
        # made for all steps before the first one
        assert torch.equal(modulations.out.shift, time)
        assert torch.equal(modulations.out.scale, pooled)
        self.calls.append((x.clone(), text, pooled, time, text_lengths))
        return self.rule(x[..., :16], time, text).to(x.dtype)


def last(steps):
    *_, (_, latents) = steps
    return latents


@pytest.mark.parametrize(
    "scale, steps, first, final",
    [
        (5, 50, (1, 0.9959, 0.9917, 0.9874, 0.9829), (0.3030, 0.2419, 0.1724, 0.0926, 0)),
        (10, 50, (1, 0.9980, 0.9959, 0.9937, 0.9914), (0.4651, 0.3896, 0.2941, 0.1695, 0)),
        (5, 16, (1, 0.9868, 0.9722, 0.9559, 0.9375), (0.6250, 0.5357, 0.4167, 0.2500, 0)),
        (3, 50, (1, 0.9932, 0.9863), (0.2069, 0.1607, 0.1111, 0.0577, 0)),
    ],
)
def test_schedule_check_values(scale, steps, first, final):
    times = schedule(steps, scale)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float32
    assert (times.diff() < 0).all()
    assert times[: len(first)].tolist() == pytest.approx(first, abs=5e-5)
    assert times[-len(final) :].tolist() == pytest.approx(final, abs=5e-5)


def test_schedule_with_scale_one_is_even():
    assert torch.allclose(schedule(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_exact_velocity_leads_from_noise_to_the_clean_latent():
    clean = torch.randn(SHAPE)
    start = noise(0, SHAPE)
    dit = Formula(lambda x, time, text: start - clean)
    steps = list(sample(dit, start, WORDS, None, Sampling(7, 5.0, 1.0)))
    assert [index for index, _ in steps] == list(range(7))
    assert torch.allclose(steps[-1][1], clean, atol=1e-5)
    times = schedule(7, 5.0)
    # every step lies on the straight line between the two, and earlier ones are left alone
    for index, latents in steps:
        assert torch.allclose(
            latents, (1 - times[index + 1]) * clean + times[index + 1] * start, atol=1e-5
        )


def test_model_receives_1000_t_in_fp32_and_its_channels():
    dit = Formula(lambda x, time, text: x)
    list(
        sample(
            dit,
            noise(0, SHAPE),
            WORDS,
            None,
            Sampling(3, 10.0, 1.0),
        )
    )
    assert torch.equal(
        torch.stack([call[3] for call in dit.calls]),
        (1000 * schedule(3, 10.0)[:3])[:, None].expand(3, 2),
    )
    assert all(call[3].dtype == torch.float32 for call in dit.calls)
    assert dit.calls[0][0].shape[-1] == 33
    assert not dit.calls[0][0][..., 16:].any()
    plain = Formula(lambda x, time, text: x, visual_cond=False)
    list(
        sample(
            plain,
            noise(0, SHAPE),
            WORDS,
            None,
            Sampling(1, 3.0, 1.0),
        )
    )
    assert plain.calls[0][0].shape[-1] == 16


@pytest.mark.parametrize("guidance, calls", [(5.0, 2), (1.0, 1), (1.0 + 1e-7, 1), (0.0, 2)])
def test_guidance(guidance, calls):
    """v_u + w (v_c - v_u), from the conditional pass first; a single pass when w is 1. Texts may
    differ in length."""
    dit = Formula(lambda x, time, text: x * 0 + text[0, 0, 0])  # +1 with words, -1 without
    start = noise(0, SHAPE)
    out = last(sample(dit, start, WORDS, None, Sampling(1, 1.0, guidance), NOTHING))
    assert len(dit.calls) == calls
    assert torch.allclose(out, start - (-1 + guidance * 2 if calls == 2 else 1), atol=1e-5)
    assert dit.calls[0][1] is WORDS.embeds
    assert dit.calls[0][4] is WORDS.lengths
    assert (
        calls == 1
        or dit.calls[1][1] is NOTHING.embeds
        and dit.calls[1][2] is NOTHING.pooled
        and dit.calls[1][4] is NOTHING.lengths
    )


def test_reference_precision_rounds_everything_to_bf16():
    rule = lambda x, time, text: 0.3 * x.float() + 0.01 * text[0, 0, 0]  # noqa: E731
    settings = {name: Sampling(6, 10.0, 5.0, name) for name in ("fp32", "reference")}
    outs = {
        name: last(
            sample(
                Formula(rule),
                noise(3, SHAPE),
                WORDS,
                None,
                s,
                NOTHING,
            )
        )
        for name, s in settings.items()
    }
    assert {name: out.dtype for name, out in outs.items()} == {
        "fp32": torch.float32,
        "reference": torch.bfloat16,
    }
    times = schedule(6, 10.0)
    x = noise(3, SHAPE).bfloat16()
    for step in range(6):
        conditional, unconditional = (
            (0.3 * x.float() + sign * 0.01).bfloat16() for sign in (1, -1)
        )
        v = (
            unconditional.float() + (5.0 * (conditional - unconditional).float()).bfloat16().float()
        ).bfloat16()
        change = (times[step + 1] - times[step]).bfloat16().float() * v.float()
        x = (x.float() + change.bfloat16().float()).bfloat16()
    assert torch.equal(outs["reference"], x)
    assert 1e-4 < (outs["fp32"] - x.float()).norm() / x.float().norm() < 2e-2


def test_fp32_keeps_the_small_early_steps_that_reference_loses():
    start = torch.full(SHAPE, 4.0)
    rule = lambda x, time, text: torch.full_like(x, 0.5)  # noqa: E731
    moved = {
        name: next(
            sample(
                Formula(rule),
                start,
                WORDS,
                None,
                Sampling(50, 10.0, 1.0, name),
            )
        )[1]
        for name in ("fp32", "reference")
    }
    assert (moved["fp32"] < 4.0).all()
    assert (moved["reference"] == 4.0).all()


def test_noise_is_seeded_and_the_same_on_every_device():
    first = noise(5, SHAPE)
    again = noise(5, SHAPE)
    other = noise(6, SHAPE)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == torch.float32
    torch.manual_seed(0)
    state = torch.get_rng_state()
    noise(5, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    if torch.cuda.is_available():
        assert torch.equal(noise(5, SHAPE, "cuda").cpu(), first)


@pytest.mark.parametrize("frames", [1, 3, 7])
def test_first_frame(frames):
    shape = (2, frames, 4, 6, 16)
    given = torch.randn(1, 1, *shape[2:])
    dit = Formula(lambda x, time, text: 0.5 * x)
    out = last(
        sample(
            dit,
            noise(1, shape),
            WORDS,
            None,
            Sampling(4, 5.0, 1.0),
            given=Given({0: given}),
        )
    )
    for x, *_ in dit.calls:
        # clean latent in the latent channels
        assert torch.equal(x[:, :1, ..., :16], given.expand(2, -1, -1, -1, -1))
        assert not x[..., 16:32].any()  # conditioning channels stay zero
        assert (x[:, 0, ..., 32] == 1).all() and not x[:, 1:, ..., 32].any()  # mask
    free = last(
        sample(
            Formula(lambda x, time, text: 0.5 * x),
            noise(1, shape),
            WORDS,
            None,
            Sampling(4, 5.0, 1.0),
        )
    )
    put_back = torch.cat([given.expand(2, -1, -1, -1, -1), free[:, 1:]], 1)
    assert torch.equal(out, normalize_first_frame(put_back))
    assert torch.equal(out, put_back) == (frames <= 4)


def test_first_and_last_frame():
    shape = (2, 6, 4, 6, 16)
    first = torch.randn(1, 1, *shape[2:])
    last_one = torch.randn(2, 1, *shape[2:])
    dit = Formula(lambda x, time, text: 0.5 * x)
    out = last(
        sample(
            dit,
            noise(1, shape),
            WORDS,
            None,
            Sampling(4, 5.0, 1.0),
            given=Given({0: first, 5: last_one}),
        )
    )
    for x, *_ in dit.calls:
        assert torch.equal(x[:, :1, ..., :16], first.expand(2, -1, -1, -1, -1))
        assert torch.equal(x[:, 5:, ..., :16], last_one)
        assert not x[..., 16:32].any()
        assert x[:, :, 0, 0, 32].tolist() == [[1, 0, 0, 0, 0, 1]] * 2
    # normalised
    assert torch.equal(out[:, 5:], last_one)
    assert not torch.equal(out[:, :1], first.expand(2, -1, -1, -1, -1))
    out = last(
        sample(
            dit,
            noise(1, shape),
            WORDS,
            None,
            Sampling(4, 5.0, 1.0),
            given=Given({5: last_one}),
        )
    )
    free = last(
        sample(
            dit,
            noise(1, shape),
            WORDS,
            None,
            Sampling(4, 5.0, 1.0),
        )
    )
    # without a first frame nothing is normalised
    assert torch.equal(out[:, 5:], last_one)
    assert torch.equal(out[:, :5], free[:, :5])


def test_the_picture_to_edit_is_the_condition():
    shape = (2, 1, 4, 6, 16)
    source = torch.randn(1, *shape[1:])
    dit = Formula(lambda x, time, text: 0.5 * x)
    start = noise(1, shape)
    out = last(
        sample(
            dit,
            start,
            WORDS,
            None,
            Sampling(4, 3.0, 1.0),
            given=Given(source=source),
        )
    )
    for x, *_ in dit.calls:
        assert torch.equal(x[..., 16:32], source.expand(shape))
        assert (x[..., 32] == 1).all()
    assert torch.equal(dit.calls[0][0][..., :16], start)
    # this formula does not look at it
    assert torch.equal(out, last(sample(dit, start, WORDS, None, Sampling(4, 3.0, 1.0))))


@pytest.mark.parametrize("stopped", [0, 1, 3, 4])
def test_a_run_goes_on_where_it_was_stopped(stopped):
    rule = lambda x, time, text: 0.3 * x + time.view(-1, 1, 1, 1, 1) / 1000 + text[0, 0, 0]  # noqa: E731
    start = noise(3, (2, 6, 4, 6, 16))
    given = Given({0: torch.randn(1, 1, 4, 6, 16)})
    steps = list(
        sample(
            Formula(rule),
            start,
            WORDS,
            None,
            Sampling(4, 5.0, 3.0),
            NOTHING,
            given,
        )
    )
    reached = steps[stopped - 1][1] if stopped else start
    rest = list(
        sample(
            Formula(rule),
            reached,
            WORDS,
            None,
            Sampling(4, 5.0, 3.0, start=stopped),
            NOTHING,
            given,
        )
    )
    assert [step for step, _ in rest] == list(range(stopped, 4))
    assert torch.equal(rest[-1][1] if rest else reached, steps[-1][1])


def test_normalisation_by_definition():
    x = torch.randn(1, 9, 3, 4, 16)
    x[:, 0] = x[:, 0] * 3 + 2
    x[:, 1] = x[:, 1] * 0.2 - 1
    out = normalize_first_frame(x)
    later = x[0, 4:9]
    for frame in range(4):
        mean = x[0, frame].mean()
        std = x[0, frame].std()
        target_mean = min(max(later.mean(), mean - 0.05), mean + 0.1)
        target_std = min(max(later.std(), std - 0.1), std + 0.25)
        assert torch.allclose(
            out[0, frame], (x[0, frame] - mean) / std * target_std + target_mean, atol=1e-6
        )
    assert torch.equal(out[:, 4:], x[:, 4:])


def test_non_finite_latents_name_the_step():
    dit = Formula(lambda x, time, text: x * (float("nan") if len(dit.calls) == 3 else 1))
    with pytest.raises(RuntimeError, match="step 3 of 5 produced NaN or Inf"):
        list(
            sample(
                dit,
                noise(0, SHAPE),
                WORDS,
                None,
                Sampling(5, 5.0, 1.0),
            )
        )


def test_misuse():
    dit, text_only = (
        Formula(lambda x, time, text: x, visual_cond) for visual_cond in (True, False)
    )
    start = noise(0, SHAPE)
    alone = Sampling(guidance=1.0)
    for call, text in (
        (lambda: schedule(0, 5.0), "steps must be at least 1"),
        (lambda: schedule(5, 0.0), "scale must be positive"),
        (lambda: Sampling(precision="fp8"), "precision must be one of fp32, reference"),
        (
            lambda: list(sample(dit, start[..., :3], WORDS, None, Sampling())),
            "noise must have shape",
        ),
        (lambda: list(sample(dit, start, WORDS, None, Sampling())), "requires an unconditional"),
        (
            lambda: list(
                sample(dit, start, WORDS, None, alone, given=Given({0: start[:, :1, :2]}))
            ),
            "given frame 0 must have latents",
        ),
        (
            lambda: list(sample(dit, start, WORDS, None, alone, given=Given({3: start[:, :1]}))),
            "one of the 3 latent frames, got number 3",
        ),
        (
            lambda: list(sample(dit, start, WORDS, None, alone, given=Given(source=start[:, :1]))),
            "the picture to edit must have latents",
        ),
        (
            lambda: list(
                sample(text_only, start, WORDS, None, alone, given=Given({0: start[:, :1]}))
            ),
            "require a model with conditioning",
        ),
        (
            lambda: list(sample(text_only, start, WORDS, None, alone, given=Given(source=start))),
            "require a model with conditioning",
        ),
        (lambda: Sampling(5, start=6), "can go on after 0 to 5 of them, got 6"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_a_batch_of_prompts_equals_single_runs():
    config = DiTConfig(
        in_text_dim=8,
        in_text_dim2=4,
        time_dim=32,
        model_dim=64,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=1,
    )
    dit = DiffusionTransformer3D(config).requires_grad_(False)
    dit.load_state_dict(random_state(config))
    grid = Grid(3, 2, 3)
    layout = make_layout(config, grid, (1.0, 1.0, 1.0))
    start = noise(0, SHAPE)
    settings = Sampling(3, 5.0, 3.0)
    words, nothing = (
        Conditioning(
            torch.randn(2, length, 8),
            torch.tensor([length, 2]),
            torch.randn(2, 4),
        )
        for length in (5, 3)
    )
    together = last(sample(dit, start, words, layout, settings, nothing))
    for i in range(2):
        alone = [
            Conditioning(c.embeds[i : i + 1, : c.lengths[i]], None, c.pooled[i : i + 1])
            for c in (words, nothing)
        ]
        assert torch.allclose(
            together[i : i + 1],
            last(sample(dit, start[i : i + 1], alone[0], layout, settings, alone[1])),
            atol=2e-5,
        )


# Golden runs of the official code


@pytest.mark.parametrize("conditioned", [False, True], ids=["text only", "first frame"])
def test_golden_latents(conditioned, monkeypatch):
    """The stored first-frame run ends with the last Euler step: putting the frame back and
    normalising came later, so they wait here."""
    monkeypatch.setattr(sampler, "finish", lambda latents, frames: latents)
    folder = shared_data() / "golden"
    settings = json.loads((folder / "config.json").read_text())
    golden = load_file(folder / "sampler.safetensors")
    config = DiTConfig(
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in settings["dit"].items()
        }
    )
    dit = DiffusionTransformer3D(config).requires_grad_(False)
    dit.load_state_dict(load_file(folder / "dit.safetensors"))
    size = settings["grid"]
    window = settings["nabla"]
    how = settings["sampler"]
    layout = make_layout(
        config,
        Grid(size["latent_T"], size["latent_H"] // 2, size["latent_W"] // 2),
        settings["scale_factor"],
        NablaConfig(window["P"], (window["wT"], window["wH"], window["wW"])),
    )
    out = last(
        sample(
            dit,
            golden["noise"][None],
            Conditioning(golden["text"], None, golden["pooled"]),
            layout,
            Sampling(how["steps"], how["scheduler_scale"], how["guidance"]),
            Conditioning(golden["neg_text"], None, golden["neg_pooled"]),
            Given({0: golden["first_frame"][None]} if conditioned else {}),
        )
    )
    exact = golden["latents_first_frame" if conditioned else "latents_t2v"]
    error = ((out[0] - exact).norm() / exact.norm()).item()
    print("rel_l2", error)
    assert error <= 5e-6


def test_golden_normalisation():
    golden = load_file(shared_data() / "golden" / "sampler.safetensors")
    assert torch.allclose(
        normalize_first_frame(golden["normalize_in"][None])[0], golden["normalize_out"], atol=1e-6
    )
