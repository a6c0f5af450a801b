# SPDX-License-Identifier: Apache-2.0
"""The VAE's convolutions by the Triton kernel against cuDNN, on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from kandinsky_kernels import reference
from kandinsky_kernels.launch import vae as launch_vae

from .card import FULL, Clock, Size, ratios

# channels in and out, Y, X, taps, and how many frames of it a decode of 10 s at 512 x 768 computes
CONVOLUTIONS = (
    (16, 512, 64, 96, (3, 3, 3), 61),
    (512, 512, 64, 96, (3, 3, 3), 610),
    (512, 512, 64, 96, (3, 2, 2), 244),
    (512, 512, 128, 192, (3, 3, 3), 366),
    (512, 512, 128, 192, (2, 2, 2), 484),
    (512, 256, 256, 384, (3, 3, 3), 121),
    (256, 256, 256, 384, (3, 3, 3), 605),
    (256, 256, 256, 384, (2, 2, 2), 964),
    (256, 128, 512, 768, (3, 3, 3), 241),
    (128, 128, 512, 768, (3, 3, 3), 1205),
    (128, 3, 512, 768, (3, 3, 3), 241),
)


TOY_CONVOLUTIONS = ((16, 16, 3, 5, (3, 3, 3), 2), (16, 3, 3, 5, (2, 2, 2), 1))


def drawn(C: int, N: int, Y: int, X: int, taps: tuple[int, ...], device: torch.device) -> tuple:
    """The arguments of one convolution: a padded frame in bf16, weights and a bias."""
    make = dict(device=device, dtype=torch.bfloat16)
    sizes = [n - 1 + k for n, k in zip((1, Y, X), taps, strict=True)]
    weight = torch.randn(N, C, *taps, **make).div_(math.sqrt(C * math.prod(taps)))
    weight = weight.to(memory_format=torch.channels_last_3d)
    return torch.randn(1, *sizes, C, **make), weight, torch.randn(N, **make), (1, 1, 1)


def kernel_on(device: torch.device) -> Callable:
    """The Triton kernel's launcher; on a CPU, where callers are tested only, the reference."""
    return launch_vae.launch_conv if device.type == "cuda" else reference.causal_conv3d


def conv_check(ours: Callable, args: tuple) -> float:
    """Its largest error against fp32. Raises AssertionError beyond bf16's."""
    exact = reference.causal_conv3d(*(x.float() for x in args[:3]), args[3])
    off = (ours(*args).float() - exact).abs().max().item()
    assert off < 2**-7 * exact.abs().max(), f"causal_conv3d is off by {off}"
    return off


@torch.no_grad()
def convolutions(clock: Clock, size: Size, roof: dict) -> Iterator[dict]:
    """The decoder's convolutions, a frame at a time as it calls them: our kernel against cuDNN's
    best, and both for all of a decode."""
    if size is FULL[1]:
        return
    toy = size is not FULL[0]
    ours = kernel_on(clock.device)
    whole = {"ours": 0.0, "cudnn": 0.0}
    for C, N, Y, X, taps, frames in TOY_CONVOLUTIONS if toy else CONVOLUTIONS:
        args = drawn(C, N, Y, X, taps, clock.device)
        off = conv_check(ours, args)
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            times = clock.measure(
                {
                    "ours": lambda args=args: ours(*args),
                    "cudnn": lambda args=args: reference.causal_conv3d(*args),
                }
            )
        tflop = 2 * Y * X * C * N * math.prod(taps) / 1e12
        yield {
            "op": "causal_conv3d",
            "size": f"{C} to {N}, {Y}x{X}, taps {taps}",
            "ms": times,
            "largest_error": off,
            "useful_tflop_s": 1e3 * tflop / times["ours"],
            "floor_ms": 1e3 * tflop / roof["matmul_tflop_s"],
            **ratios(times),
        }
        whole = {name: ms + frames * times[name] for name, ms in whole.items()}
    yield {
        "op": "causal_conv3d",
        "size": "toy" if toy else "10 s, all frames",
        "ms": whole,
        **ratios(whole),
    }
