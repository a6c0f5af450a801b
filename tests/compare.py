# SPDX-License-Identifier: Apache-2.0
"""The comparators, which decide how close a result must be to the oracle.

The measure is the error of an honest peer, and not a tolerance that somebody picked.
"""

import math
import os

import torch

from kandinsky_kernels import unpack_selection

BIAS_ELEMENTS = 10_000  # below this many elements chance alone can look like a bias
RMSE_ELEMENTS = 64  # below this many, a lucky peer says nothing


def _step(magnitude: torch.Tensor, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of ``dtype`` at ``magnitude``."""
    info = torch.finfo(dtype)
    return (
        2.0 ** max(math.floor(math.log2(max(magnitude.item(), info.tiny))), math.log2(info.tiny))
        * info.eps
    )


def _rms(x: torch.Tensor) -> float:
    largest = x.abs().amax().item() if x.numel() else 0.0
    return (
        largest * (x / largest).square().mean().sqrt().item() if 0 < largest < math.inf else largest
    )


def _reproduce() -> str:
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
    return f"; reproduce with: python -m pytest '{test}'" if test else ""


def _check_form(actual: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == exact.shape, f"shape {list(actual.shape)} should be {list(exact.shape)}"
    assert actual.dtype == dtype, f"dtype {actual.dtype} should be {dtype}"
    assert actual.device == exact.device, f"device {actual.device} should be {exact.device}"
    assert actual.is_contiguous(), (
        f"strides {actual.stride()} of shape {list(actual.shape)} should be contiguous"
    )


def _check_pattern(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The mask of the elements to compare, which are finite in both.

    All others must be the same infinity, or NaN, in both.
    """
    wanted = exact.to(actual.dtype)  # what the dtype can hold: its overflow is no fault
    finite = wanted.isfinite()
    same = (actual == wanted) | (actual.isnan() & wanted.isnan())
    wrong = torch.where(finite, ~actual.isfinite(), ~same)
    if wrong.any():
        index = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(wrong.sum())} elements differ in being finite, the first at "
            f"{index}: "
            f"{actual[index].item()} should be "
            f"{wanted[index].item()}{_reproduce()}"
        )
    return finite


def assert_faithful(actual: torch.Tensor, exact: torch.Tensor, peer: torch.Tensor) -> None:
    """Require that ``actual`` errs no more than ``peer``, both measured against ``exact``.

    1. Shape and device are those of exact, the dtype is that of peer, and actual is contiguous. It
       is finite where exact is, and elsewhere the same infinity or NaN.
    2. max|actual - exact| <= 2 max|peer - exact| + one rounding step of the largest value.
    3. From 64 elements on, RMSE(actual) <= 1.25 RMSE(peer), where one element may be one rounding
       step away.
    4. From 10^4 elements on, |mean(|actual| - |exact|)| <= 1e-4 mean|exact|.
    """
    _check_form(actual, exact, peer.dtype)
    finite = _check_pattern(actual, exact)
    if not finite.any():
        return
    comparable = finite & peer.isfinite()
    wide = actual[finite].double()
    truth = exact[finite].double()
    error = wide - truth
    peer_error = (peer.double() - exact.double())[comparable]
    step = _step(truth.abs().amax(), actual.dtype)
    worst = error.abs().amax().item()
    peer_worst = peer_error.abs().amax().item() if len(peer_error) else 0.0
    rmse = _rms(error)
    peer_rmse = _rms(peer_error)
    bias = (wide.abs() - truth.abs()).mean().item()
    size = truth.abs().mean().item()
    broken = []
    if worst > 2 * peer_worst + step:
        broken.append("2 (largest error)")
    if len(error) >= RMSE_ELEMENTS and rmse > 1.25 * peer_rmse + step / math.sqrt(len(error)):
        broken.append("3 (RMSE)")
    if len(error) >= BIAS_ELEMENTS and abs(bias) > 1e-4 * size:
        broken.append("4 (bias)")
    if broken:
        index = tuple(finite.nonzero()[int(error.abs().argmax())].tolist())
        raise AssertionError(
            f"breaks rule {', '.join(broken)}: worst at {index}: {actual[index].item():.9g} "
            f"should be {exact[index].item():.9g}; "
            f"largest error {worst:.3g} against the peer's {peer_worst:.3g} and a step of "
            f"{step:.3g}; RMSE {rmse:.3g} against "
            f"{peer_rmse:.3g}; bias {bias:.3g} of mean {size:.3g}{_reproduce()}"
        )


