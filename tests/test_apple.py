# SPDX-License-Identifier: Apache-2.0
"""An Apple GPU: operators run as PyTorch has them, and nothing is ever in fp64 there.

No such machine is at hand: `tests.support.apple` plays one, see there for what that can show.
"""

import pytest
import torch

import kandinsky_kernels as ops
from kandinsky_kernels import reference
from kandinsky_model import pipeline
from tests.support.apple import AppleTensor, played

B, S, H, D, G = 1, 150, 2, 8, 4
OFFSETS = torch.tensor([0, 64, 128, S], dtype=torch.int32)
SIZES = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 3}


def values(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on(device, *tensors):
    return [tensor.to(device) for tensor in tensors]


def agree(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    assert isinstance(ours, AppleTensor)
    torch.testing.assert_close(ours.cpu(), wanted, rtol=1e-5, atol=1e-6)


def test_fp64_and_two_devices_are_refused_as_apple_refuses_them():
    with played():
        x = values(0, 3).to("mps")
        assert x.device.type == "mps"
        with pytest.raises(TypeError, match="float64"):
            x.double()
        with pytest.raises(RuntimeError, match="same device"):
            x + values(1, 3)


@pytest.mark.parametrize("ties", ["all", "stable"])
def test_selections_are_those_of_the_cpu(ties):
    query, key = values(0, B, H, 40, D) * 3, values(1, B, H, 40, D)
    options = {"tiles": (1, 5, 8), "window": (1, 3, 3), "ties": ties}
    wanted = ops.select_blocks(query, key, 0.6, **options)
    with played():
        ours = ops.select_blocks(*on("mps", query, key), 0.6, **options)
        assert isinstance(ours, AppleTensor)
        assert torch.equal(ours.cpu(), wanted)


def test_attention_gathers_instead_of_looping(monkeypatch):
    query, key, value = (values(i, B, S, H, D) for i in range(3))
    keep = torch.eye(3, dtype=torch.bool).expand(B, H, 3, 3)
    selection = ops.pack_selection(keep)
    wanted = ops.block_sparse_attention(query, key, value, selection, OFFSETS)
    monkeypatch.setattr(reference, "block_sparse_attention", None)
    with played():
        inputs = on("mps", query, key, value, selection, OFFSETS)
        agree(ops.block_sparse_attention(*inputs), wanted)


def test_group_norm_keeps_its_moments_in_fp64_on_the_cpu():
    x, weight, bias = values(0, B, 2, 3, 4, D), values(1, D), values(2, D)
    wanted = ops.group_affine(ops.group_moments(x, G), weight, bias)
    with played():
        frames, *affine = on("mps", x, weight, bias)
        moments = ops.group_moments(frames, G)
        assert moments.device.type == "cpu"
        assert moments.dtype == torch.float64
        for ours, theirs in zip(ops.group_affine(moments, *affine), wanted, strict=True):
            agree(ours, theirs)


def test_a_clip_is_drawn_from_text_to_pixels():
    prompt = "a red circle moving right on a blue background"
    wanted = pipeline.load("tiny", device="cpu").generate(prompt, **SIZES)
    with played():
        drawn = pipeline.load("tiny", device="mps").generate(prompt, **SIZES)
        frames = drawn.frames.cpu()
    off = (frames.int() - wanted.frames.int()).abs()
    assert off.max() <= 1
