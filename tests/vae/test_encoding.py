# SPDX-License-Identifier: Apache-2.0
"""Streamed encoding: equal to the plain encoder, the same bits in any memory, within the bytes that
the scheme predicts."""

import itertools

import pytest
import torch

from kandinsky_model.checkpoints.load import load_vae
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.config import VAEConfig
from kandinsky_model.vae import stages, winograd
from kandinsky_model.vae.hunyuan import encoding_scheme
from kandinsky_model.vae.schemes import Accounting, ladder
from kandinsky_model.vae.stages import shrinking_lengths
from kandinsky_model.vae.stream import encoding, pixels, stream

from ..support.live_memory import LiveMemory
from .test_hunyuan import frozen_vae, rel_l2, small_vae
from .test_stream import DEEP, FLAT

SIZES = [
    (1, 24, 40),
    (5, 16, 56),
    (13, 24, 16),
    (17, 8, 24),
]  # video F, H, W
SECONDS = {
    "5 s SD": (1, 3, 121, 512, 768),
    "10 s SD": (1, 3, 241, 512, 768),
    "5 s HD": (1, 3, 121, 768, 1280),
    "10 s HD": (1, 3, 241, 768, 1280),
}


def video_of(size, dtype=torch.float32, batch=1):
    video = torch.rand(batch, 3, *size, dtype=torch.float64)
    return video.mul(2).sub(1).to(dtype)


def accounted(vae, video):
    chain = encoding(vae.encoder)
    return chain, Accounting(chain, video.shape)


def encoded(vae, video, scheme):
    chain, accounting = accounted(vae, video)
    pieces = stream(chain, video, accounting.kept(scheme), {})
    return torch.cat(list(pieces), dim=2)


def scheme_names(vae, video):
    return accounted(vae, video)[1].names()


def schemes_of(vae, video):
    """The ladder: fastest first, each in less memory."""
    return ladder(accounted(vae, video)[1])


def budgets(vae, video):
    """One that each scheme of the ladder just fits."""
    return [scheme.predicted_peak_bytes for scheme in schemes_of(vae, video)]


@pytest.mark.parametrize("positions", [1, 300, 1500, 2**14])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_scheme_is_the_plain_encoder(monkeypatch, size, positions):
    # chunks of two frames, ragged ones, and all in one
    monkeypatch.setattr(stages, "POSITIONS", positions)
    vae = small_vae(dtype=torch.float64)
    video = video_of(size, torch.float64, batch=2)
    plain = vae.encoder(video).detach()
    schemes = scheme_names(vae, video)
    assert len(schemes) == 120
    assert len(set(schemes)) == 120
    nearly_every_scheme = size == (13, 24, 16) and positions == 300
    step = 3 if nearly_every_scheme else 29
    results = [encoded(vae, video, scheme) for scheme in schemes[::step]]
    assert rel_l2(results[0], plain) <= 1e-12
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("config", [DEEP, FLAT], ids=["five levels", "three levels"])
def test_schemes_of_other_depths(config):
    vae = small_vae(config, torch.float64)
    video = video_of((13, 16, 24), torch.float64)
    plain = vae.encoder(video).detach()
    for scheme in scheme_names(vae, video)[::60]:
        assert rel_l2(encoded(vae, video, scheme), plain) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size",
    [
        (33, 40, 24),
        (29, 24, 56),
        (25, 56, 40),
    ],
    ids=str,
)
def test_the_budget_changes_no_bit(monkeypatch, dtype, size):
    monkeypatch.setattr(stages, "POSITIONS", 1000)
    vae = frozen_vae(dtype=dtype)
    video = video_of(size, dtype)
    told = []
    results = []
    for budget in (None, 10**12, *budgets(vae, video)):
        results.append(torch.cat(vae.encode(video, budget, told.append)))
    assert len(results) >= 7
    assert all(torch.equal(result, results[0]) for result in results)
    schemes = [line.split()[3].rstrip(",") for line in told]
    assert all(line.startswith("encoding in scheme ") for line in told)
    assert schemes[:3] == ["KKKK"] * 3
    assert len(set(schemes)) == len(schemes) - 2


