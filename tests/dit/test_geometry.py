# SPDX-License-Identifier: Apache-2.0
"""Token orders, blocks, local windows and rotary angles against their definitions, written out
index by index."""

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


PRESET_GRIDS = sorted(
    {preset_grid(p.frames, *size) for p in PRESETS.values() for size in p.sizes}, key=repr
)
ODD_GRIDS = [Grid(1, 1, 1), Grid(2, 29, 52), Grid(3, 8, 9), Grid(1, 7, 24), Grid(2, 39, 39)]


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
    wanted = []
    sizes = []
    for t in range(grid.T):
        for tile_y in range(tiles_y):
            for tile_x in range(tiles_x):
                tile = [
                    (t * grid.Y + y) * grid.X + x
                    for y in range(8 * tile_y, min(8 * tile_y + 8, grid.Y))
                    for x in range(8 * tile_x, min(8 * tile_x + 8, grid.X))
                ]
                wanted += tile
                sizes.append(len(tile))
    offsets = block_offsets(grid)
    assert tile_order(grid).tolist() == wanted
    assert offsets.dtype == torch.int32
    assert offsets.diff().tolist() == sizes
    assert (offsets[0], offsets[-1], len(offsets)) == (0, grid.tokens, grid.blocks + 1)


def test_published_index_formula():
    """Whole tiles: index = ((t H/8 + h//8) W/8 + w//8) 64 + (h%8) 8 + (w%8)."""
    grid = Grid(3, 16, 40)
    inverse = inverse_order(tile_order(grid)).view(grid.T, grid.Y, grid.X)
    for t, h, w in ((0, 0, 0), (0, 7, 8), (1, 9, 39), (2, 15, 17)):
        assert inverse[t, h, w] == ((t * 2 + h // 8) * 5 + w // 8) * 64 + (h % 8) * 8 + w % 8


def test_patchify_is_channel_fastest_and_unpatchify_channel_slowest():
    channels = 3
    x = torch.randn(
        2,
        2,
        6,
        8,
        channels,
    )
    tokens = patchify(x, (1, 2, 2))
    assert tokens.shape == (2, 2 * 3 * 4, 4 * channels)
    for t, y, x_, ph, pw, c in ((0, 0, 0, 0, 1, 2), (1, 2, 3, 1, 0, 1), (1, 1, 2, 1, 1, 0)):
        token = tokens[1, (t * 3 + y) * 4 + x_]
        assert token[(2 * ph + pw) * channels + c] == x[1, t, 2 * y + ph, 2 * x_ + pw, c]
    features = torch.randn(2, 24, 4 * channels)
    latents = unpatchify(features, Grid(2, 3, 4), (1, 2, 2))
    assert latents.shape == x.shape
    for t, y, x_, ph, pw, c in ((0, 0, 0, 0, 1, 2), (1, 2, 3, 1, 0, 1), (1, 1, 2, 1, 1, 0)):
        token = features[0, (t * 3 + y) * 4 + x_]
        assert latents[0, t, 2 * y + ph, 2 * x_ + pw, c] == token[c * 4 + 2 * ph + pw]


@pytest.mark.parametrize(
    "tiles, window", [((5, 2, 3), (3, 3, 3)), ((2, 2, 2), (1, 1, 1)), ((7, 4, 3), (4, 5, 1))]
)
def test_local_window_by_definition(tiles, window):
    cells = [(t, y, x) for t in range(tiles[0]) for y in range(tiles[1]) for x in range(tiles[2])]
    wanted = [
        [all(abs(i - j) <= w // 2 for i, j, w in zip(a, b, window, strict=True)) for b in cells]
        for a in cells
    ]
    assert local_window(tiles, window).tolist() == wanted


def test_local_window_row_counts_of_the_released_setting():
    counts = local_window(Grid(61, 32, 48).tiles, (11, 3, 3)).sum(-1)
    assert (counts.min(), counts.max()) == (24, 99)
    assert counts.float().mean().item() == pytest.approx(70.1, abs=0.05)


def test_golden_local_windows():
    golden = load_file(shared_data() / "golden" / "nabla.safetensors")
    assert torch.equal(local_window((5, 2, 3), (3, 3, 3)), golden["sta_5x2x3_w3x3x3"])
    assert torch.equal(local_window((7, 3, 2), (5, 3, 1)), golden["sta_7x3x2_w5x3x1"])
    assert torch.equal(
        local_window((61, 4, 6), (11, 3, 3)).sum(-1).int(), golden["sta_rowcount_61x4x6_w11x3x3"]
    )


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
    for position in ((2, 0, 0), (0, 3, 0), (0, 0, 4), (2, 3, 4)):
        t, y, x = position
        assert tuple(places[(t * grid.Y + y) * grid.X + x].tolist()) == position
        parts = table.split([dim // 2 for dim in axes_dims], -1)
        row = torch.cat([part[p] for part, p in zip(parts, position, strict=True)])
        wanted = [
            p * 10000 ** (-j / (dim // 2)) / s
            for p, dim, s in zip(position, axes_dims, scale, strict=True)
            for j in range(dim // 2)
        ]
        assert torch.allclose(row, torch.tensor(wanted), rtol=1e-6)


def test_first_frequencies():
    """Check values of the published tables: position 1 on each axis."""
    for dim, values in (
        (16, (1, 0.316228, 0.1, 0.031623)),
        (24, (1, 0.464159, 0.215443, 0.1)),
        (32, (1, 0.562341, 0.316228)),
        (48, (1, 0.681292, 0.464159)),
    ):
        assert rotary_angles(2, (dim,), (1.0,))[1, : len(values)].tolist() == pytest.approx(
            values, abs=1e-6
        )
    assert rotary_angles(1200, (64,), (1.0,)).shape == (1200, 32)  # no table to run out of
    assert math.isclose(rotary_angles(8, (64,), (1.0,))[7, 0].item(), 7.0)


@pytest.mark.parametrize("count", [8, 12, 32, 64, 256])
def test_frequencies_are_exact_powers_of_rounded_exponents(count):
    # fp32, each
    exponents = [-math.log(10000.0) * torch.tensor(float(i)) / count for i in range(count)]
    assert torch.equal(
        frequencies(count), torch.tensor([math.exp(exponent.item()) for exponent in exponents])
    )


def test_empty_grid_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        Grid(3, 0, 4)
