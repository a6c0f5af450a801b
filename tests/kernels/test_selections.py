# SPDX-License-Identifier: Apache-2.0
"""NABLA's choice of blocks, beyond the laws of the common table, and packed selections."""

import math

import pytest
import torch

import kandinsky_kernels as ops
from kandinsky_kernels import _library
from kandinsky_model.dit.geometry import local_window

from ..compare import assert_same_blocks


@pytest.mark.parametrize("keep_mass", [1e-9, 0.2, 0.7, 0.9, 0.999])
@pytest.mark.parametrize(
    "sharp",
    [0.05, 1.0, 6.0],
    ids=["flat", "usual", "peaked"],
)
@pytest.mark.parametrize("ties", ["all", "stable"])
def test_selection_against_exact_scores(keep_mass, sharp, ties, simd):  # law 27
    shared = torch.randn(1, 2, 1, 32)  # block means of a video resemble each other
    query = sharp * (torch.randn(1, 2, 131, 32) + shared)
    key = torch.randn(1, 2, 131, 32) + shared
    scores = query.double() @ key.double().mT / math.sqrt(32)
    assert_same_blocks(
        ops.select_blocks(query, key, keep_mass, ties=ties), scores, keep_mass, ties=ties
    )


def test_selection_is_the_smallest_set_that_holds_the_mass(simd):
    query = 2 * torch.randn(1, 1, 200, 64)
    key = torch.randn(1, 1, 200, 64)
    kept = ops.unpack_selection(ops.select_blocks(query, key, 0.8), 200)
    mass = (query.double() @ key.double().mT / 8.0).softmax(-1)
    held = (mass * kept).sum(-1)
    lightest = mass.masked_fill(~kept, math.inf).amin(-1)
    assert (held > 0.8 - 1e-6).all() and (held - lightest < 0.8 + 1e-6).all()
    assert (mass.masked_fill(kept, 0.0).amax(-1) <= lightest * (1 + 1e-5)).all(), (
        "a dropped block is heavier than a kept one"
    )


def keep_of_copies(mass, copies, keep_mass, ties):
    """What a row keeps of `copies` equal blocks of each of these masses (fp64, of one copy), lowest
    index first in a group."""
    keep = [[True] * len(mass) for _ in range(copies)]
    below = 0.0
    for block in sorted(range(len(mass)), key=mass.__getitem__):
        dropped = min(copies, max(0, math.ceil((1.0 - keep_mass - below) / mass[block]) - 1))
        if ties == "all" and dropped < copies:
            return keep
        for copy in range(dropped):
            keep[copy][block] = False
        if dropped < copies:
            return keep
        below += dropped * mass[block]
    raise AssertionError("nothing kept")


@pytest.mark.parametrize("ties", ["all", "stable"])
@pytest.mark.parametrize("keep_mass", [0.01, 0.31, 0.5, 0.77, 1.0])
def test_ties_follow_the_stated_rule(ties, keep_mass, simd):
    """Every key occurs eleven times, so the threshold falls among blocks of one mass."""
    copies = 11
    key = torch.randn(1, 1, 7, 16)
    query = torch.randn(1, 1, 77, 16)
    kept = ops.unpack_selection(
        ops.select_blocks(
            query,
            key.repeat(1, 1, copies, 1),
            keep_mass,
            ties=ties,
        ),
        77,
    )
    mass = (query.double() @ key.double().mT / 4.0).softmax(-1)[0, 0] / copies
    wanted = torch.tensor([keep_of_copies(row, copies, keep_mass, ties) for row in mass.tolist()])
    assert torch.equal(kept[0, 0], wanted.flatten(-2))


@pytest.mark.parametrize("keep_mass", [1e-17, 0.01, 0.5, 0.75, 1.0])
def test_equal_blocks_are_all_kept_or_the_last_ones(keep_mass, simd):
    """Among 64 equal blocks the threshold often is a sum exactly; the block that reaches it is
    kept."""
    query = torch.zeros(1, 1, 64, 8)
    key = torch.randn(1, 1, 64, 8)
    assert ops.unpack_selection(ops.select_blocks(query, key, keep_mass), 64).all()
    stable = ops.unpack_selection(ops.select_blocks(query, key, keep_mass, ties="stable"), 64)
    assert torch.equal(
        stable, (torch.arange(64) >= math.ceil(64 * (1 - keep_mass)) - 1).expand_as(stable)
    )