def test_boundaries_of_chunks_are_boundaries_in_the_level_before(monkeypatch):
    sizes = (
        (1, 8, 8),
        (5, 8, 16),
        (17, 24, 40),
        (33, 64, 64),
        (121, 160, 160),
        (241, 512, 768),
    )
    for positions, (frames, height, width), times in itertools.product(
        (1, 77, 4096), sizes, ((1, 2, 2), (2, 2, 1))
    ):
        monkeypatch.setattr(stages, "POSITIONS", positions)
        before = shrinking_lengths(frames, height, width)
        for time in times:
            assert sum(before) == frames
            assert min(before) > 0
            if len(before) > 1:  # whole pairs behind the first frame
                assert before[0] % 2 == 1
                assert not any(length % 2 for length in before[1:-1])
            frames = (frames - 1) // time + 1
            height = height // 2
            width = width // 2
            after = shrinking_lengths(frames, height, width)
            needed = {time * (end - 1) + 1 for end in itertools.accumulate(after)}
            assert needed <= set(itertools.accumulate(before))
            before = after


# What comes in


def test_bytes_are_scaled_and_the_whole_clip_is_never_converted(monkeypatch):
    monkeypatch.setattr(stages, "POSITIONS", 1)
    vae = frozen_vae()
    video = torch.randint(256, (2, 3, 9, 16, 24), dtype=torch.uint8)
    wanted = vae.encode(video.float() / 127.5 - 1)
    seen = []

    def count(x, like):
        seen.append(x.shape[1])
        return pixels(x, like)

    monkeypatch.setattr("kandinsky_model.vae.stream.pixels", count)
    mean, logvar = vae.encode(video)
    assert torch.equal(mean, wanted[0])
    assert torch.equal(logvar, wanted[1])
    assert max(seen) == 2
    assert sum(seen) == 9
    assert mean.dtype == torch.float32


