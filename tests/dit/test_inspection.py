# SPDX-License-Identifier: Apache-2.0
"""What NABLA keeps, as recorded and drawn: the numbers are those of the selections, and watching
changes nothing."""

import io
import json
import math
import sys

import pytest
import torch
from PIL import Image

from kandinsky_kernels import select_blocks, unpack_selection
from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.dit import nabla
from kandinsky_model.dit.layout import Chunks
from kandinsky_model.inspection import CURVE, Watch, inspect, measure
from kandinsky_model.media import chart

PROMPT = "a red circle moving right"
SIZE = dict(
    num_frames=9,
    height=96,
    width=160,
    num_inference_steps=3,
    seed=1,
)


@pytest.fixture
def model():
    return pipeline.load("tiny", device="cpu", parts=("text", "dit"))


def test_numbers_are_those_of_the_map():
    query = torch.randn(2, 3, 11, 8)
    key = torch.randn(2, 3, 11, 8)
    selection = select_blocks(query, key, 0.6)
    found = measure(
        query,
        key,
        selection,
        True,
    )
    share = torch.softmax(query.double() @ key.double().mT / math.sqrt(8), -1)
    keep = unpack_selection(selection, 11)
    assert torch.allclose(found["density"].double(), keep.double().mean((0, 2, 3)))
    assert torch.allclose(found["mass"].double(), (share * keep).sum(-1).mean((0, 2)), atol=1e-6)
    assert torch.equal(found["map"].bool(), keep[0])
    heaviest = share.sort(-1, descending=True).values.mean((0, 2))  # [H, N]
    for percent in (0, 10, 50, 99, 100):
        whole, part = divmod(percent * 11, 100)
        wanted = heaviest[:, :whole].sum(-1) + (part / 100 * heaviest[:, whole] if part else 0)
        assert torch.allclose(found["curve"][:, percent].double(), wanted, atol=1e-6)
    assert found["curve"].shape == (3, CURVE + 1)


def test_every_pass_is_seen_and_none_is_changed(model, monkeypatch):
    asked = []
    monkeypatch.setattr(
        nabla, "select_blocks", lambda *args: asked.append(select_blocks(*args)) or asked[-1]
    )
    plain = model.generate(
        PROMPT,
        guidance_scale=3.0,
        attention="nabla",
        **SIZE,
    ).latents
    asked.clear()
    with Watch(model.dit, 2, [1]) as watch:
        assert torch.equal(
            model.generate(
                PROMPT,
                guidance_scale=3.0,
                attention="nabla",
                **SIZE,
            ).latents,
            plain,
        )
    L = len(model.dit.visual_transformer_blocks)
    H = model.dit.config.num_heads
    N = asked[0].shape[2]
    # step, pass, layer
    kept = torch.stack([unpack_selection(one, N)[0].float() for one in asked]).view(
        3,
        2,
        L,
        H,
        N,
        N,
    )
    assert watch.steps == 3
    assert torch.allclose(
        watch.density,
        kept.mean((-1, -2)).permute(2, 0, 1, 3),
    )
    assert list(watch.maps) == [1]
    assert torch.equal(watch.maps[1], kept[1, 0])
    assert all(block.self_attention.watch is None for block in model.dit.visual_transformer_blocks)


def test_heads_in_groups_leave_the_same_record(model, monkeypatch):
    def seen():
        with Watch(model.dit, 1, [0]) as watch:
            model.generate(
                PROMPT,
                guidance_scale=1.0,
                attention="nabla",
                **SIZE,
            )
        return watch

    whole = seen()
    make_layout = pipeline.make_layout
    monkeypatch.setattr(
        pipeline,
        "make_layout",
        lambda *args, chunks, **options: make_layout(*args, chunks=Chunks(heads=1), **options),
    )
    parts = seen()
    assert whole.density.std() > 0.01
    assert parts.density.shape == whole.density.shape
    # a product of fewer rows may round differently
    assert torch.allclose(parts.density, whole.density, atol=0.01)
    assert (parts.maps[0] != whole.maps[0]).float().mean() < 0.01


