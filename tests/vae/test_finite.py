# SPDX-License-Identifier: Apache-2.0
"""What comes out of a VAE is finite: float16 that overflows goes on in float32 with one line in the
log, and where nothing helps there is an error instead of black frames."""

import logging
import random

import pytest
import torch

from kandinsky_model.checkpoints.load import load_vae
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.tiny.train_vae import crop_batch
from kandinsky_model.vae import fallback, stages
from kandinsky_model.vae.flux import ImageVAE
from kandinsky_model.vae.stream import NotFinite
from kandinsky_model.vae.tiles import Tiling

from .test_hunyuan import frozen_vae, small_vae
from .test_names import picture_vae

LINE = "decoding overflows float16; it goes on in float32, which takes twice the memory"


def psnr(actual, wanted):
    """Of video in -1..1, in decibels."""
    return (4 / (actual.float() - wanted.float()).square().mean()).log10().mul(10).item()


def warnings(caplog):
    """What this package has warned of; other libraries may have warned too."""
    ours = [record for record in caplog.records if record.name.startswith("kandinsky_model")]
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


@pytest.fixture(scope="module")
def bundled():
    """The bundled VAE in float32 and float16, a clip [1, 3, 9, 96, 96] and its latents."""
    wide = load_vae(TINY / "vae", dtype=torch.float32)
    narrow = load_vae(TINY / "vae", dtype=torch.float16)
    video = crop_batch(1, 9, 96, random.Random(3))
    latents, _ = wide.encode(video)
    return wide, narrow, video, latents


@pytest.mark.parametrize(
    ("policy", "tiles"),
    [
        ("global", None),
        ("official", Tiling(64, 64)),
        ("preview", None),
    ],
    ids=["global", "official", "preview"],
)
def test_the_bundled_vae_decodes_in_float16(bundled, caplog, policy, tiles):
    wide, narrow, _, latents = bundled
    wanted = wide.decode(latents, policy, tiles)
    actual = narrow.decode(latents.half(), policy, tiles)
    assert actual.dtype == torch.float16
    assert psnr(actual, wanted) >= 45
    assert warnings(caplog) == [LINE]


def test_the_bundled_vae_encodes_in_float16(bundled, caplog):
    wide, narrow, video, wanted = bundled
    mean, logvar = narrow.encode(video)
    assert mean.dtype == torch.float16
    assert logvar.dtype == torch.float16
    assert (mean - wanted).norm() <= 1e-2 * wanted.norm()
    line = LINE.replace("decoding", "encoding")
    assert warnings(caplog) == [line]


def test_weights_stay_as_they_were(bundled):
    _, narrow, _, _ = bundled
    dtypes = {parameter.dtype for parameter in narrow.parameters()}
    assert dtypes == {torch.float16}


def test_what_fits_float16_stays_in_it(caplog):
    vae = frozen_vae(dtype=torch.float16)
    latents = torch.randn(1, 4, 3, 4, 5).half()
    wanted = frozen_vae().decode(latents.float())
    actual = vae.decode(latents)
    assert psnr(actual, wanted) >= 45
    assert not warnings(caplog)


def test_the_budget_changes_no_bit_and_is_exceeded_with_a_word(bundled, caplog):
    _, narrow, _, latents = bundled
    latents = latents[..., :6, :6].half()
    wanted = narrow.decode(latents)
    schemes = narrow.decoding_schemes(latents.shape)
    budgets = [scheme.predicted_peak_bytes for scheme in schemes]
    caplog.clear()
    for budget in budgets:
        actual = narrow.decode(latents, memory_budget=budget)
        assert torch.equal(actual, wanted)
    lines = warnings(caplog)
    assert lines.count(LINE) == len(budgets)
    assert f"more than the memory budget of {budgets[-1]}; it goes on" in lines[-1]
    with pytest.raises(ValueError, match="at least"):  # the budget is checked for float16
        narrow.decode_frames(latents, memory_budget=budgets[-1] - 1)


