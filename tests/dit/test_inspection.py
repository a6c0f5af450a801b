# SPDX-License-Identifier: Apache-2.0
"""What NABLA keeps, as recorded and drawn: the numbers are those of the selections, and watching
changes nothing."""

import json
import math

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


def test_lines_lie_where_their_numbers_say():
    axes = chart.Axes("t", "x", "y", y_range=(0, 1))
    picture = chart.lines(
        {"flat": [(0, 0.5), (30, 0.5)], "none": [(0, math.nan)]}, axes, (400, 300)
    )
    top = 50
    bottom = 300 - 44
    column = [picture.getpixel((200, y)) for y in range(300)]
    colored = [y for y, pixel in enumerate(column) if max(pixel) - min(pixel) > 60]
    assert colored
    assert abs(sum(colored) / len(colored) - (top + bottom) / 2) <= 1
    with pytest.raises(ValueError, match="at least one finite number"):
        chart.lines({"none": [(0, math.nan)]}, axes)


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0.31, 0.58, [0.3, 0.4, 0.5, 0.6]), (5, 5, None)],
)
def test_ticks_are_round_and_span_the_numbers(low, high, ticks):
    found = chart._ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert ticks is None or found == ticks


def test_cells_show_the_maps():
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 1, 0, 3] = 1
    picture = chart.cells(maps, side=40)
    assert [picture.getpixel((64 + 44 + 35, 48 + y)) for y in (5, 35)] == [(255,) * 3, (0,) * 3]
    assert picture.getpixel((64 + 35, 48 + 5)) == (0, 0, 0)
    titled = chart.cells(maps, side=40, title="a title that is longer than two small squares")
    assert titled.width > picture.width


def test_pictures_in_a_row():
    row = chart.beside([Image.new("RGB", (3, 5), (1, 2, 3)), Image.new("RGB", (4, 2))])
    assert row.size == (7, 5)
    assert row.getpixel((0, 0)) == (1, 2, 3)
    assert row.getpixel((6, 4)) == (255, 255, 255)