def exact_blocks(
    scores: torch.Tensor, keep_mass: float, ties: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The kept blocks (bool) for fp64 logits [..., N], and the masses that decide.

    Those are the probability of each block, and the sum up to and with it in ascending order.
    """
    mass = scores.double().softmax(-1)
    ascending, order = mass.sort(dim=-1, stable=True)
    below = ascending.cumsum(-1)
    kept = below >= (1.0 - keep_mass) * below[..., -1:]
    cumulative = torch.empty_like(below).scatter(-1, order, below)
    if ties == "stable":
        return torch.zeros_like(kept).scatter(-1, order, kept), mass, cumulative
    lightest = ascending.gather(-1, kept.int().argmax(-1, keepdim=True))
    return mass >= lightest, mass, cumulative


def assert_same_blocks(
    selection: torch.Tensor,
    scores: torch.Tensor,
    keep_mass: float,
    near: torch.Tensor | None = None,
    ties: str = "all",
) -> None:
    """Require that a packed selection [B, H, N, W] is what exact logits ``scores`` ask for.

    scores is fp64 [B, H, N, N]. The blocks of the local window, ``near``, are kept besides.

    Rows may differ only in blocks that fp32 cannot decide: whose cumulative mass lies within delta
    of the threshold, or whose own mass lies within delta of the lightest kept block's where a
    dropped block's does too. At most 1 % of the rows (at least one) may, in both directions when
    they are many; every row keeps something, keep_mass - delta of its mass, and its whole local
    window.
    """
    N = scores.shape[-1]
    assert not (selection_tail := selection & _unused_bits(N)).any(), (
        f"bits beyond block {N} are set: {selection_tail.unique()}"
    )
    actual = unpack_selection(selection, N)
    assert actual.shape == scores.shape, (
        f"selection of shape {list(selection.shape)} does not fit scores {list(scores.shape)}"
    )
    kept, mass, cumulative = exact_blocks(scores, keep_mass, ties)
    delta = (
        8 * torch.finfo(torch.float32).eps * (1.0 + scores.abs().amax(-1, keepdim=True).double())
    )
    lightest = torch.where(kept, mass, torch.inf).amin(-1, keepdim=True)
    tied = (mass - lightest).abs() <= delta * lightest
    undecided = ((cumulative - (1.0 - keep_mass)).abs() <= delta) | (
        tied & (tied & ~kept).any(-1, keepdim=True)
    )
    near = torch.zeros(N, N, dtype=torch.bool) if near is None else near
    differs = actual != (kept | near)
    wrong = differs & ~undecided
    assert not wrong.any(), (
        f"{int(wrong.sum())} blocks chosen wrongly, the first at "
        f"{wrong.nonzero()[0].tolist()}{_reproduce()}"
    )
    rows = differs.any(-1)
    assert rows.sum() <= max(1, rows.numel() // 100), (
        f"{int(rows.sum())} of {rows.numel()} rows undecided{_reproduce()}"
    )
    added = int((differs & actual).sum())
    dropped = int((differs & ~actual).sum())
    assert added + dropped < 20 or min(added, dropped) > 0, (
        f"{added} blocks added but {dropped} dropped: a bias{_reproduce()}"
    )
    assert actual.any(-1).all(), f"a row keeps nothing{_reproduce()}"
    short = (mass * actual).sum(-1, keepdim=True) < keep_mass - delta
    assert not short.any(), (
        f"{int(short.sum())} rows keep less than {keep_mass} of their mass{_reproduce()}"
    )
    assert (actual | ~near).all(), f"a block of the local window is missing{_reproduce()}"


def _unused_bits(blocks: int) -> torch.Tensor:
    """int32 [W], where the bits that belong to no block are set."""
    words = torch.zeros(-(-blocks // 32), dtype=torch.int64)
    if blocks % 32:
        words[-1] = (1 << 32) - (1 << blocks % 32)
    return words.to(torch.int32)