def test_pieces_that_were_given_out_are_not_given_again(monkeypatch, caplog):
    monkeypatch.setattr(stages, "POSITIONS", 64)  # so that there are several pieces
    vae = frozen_vae(dtype=torch.float16)
    latents = torch.randn(1, 4, 5, 4, 4).half()
    narrow = list(vae.decode_frames(latents))
    same_weights = small_vae(dtype=torch.float16).float().requires_grad_(False)
    wide = list(same_weights.decode_frames(latents.float()))
    assert len(narrow) > 3
    seen = []

    def fail_once(x, doing):
        seen.append(x)
        if len(seen) == 3:  # the third piece, still in float16
            raise NotFinite("injected")

    monkeypatch.setattr(fallback, "check_finite", fail_once)
    pieces = list(vae.decode_frames(latents))
    assert warnings(caplog) == [LINE]
    assert [piece.shape for piece in pieces] == [piece.shape for piece in narrow]
    # the bits of each piece say in which dtype it was computed
    expected = narrow[:2] + [piece.half() for piece in wide[2:]]
    for piece, same in zip(pieces, expected, strict=True):
        assert torch.equal(piece, same)
    assert not torch.equal(narrow[2], wide[2].half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", ["conv_in", "conv_out"])
@pytest.mark.parametrize("recorded", [False, True], ids=["streamed", "recorded"])
def test_broken_weights_are_an_error(dtype, layer, recorded):
    """conv_in spoils statistics, conv_out only the result."""
    vae = small_vae(dtype=dtype)
    latents = torch.randn(1, 4, 2, 3, 3).to(dtype)
    video = torch.rand(1, 3, 5, 16, 24).to(dtype)
    with torch.no_grad():
        for network in (vae.encoder, vae.decoder):
            weight = getattr(network, layer).conv.weight
            weight[0, 0, 0, 0, 0] = torch.nan
    remedy = "verify the weights"
    # streamed, float32 was tried as well
    if dtype == torch.float16 and recorded:
        remedy = "load the VAE in bfloat16 or float32"
    for doing, call, x in (
        ("decoding", vae.decode, latents),
        ("encoding", vae.encode, video),
    ):
        words = f"^{doing} must give finite values, got NaN"
        with (
            torch.set_grad_enabled(recorded),
            pytest.raises(NotFinite, match=words) as caught,
        ):
            call(x)
        message = str(caught.value)
        assert isinstance(caught.value, RuntimeError)
        assert "\n" not in message
        assert remedy in message


def test_results_beyond_float16_are_an_error():
    vae = frozen_vae(dtype=torch.float16)
    last = vae.decoder.conv_out.conv
    last.weight.mul_(2**15)
    last.bias.fill_(65504)
    with pytest.raises(NotFinite, match="in torch.float16: load the VAE in bfloat16 or float32"):
        vae.decode(torch.randn(1, 4, 2, 3, 3).half())


# Pictures


def overflowing_pictures(dtype):
    """A picture VAE whose activations, behind its first convolutions, reach several 100,000."""
    vae = picture_vae().eval().requires_grad_(False)
    for network in (vae.encoder, vae.decoder):
        weight = network.conv_in.weight
        weight.mul_(2.0**20)
        weight.clamp_(-60000, 60000)
    return ImageVAE(vae.to(dtype))


def test_pictures_in_float16(caplog):
    wide = overflowing_pictures(torch.float32)
    narrow = overflowing_pictures(torch.float16)
    video = torch.rand(1, 3, 1, 16, 24) * 2 - 1
    latents = 10 * torch.randn(1, 16, 1, 2, 3)
    (picture,) = narrow.decode_frames(latents.half())
    mean, logvar = narrow.encode(video)
    assert picture.dtype == torch.float16
    assert mean.dtype == torch.float16
    assert logvar.dtype == torch.float16
    wanted = next(wide.decode_frames(latents))
    assert psnr(picture, wanted) >= 45
    wanted, _ = wide.encode(video)
    assert (mean - wanted).norm() <= 1e-2 * wanted.norm()
    assert warnings(caplog) == [
        "decoding overflows float16; it is done again in float32",
        "encoding overflows float16; it is done again in float32",
    ]


def test_broken_pictures_are_an_error():
    vae = picture_vae().eval().requires_grad_(False)
    vae.decoder.conv_out.bias.fill_(torch.inf)
    pictures = ImageVAE(vae)
    latents = torch.randn(1, 16, 1, 4, 6)
    with pytest.raises(NotFinite, match="decoding must give finite values"):
        list(pictures.decode_frames(latents))
    broken = torch.full_like(latents, torch.nan)
    with pytest.raises(ValueError, match="latents must be finite"):
        list(pictures.decode_frames(broken))
