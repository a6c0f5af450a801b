# SPDX-License-Identifier: Apache-2.0
"""Files that players open: what was written is read back by another reader."""

import os
import random

import pytest
import torch

from kandinsky_model.media import video
from kandinsky_model.media.comment import read_comment
from kandinsky_model.tiny import scenes


def clip(frames=9, height=48, width=64):
    """A bright bar walking over a colour ramp: every frame differs."""
    ramp = torch.linspace(40, 200, width).expand(height, width)
    grey = torch.full_like(ramp, 90)
    still = torch.stack([ramp, ramp.flip(1), grey], dim=-1).byte()  # [H, W, 3]
    out = still.repeat(frames, 1, 1, 1)
    for i in range(frames):
        out[i, :, 4 * i : 4 * i + 8] = 240
    return out


def decoded(container):
    """uint8 [F, H, W, 3]: the frames of an opened file."""
    frames = []
    for frame in container.decode(video=0):
        pixels = frame.to_ndarray(format="rgb24")
        frames.append(torch.from_numpy(pixels))
    return torch.stack(frames)


def psnr(actual, wanted):
    """Of each frame, in decibels."""
    difference = actual.float() - wanted.float()
    error = difference.square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(255**2 / error)


@pytest.mark.parametrize("suffix", video.FORMATS)
def test_every_format_keeps_the_comment(tmp_path, suffix):
    comment = '{"prompt": "a red circle, ünïcode", "seed": 7}'
    (path, *_) = video.save(clip(2), tmp_path / f"a{suffix}", comment=comment)
    assert read_comment(path) == comment


def test_webm_holds_the_frames(tmp_path):
    import av

    frames = clip()
    video.save(frames, tmp_path / "a.webm")
    with av.open(str(tmp_path / "a.webm")) as container:
        (stream,) = container.streams.video
        assert stream.codec_context.name == "vp9"
        back = decoded(container)
    assert psnr(back, frames).min() > 28  # as for mp4


def test_mp4_says_what_it_is_and_holds_the_frames(tmp_path):
    import av

    frames = clip()
    comment = '{"prompt": "a red circle, ünïcode", "seed": 7}'
    path = tmp_path / "a.mp4"
    assert video.save(frames, path, fps=24, comment=comment) == [path]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        assert container.metadata["comment"] == comment
        assert stream.frames == 9
        assert stream.average_rate == 24
        assert codec.name == "h264"
        assert codec.pix_fmt == "yuv420p"
        assert codec.width == 64
        assert codec.height == 48
        # BT.709, limited range
        assert codec.color_primaries == 1
        assert codec.color_trc == 1
        assert codec.colorspace == 1
        assert codec.color_range == 1
        back = decoded(container)
    assert psnr(back, frames).min() > 28  # neighbouring frames are 15 dB apart
    data = path.read_bytes()
    index = data.find(b"moov")
    assert index > 0
    assert index < data.find(b"mdat"), "the index must be first: a browser starts at once"


@pytest.mark.parametrize("suffix", video.FORMATS)
def test_the_same_frames_give_the_same_file(tmp_path, suffix):
    """Flat shapes on a plain ground, of 160x160x17: with the encoder's own settings two or three
    different files came out of six."""
    frames = scenes.draw(scenes.training_scene(0, random.Random(0)))
    contents = set()
    for i in range(12):
        written = video.save(frames, tmp_path / f"{i}{suffix}", comment="as in every file")
        contents.add(tuple(path.read_bytes() for path in written))
    assert len(contents) == 1


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.png"])
def test_frames_may_come_in_pieces(tmp_path, name):
    frames = clip()
    (tmp_path / "b").mkdir()
    written = video.save(frames, tmp_path / name)
    pieces = iter(frames.split([1, 2, 2, 4]))
    in_pieces = video.save(pieces, tmp_path / "b" / name)
    for one, other in zip(written, in_pieces, strict=True):
        assert one.read_bytes() == other.read_bytes()
    with pytest.raises(ValueError, match="no piece"):
        video.save(iter([]), tmp_path / name)
    assert written[0].read_bytes() == in_pieces[0].read_bytes()


