# SPDX-License-Identifier: Apache-2.0
"""The comparators catch planted faults.

If they did not, a green table of cases would prove nothing.
"""

import math

import pytest
import torch

from kandinsky_kernels import pack_selection, reference

from ..compare import assert_faithful, assert_same_blocks, exact_blocks

EPS = 1e-5


def norm(x, scale, shift, eps=EPS):
    """An honest peer of `modulated_norm`: the usual expression in fp32."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation * (1 + scale[:, None]) + shift[:, None]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def case(request):
    """x, scale, shift, the exact result in fp64 and the peer's."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(1, 96, 256, generator=g).to(request.param)
    scale = torch.randn(1, 256, generator=g)
    shift = torch.randn(1, 256, generator=g)
    exact = reference.modulated_norm(x.double(), scale.double(), shift.double(), EPS)
    return x, scale, shift, exact, norm(x, scale, shift).to(x.dtype)


def truncated(x):
    """fp32 cut off to the digits of bfloat16, toward zero."""
    return (x.view(torch.int32) & -65536).view(torch.float32)


def test_honest_result_passes(case):
    x, scale, shift, exact, peer = case
    assert_faithful(reference.modulated_norm(x, scale, shift, EPS), exact, peer)


def test_truncation_is_caught(case):
    x, scale, shift, exact, peer = case
    cut = truncated(norm(x, scale, shift)).to(x.dtype)
    with pytest.raises(AssertionError, match="bias"):
        assert_faithful(cut, exact, peer)


def test_slight_truncation_is_caught_by_rule_4_alone():
    """Rules 2 and 3 are measured against a peer that is itself poor; a bias is not."""
    exact = torch.randn(200, 100, dtype=torch.float64)
    peer = (exact + 0.02 * torch.randn(200, 100, dtype=torch.float64)).bfloat16()
    cut = truncated(exact.float()).bfloat16()
    with pytest.raises(AssertionError, match=r"breaks rule 4 \(bias\):"):
        assert_faithful(cut, exact, peer)


@pytest.mark.parametrize("rows", [1, 32])
def test_zero_tail_is_caught(case, rows):
    *_, exact, peer = case
    actual = peer.clone()
    actual[:, -rows:] = 0
    with pytest.raises(AssertionError, match="rule 2"):
        assert_faithful(actual, exact, peer)


def test_swapped_scale_and_shift_are_caught(case):
    x, scale, shift, exact, peer = case
    with pytest.raises(AssertionError, match="rule 2"):
        assert_faithful(norm(x, shift, scale).to(x.dtype), exact, peer)


def test_misplaced_eps_is_caught():
    """Rows of small variance, where eps decides: outside the root it is another function."""
    x = 1e-3 * torch.randn(1, 64, 128)
    zero = torch.zeros(1, 128)
    exact = reference.modulated_norm(x.double(), zero.double(), zero.double(), EPS)
    centred = x - x.mean(-1, keepdim=True)
    misplaced = centred / (centred.square().mean(-1, keepdim=True).sqrt() + EPS)
    with pytest.raises(AssertionError, match="rule 2"):
        assert_faithful(misplaced, exact, norm(x, zero, zero))


def test_stale_row_is_caught(case):
    *_, exact, peer = case
    actual = peer.clone()
    actual[:, 40] = peer[:, 39]
    with pytest.raises(AssertionError, match=r"worst at \(0, 40, "):
        assert_faithful(actual, exact, peer)


def test_bias_is_caught():
    exact = torch.randn(1, 100, 200, dtype=torch.float64)
    peer = (exact * (1 + 1e-3 * torch.randn_like(exact))).float()
    with pytest.raises(AssertionError, match="rule 4"):
        assert_faithful((exact * (1 + 3e-4)).float(), exact, peer)


def test_noise_below_the_largest_error_is_caught():
    exact = torch.randn(1, 100, 200, dtype=torch.float64)
    peer = exact.float()
    peer[0, 0, 0] += 1e-3  # one outlier makes rule 2 generous
    with pytest.raises(AssertionError, match=r"rule 3 \(RMSE\)"):
        assert_faithful(
            (exact + 5e-4 * (2 * torch.rand_like(exact) - 1)).float(),
            exact,
            peer,
        )


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (lambda x: x.double(), "dtype"),
        (lambda x: x[:, 1:], "shape"),
        (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "strides"),
        (lambda x: x.masked_fill(x == x.max(), math.nan), "differ in being finite"),
        (lambda x: x.masked_fill(x == x.max(), math.inf), "differ in being finite"),
    ],
    ids=["dtype", "shape", "strides", "nan", "inf"],
)
def test_wrong_form_is_caught(fault, text):
    exact = torch.randn(20, 30, dtype=torch.float64)
    with pytest.raises(AssertionError, match=text):
        assert_faithful(fault(exact.float()), exact, exact.float())


