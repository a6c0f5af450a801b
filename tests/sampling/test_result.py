# SPDX-License-Identifier: Apache-2.0
"""What a video shows of itself: pictures, a line of text, a clip in a notebook, a bar while it is
made; and what the same seed gives."""

import base64
import io

import pytest
import torch
from PIL import Image

from kandinsky_model import pipeline
from kandinsky_model.sampling.sampler import noise

from ..support import tiny_models
from ..support.tiny_models import SMALL

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pipeline.load(tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny")), device="cpu")


@pytest.fixture(scope="module")
def video(model):
    return model.generate(PROMPT, seed=3, **SMALL)


def test_frames_as_pictures(video):
    pictures = video.pil()
    assert len(pictures) == 5
    assert all(picture.size == (80, 64) for picture in pictures)
    assert pictures[2].tobytes() == video.frames[2].numpy().tobytes()


def test_a_video_and_a_model_say_what_they_are(model):
    video = model.generate(PROMPT, seed=3, **SMALL)
    shown = "Video('a red circle moving right', 5 frames at 24 per second of 80x64, seed 3, "
    assert repr(video) == shown + "not decoded yet)"
    assert video.frames is not None
    assert repr(video) == shown + "decoded)"
    still = model.generate(PROMPT, seed=3, **SMALL | {"num_frames": 1})
    assert "1 frame of 80x64" in repr(still)
    assert repr(model).startswith("Kandinsky5('/")
    assert repr(model).endswith("text, dit, vae for cpu)")


def test_a_notebook_shows_the_clip(model, video, monkeypatch):
    bundle = video._repr_mimebundle_()
    assert bundle["text/plain"] == repr(video)
    data = bundle["text/html"].partition("base64,")[2].partition('"')[0]
    assert base64.b64decode(data)[4:8] == b"ftyp"  # as every mp4 begins
    still = model.generate(PROMPT, seed=3, **SMALL | {"num_frames": 1})
    picture = Image.open(io.BytesIO(base64.b64decode(still._repr_mimebundle_()["image/png"])))
    assert picture.tobytes() == still.frames[0].numpy().tobytes()

    def fail():
        raise RuntimeError("no encoder")

    monkeypatch.setattr("kandinsky_model.media.video.h264_encoder", fail)
    assert base64.b64decode(video._repr_mimebundle_()["image/gif"]).startswith(b"GIF8")


def test_a_bar_shows_the_steps(model, video, capsys):
    events = []
    shown = model.generate(
        PROMPT, seed=3, progress=True, callback=lambda *event: events.append(event[:3]), **SMALL
    )
    assert "sampling" in capsys.readouterr().err
    assert events == [("text", 0, 1), *(("sampling", step, 2) for step in range(3))]
    assert torch.equal(shown.latents, video.latents)
    assert (
        model.generate(
            PROMPT,
            seed=3,
            progress=False,
            **SMALL,
        ).settings
        == video.settings
    )
    assert capsys.readouterr().err == ""


# What the same seed gives


def test_the_same_seed_gives_the_same_noise_everywhere():
    """For any number of threads, and alone as in a batch."""
    shape = (1, 2, 8, 10, 16)
    drawn = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            drawn.append(noise(7, shape))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*drawn)


def test_the_same_seed_gives_the_same_bits_in_the_same_circumstances(model, video):
    """The circumstances are the number of threads, the instruction set and the batch."""
    again = model.generate(PROMPT, seed=3, **SMALL)
    assert torch.equal(again.latents, video.latents)
    assert torch.equal(again.frames, video.frames)
    batches = [model.generate([PROMPT, "a blue square"], seed=3, **SMALL) for _ in range(2)]
    for first, second in zip(*batches, strict=True):
        assert torch.equal(first.latents, second.latents)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_instruction_sets_and_batches_change_rounding_alone(simd, video, model, threads):
    """Matrix products of torch split their sums by the number of threads and by the batch, and
    kernels round by the instruction set: latents move by some 1e-5, frames by one level at most."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        alone = model.generate(PROMPT, seed=3, **SMALL)
        batch = model.generate([PROMPT, "a blue square"], seed=3, **SMALL)
    finally:
        torch.set_num_threads(before)
    for other in (alone, batch[0]):
        torch.testing.assert_close(other.latents, video.latents, rtol=0, atol=1e-4)
        assert (other.frames.int() - video.frames.int()).abs().max() <= 1
