# SPDX-License-Identifier: Apache-2.0
"""Streamed decoding: equal to the plain decoder, the same bits in any memory, within the bytes that
the scheme predicts."""

import random
from types import SimpleNamespace

import pytest
import torch

from kandinsky_model.config import VAEConfig
from kandinsky_model.devices.available import parse_bytes
from kandinsky_model.vae import stages, winograd
from kandinsky_model.vae.hunyuan import decoding_scheme
from kandinsky_model.vae.schemes import Accounting, choose, ladder, schemes_within
from kandinsky_model.vae.stream import Chain, decoding, stream
from kandinsky_model.vae.tiles import Tiling

from ..support.live_memory import LiveMemory
from .test_hunyuan import SMALL, frozen_vae, rel_l2, small_vae

# latent T, Y, X
SIZES = [
    (1, 3, 4),
    (2, 5, 2),
    (5, 3, 3),
    (6, 2, 5),
]
DEEP = VAEConfig(
    latent_channels=4,
    block_out_channels=(8, 8, 16, 16, 16),
    layers_per_block=1,
    norm_num_groups=4,
)
FLAT = VAEConfig(
    latent_channels=4,
    block_out_channels=(8, 8, 16),
    layers_per_block=2,
    norm_num_groups=4,
)
SECONDS = {
    "5 s SD": (1, 16, 31, 64, 96),
    "10 s SD": (1, 16, 61, 64, 96),
    "5 s HD": (1, 16, 31, 96, 160),
    "10 s HD": (1, 16, 61, 96, 160),
}


def accounted(vae, latents):
    chain = decoding(vae.decoder, vae.post_quant_conv)
    return chain, Accounting(chain, latents.shape)


def decoded(vae, latents, scheme):
    chain, accounting = accounted(vae, latents)
    pieces = stream(chain, latents, accounting.kept(scheme), {})
    return torch.cat(list(pieces), dim=2)


def scheme_names(vae, latents):
    return accounted(vae, latents)[1].names()


def schemes_of(vae, latents):
    """The ladder: fastest first, each in less memory."""
    return ladder(accounted(vae, latents)[1])


def budgets(vae, latents):
    """One that each scheme of the ladder just fits."""
    return [scheme.predicted_peak_bytes for scheme in schemes_of(vae, latents)]


@pytest.mark.parametrize("positions", [1, 20, 4096])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_scheme_is_the_plain_decoder(monkeypatch, size, positions):
    # chunks of one frame, ragged ones, and all in one
    monkeypatch.setattr(stages, "POSITIONS", positions)
    vae = small_vae(dtype=torch.float64)
    latents = torch.randn(2, 4, *size).double()
    plain = vae.decoder(vae.post_quant_conv(latents)).detach()
    schemes = scheme_names(vae, latents)
    assert len(schemes) == 30
    every_scheme = size == (5, 3, 3) and positions == 20
    step = 1 if every_scheme else 6
    results = [decoded(vae, latents, scheme) for scheme in schemes[::step]]
    assert rel_l2(results[0], plain) <= 1e-12
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("config", [DEEP, FLAT], ids=["five levels", "three levels"])
def test_schemes_of_other_depths(config):
    vae = small_vae(config, torch.float64)
    latents = torch.randn(1, 4, 4, 3, 2).double()
    plain = vae.decoder(vae.post_quant_conv(latents)).detach()
    for scheme in scheme_names(vae, latents)[::5]:
        result = decoded(vae, latents, scheme)
        assert rel_l2(result, plain) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("policy", "tiles"),
    [
        ("global", None),
        ("official", Tiling(48, 56, frames=9, frame_stride=4)),
    ],
    ids=str,
)
def test_the_budget_changes_no_bit(monkeypatch, dtype, policy, tiles):
    monkeypatch.setattr(stages, "POSITIONS", 30)
    vae = frozen_vae(dtype=dtype)
    latents = torch.randn(1, 4, 9, 8, 9).to(dtype)
    told = []
    results = []
    for budget in (None, 10**12, *budgets(vae, latents)):
        frames = list(vae.decode_frames(latents, policy, tiles, budget, told.append))
        results.append(torch.cat(frames, dim=2))
    assert len(results) >= 6
    assert all(torch.equal(result, results[0]) for result in results)
    if policy == "global":
        schemes = [line.split()[3].rstrip(",") for line in told]
        assert schemes[:3] == ["KKKK"] * 3
        assert len(set(schemes)) == len(schemes) - 2


