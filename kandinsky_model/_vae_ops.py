# SPDX-License-Identifier: Apache-2.0
"""The decoder's operators in plain PyTorch, on channels-last activations [B, T, Y, X, C]."""

import torch
import torch.nn.functional as F
from torch import Tensor


def group_moments(x: Tensor, groups: int) -> Tensor:
    """Mean and biased variance of every frame and group, fp64 [B, T, G, 2]; a frame's are the same whatever else is in the call.

    Sums are taken around a mean of the frame's first row, over Y in fp32 and from there in fp64.
    """
    batch, frames, height, width, channels = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = x.new_empty(batch, frames, groups, 2, dtype=torch.float64)
    count = height * width * channels // groups
    for t in range(frames):  # one frame at a time stays in the cache
        frame = x[:, t].to(dtype)  # [B, Y, X, C]
        pivot = frame[:, 0].unflatten(-1, (groups, -1)).mean((1, 3))  # [B, G]
        frame = frame - pivot.repeat_interleave(channels // groups, 1).view(batch, 1, 1, channels)
        first, second = (s.double().sum(1).unflatten(-1, (groups, -1)).sum(-1) / count for s in (frame.sum(1), frame.square_().sum(1)))
        out[:, t, :, 0], out[:, t, :, 1] = pivot.double() + first, second - first.square()
    return out


def group_affine(moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and shift [B, C] of the GroupNorm over all frames of `moments`, fp32 (fp64 for fp64 weights)."""
    frame_mean, frame_variance = moments.unbind(-1)  # [B, T, G]
    mean = frame_mean.mean(1)  # [B, G]
    variance = (frame_variance + (frame_mean - mean.unsqueeze(1)).square()).mean(1)
    size = weight.numel() // moments.shape[2]
    scale = weight.double() * (variance + eps).rsqrt().repeat_interleave(size, 1)  # [B, C]
    shift = bias.double() - mean.repeat_interleave(size, 1) * scale
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return scale.to(dtype), shift.to(dtype)


def group_norm_silu(x: Tensor, scale: Tensor, shift: Tensor, front: Tensor | None = None) -> Tensor:
    """silu(x * scale + shift) with repeated borders and two frames in front: `front`, or copies of the first; [B, T+2, Y+2, X+2, C]."""
    batch, frames, height, width, channels = x.shape
    scale, shift = (v.view(batch, 1, 1, channels) for v in (scale, shift))
    padded = x.new_empty(batch, frames + 2, height + 2, width + 2, channels)
    for t in range(frames):
        frame = padded[:, t + 2]
        inner = frame[:, 1:-1, 1:-1]
        if x.dtype == scale.dtype:
            F.silu(torch.addcmul(shift, x[:, t], scale, out=inner), inplace=True)
        else:
            inner.copy_(F.silu(torch.addcmul(shift, x[:, t], scale), inplace=True))
        frame[:, 0, 1:-1], frame[:, -1, 1:-1] = inner[:, 0], inner[:, -1]
        frame[:, :, 0], frame[:, :, -1] = frame[:, :, 1], frame[:, :, -2]
    padded[:, :2] = padded[:, 2:3] if front is None else front
    return padded


def frame_causal_attention(query: Tensor, key: Tensor, value: Tensor, first_frame: int = 0) -> Tensor:
    """Attention of query [B, T, P, D] over key and value [B, T', P, D]: query frame t sees frames 0 .. first_frame + t."""
    out = []
    for t in range(query.shape[1]):
        k, v = (x[:, : first_frame + t + 1].flatten(1, 2) for x in (key, value))
        out.append(F.scaled_dot_product_attention(query[:, t], k, v))  # [B, P, D]
    return torch.stack(out, 1)


def causal_conv3d(padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution of the padded [B, T + 2, Y + 2, X + 2, C] without further padding: [B, T, Y, X, C']."""
    x = padded.permute(0, 4, 1, 2, 3)
    if x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        # conv3d itself turns to a loop over matrix products, up to seven times slower, where B * C * T * Y is small
        out = torch.mkldnn_convolution(x, weight, bias, [0, 0, 0], [1, 1, 1], [1, 1, 1], 1)
    else:
        out = F.conv3d(x, weight, bias)
    return out.permute(0, 2, 3, 4, 1).contiguous()