def test_masses_are_integers_of_32_bits(simd):
    # The mass of the last block rounds to 0, that of the second to 1.
    key = torch.tensor([1.0, 0.75 * 2.0**-32, 0.25 * 2.0**-32]).log().view(1, 1, 3, 1)
    kept = ops.unpack_selection(ops.select_blocks(torch.ones_like(key), key, 1 - 2.0**-40), 3)
    assert kept[0, 0].tolist() == 3 * [[True, True, False]]


@pytest.mark.parametrize(
    "tiles",
    [
        (1, 1, 1),
        (3, 5, 7),
        (7, 1, 6),
        (2, 4, 4),
        (5, 2, 3),
        (1, 1, 97),
    ],
)
@pytest.mark.parametrize(
    "window",
    [
        (1, 1, 1),
        (3, 3, 3),
        (11, 3, 3),
        (5, 3, 1),
        (2, 4, 99),
    ],
)
def test_local_window(tiles, window, simd):
    N = math.prod(tiles)
    query, key = (torch.randn(1, 2, N, 8) for _ in range(2))
    kept = ops.unpack_selection(ops.select_blocks(query, key, 1e-9, tiles, window), N)
    best = ops.unpack_selection(ops.select_blocks(query, key, 1e-9), N)
    assert (best.sum(-1) == 1).all(), "the heaviest block alone"
    assert torch.equal(kept, best | local_window(tiles, window))


def test_rows_without_a_finite_maximum_keep_every_block(simd):  # law 9
    query, key = (torch.randn(1, 2, 70, 16) for _ in range(2))
    clean = ops.select_blocks(query, key, 0.5)
    for row, value in (
        (3, math.nan),
        (33, math.inf),
        (60, -math.inf),
    ):
        query[0, 1, row, 5] = value
    dirty = ops.select_blocks(query, key, 0.5)
    touched = [3, 33, 60]
    assert ops.unpack_selection(dirty, 70)[0, 1, touched].all()
    clean[0, 1, touched] = dirty[0, 1, touched]
    assert torch.equal(dirty, clean)
    key[0, 0, 9, 0] = math.nan
    assert ops.unpack_selection(ops.select_blocks(query, key, 0.5), 70)[0, 0].all()


def peak_growth(call) -> int:
    """Bytes by which a call raises the resident memory of this process at its worst, as Linux
    counts it."""

    def status(field):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))

    try:
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # resets the peak
    except OSError:
        pytest.skip("the peak of resident memory cannot be reset on this system")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


@pytest.mark.skipif(_library.extension is None, reason="the compiled extension is not built")
def test_selection_needs_rows_and_not_the_map():  # law 19
    N = 8192  # the map of scores would be 256 MiB, the packed result is 8 MiB
    query, key = (torch.randn(1, 1, N, 8) for _ in range(2))
    ops.select_blocks(query[:, :, :64], key[:, :, :64], 0.9)  # threads start before the count does
    grown = peak_growth(lambda: ops.select_blocks(query, key, 0.9))
    assert grown < N * N // 8 + 32 * torch.get_num_threads() * N * 4 + (8 << 20), (
        f"{grown >> 20} MiB"
    )


@pytest.mark.parametrize("N", [1, 31, 32, 33, 100])
def test_packing_and_unpacking_are_inverse(N):
    keep = torch.rand(2, 3, N, N) < 0.5
    packed = ops.pack_selection(keep)
    assert packed.shape == (2, 3, N, -(-N // 32)) and packed.dtype == torch.int32
    assert torch.equal(ops.unpack_selection(packed, N), keep)
    assert ops.selection_density(packed, N) == pytest.approx(keep.float().mean().item())


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1),
        (2, 3, 31),
        (1, 2, 32),
        (2, 33),
        (1, 100),
        (1, 1, 257),
    ],
)
def test_transposed_selections(shape):
    *outer, N = shape
    keep = (
        torch.rand(
            *outer,
            N,
            N,
            generator=torch.Generator().manual_seed(N),
        )
        < 0.4
    )
    transposed = ops.transpose_selection(ops.pack_selection(keep))
    assert torch.equal(transposed, ops.pack_selection(keep.mT)) and transposed.is_contiguous()
    assert torch.equal(ops.transpose_selection(transposed), ops.pack_selection(keep))


@pytest.mark.parametrize(
    "selection",
    [
        torch.zeros(5, 2, dtype=torch.int32),
        torch.zeros(5, 1),
        torch.zeros(1, dtype=torch.int32),
    ],
)
def test_transposing_refuses_what_is_no_selection(selection):
    with pytest.raises(ValueError, match=r"int32 \[..., N, ceil\(N / 32\)\]"):
        ops.transpose_selection(selection)