def test_frames_leave_in_order_while_the_last_pass_runs(monkeypatch):
    vae = frozen_vae()
    latents = torch.randn(2, 4, 5, 40, 40)
    monkeypatch.setattr(winograd, "suits", lambda *_: False)
    convolve = stages.ops.causal_conv3d
    calls = []

    def count(*args):
        calls.append(1)
        return convolve(*args)

    monkeypatch.setattr(stages.ops, "causal_conv3d", count)
    seen = []
    pieces = []
    for piece in vae.decode_frames(latents):
        pieces.append(piece)
        seen.append(len(calls))
    assert [piece.shape[2] for piece in pieces] == [1] + [2] * 8
    assert pieces[0].shape == (2, 3, 1, 320, 320)
    # work is left when the first ones leave
    assert seen == sorted(set(seen))
    assert torch.equal(torch.cat(pieces, 2), vae.decode(latents))


def test_upsampling_weights_are_folded_once(monkeypatch):
    from kandinsky_model.vae.layers import Upsample

    fold = Upsample.folded
    folded = []

    def count(layer):
        folded.append(layer)
        return fold(layer)

    monkeypatch.setattr(Upsample, "folded", count)
    vae = frozen_vae()
    latents = torch.randn(1, 4, 6, 8, 8)
    # many passes over many chunks
    least = budgets(vae, latents)[-1]
    vae.decode(latents, memory_budget=least)
    # many tiles
    tiles = Tiling(48, 48, frames=9, frame_stride=4)
    vae.decode(latents, "official", tiles)
    assert len(set(folded)) == 3
    assert len(folded) == 6


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [
        (torch.float64, 1e-14),
        (torch.float32, 1e-6),
    ],
    ids=str,
)
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 2, 2)])
def test_convolution_in_pairs_is_convolution(dtype, limit, frames, first, kernel):
    conv = torch.nn.Conv3d(8, 12, kernel).to(dtype).requires_grad_(False)
    padded = torch.randn(2, frames + 2, 6, 7, 8, dtype=dtype)
    if first:
        padded[:, :2] = padded[:, 2:3]
    direct = stages.ops.causal_conv3d(padded, conv.weight, conv.bias)
    taps = winograd.taps_of(conv.weight)
    in_pairs = winograd.convolve(padded, taps, conv.bias, first)
    assert in_pairs.shape == direct.shape
    assert rel_l2(in_pairs, direct) <= limit


def test_pairs_are_for_fp32_on_a_cpu_and_as_exact(monkeypatch):
    small = torch.nn.Conv3d(4, 4, 3)
    assert winograd.suits(small.to(torch.float32))
    assert not winograd.suits(small.to(torch.float64))
    assert not winograd.suits(small.to(torch.bfloat16))
    conv = torch.nn.Conv3d(48, 48, 3)
    assert winograd.suits(conv, 80 * 80)
    assert not winograd.suits(conv, 20 * 20)
    vae = frozen_vae()
    latents = torch.randn(1, 4, 5, 3, 4)
    in_pairs = vae.decode(latents)
    exact = frozen_vae(dtype=torch.float64).decode(latents.double())
    monkeypatch.setattr(winograd, "suits", lambda *_: False)
    direct = vae.decode(latents)
    assert not torch.equal(in_pairs, direct)
    assert rel_l2(in_pairs, exact) <= 5e-6
    assert rel_l2(direct, exact) <= 5e-6


# Memory