def test_mp4_colours_are_bt709(tmp_path):
    import av

    red = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    red[..., 0] = 255
    video.save(red, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        planes = next(container.decode(video=0)).planes
        luma, blue, red_difference = (bytes(plane)[0] for plane in planes)
    # Limited-range BT.709: Y = 16 + 219 * 0.2126, Cb = 128 - 224 * 0.2126 / 1.8556, Cr = 128 + 224
    # / 2. BT.601 would say Y = 81.
    assert abs(luma - 63) <= 1
    assert abs(blue - 102) <= 1
    assert abs(red_difference - 240) <= 1


def test_gif_keeps_frames_speed_and_comment(tmp_path):
    from PIL import Image

    video.save(clip(12), tmp_path / "a.gif", fps=24, comment="seed 7")
    with Image.open(tmp_path / "a.gif") as image:
        lengths = []
        for i in range(image.n_frames):
            image.seek(i)
            lengths.append(image.info["duration"])
        assert image.n_frames == 12
        assert image.info["loop"] == 0
        assert sum(lengths) == 500
        image.seek(0)
        assert image.info["comment"] == b"seed 7"


def test_png_is_one_file_for_one_frame_and_numbered_otherwise(tmp_path):
    import numpy
    from PIL import Image

    def pixels(image):
        return torch.from_numpy(numpy.array(image))

    frames = clip(3)
    path = tmp_path / "a.png"
    assert video.save(frames[:1], path, comment="é") == [path]
    with Image.open(path) as image:
        assert image.info["Comment"] == "é"
        assert torch.equal(pixels(image), frames[0])
    written = video.save(frames, tmp_path / "b.png")
    assert [path.name for path in written] == ["b_000.png", "b_001.png", "b_002.png"]
    with Image.open(written[2]) as image:
        assert torch.equal(pixels(image), frames[2])


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("a.avi", ValueError, "must end in .mp4 or .webm or .gif or .png or .jpg"),
        ("absent/a.mp4", OSError, "existing directory"),
        ("folder.png", ValueError, "is a directory"),
    ],
)
def test_impossible_outputs_are_refused_in_one_sentence(tmp_path, name, kind, words):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(kind, match=words) as caught:
        video.check_output(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(
    not os.path.isdir("/proc/self/fd"), reason="needs a directory that nobody may write to"
)
def test_unwritable_directory_is_refused():
    with pytest.raises(OSError, match="must be writable"):
        video.check_output("/proc/self/a.gif")


def test_missing_encoder_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    import av

    def absent(name, mode):
        raise ValueError(name)

    monkeypatch.setattr(av.codec, "Codec", absent)
    with pytest.raises(RuntimeError, match="H.264 encoder"):
        video.check_output(tmp_path / "a.mp4")
    assert video.check_output(tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    target = tmp_path / "a.mp4"
    target.write_bytes(b"old")

    def half(frames, path, fps, comment):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "_write_clip", half)
    with pytest.raises(KeyboardInterrupt):
        video.save(clip(), target)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("frames", "kind", "words"),
    [
        (clip().float(), TypeError, "uint8"),
        (clip()[0], ValueError, r"\[F, H, W, 3\]"),
        (clip()[:0], ValueError, "at least one frame"),
        (clip(height=47), ValueError, "even sides"),
    ],
)
def test_frames_that_do_not_fit_are_named(tmp_path, frames, kind, words):
    with pytest.raises(kind, match=words):
        video.save(frames, tmp_path / "a.mp4")


def test_strip_shows_first_to_last_side_by_side():
    level = torch.arange(17, dtype=torch.uint8) * 10
    frames = level.view(17, 1, 1, 1).expand(17, 32, 32, 3)
    strip = video.strip(frames, count=5, height=16)
    assert strip.shape == (1, 16, 5 * 16 + 4 * 4, 3)
    centres = [int(strip[0, 8, 8 + 20 * i, 0]) for i in range(5)]
    assert centres == [0, 40, 80, 120, 160]
    assert (strip[0, :, 16:20] == 255).all()
