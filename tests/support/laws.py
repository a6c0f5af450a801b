# SPDX-License-Identifier: Apache-2.0
"""Laws that forward and backward operators keep alike, for one case of a table each.

The numbers of laws are those of tests/README.md.
"""

import math

import torch

from ..cases import tensors

# PyTorch's own operators that a call of a kernel may run besides.
NOT_ARITHMETIC = {
    "new_empty",
    "new_zeros",
    "empty",
    "empty_like",
    "empty_strided",
    "fill_",
    "zero_",
    "contiguous",
    "clone",
    "copy_",
    "select",
    "slice",
    "narrow",
    "as_strided",
    "transpose",
}


def same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.nan_to_num(1e30), e.nan_to_num(1e30)), (
            f"differ by up to {(a.double() - e.double()).abs().amax():.3g}"
        )


def framed(x, sentinel=-7.0):
    """A copy of x inside a larger buffer of sentinels, and that buffer.

    The copy has an odd storage offset and padded outer strides; its last dimension is contiguous.
    """
    if not x.is_floating_point() or x.dim() < 2:
        return x, None
    shape = [size + 2 for size in x.shape]
    flat = torch.full((math.prod(shape) + 3,), sentinel, dtype=x.dtype)
    view = flat[3:].view(shape)[tuple(slice(1, -1) for _ in shape)]
    view.copy_(x)
    return view, flat


def permuted(x):
    """The same values, dense, with the outer dimensions in another order in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 2 else x


def views(case) -> None:
    """Law 5: slices of larger tensors give the same result."""
    inputs = case.inputs()
    views = {name: framed(x)[0] if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    assert any(not x.is_contiguous() for x in tensors(views).values())
    same(case.run(views), case.run(inputs))


def guard_bands(case) -> None:
    """Law 7: inputs and what surrounds them in memory come out unchanged."""
    inputs = case.inputs()
    frames = {name: framed(x) for name, x in tensors(inputs).items()}
    before = {name: flat.clone() for name, (_, flat) in frames.items() if flat is not None}
    case.run({**inputs, **{name: view for name, (view, _) in frames.items()}})
    for name, flat in before.items():
        assert torch.equal(frames[name][1], flat), f"{name} or its surroundings were written to"


def determinism(case) -> None:
    """Law 11: any number of threads gives the same bits."""
    inputs = case.inputs()
    threads = torch.get_num_threads()
    first = case.run(inputs)
    try:
        for attempt in range(10):
            torch.set_num_threads(1 + attempt % 3)
            same(case.run(inputs), first)
    finally:
        torch.set_num_threads(threads)