@pytest.mark.parametrize("pairs", [False, True], ids=["direct", "in pairs"])
@pytest.mark.parametrize("name", ["KKKK", "KKKR", "RRRR", "KKKS", "KKSS", "KSSS"])
def test_predicted_peak_is_the_measured_one(monkeypatch, name, pairs):
    monkeypatch.setattr(winograd, "suits", lambda *_: pairs)
    config = VAEConfig(
        latent_channels=4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae = frozen_vae(config)
    latents = torch.randn(1, 4, 9, 12, 16)
    chain, accounting = accounted(vae, latents)
    scheme = accounting.scheme(name)
    with LiveMemory() as memory:
        for _ in stream(chain, latents, scheme.kept, {}):
            pass
    ratio = scheme.predicted_peak_bytes / memory.peak
    assert ratio >= 0.9
    assert ratio <= 1.1


@pytest.mark.parametrize(
    ("clip", "name", "peak_gb", "flops"),
    [
        ("5 s SD", "KKKK", 26, 1.0),
        ("10 s SD", "KKKK", 51, 1.0),
        ("10 s SD", "KKKR", 27, 1.4),
        ("10 s SD", "KKRS", 9.5, 3.4),
        ("5 s SD", "KKKS", 7.1, 3.3),
        ("5 s HD", "KKRS", 16, 3.3),
        ("10 s HD", "KKRS", 24, 3.1),
    ],
    ids=str,
)
def test_the_ladder_of_the_released_vae(clip, name, peak_gb, flops):
    budget = int(peak_gb * 1e9)
    scheme = decoding_scheme(VAEConfig(), SECONDS[clip], torch.bfloat16, budget)
    assert scheme.name == name
    assert scheme.predicted_peak_bytes <= peak_gb * 1e9
    assert scheme.relative_flops <= flops


def test_ten_seconds_fit_twelve_gigabytes():
    scheme = decoding_scheme(VAEConfig(), SECONDS["10 s SD"], torch.bfloat16, int(10.5e9))
    assert scheme.predicted_peak_bytes <= 10.5e9
    assert scheme.relative_flops <= 3.4
    assert "GB predicted" in str(scheme)
    assert scheme.name in str(scheme)


def test_flops_are_those_of_the_folded_network():
    with torch.device("meta"):
        vae = small_vae(VAEConfig(), torch.bfloat16)
    latents = torch.empty(SECONDS["10 s SD"], device="meta", dtype=torch.bfloat16)
    _, accounting = accounted(vae, latents)
    assert sum(accounting.flops) == pytest.approx(1379e12, rel=1e-3)


def test_a_ladder_falls_in_bytes_and_rises_in_flops():
    for shape in SECONDS.values():
        with torch.device("meta"):
            vae = small_vae(VAEConfig(), torch.bfloat16)
            latents = torch.empty(shape)
        _, accounting = accounted(vae, latents)
        schemes = ladder(accounting)
        peaks = [scheme.predicted_peak_bytes for scheme in schemes]
        flops = [scheme.relative_flops for scheme in schemes]
        assert peaks == sorted(peaks, reverse=True)
        assert flops == sorted(flops)
        assert flops[0] == 1.0
        assert len(schemes) >= 5


@pytest.mark.parametrize(
    ("budget", "kind", "words"),
    [
        (1000, ValueError, r"at least \d+ bytes .* got 1000: raise it"),
        (0, ValueError, "got 0"),
        (-5, ValueError, "got -5"),
        ("10GB", TypeError, "an int, of bytes, got '10GB'"),
        (1e9, TypeError, "got 1000000000.0"),
        (True, TypeError, "got True"),
    ],
)
def test_impossible_budgets_are_refused(budget, kind, words):
    vae = frozen_vae()
    latents = torch.randn(1, 4, 3, 4, 4)
    for policy in ("global", "official"):
        with pytest.raises(kind, match=words) as caught:
            vae.decode_frames(latents, policy, memory_budget=budget)
        assert "\n" not in str(caught.value)
    least = budgets(vae, latents)[-1]
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        vae.decode(latents, memory_budget=least - 1)
    assert vae.decode(latents, memory_budget=least).isfinite().all()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GB", 10**10),
        ("9.5 GiB", int(9.5 * 2**30)),
        ("800mb", 8 * 10**8),
        ("123", 123),
        (" 5 kib ", 5120),
        ("7B", 7),
    ],
)
def test_bytes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "10 parsecs", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="write for example 10GB"):
        parse_bytes(text)


# Running out of memory