def test_inspect_draws_and_leaves_the_model_as_it_was(model, tmp_path):
    before = model.preset
    light = inspect(
        model,
        PROMPT,
        tmp_path / "light",
        keep_mass=0.3,
        guidance_scale=1.0,
        maps_at=[2],
        **SIZE,
    )
    full = inspect(
        model,
        PROMPT,
        tmp_path / "full",
        keep_mass=1.0,
        guidance_scale=1.0,
        **SIZE,
    )
    assert model.preset is before
    assert 0.1 < light.density.mean() < 0.6
    assert full.density.min() == 1
    assert torch.allclose(full.mass, torch.ones(()))
    assert sorted(path.name for path in (tmp_path / "light").iterdir()) == [
        "blocks_002.png",
        "curves.png",
        "density.png",
        "mass.png",
        "numbers.json",
    ]
    assert len(list((tmp_path / "full").glob("blocks_*.png"))) == 3
    numbers = json.loads((tmp_path / "light" / "numbers.json").read_text())
    assert numbers["keep_mass"] == 0.3
    assert torch.allclose(torch.tensor(numbers["density"]), light.density)
    with pytest.raises(ValueError, match="steps 0 to 2, got 3"):
        inspect(
            model,
            PROMPT,
            tmp_path,
            maps_at=[3],
            **SIZE,
        )


def test_a_model_trained_with_dense_attention_can_be_looked_at(model, tmp_path):
    model.preset = pipeline.replace(model.preset, nabla=None)
    watch = inspect(
        model,
        PROMPT,
        tmp_path,
        guidance_scale=1.0,
        **SIZE,
    )
    assert watch.steps == 3


def test_the_command(tmp_path, capsys):
    options = [
        "--frames",
        "5",
        "--size",
        "160x96",
        "--steps",
        "2",
        "--seed",
        "1",
        "--device",
        "cpu",
    ]
    assert main(["inspect", PROMPT, "-o", str(tmp_path / "out"), *options]) == 0
    out = capsys.readouterr().out
    assert "layer  0:" in out
    assert "of the blocks" in out
    assert (tmp_path / "out" / "blocks_001.png").is_file()
    assert main(["inspect", PROMPT, "-o", str(tmp_path / "out"), "--keep-mass", "2", *options]) == 2
    assert "keep_mass must lie in (0, 1], got 2" in capsys.readouterr().err


def pixels(figure):
    """What a figure looks like: a PIL image, RGB."""
    file = io.BytesIO()
    figure.savefig(file)
    return Image.open(file).convert("RGB")


def test_curves_hold_the_numbers_and_some_of_many_are_named(monkeypatch):
    # the state that pyplot shares with other programs
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    figure = chart.figure(400, 300)
    axes = figure.subplots()
    chart.describe(axes, "of a folder $_$", "step", "y")
    chart.curves(axes, {f"layer {i}": [(0, i), (1, 2 * i)] for i in range(32)})
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[0, i], [1, 2 * i]] for i in range(32)
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"layer {i}" for i in range(0, 32, 4)
    ]
    assert set(axes.get_xticks()) <= set(range(-1, 3))
    assert pixels(figure).size == (400, 300)


def test_without_matplotlib_nothing_is_begun(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(model, "generate", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(RuntimeError, match=r"pip install 'kandinsky-kernels\[charts\]'"):
        inspect(model, PROMPT, tmp_path / "out", **SIZE)
    assert not (tmp_path / "out").exists()


def test_maps_are_shown_pixel_by_pixel():
    maps = torch.zeros(2, 3, 4, 4)
    maps[1, 2, 0, 3] = 1  # the last square's upper right corner
    picture = pixels(chart.grid_of_maps(maps, "title", "layer", "head"))
    white = [
        (x, y)
        for x in range(60, 60 + 3 * 100 + 4)
        for y in range(72, 72 + 2 * 100 + 4)
        if picture.getpixel((x, y)) == (255, 255, 255)
    ]
    assert white == [
        (x, y) for x in range(60 + 204 + 72, 60 + 204 + 96) for y in range(72 + 104, 72 + 104 + 24)
    ]
    black = sum(picture.getpixel((60 + 4 + x, 72 + 4)) == (0, 0, 0) for x in range(96))
    assert black == 96


def test_a_large_map_is_averaged_down():
    picture = pixels(chart.grid_of_maps(torch.eye(2).repeat(96, 96)[None, None], "title"))
    assert {picture.getpixel((64 + x, 76 + x))[0] for x in range(96)} <= {127, 128}