def test_floats_of_any_width_are_taken_as_they_are():
    vae = frozen_vae(dtype=torch.bfloat16)
    video = video_of((5, 16, 24), torch.float64)
    assert torch.equal(vae.encode(video)[0], vae.encode(video.bfloat16())[0])
    vae.float()
    assert torch.equal(vae.encode(video)[0], vae.encode(video.float())[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_a_video_stays_where_it_lies(dtype):
    """The meta device stands for a GPU: whatever meets tensors of both devices fails."""
    vae = frozen_vae(dtype=torch.bfloat16).to("meta")
    video = torch.ones(1, 3, 9, 16, 24).to(dtype)
    for moments in vae.encode(video):
        assert moments.is_meta
        assert moments.dtype == torch.bfloat16
        assert moments.shape == (1, 4, 3, 2, 3)


def test_gradients_flow_through_the_plain_encoder():
    vae = small_vae()
    pixels = torch.randint(256, (1, 3, 5, 16, 24), dtype=torch.uint8)
    video = (pixels.float() / 127.5 - 1).requires_grad_()
    mean, _ = vae.encode(video, memory_budget=1)  # it has no say here
    mean.sum().backward()
    assert video.grad.abs().sum() > 0
    assert vae.encoder.conv_in.conv.weight.grad.abs().sum() > 0
    assert torch.equal(vae.encode(pixels)[0], mean)


# Memory


@pytest.mark.parametrize("pairs", [False, True], ids=["direct", "in pairs"])
@pytest.mark.parametrize("name", ["KKKK", "RKKK", "HRHK", "SKKK", "SRKK", "SHKK", "SSRK", "SSSK"])
def test_predicted_peak_is_the_measured_one(monkeypatch, name, pairs):
    monkeypatch.setattr(winograd, "suits", lambda *_: pairs)
    config = VAEConfig(
        latent_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4
    )
    vae = frozen_vae(config)
    video = torch.randint(256, (1, 3, 33, 96, 128), dtype=torch.uint8)
    chain, accounting = accounted(vae, video)
    scheme = accounting.scheme(name)
    with LiveMemory() as memory:
        for _ in stream(chain, video, scheme.kept, {}):
            pass
    assert 0.9 <= scheme.predicted_peak_bytes / memory.peak <= 1.1


@pytest.mark.parametrize(
    ("clip", "name", "peak_gb", "flops"),
    [
        ("5 s SD", "KKKK", 26, 1.0),
        ("10 s SD", "RKKK", 26, 1.2),
        ("10 s SD", "SRKK", 13, 1.7),
        ("10 s SD", "SHKK", 8, 1.9),
        ("5 s HD", "SHKK", 12.1, 1.9),
        ("10 s HD", "SSRK", 10, 3.0),
    ],
    ids=str,
)
def test_the_ladder_of_the_released_vae(clip, name, peak_gb, flops):
    scheme = encoding_scheme(VAEConfig(), SECONDS[clip], torch.bfloat16, int(peak_gb * 1e9))
    assert scheme.name == name
    assert scheme.predicted_peak_bytes <= peak_gb * 1e9
    assert scheme.relative_flops <= flops
    assert "GB predicted" in str(scheme)
    assert scheme.doing == "encoding"


def test_a_ladder_falls_in_bytes_and_rises_in_flops():
    for shape in SECONDS.values():
        with torch.device("meta"):
            vae = small_vae(VAEConfig(), torch.bfloat16)
        chain = encoding(vae.encoder)
        schemes = ladder(Accounting(chain, shape))
        peaks = [scheme.predicted_peak_bytes for scheme in schemes]
        flops = [scheme.relative_flops for scheme in schemes]
        assert peaks == sorted(peaks, reverse=True)
        assert flops == sorted(flops)
        assert flops[0] == 1.0
        assert len(schemes) >= 8


@pytest.mark.parametrize(
    ("budget", "kind", "words"),
    [
        (
            1000,
            ValueError,
            r"encoding this many frames .* at least \d+ bytes .* got 1000: raise it, "
            r"or encode fewer frames",
        ),
        ("10GB", TypeError, "an int, of bytes, got '10GB'"),
        (True, TypeError, "got True"),
    ],
)
def test_impossible_budgets_are_refused(budget, kind, words):
    vae = frozen_vae()
    video = video_of((9, 16, 24))
    with pytest.raises(kind, match=words) as caught:
        vae.encode(video, budget)
    assert "\n" not in str(caught.value)
    least = budgets(vae, video)[-1]
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        vae.encode(video, least - 1)
    assert vae.encode(video, least)[0].isfinite().all()
    with pytest.raises(ValueError, match="encoding this many frames"):
        encoding_scheme(vae.config, video.shape, torch.float32, 1000)


@pytest.mark.parametrize("when", ["at once", "later"])
def test_out_of_memory_falls_to_the_next_scheme(monkeypatch, caplog, when):
    monkeypatch.setattr(stages, "POSITIONS", 64)
    monkeypatch.setattr(winograd, "suits", lambda *_: False)
    vae = frozen_vae()
    video = video_of((33, 40, 48))
    wanted = vae.encode(video)
    convolve = stages.ops.causal_conv3d
    state = {"calls": 0, "failures": 0}

    def fail(*args):
        state["calls"] += 1
        if state["failures"] < 2 and state["calls"] >= {"at once": 1, "later": 100}[when]:
            state.update(calls=0, failures=state["failures"] + 1)
            raise torch.OutOfMemoryError("injected")
        return convolve(*args)

    monkeypatch.setattr(stages.ops, "causal_conv3d", fail)
    told = []
    mean, logvar = vae.encode(video, notify=told.append)
    assert torch.equal(mean, wanted[0])
    assert torch.equal(logvar, wanted[1])
    assert state["failures"] == 2
    names = [scheme.name for scheme in schemes_of(vae, video)]
    tried = [line.split()[3].rstrip(",") for line in told]
    assert tried == names[:3]
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    for warning in warnings:
        line = warning.getMessage()
        assert "memory ran out while encoding" in line
        assert "\n" not in line


def test_autocast_costs_digits_only():
    """On the bundled VAE, whose attention is given fp32 by what stands before it and makes bf16 of
    it."""
    vae = load_vae(TINY / "vae", dtype=torch.float32)
    video = video_of((5, 32, 48))
    latents = torch.randn(1, vae.config.latent_channels, 2, 4, 6)
    plain = vae.encode(video)[0], vae.decode(latents)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = vae.encode(video)[0], vae.decode(latents)
    for ours, exact in zip(rounded, plain, strict=True):
        assert 1e-4 < rel_l2(ours.float(), exact) <= 4e-2  # 2**-8 over a dozen layers