@pytest.mark.parametrize("when", ["at once", "in the first pass", "after some frames"])
def test_out_of_memory_falls_to_the_next_scheme(monkeypatch, caplog, when):
    monkeypatch.setattr(stages, "POSITIONS", 64)
    monkeypatch.setattr(winograd, "suits", lambda *_: False)
    vae = frozen_vae()
    latents = torch.randn(1, 4, 12, 8, 9)
    wanted = vae.decode(latents)
    convolve = stages.ops.causal_conv3d
    state = SimpleNamespace(calls=0, failures=0, frames=0)

    def is_due():
        if when == "after some frames":
            return state.frames >= 5
        return state.calls >= (1 if when == "at once" else 7)

    def fail(*args):
        state.calls += 1
        if state.failures < 2 and is_due():
            state.calls = 0
            state.failures += 1
            raise torch.OutOfMemoryError("injected")
        return convolve(*args)

    monkeypatch.setattr(stages.ops, "causal_conv3d", fail)
    pieces = []
    told = []
    for piece in vae.decode_frames(latents, notify=told.append):
        pieces.append(piece)
        state.calls = 0
        state.frames += piece.shape[2]
    assert torch.equal(torch.cat(pieces, 2), wanted)  # nothing twice, nothing missing
    tried = [line.split()[3].rstrip(",") for line in told]
    names = [scheme.name for scheme in schemes_of(vae, latents)]
    assert tried == names[:3]
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2
    for warning in warnings:
        line = warning.getMessage()
        assert "memory ran out" in line
        assert "\n" not in line


def test_out_of_memory_in_the_smallest_scheme_is_an_error(monkeypatch):
    monkeypatch.setattr(winograd, "suits", lambda *_: False)
    vae = frozen_vae()
    latents = torch.randn(1, 4, 2, 3, 3)

    def fail(*_):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(stages.ops, "causal_conv3d", fail)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        vae.decode(latents)


def test_known_statistics_are_not_measured_again(monkeypatch):
    vae = frozen_vae()
    latents = torch.randn(1, 4, 2, 3, 3)
    chain, accounting = accounted(vae, latents)
    affines = {}
    kept = accounting.kept("KSSS")
    first = list(stream(chain, latents, kept, affines))
    monkeypatch.setattr(stages.ops, "group_moments", lambda *_: pytest.fail("measured again"))
    again = list(stream(chain, latents, kept, affines))
    assert torch.equal(torch.cat(again, 2), torch.cat(first, 2))


def test_without_a_budget_a_gpu_is_asked(monkeypatch):
    class OnCard(Chain):
        weight = SimpleNamespace(dtype=torch.bfloat16, device=torch.device("cuda:0"))

    with torch.device("meta"):
        chain = decoding(small_vae(VAEConfig(), torch.bfloat16).decoder)
    chain = OnCard(chain.doing, chain.stages, chain.lengths)
    shape = SECONDS["10 s SD"]
    # PyTorch holds 1 GB that nothing occupies; the card reports the rest of what is free
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10**9)
    expected = {
        140: "KKKK",
        40: "KKKR",
        12: "KKRS",
        1: "KSSS",  # too little for any: the smallest is tried
    }
    for free_gb, name in expected.items():
        free = (free_gb - 1) * 10**9
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 0))
        assert schemes_within(chain, shape, None)[0].name == name
    smallest = schemes_within(chain, shape, None)
    with pytest.raises(ValueError, match="at least"):
        choose(smallest, 10**9)


# Preview


def test_preview_is_deterministic_and_of_the_right_colours():
    from kandinsky_model.checkpoints.load import load_vae
    from kandinsky_model.checkpoints.locate import TINY
    from kandinsky_model.tiny.train_vae import crop_batch

    if not TINY.is_dir():
        pytest.skip("the bundled model is not in this checkout")
    vae = load_vae(TINY / "vae", dtype=torch.float32)
    with torch.no_grad():
        clip = crop_batch(1, 9, 96, random.Random(3))
        latents = vae.encode(clip)[0]
        preview = vae.decode(latents, "preview")
        video = vae.decode(latents)
        loaded_again = load_vae(TINY / "vae", dtype=torch.float32)
        assert torch.equal(preview, loaded_again.decode(latents, "preview"))
    assert preview.shape == video.shape
    assert preview.dtype == video.dtype
    both = torch.stack([preview.flatten(), video.flatten()])
    assert torch.corrcoef(both)[0, 1] >= 0.8
    for t in (2, 3, 4):  # with frame 1, those of the second latent frame
        assert torch.equal(preview[:, :, 1], preview[:, :, t])


def test_preview_follows_the_weights():
    vae = frozen_vae(SMALL)
    latents = torch.randn(2, 4, 2, 3, 3)
    before = vae.preview(latents)
    assert torch.equal(before, vae.preview(latents))
    assert before.shape == (2, 3, 5, 24, 24)
    with torch.no_grad():
        vae.decoder.conv_out.conv.bias.add_(1.0)
    torch.testing.assert_close(vae.preview(latents), before + 1, rtol=0, atol=1e-4)
