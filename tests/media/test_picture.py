# SPDX-License-Identifier: Apache-2.0
"""Pictures given by users: every mode they come in, sizes, and refusals."""

import numpy
import pytest
import torch
from PIL import Image

from kandinsky_model.config import get_preset
from kandinsky_model.media.picture import read_image, resize
from kandinsky_model.sampling.given import fitting_size, latent_of
from kandinsky_model.vae.hunyuan import sample_posterior

from ..support.tiny_models import random_vae

COLOUR = (200, 100, 50)


def picture(mode):
    """32 x 24 pixels, all in COLOUR, or in another grey where the mode has no colour."""
    width = 32
    height = 24
    if mode == "I;16":
        grey = numpy.full((height, width), 100 * 257, numpy.uint16)
        return Image.fromarray(grey)
    if mode == "F":
        ramp = numpy.linspace(0, 1, width * height, dtype=numpy.float32)
        return Image.fromarray(ramp.reshape(height, width))
    rgb = Image.new("RGB", (width, height), COLOUR)
    return rgb.convert(mode)


@pytest.mark.parametrize(
    "mode, wanted, slack",
    [
        ("RGB", COLOUR, 0),
        ("RGBA", COLOUR, 0),
        ("P", COLOUR, 30),
        ("L", (124,) * 3, 1),
        ("LA", (124,) * 3, 1),
        ("CMYK", COLOUR, 1),
        ("I;16", (100,) * 3, 0),
        ("1", None, 0),
        ("F", None, 0),
    ],
)
@pytest.mark.parametrize("saved", [False, True])
def test_every_mode_becomes_rgb(mode, wanted, slack, saved, tmp_path):
    image = picture(mode)
    if saved:
        suffix = "tif" if mode in ("CMYK", "F") else "png"
        path = tmp_path / f"a.{suffix}"
        image.save(path)
        image = str(path)
    pixels = read_image(image)
    assert pixels.shape == (3, 24, 32)
    assert pixels.dtype == torch.uint8
    if wanted:
        mean = pixels.float().mean((1, 2))
        error = mean - torch.tensor(wanted)
        assert error.abs().max() <= slack
    if mode == "F":
        assert pixels.max() == 255
        assert pixels.min() == 0


def test_transparency_is_white():
    image = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    pixels = read_image(image)
    assert (pixels == 255).all()
    palette = Image.new("P", (20, 20), 0)
    palette.info["transparency"] = 0
    pixels = read_image(palette)
    assert (pixels == 255).all()


def test_photographs_are_turned(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    path = tmp_path / "a.jpg"
    image.save(path, exif=exif)
    pixels = read_image(path)
    assert pixels.shape == (3, 40, 20)


def test_tensors_are_taken_as_they_are():
    pixels = torch.randint(256, (20, 30, 3), dtype=torch.uint8)
    channels_first = pixels.permute(2, 0, 1)  # [3, 20, 30]
    assert torch.equal(read_image(pixels), channels_first)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda p: p / "none.png", FileNotFoundError, "must exist"),
        (
            lambda p: torch.rand(20, 20, 3),
            TypeError,
            r"uint8 \[H, W, 3\], got torch.float32",
        ),
        (lambda p: 7, TypeError, "a path, a PIL image or a uint8 tensor .*got int"),
        (lambda p: Image.new("RGB", (15, 400)), ValueError, "got 15x400"),
        (
            lambda p: Image.new("RGB", (16, 129)),
            ValueError,
            "at most 8 times the other, got 16x129",
        ),
    ],
)
def test_refusals(make, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read_image(make(tmp_path))


def test_damaged_files_are_named(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:400])
    for damaged in (text, cut):
        words = f"{damaged.name} is not .*save it as png or jpg"
        with pytest.raises(ValueError, match=words):
            read_image(damaged)


@pytest.mark.parametrize(
    "size, preset, wanted",
    [
        ((512, 768), "i2v-lite-5s", (512, 768)),
        ((768, 512), "i2v-lite-5s", (768, 512)),
        ((1080, 1920), "i2v-lite-5s", (464, 832)),
        ((100, 100), "i2v-lite-5s", (624, 624)),
        ((1080, 1920), "i2v-pro-sft-5s-hd", (768, 1408)),
        ((1000, 1000), "i2v-pro-sft-5s-hd", (1024, 1024)),
        ((600, 900), "i2i-lite-sft", (768, 1280)),
        ((80, 100), "i2i-lite-sft", (896, 1152)),
        ((100, 100), "i2i-lite-sft", (1024, 1024)),
        ((500, 100), "i2i-lite-sft", (1408, 640)),
    ],
)
def test_sizes(size, preset, wanted):
    """Values of the published rules: k = sqrt(area / (h w)) / step, side = round(side k) step;
    pictures take the nearest h / w."""
    assert fitting_size(*size, get_preset(preset)) == wanted


@pytest.mark.parametrize("level, value", [(255, 1.0), (0, -1.0), (51, -0.6)])
def test_first_frame_is_a_seeded_sample_of_the_scaled_posterior(level, value):
    vae = random_vae().requires_grad_(False)
    flat = torch.full((3, 40, 56), level, dtype=torch.uint8)
    image = resize(flat, 32, 48)
    latent = latent_of(image, vae, seed=3)
    assert latent.shape == (1, 1, 4, 6, vae.config.latent_channels)
    assert latent.dtype == torch.float32
    frame = torch.full((1, 3, 1, 32, 48), value)
    mean, logvar = vae.encode(frame)
    generator = torch.Generator().manual_seed(3)
    sampled = sample_posterior(mean, logvar, generator)  # [1, C, 1, Y, X]
    channels_last = sampled.permute(0, 2, 3, 4, 1)  # [1, 1, Y, X, C]
    wanted = channels_last * vae.config.scaling_factor
    assert torch.allclose(latent, wanted, atol=1e-5)
    other = latent_of(image, vae, seed=4)
    assert not torch.equal(latent, other)


def test_the_latents_of_a_still_video_are_equal():
    """So the latent of a picture can be that of a last frame."""
    vae = random_vae().double().requires_grad_(False)
    frame = torch.randn(1, 3, 1, 32, 48, dtype=torch.float64)
    still = frame.expand(-1, -1, 9, -1, -1)
    for moment in vae.encode(still):
        first = moment[:, :, :1]
        torch.testing.assert_close(moment, first.expand_as(moment), rtol=0, atol=1e-12)


def test_resizing_is_that_of_picture_libraries():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (40, 56, 3), dtype=torch.uint8, generator=generator)
    channels_first = image.permute(2, 0, 1)  # [3, 40, 56]
    pil = Image.fromarray(image.numpy())
    for height, width in ((32, 48), (100, 70)):
        resized = pil.resize((width, height), Image.Resampling.BILINEAR)
        theirs = torch.from_numpy(numpy.array(resized))
        ours = resize(channels_first, height, width).permute(1, 2, 0)
        error = ours.int() - theirs.int()
        assert error.abs().max() <= 1
        equal = (ours == theirs).float()
        assert equal.mean() > 0.9
