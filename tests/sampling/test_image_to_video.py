# SPDX-License-Identifier: Apache-2.0
"""From pictures to a video: it begins or ends with them, at their shape, the same for the same
seed."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.media.picture import crop, resize
from kandinsky_model.sampling.given import finish, latent_of
from kandinsky_model.sampling.result import load_latents

from ..support import tiny_models

SHORT = dict(num_frames=5, num_inference_steps=2, guidance_scale=2.0)
PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = pipeline.load(tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny")), device="cpu")
    made.preset = replace(
        made.preset,
        name="tiny-i2v",
        task="i2v",
        sizes=((96, 96),),
    )
    return made


def picture(height=60, width=100, seed=0):
    return torch.randint(
        256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


@torch.no_grad()
def latent(*args, **options):
    return latent_of(*args, **options)


def test_video_has_the_shape_and_the_first_frame_of_the_picture(model):
    video = model.generate(PROMPT, seed=4, image=picture(), **SHORT)
    # area 96 x 96, sides in steps of 16
    assert (video.settings.height, video.settings.width, video.settings.image) == (80, 128, "given")
    clean = latent(
        resize(picture().permute(2, 0, 1), 80, 128),
        model.vae,
        seed=4,
    )
    wanted = finish(torch.cat([clean, video.latents[:, 1:]], 1), {0: clean})[:, :1]
    assert torch.allclose(video.latents[:, :1], wanted, atol=1e-5)
    assert video.frames.shape == (5, 80, 128, 3)


def test_seed_decides_and_batches_are_single_runs(model):
    one, again, other = (
        model.generate(
            PROMPT,
            seed=seed,
            image=picture(),
            **SHORT,
        ).latents
        for seed in (4, 4, 5)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    batch = model.generate(
        [PROMPT, "a blue star"],
        seed=4,
        image=picture(),
        **SHORT,
    )
    assert torch.allclose(batch[0].latents, one, atol=1e-4)
    assert torch.allclose(
        batch[1].latents,
        model.generate(
            "a blue star",
            seed=5,
            image=picture(),
            **SHORT,
        ).latents,
        atol=1e-4,
    )


def test_another_picture_another_video(model):
    one, other = (
        model.generate(
            PROMPT,
            seed=4,
            image=picture(seed=seed),
            **SHORT,
        ).latents
        for seed in (0, 1)
    )
    assert not torch.allclose(one[:, 1:], other[:, 1:], atol=1e-3)


@pytest.mark.parametrize("first", [None, picture()], ids=["last only", "both"])
def test_video_ends_with_the_last_picture(model, first):
    settings = dict(SHORT, num_frames=25)
    video = model.generate(
        PROMPT,
        seed=4,
        image=first,
        last_image=picture(70, 100, seed=1),
        height=64,
        width=96,
        **settings,
    )
    assert video.settings.last_image == "given"
    assert video.settings.image == ("" if first is None else "given")
    last = latent(
        resize(
            crop(picture(70, 100, seed=1).permute(2, 0, 1), 64, 96),
            64,
            96,
        ),
        model.vae,
        seed=4,
    )
    assert torch.equal(video.latents[:, -1:], last)
    free = model.generate(
        PROMPT,
        seed=4,
        image=picture(),
        height=64,
        width=96,
        **settings,
    )
    # what lies between has seen it
    assert not torch.allclose(video.latents[:, 2:-1], free.latents[:, 2:-1], atol=1e-3)


def test_a_last_picture_takes_the_shape_of_the_first(model):
    video = model.generate(
        PROMPT,
        seed=4,
        image=picture(),
        last_image=picture(90, 90, seed=1),
        **dict(SHORT, num_frames=25),
    )
    assert (video.settings.height, video.settings.width) == (80, 128)
    last = latent(
        resize(
            crop(picture(90, 90, seed=1).permute(2, 0, 1), 60, 100),
            80,
            128,
        ),
        model.vae,
        seed=4,
    )
    assert torch.equal(video.latents[:, -1:], last)


def test_a_given_size_takes_the_middle(model):
    video = model.generate(
        PROMPT,
        seed=4,
        image=picture(40, 100),
        height=64,
        width=64,
        **SHORT,
    )
    assert video.frames.shape == (5, 64, 64, 3)
    middle = model.generate(
        PROMPT, seed=4, image=picture(40, 100)[:, 30:70], height=64, width=64, **SHORT
    )
    assert torch.equal(video.latents, middle.latents)


@pytest.mark.parametrize(
    "size, wanted, kept",
    [
        ((40, 100), (64, 64), (40, 40)),
        ((100, 40), (64, 64), (40, 40)),
        ((60, 90), (32, 48), (60, 90)),
        ((33, 77), (48, 32), (33, 22)),
    ],
)
def test_crop(size, wanted, kept):
    image = torch.arange(size[0] * size[1]).view(1, *size)
    middle = crop(image, *wanted)
    assert middle.shape[1:] == kept
    top = (size[0] - kept[0]) // 2
    left = (size[1] - kept[1]) // 2
    assert middle[0, 0, 0] == image[0, top, left]


def test_refusals(model, tmp_path):
    with pytest.raises(ValueError, match="tiny-i2v begins with an image, got none; pass image"):
        model.generate(PROMPT, **SHORT)
    with pytest.raises(FileNotFoundError, match="the image must exist"):
        model.generate(PROMPT, image=tmp_path / "none.png", **SHORT)
    plain = pipeline.load(tiny_models.tiny_folder(tmp_path), device="cpu")
    with pytest.raises(ValueError, match="takes no image, got one; use an i2v or i2i preset"):
        plain.generate(PROMPT, image=picture(), **SHORT)
    with pytest.raises(ValueError, match="takes no image, got one"):
        plain.generate(PROMPT, last_image=picture(), **SHORT)


def test_command_line(model, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline.Kandinsky5, "from_sources", lambda *_, **__: model)
    Image.fromarray(picture().numpy()).save(tmp_path / "a.png")
    short = ["--steps", "1", "--frames", "5"]
    assert (
        main(
            [
                "generate",
                PROMPT,
                "--image",
                str(tmp_path / "a.png"),
                "-o",
                str(tmp_path / "a.gif"),
                *short,
            ]
        )
        == 0
    )
    _, settings = load_latents(tmp_path / "a.latents.safetensors")
    assert settings.image == str(tmp_path / "a.png")
    assert (settings.height, settings.width) == (
        80,
        128,
    )
    assert main(["generate", PROMPT, "-o", str(tmp_path / "b.gif")]) == 2
