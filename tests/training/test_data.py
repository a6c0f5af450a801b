# SPDX-License-Identifier: Apache-2.0
"""A folder of training data: what is read of it, what is wrong with it, what is kept of it on disk,
and in which order and with which random numbers it is trained on."""

import logging
import os
import random
import struct
from fractions import Fraction

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints.locate import locate
from kandinsky_model.media import video
from kandinsky_model.tiny import scenes
from kandinsky_model.training.batches import Draws, Passes, draw
from kandinsky_model.training.cache import Cache, Sample, Wanted, load
from kandinsky_model.training.clips import nearest_size, read_clip
from kandinsky_model.training.data import Bad, Item, find_items, read_image, read_item

from ..conftest import shared_data
from ..support.train_folders import SMALL, clips

SIZES = ((64, 64), (64, 96))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return clips(tmp_path_factory.mktemp("data"))


# Clips and pictures


def numbered(path, rate, count):
    """A clip of `count` grey frames at `rate` frames per second, the i-th of brightness 10 i."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "0", "bf": "0"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        stream.codec_context.color_range = 1
        for i in range(count):
            grey = torch.full((64, 64, 3), 10 * i, dtype=torch.uint8)
            frame = av.VideoFrame.from_ndarray(grey.numpy(), format="rgb24")
            frame.pts = i
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("rate", "wanted"),
    [
        (24, [0, 1, 2, 3, 4, 5, 6, 7]),
        (12, [0, 0, 1, 1, 2, 2, 3, 3]),
        (30, [0, 1, 3, 4, 5, 6, 8, 9]),
        (60, [1, 3, 6, 8, 11, 13, 16, 18]),
    ],
)
@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_clips_of_any_rate(tmp_path, rate, wanted, kind):
    frames = read_clip(
        numbered(tmp_path / f"a.{kind}", rate, 24),
        24,
        8,
        [(64, 64)],
    )
    assert [round(frame.float().mean().item() / 10) for frame in frames] == wanted
    assert frames[0].shape == (3, 64, 64)
    assert frames[0].dtype == torch.uint8


def test_colours_of_a_clip_are_those_of_its_frames(tmp_path):
    scene = scenes.training_scene(5, random.Random(0))
    drawn = scenes.draw(scene, range(5))
    video.save(drawn, tmp_path / "a.mp4")
    read = torch.stack(read_clip(tmp_path / "a.mp4", 24, 99, [(160, 160)]))
    assert len(read) == 5
    assert (read.permute(0, 2, 3, 1).float() - drawn.float()).abs().mean() < 3


COLOURS = ((205, 25, 40), (40, 170, 70), (40, 80, 220), (255, 240, 80), (128, 128, 128))
# the shares of red and blue in luma, and the code of H.273
MATRICES = {"bt709": (0.2126, 0.0722, 1), "bt601": (0.299, 0.114, 5)}


def levels(rgb, matrix, full):
    """(Y, Cb, Cr) of a colour, by the definition in BT.601 and BT.709."""
    red, blue, _ = MATRICES[matrix]
    r, g, b = (level / 255 for level in rgb)
    y = red * r + (1 - red - blue) * g + blue * b
    cb = (b - y) / (2 * (1 - blue))
    cr = (r - y) / (2 * (1 - red))
    if full:
        return round(255 * y), round(128 + 255 * cb), round(128 + 255 * cr)
    return round(16 + 219 * y), round(128 + 224 * cb), round(128 + 224 * cr)


def striped(path, size, matrix, tag, full=False):
    """A clip of vertical stripes in COLOURS, whose Y, Cb and Cr are computed here."""
    import av

    height, width = size
    stripe = width // len(COLOURS)
    planes = [numpy.zeros((height >> half, width >> half), numpy.uint8) for half in (0, 1, 1)]
    for i, colour in enumerate(COLOURS):
        for plane, level in zip(planes, levels(colour, matrix, full), strict=True):
            step = stripe * plane.shape[1] // width
            plane[:, i * step : (i + 1) * step] = level
    stacked = numpy.concatenate([plane.ravel() for plane in planes])
    frame = av.VideoFrame.from_ndarray(stacked.reshape(height * 3 // 2, width), format="yuv420p")
    with av.open(str(path), "w") as container:
        options = {"crf": "0", "preset": "ultrafast"}
        stream = container.add_stream("libx264", rate=24, options=options)
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        if tag:
            stream.codec_context.colorspace = MATRICES[matrix][2]
        stream.codec_context.color_range = 2 if full else 1
        frame.pts = 0
        frame.time_base = Fraction(1, 24)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("height", "matrix", "tag", "full"),
    [
        (480, "bt709", True, False),
        (480, "bt601", True, False),
        (480, "bt601", False, False),
        (720, "bt601", True, False),
        (720, "bt709", True, False),
        (720, "bt709", False, False),
        (720, "bt709", False, True),
        (480, "bt709", True, True),
    ],
)
def test_colours_are_those_that_the_file_means(tmp_path, height, matrix, tag, full):
    """Within two levels, which is what 8 bits of Y, Cb and Cr leave. Untagged clips of 720 rows and
    more have the matrix of BT.709."""
    size = (height, 160)
    path = striped(tmp_path / "a.mp4", size, matrix, tag, full)
    (frame,) = read_clip(path, 24, 1, [size])
    for i, colour in enumerate(COLOURS):
        seen = frame[:, height // 2, 32 * i + 16]
        assert (seen.int() - torch.tensor(colour)).abs().max() <= 2, (colour, seen)


def test_a_gif_keeps_its_colours(tmp_path):
    """Its pixels are RGB, for which neither matrix nor range mean anything."""
    drawn = torch.zeros(2, 64, 160, 3, dtype=torch.uint8)
    for i, colour in enumerate(COLOURS):
        drawn[:, :, 32 * i : 32 * (i + 1)] = torch.tensor(colour, dtype=torch.uint8)
    video.save(drawn, tmp_path / "a.gif")
    frame = read_clip(tmp_path / "a.gif", 24, 1, [(64, 160)])[0]
    assert (frame.permute(1, 2, 0).int() - drawn[0].int()).abs().max() <= 2


def test_a_colour_matrix_that_is_not_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(MATRICES, "bt709", (0.2126, 0.0722, 8))  # YCgCo
    path = striped(tmp_path / "a.mp4", (64, 160), "bt709", True)
    with pytest.raises(ValueError, match="its colour matrix has the code 8 of H.273"):
        read_clip(path, 24, 1, [(64, 160)])


def test_sizes_and_lengths_are_the_nearest(tmp_path):
    assert nearest_size(100, 150, SIZES) == (64, 96)
    assert nearest_size(150, 100, SIZES) == (64, 64)
    clip = Item(clips(tmp_path, 1, 9) / "clip0.mp4", "a clip")
    assert read_item(clip, SIZES, (5, 13), 24).shape == (3, 5, 64, 64)
    assert read_item(clip, [(64, 96)], (5, 9), 24).shape == (3, 9, 64, 96)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "still.png")
    still = Item(tmp_path / "still.png", "red")
    assert read_item(still, SIZES, (1, 9), 24).shape == (3, 1, 64, 96)


def test_a_real_clip():
    path = shared_data() / "clips" / "kandinsky_a.mp4"
    frames = read_clip(path, 24, 9, [(512, 768), (512, 512)])
    assert len(frames) == 9
    assert frames[0].float().std() > 10


# Captions


def pictures(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(folder / name)
    return folder


def captions_of(folder):
    return {item.name: item.caption for item in find_items(folder, Bad())}


def test_captions(tmp_path):
    folder = clips(tmp_path, 3)
    (folder / "clip1.txt").unlink()
    lines = [
        '{"file": "clip1.mp4", "caption": "from the\\nlist"}',
        "",
        '{"file": "clip0.mp4", "caption": "x"}',
    ]
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    items = find_items(folder, Bad())
    assert [item.path.name for item in items] == ["clip0.mp4", "clip1.mp4", "clip2.mp4"]
    assert items[1].caption == "from the list"
    assert items[0].caption == (folder / "clip0.txt").read_text().strip()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "captions.jsonl",
            '{"file": "a.png", "caption": "one"}\n{"file": "b/c.png", "text": "two"}',
        ),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "one"}\n{"path": "b/c.png", "prompt": "two"}',
        ),
        ("metadata.csv", 'file_name,text\na.png,one\nb/c.png,"two"\n'),
        ("metadata.csv", "id,caption,image_path\n1,one,a.png\n2,two,./b/c.png\n"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "BOM"])
def test_tables_of_captions(tmp_path, name, text, mark):
    folder = pictures(tmp_path, "a.png", "b/c.png")
    (folder / name).write_text(mark + text, encoding="utf-8")
    assert captions_of(folder) == {"a.png": "one", "b/c.png": "two"}


def test_captions_beside_in_folders_and_in_their_tables(tmp_path):
    folder = pictures(tmp_path, "a.png", "b/a.png", "b/d/e.png", ".hidden/f.png")
    (folder / "a.caption").write_text("\ufeffone", encoding="utf-8")
    (folder / "b" / "a.txt").write_text("two")
    (folder / "b" / "a.caption").write_text("not this one")
    (folder / "b" / "d" / "metadata.csv").write_text("file_name,text\ne.png,three\n")
    (folder / "b" / "loop").symlink_to(folder)
    assert captions_of(folder) == {"a.png": "one", "b/a.png": "two", "b/d/e.png": "three"}


def test_what_a_training_writes_is_not_data(tmp_path):
    folder = pictures(tmp_path, "a.png", "out/samples/b.png", "samples/c.png")
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text("x")
    without = [folder / "samples", folder / "out"]
    assert [item.name for item in find_items(folder, Bad(), without=without)] == ["a.png"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        (
            "captions.jsonl",
            b'{"file": "a.png", "caption": "x"}\n{"file": 3}\n',
            "line 2 of .*captions",
        ),
        ("metadata.jsonl", b"\n[[1]]\n", "line 2 of .*metadata.jsonl must be like"),
        ("metadata.csv", b"file_name,text\na.png\n", "line 2 of .*metadata.csv must be like"),
        ("metadata.csv", b"name,words\n", "must have a column file or file_name"),
        ("metadata.csv", b"file,text\n" + b"x" * 200_000, "after line 1 there is field larger"),
        (
            "metadata.csv",
            "file,text\na.png,\n\xe9\n".encode("latin-1"),
            "line 3 of .*metadata.csv has",
        ),
        ("a.txt", "one\ntwo\nfa\xe7ade".encode("latin-1"), "line 3 of .*a.txt has the byte 0xE7"),
        ("a.txt", "two".encode("utf-16"), "line 1 of .*a.txt has the byte 0xFF"),
        ("b.txt", b"", "neither in a.txt or a.caption nor in captions.jsonl or metadata.jsonl or"),
    ],
)
def test_captions_that_cannot_be_read_are_refused_by_file_and_line(tmp_path, name, data, words):
    folder = pictures(tmp_path, "a.png")
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=words) as raised:
        find_items(folder, Bad())
    assert len(str(raised.value).splitlines()) == 1


def test_the_layouts_are_told_where_there_is_nothing(tmp_path):
    for words in ("walk.caption", "metadata.jsonl", "metadata.csv", "folders inside it"):
        with pytest.raises(ValueError, match=words):
            find_items(tmp_path, Bad())


def test_pictures_before_edits(tmp_path):
    for name, colour in (("a.png", "red"), ("a.source.png", "blue"), ("b.jpg", "red")):
        Image.new("RGB", (80, 64), colour).save(tmp_path / name)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("make it red")
    missing = "b.jpg cannot be trained on: the picture before the edit is missing, b.source.jpg"
    with pytest.raises(ValueError, match=missing):
        find_items(tmp_path, Bad(), edits=True)
    bad = Bad("skip")
    (item,) = find_items(tmp_path, bad, edits=True)
    assert (item.path.name, item.source.name) == ("a.png", "a.source.png")
    assert [path.name for path in bad.skipped] == ["b.jpg"]


# Files that cannot be trained on


def spoil(folder):
    """Put one file of every bad kind beside the good ones: {name: what is said of it}."""
    whole = (folder / "clip0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "noise.mp4").write_bytes(bytes(range(256)) * 9)
    (folder / "empty.webm").write_bytes(b"")
    (folder / "no_caption.mp4").write_bytes(whole)
    (folder / "blank_caption.mp4").write_bytes(whole)
    (folder / "blank_caption.txt").write_text(" \n")
    short = scenes.draw(scenes.training_scene(1, random.Random(2)), range(3))
    video.save(short, folder / "short.mp4")
    Image.new("RGB", (64, 64)).save(folder / "still.png")
    (folder / "broken.png").write_bytes(b"no picture")
    video.save(
        scenes.draw(scenes.training_scene(1, random.Random(2))),
        folder / "tags.mp4",
        comment="@" * 24,
    )
    tags = (folder / "tags.mp4").read_bytes()
    assert tags.count(b"@" * 24) == 1
    (folder / "tags.mp4").write_bytes(tags.replace(b"@" * 24, b"\xe9" * 24))
    (folder / "lost.mp4").symlink_to(folder / "nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "latin.mp4").write_bytes(whole)
    (folder / "latin.txt").write_bytes(b"a\n\xe9")
    names = ("cut", "noise", "empty", "short", "still", "broken", "tags", "lost", "pipe", "folder")
    for name in names:
        (folder / f"{name}.txt").write_text("something")
    return {
        "cut.mp4": "it cannot be decoded",
        "noise.mp4": "cannot be decoded",
        "empty.webm": "cannot be decoded",
        "no_caption.mp4": "it has no caption, neither in no_caption.txt or no_caption.caption",
        "blank_caption.mp4": "has no caption",
        "short.mp4": "has 3 frames at 24 per second, but the shortest length asked for is 5",
        "still.png": "is a picture, but",
        "broken.png": "must be one that Pillow can read",
        "tags.mp4": "reading it failed with UnicodeDecodeError ('utf-8' codec can't decode",
        "lost.mp4": "it is no ordinary file",
        "pipe.mp4": "it is no ordinary file",
        "folder.mp4": "it is no ordinary file",
        "latin.mp4": "but line 2 of",
    }


def test_bad_data_are_named_and_skipped_or_stop(tmp_path, caplog, capsys):
    folder = clips(tmp_path / "data")
    wanted = spoil(folder)
    arguments = ["train", str(folder), "-o", str(tmp_path / "out"), *SMALL, "--steps", "1"]
    assert main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("kandinsky: ")
    assert "blank_caption.mp4 cannot be trained on: it has no caption" in said
    assert "--bad-data skip" in said
    logger = "kandinsky_model.training.data"
    with caplog.at_level(logging.WARNING, logger):
        assert main([*arguments, "--bad-data", "skip"]) == 0
    skipped = [record.getMessage() for record in caplog.records if record.name == logger]
    for name, reason in wanted.items():
        assert [line for line in skipped if f"{name}: " in line and reason in line], (name, skipped)
    assert len(skipped) == len(wanted)
    assert len(list((tmp_path / "out" / "training" / "cache").glob("*.latents.*"))) == 4


def test_stopping_names_the_first_corrupt_clip(tmp_path):
    folder = clips(tmp_path, 2)
    (folder / "clip0.mp4").write_bytes((folder / "clip0.mp4").read_bytes()[:1500])
    with pytest.raises(ValueError, match="clip0.mp4 cannot be trained on: it cannot be decoded"):
        cache_of(tmp_path / "cache").fill(find_items(folder, Bad()), Bad())
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("error", [struct.error("bad"), ZeroDivisionError(), MemoryError("much")])
def test_whatever_a_library_raises_belongs_to_the_policy(tmp_path, monkeypatch, error, caplog):
    """Reading one sample may fail in any way; writing the cache is not reading."""
    folder = pictures(tmp_path / "data", "a.png", "b.png")
    for name in "ab":
        (folder / f"{name}.txt").write_text("x")

    def failing(path):
        if path.name == "a.png":
            raise error
        return read_image(path)

    monkeypatch.setattr("kandinsky_model.training.data.read_image", failing)
    items = find_items(folder, Bad())
    cache = cache_of(tmp_path / "cache", lengths=(1,))
    with pytest.raises(ValueError, match=f"a.png cannot be trained on: .* {type(error).__name__}"):
        cache.fill(items, Bad())
    cache.fill(items, Bad("skip"))
    assert [sample.name for sample in cache.samples(items)] == ["b.png"]


def test_an_entry_of_another_kind_is_made_again(data, tmp_path):
    """Whole files, but not with the tensors that training reads."""
    items = find_items(data, Bad())[:1]
    cache = cache_of(tmp_path)
    cache.fill(items, Bad())
    (sample,) = cache.samples(items)
    for path in (sample.latents, sample.text):
        good = path.read_bytes()
        save_file({"latents": torch.zeros(3), "embeds": torch.zeros(3)}, path)
        assert cache.samples(items) == []
        cache.fill(items, Bad())
        assert cache.samples(items) == [sample]
        assert path.read_bytes() == good


def test_equal_names_in_two_folders_are_two_samples(tmp_path):
    """Even where size and time are equal too, as they are for files of some archives."""
    folder = pictures(tmp_path / "data", "a/0.bmp", "b/0.bmp")
    Image.new("RGB", (64, 64), "white").save(folder / "b" / "0.bmp")
    for name in "ab":
        (folder / name / "0.txt").write_text("x")
        os.utime(folder / name / "0.bmp", (1, 1))
    items = find_items(folder, Bad())
    cache = cache_of(tmp_path / "cache", lengths=(1,))
    cache.fill(items, Bad())
    dark, light = (load(one.latents)["latents"] for one in cache.samples(items))
    assert not torch.equal(dark, light)


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(FileNotFoundError, match="is none; check the path"):
        find_items(tmp_path / "nowhere", Bad())
    with pytest.raises(ValueError, match="got none that can be used of 0"):
        find_items(tmp_path, Bad())
    with pytest.raises(ValueError, match="stop or skip the training, got 'ignore'"):
        Bad("ignore")


# The cache


def cache_of(folder, **changes):
    wanted = Wanted(**{"sizes": ((64, 64),), "lengths": (5,)} | changes)
    return Cache(folder, locate("tiny"), wanted, CPU, torch.float32)


@pytest.fixture(scope="module")
def samples(data, tmp_path_factory):
    """The samples of `data`, whose entries are to be left as they are."""
    items = find_items(data, Bad())
    cache = cache_of(tmp_path_factory.mktemp("cache"))
    cache.fill(items, Bad())
    return cache.samples(items)


def test_entries_are_made_once_and_again_where_broken(data, tmp_path, monkeypatch):
    items = find_items(data, Bad())
    cache = cache_of(tmp_path)
    cache.fill(items, Bad())
    samples = cache.samples(items)
    assert [sample.shape for sample in samples] == [(2, 8, 8)] * 4
    assert len(list(tmp_path.iterdir())) == 4 + 4 + 1  # latents, captions and the null prompt
    latents = load(samples[0].latents)["latents"]
    assert latents.shape == (2, 8, 8, 16)
    assert 0.1 < latents.float().std() < 3

    made = []
    monkeypatch.setattr(Cache, "_write", lambda _, path, tensors: made.append(path))
    cache_of(tmp_path).fill(items, Bad())
    assert made == []
    samples[1].latents.write_bytes(samples[1].latents.read_bytes()[:-5])
    cache_of(tmp_path).fill(items, Bad())
    assert made == [samples[1].latents]
    assert cache_of(tmp_path, lengths=(1,)).samples(items) == []  # these have other names
    monkeypatch.undo()
    called = cache_of(tmp_path, trigger="zap")
    called.fill(items, Bad())
    assert called.samples(items)[0].caption.startswith("zap ")


def test_a_full_disk_leaves_nothing_half_written(data, tmp_path):
    resource = pytest.importorskip("resource")
    items = find_items(data, Bad())
    cache_of(tmp_path).fill(items[:1], Bad())
    kept = sorted(tmp_path.iterdir())
    # the largest size of a file: writing more fails as on a full disk
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="must have room .* start again: what is there is whole"):
            cache_of(tmp_path).fill(items, Bad("skip"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(tmp_path.iterdir()) == kept
    cache_of(tmp_path).fill(items, Bad())
    assert len(cache_of(tmp_path).samples(items)) == 4


# Passes and their random numbers


def test_every_epoch_shows_every_sample_once():
    shapes = [(2, 8, 8)] * 5 + [(1, 8, 8)] * 2 + [(2, 8, 12)]
    samples = [
        Sample(
            str(i),
            "",
            *[None] * 3,
            shape,
        )
        for i, shape in enumerate(shapes)
    ]
    passes = Passes(samples, 2, seed=3)
    assert passes.length == 3 + 1 + 1
    orders = []
    numbers = []
    for epoch in range(4):
        members = [passes[epoch * passes.length + i] for i in range(passes.length)]
        for one in members:
            assert len(one) <= 2
            assert len({sample.shape for sample, _ in one}) == 1
        orders.append([sample.name for one in members for sample, _ in one])
        numbers += [number for one in members for _, number in one]
        assert sorted(orders[-1]) == [str(i) for i in range(8)]
    assert len(set(map(tuple, orders))) == 4
    assert len(set(numbers)) == len(numbers)
    assert Passes(samples, 2, seed=3)[17] == passes[17]
    assert [Passes(samples, 2, seed=4)[i] for i in range(5)] != [passes[i] for i in range(5)]


def test_random_numbers_depend_on_seed_and_number_alone(samples):
    draws = Draws(1, 5.0, 0.5)
    alone = draw([(samples[0], 7)], draws, "t2v", CPU)
    pair = draw([(samples[2], 3), (samples[0], 7)], draws, "t2v", CPU)
    assert torch.equal(alone.noise[0], pair.noise[1])
    assert torch.equal(alone.times[0], pair.times[1])
    assert torch.equal(alone.cond.embeds[0], pair.cond.embeds[1, : alone.cond.lengths[0]])
    other = draw([(samples[0], 8)], draws, "t2v", CPU)
    assert not torch.equal(alone.noise[0], other.noise[0])
    t = alone.times[0]
    torch.testing.assert_close(alone.noisy[0], (1 - t) * alone.clean[0] + t * alone.noise[0])


def test_times_and_dropping_are_distributed_as_said(samples):
    members = [(samples[0], i) for i in range(1500)]
    batch = draw(members, Draws(0, 3.0, 0.3), "t2v", CPU)
    u = batch.times / (3.0 - 2.0 * batch.times)  # the shift undone
    z = torch.logit(u.double())
    assert abs(z.mean()) < 0.1
    assert abs(z.std() - 1) < 0.1
    null = load(samples[0].null)["embeds"]
    dropped = (batch.cond.lengths == len(null)).double().mean()
    assert abs(dropped - 0.3) < 0.05
    assert abs(batch.noise.std() - 1) < 0.01


def test_first_frames_are_given(samples):
    batch = draw([(samples[0], 0)], Draws(0, 5.0, 0.0), "i2v", CPU)
    assert set(batch.given.frames) == {0}
    assert torch.equal(batch.given.frames[0], batch.clean[:, :1])
