# SPDX-License-Identifier: Apache-2.0
"""Token orders, blocks, local windows and rotary angles against their definitions, written out
index by index."""

import itertools
import math

import pytest
import torch
from safetensors.torch import load_file

from kandinsky_model.config import PRESETS
from kandinsky_model.dit.geometry import (
    Grid,
    block_offsets,
    frequencies,
    inverse_order,
    local_window,
    patchify,
    positions,
    rotary_angles,
    tile_order,
    unpatchify,
)

from ..conftest import shared_data


def preset_grid(frames, height, width):
    return Grid((frames - 1) // 4 + 1, height // 16, width // 16)


PRESET_GRIDS = {
    preset_grid(preset.frames, height, width)
    for preset in PRESETS.values()
    for height, width in preset.sizes
}
PRESET_GRIDS = sorted(PRESET_GRIDS, key=repr)
ODD_GRIDS = [
    Grid(1, 1, 1),
    Grid(2, 29, 52),
    Grid(3, 8, 9),
    Grid(1, 7, 24),
    Grid(2, 39, 39),
]


@pytest.mark.parametrize("grid", PRESET_GRIDS + ODD_GRIDS, ids=str)
def test_tile_order_and_its_inverse_compose_to_identity(grid):
    order = tile_order(grid)
    inverse = inverse_order(order)
    identity = torch.arange(grid.tokens)
    assert order.dtype == torch.int64
    assert torch.equal(order[inverse], identity)
    assert torch.equal(inverse[order], identity)


@pytest.mark.parametrize("grid", [Grid(2, 16, 24), *ODD_GRIDS], ids=str)
def test_tile_order_walks_tile_by_tile(grid):
    _, tiles_y, tiles_x = grid.tiles

    def tile_of(t, top, left):
        bottom = min(top + 8, grid.Y)
        right = min(left + 8, grid.X)
        return [
            (t * grid.Y + y) * grid.X + x for y in range(top, bottom) for x in range(left, right)
        ]

    wanted = []
    sizes = []
    for t in range(grid.T):
        for tile_y in range(tiles_y):
            for tile_x in range(tiles_x):
                tile = tile_of(t, 8 * tile_y, 8 * tile_x)
                wanted += tile
                sizes.append(len(tile))
    offsets = block_offsets(grid)
    assert tile_order(grid).tolist() == wanted
    assert offsets.dtype == torch.int32
    assert offsets.diff().tolist() == sizes
    assert offsets[0] == 0
    assert offsets[-1] == grid.tokens
    assert len(offsets) == grid.blocks + 1


def test_published_index_formula():
    """Whole tiles: index = ((t H/8 + h//8) W/8 + w//8) 64 + (h%8) 8 + (w%8)."""
    grid = Grid(3, 16, 40)
    inverse = inverse_order(tile_order(grid)).view(grid.T, grid.Y, grid.X)
    for t, h, w in ((0, 0, 0), (0, 7, 8), (1, 9, 39), (2, 15, 17)):
        tile = (t * 2 + h // 8) * 5 + w // 8
        within = (h % 8) * 8 + w % 8
        assert inverse[t, h, w] == tile * 64 + within


def test_patchify_is_channel_fastest_and_unpatchify_channel_slowest():
    C = 3
    grid = Grid(2, 3, 4)
    patch = (1, 2, 2)
    video = torch.randn(2, 2, 6, 8, C)
    tokens = patchify(video, patch)
    assert tokens.shape == (2, grid.tokens, 4 * C)
    features = torch.randn(2, grid.tokens, 4 * C)
    latents = unpatchify(features, grid, patch)
    assert latents.shape == video.shape
    # a token's place, a place within its patch, a channel
    for t, y, x, patch_y, patch_x, c in (
        (0, 0, 0, 0, 1, 2),
        (1, 2, 3, 1, 0, 1),
        (1, 1, 2, 1, 1, 0),
    ):
        token = (t * grid.Y + y) * grid.X + x
        row = 2 * y + patch_y
        column = 2 * x + patch_x
        within = 2 * patch_y + patch_x
        assert tokens[1, token, within * C + c] == video[1, t, row, column, c]
        assert latents[0, t, row, column, c] == features[0, token, c * 4 + within]


@pytest.mark.parametrize(
    "tiles, window",
    [
        ((5, 2, 3), (3, 3, 3)),
        ((2, 2, 2), (1, 1, 1)),
        ((7, 4, 3), (4, 5, 1)),
    ],
)
def test_local_window_by_definition(tiles, window):
    def is_near(a, b):
        axes = zip(a, b, window, strict=True)
        return all(abs(i - j) <= width // 2 for i, j, width in axes)

    cells = list(itertools.product(*map(range, tiles)))
    wanted = []
    for query in cells:
        row = [is_near(query, key) for key in cells]
        wanted.append(row)
    assert local_window(tiles, window).tolist() == wanted


def test_local_window_row_counts_of_the_released_setting():
    tiles = Grid(61, 32, 48).tiles
    counts = local_window(tiles, (11, 3, 3)).sum(-1)
    assert counts.min() == 24
    assert counts.max() == 99
    mean = counts.float().mean().item()
    assert mean == pytest.approx(70.1, abs=0.05)


def test_golden_local_windows():
    golden = load_file(shared_data() / "golden" / "nabla.safetensors")
    window = local_window((5, 2, 3), (3, 3, 3))
    assert torch.equal(window, golden["sta_5x2x3_w3x3x3"])
    window = local_window((7, 3, 2), (5, 3, 1))
    assert torch.equal(window, golden["sta_7x3x2_w5x3x1"])
    window = local_window((61, 4, 6), (11, 3, 3))
    counts = window.sum(-1).int()
    assert torch.equal(counts, golden["sta_rowcount_61x4x6_w11x3x3"])


@pytest.mark.parametrize("axes_dims", [(16, 24, 24), (32, 48, 48)])
def test_rotary_angles(axes_dims):
    grid = Grid(3, 4, 5)
    scale = (1.0, 2.0, 3.16)
    table = rotary_angles(5, axes_dims, scale)
    places = positions(grid)
    assert table.shape == (5, sum(axes_dims) // 2)
    assert table.dtype == torch.float32
    assert places.shape == (grid.tokens, 3)
    assert places.dtype == torch.int32
    pairs = [dim // 2 for dim in axes_dims]
    columns = table.split(pairs, -1)
    for position in ((2, 0, 0), (0, 3, 0), (0, 0, 4), (2, 3, 4)):
        t, y, x = position
        token = (t * grid.Y + y) * grid.X + x
        assert tuple(places[token].tolist()) == position
        for axis in range(3):
            exponents = torch.arange(pairs[axis], dtype=torch.float64) / pairs[axis]
            wanted = position[axis] * 10000**-exponents / scale[axis]
            angles = columns[axis][position[axis]]
            assert torch.allclose(angles, wanted.float(), rtol=1e-6)


def test_first_frequencies():
    """Check values of the published tables: position 1 on each axis."""
    published = {
        16: (1, 0.316228, 0.1, 0.031623),
        24: (1, 0.464159, 0.215443, 0.1),
        32: (1, 0.562341, 0.316228),
        48: (1, 0.681292, 0.464159),
    }
    scale = (1.0,)
    for dim, values in published.items():
        angles = rotary_angles(2, (dim,), scale)[1]
        first = angles[: len(values)].tolist()
        assert first == pytest.approx(values, abs=1e-6)
    long = rotary_angles(1200, (64,), scale)
    assert long.shape == (1200, 32)  # no table to run out of
    angles = rotary_angles(8, (64,), scale)[7]
    assert math.isclose(angles[0].item(), 7.0)


@pytest.mark.parametrize("count", [8, 12, 32, 64, 256])
def test_frequencies_are_exact_powers_of_rounded_exponents(count):
    powers = []
    for i in range(count):
        exponent = -math.log(10000.0) * torch.tensor(float(i)) / count  # rounded to fp32
        powers.append(math.exp(exponent.item()))
    assert torch.equal(frequencies(count), torch.tensor(powers))


def test_empty_grid_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        Grid(3, 0, 4)