def test_non_finite_pattern_must_agree():
    exact = torch.tensor([1.0, math.inf, math.nan, 1e39, 2.0], dtype=torch.float64)
    # 1e39 overflows fp32: infinity is right
    good = torch.tensor([1.0, math.inf, math.nan, math.inf, 2.0])
    assert_faithful(good, exact, good)
    with pytest.raises(AssertionError, match="differ in being finite"):
        assert_faithful(
            good * torch.tensor([1, -1, 1, 1, 1]),
            exact,
            good,
        )


@pytest.fixture
def scores():
    return 2 * torch.randn(2, 3, 50, 50, dtype=torch.float64)


def test_exact_selection_passes(scores):
    assert_same_blocks(pack_selection(exact_blocks(scores, 0.8, "all")[0]), scores, 0.8)


def plant_extra(keep, mass):
    lightest_dropped = torch.where(keep, math.inf, mass).argmin(-1, keepdim=True)
    return keep.scatter(-1, lightest_dropped, True)


def plant_missing(keep, mass):
    return keep.scatter(-1, mass.argmax(-1, keepdim=True), False)


@pytest.mark.parametrize(
    "fault",
    [
        plant_extra,
        plant_missing,
        lambda keep, mass: keep.roll(1, -2),
        lambda keep, mass: torch.zeros_like(keep),
        lambda keep, mass: keep.transpose(-1, -2).contiguous(),
    ],
    ids=["extra", "missing", "stale row", "nothing", "transposed"],
)
def test_wrong_selection_is_caught(scores, fault):
    keep, mass, _ = exact_blocks(scores, 0.8, "all")
    with pytest.raises(AssertionError, match="chosen wrongly"):
        assert_same_blocks(pack_selection(fault(keep, mass)), scores, 0.8)


def test_wrong_threshold_is_caught(scores):
    with pytest.raises(AssertionError, match="chosen wrongly"):
        assert_same_blocks(pack_selection(exact_blocks(scores, 0.79, "all")[0]), scores, 0.8)


def test_missing_local_window_is_caught(scores):
    near = torch.eye(50, dtype=torch.bool)
    keep = exact_blocks(scores, 0.3, "all")[0]
    assert_same_blocks(pack_selection(keep | near), scores, 0.3, near)
    with pytest.raises(AssertionError, match="chosen wrongly"):
        assert_same_blocks(pack_selection(keep), scores, 0.3, near)


def test_stray_bits_are_caught(scores):
    selection = pack_selection(exact_blocks(scores, 0.8, "all")[0])
    selection[0, 0, 0, -1] |= 1 << 20  # block 52 of 50
    with pytest.raises(AssertionError, match="bits beyond"):
        assert_same_blocks(selection, scores, 0.8)


def test_undecidable_blocks_are_excused_but_few_rows():
    """Two blocks of equal weight at the threshold: fp32 may take either, but not in every row."""
    top = torch.tensor([3.0, 1.0, 1.0 + 1e-9, 0.0], dtype=torch.float64)
    scores = torch.nn.functional.pad(top.expand(1, 1, 400, 4), (0, 396), value=-60.0)
    threshold = mass_of_top_two(scores)
    keep = exact_blocks(scores, threshold, "stable")[0]
    swapped = keep.clone()
    swapped[0, 0, 7, 1:3] = ~keep[0, 0, 7, 1:3]
    assert_same_blocks(pack_selection(swapped), scores, threshold, ties="stable")
    swapped[0, 0, :, 1:3] = ~keep[0, 0, :, 1:3]
    with pytest.raises(AssertionError, match="rows undecided"):
        assert_same_blocks(pack_selection(swapped), scores, threshold, ties="stable")


def mass_of_top_two(scores):
    """Just less than the two heaviest blocks weigh together."""
    return float(scores[0, 0, 0].softmax(-1).topk(2).values.sum() - 1e-3)
