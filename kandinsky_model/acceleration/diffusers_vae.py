# SPDX-License-Identifier: Apache-2.0
"""The forwards that diffusers' HunyuanVideo VAE gets, by the name of the class.

Between modules videos are [B, C, T, Y, X] as in diffusers, in channels-last memory. Inside a
module they are rows, [B, T, Y, X, C], which are the same memory and what the operators read. A
parent hands rows to its norms and convolutions together with how they are to be used; without that
argument norms and convolutions are the stock ones. Tiling and slicing stay diffusers'.

Every forward here decides for itself whether its module is as diffusers built it. Where a part has
been replaced or is watched by a hook, the module runs as diffusers wrote it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kandinsky_kernels import (
    causal_conv3d,
    frame_causal_attention,
    group_affine,
    group_moments,
    group_norm_silu,
)

from ..vae import winograd
from ..vae.layers import fold
from ..vae.stages import pad
from .forward_swap import (
    Foreign,
    accelerated,
    changed,
    falls_back,
    refusal,
    replacement,
    stock,
)

SAME = (1, 1, 1)  # factors of an output as large as the input
Part = tuple[nn.Module, type | None]  # as `changed` takes it


@replacement
def group_norm(self, x: Tensor, silu: bool | None = None) -> Tensor:
    """torch.nn.GroupNorm.

    silu: given for rows x [B, T, Y, X, C]. Where it is True, SiLU follows the norm, and the result
    lies inside the padding that a convolution with 3 x 3 x 3 taps reads:
    [B, T + 2, Y + 2, X + 2, C].
    """
    if silu is None:
        return stock(self, x)
    moments = group_moments(x, self.num_groups)
    scale, shift = group_affine(moments, self.weight, self.bias, self.eps)
    return group_norm_silu(x, scale, shift, pad=silu, silu=silu)


@replacement
def conv3d(self, x: Tensor, factors: tuple[int, int, int] | None = None) -> Tensor:
    """torch.nn.Conv3d.

    factors: given for rows x [B, T, Y, X, C] that bring their padding; how much nearest-neighbour
    upsampling enlarges each axis before the convolution. The enlarged video is never made: the
    taps that read the same voxel are added up (`fold`).
    """
    if factors is None:
        return stock(self, x)
    if self.kernel_size == SAME:
        return F.linear(x, self.weight.flatten(1), self.bias)
    if factors == SAME:
        return _convolve(self, x, self.weight, self.stride)
    time, up, across = factors
    frames, height, width = (n - 2 for n in x.shape[1:4])  # without padding
    frames += time - 1  # padded by one frame less where time is doubled
    enlarged = (time * (frames - 1) + 1, up * height, across * width)  # the first frame stays one
    out = x.new_empty(len(x), *enlarged, self.out_channels)
    for (t, y, z), weight in fold(self.weight, factors).items():
        if frames > t:  # a single frame has no doubled one
            window = x[:, t:, y : y + height + 3 - up, z : z + width + 3 - across]
            out[:, t::time, y::up, z::across] = _convolve(self, window, weight, SAME)
    return out


def _convolve(
    conv: nn.Conv3d,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int, int],
) -> Tensor:
    """Convolve rows x, whose first three frames are copies of one where there are three taps in
    time: causal padding made them so."""
    plain = stride != SAME or weight.shape[2] != 3 or torch.compiler.is_compiling()
    if not plain and winograd.suits(conv, x.shape[2] * x.shape[3]):
        return winograd.convolve(x, winograd.taps_of(weight), conv.bias, True)
    return causal_conv3d(x, weight, conv.bias, stride)


@replacement
def causal_conv(self, hidden_states: Tensor, padded: bool = False) -> Tensor:
    """HunyuanVideoCausalConv3d. padded: hidden_states are rows that bring their padding."""
    if padded:
        return self.conv(hidden_states, SAME)
    if _falls_back(self, hidden_states, _convolution(self)):
        return stock(self, hidden_states)
    x = _rows(hidden_states)
    if any(self.time_causal_padding):
        x = pad(x, None, 2)
    return _planes(self.conv(x, SAME))


@replacement
def resnet_block(self, hidden_states: Tensor) -> Tensor:
    """HunyuanVideoResnetBlockCausal3D."""
    if _falls_back(self, hidden_states, _resnet(self)):
        return stock(self, hidden_states)
    x = _rows(hidden_states)
    y = self.conv1(self.norm1(x, True), True)
    y = self.conv2(self.norm2(y, True), True)
    shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, True)
    return _planes(y.add_(shortcut))


@replacement
def mid_block(self, hidden_states: Tensor) -> Tensor:
    """HunyuanVideoMidBlock3D, whose attention needs no mask [B, S, S] here."""
    attentions = [attention for attention in self.attentions if attention is not None]
    parts = (part for attention in attentions for part in _attention(attention))
    unusual = next((why for why in map(_unlike_the_published, attentions) if why), None)
    if _falls_back(self, hidden_states, parts, unusual):
        return stock(self, hidden_states)
    hidden_states = self.resnets[0](hidden_states)
    for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
        if attention is not None:
            x = _rows(hidden_states)
            mixed = attention(x.flatten(1, 3), frames=x.shape[1])  # [B, S, C]
            hidden_states = _planes(mixed.view(x.shape))
        hidden_states = resnet(hidden_states)
    return hidden_states


@replacement
def attention(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    frames: int | None = None,
    **options,
) -> Tensor:
    """diffusers' Attention, in which every position sees those of its own and earlier frames.

    frames: given for hidden_states [B, T * P, C] that are a video of T frames with P positions
    each, instead of a mask.
    """
    if frames is None:
        return stock(self, hidden_states, encoder_hidden_states, attention_mask, **options)
    x = hidden_states.unflatten(1, (frames, -1))  # [B, T, P, C]
    tokens = self.group_norm(x.unsqueeze(3), False).squeeze(3)
    out = frame_causal_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
    return (self.to_out[0](out) + x).flatten(1, 2)  # [B, T * P, C]


@replacement
def upsample(self, hidden_states: Tensor) -> Tensor:
    """HunyuanVideoUpsampleCausal3D."""
    parts = [(self.conv, None), *_convolution(self.conv)]
    if _falls_back(self, hidden_states, parts):
        return stock(self, hidden_states)
    factors = tuple(int(factor) for factor in self.upsample_factor)
    x = pad(_rows(hidden_states), None, 3 - factors[0])
    return _planes(self.conv.conv(x, factors))


@replacement
def encoder(self, hidden_states: Tensor) -> Tensor:
    """HunyuanVideoEncoder3D."""
    if _falls_back(self, hidden_states, _last_layers(self)):
        return stock(self, hidden_states)
    x = self.conv_in(hidden_states)
    for block in (*self.down_blocks, self.mid_block):
        x = block(x)
    return _finish(self, x)


@replacement
def decoder(self, hidden_states: Tensor) -> Tensor:
    """HunyuanVideoDecoder3D."""
    if _falls_back(self, hidden_states, _last_layers(self)):
        return stock(self, hidden_states)
    x = self.conv_in(hidden_states)
    for block in (self.mid_block, *self.up_blocks):
        x = block(x)
    return _finish(self, x)


def _finish(network: Foreign, x: Tensor) -> Tensor:
    """The last norm, SiLU and convolution of an encoder or decoder."""
    rows = network.conv_norm_out(_rows(x), True)
    return _planes(network.conv_out(rows, True)).contiguous()


def _rows(x: Tensor) -> Tensor:
    """[B, C, T, Y, X] -> contiguous [B, T, Y, X, C], which is no work in channels-last memory."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def _planes(x: Tensor) -> Tensor:
    """[B, T, Y, X, C] -> [B, C, T, Y, X] in the same memory."""
    return x.permute(0, 4, 1, 2, 3)


# What a forward above computes without calling it, or calls with other arguments.


def _convolution(module: Foreign) -> Iterator[Part]:
    """The inside of a HunyuanVideoCausalConv3d; the module itself is none where it is called as
    diffusers calls it."""
    if hasattr(module, "conv"):  # not where something else was put in its place
        yield module.conv, None


def _resnet(block: Foreign) -> Iterator[Part]:
    yield block.norm1, None
    yield block.norm2, None
    for conv in (block.conv1, block.conv2):
        yield conv, None
        yield from _convolution(conv)
    if block.conv_shortcut is not None:
        yield block.conv_shortcut, None
        yield from _convolution(block.conv_shortcut)
    yield block.nonlinearity, nn.SiLU
    yield block.dropout, nn.Dropout


def _attention(module: Foreign) -> Iterator[Part]:
    yield module, None
    if accelerated(module):
        yield module.group_norm, None
        yield module.to_out[1], nn.Dropout


def _last_layers(network: Foreign) -> Iterator[Part]:
    yield network.conv_norm_out, None
    yield network.conv_act, nn.SiLU
    yield network.conv_out, None
    yield from _convolution(network.conv_out)


def _unlike_the_published(module: Foreign) -> str | None:
    """What of an attention of the middle block is not as HunyuanVideo's is, or None."""
    processor = type(getattr(module, "processor", None))
    from_diffusers = processor.__module__.startswith("diffusers.")
    if processor.__name__ != "AttnProcessor2_0" or not from_diffusers:
        return "an attention processor has been replaced"
    extras = (module.spatial_norm, module.norm_q, module.norm_k)
    if any(extra is not None for extra in extras) or module.heads != 1:
        return "its attention has several heads or norms of its own"
    if not module.residual_connection or module.rescale_output_factor != 1:
        return "its attention has no residual connection or scales its output"
    return None


def _falls_back(
    module: Foreign,
    x: Tensor,
    parts: Iterator[Part] | list[Part],
    why: str | None = None,
) -> bool:
    """Whether `module` must run as diffusers wrote it this time, which is reported."""
    if not accelerated(module):
        return True
    parts = list(parts)
    why = why or changed(parts) or next(filter(None, map(_unusual, parts)), None)
    return falls_back(module, why or refusal(module, x))


def _unusual(part: Part) -> str | None:
    """Why a part of the right class computes something else here, or None."""
    module, _ = part
    if isinstance(module, nn.Dropout) and module.p and module.training:
        return "dropout is active"
    if isinstance(module, nn.GroupNorm) and module.weight is None:
        return "a norm has no weight"
    if isinstance(module, nn.Conv3d):
        padded = any(module.padding) or module.padding_mode != "zeros"
        if padded or module.groups != 1 or set(module.dilation) != {1}:
            return "a convolution is padded, dilated or grouped"
    return None


FORWARDS = {
    "HunyuanVideoDecoder3D": decoder,
    "HunyuanVideoEncoder3D": encoder,
    "HunyuanVideoMidBlock3D": mid_block,
    "HunyuanVideoResnetBlockCausal3D": resnet_block,
    "HunyuanVideoUpsampleCausal3D": upsample,
    "HunyuanVideoCausalConv3d": causal_conv,
    "Attention": attention,
    "GroupNorm": group_norm,
    "Conv3d": conv3d,
}


def obstacle(vae: Foreign) -> str | None:
    """Why nothing of this VAE would run faster, or None."""
    if vae.config.act_fn not in ("silu", "swish"):
        return f"its activation is {vae.config.act_fn}, not SiLU"
    for module in vae.modules():
        if getattr(module, "pad_mode", "replicate") != "replicate":
            return f"its padding is {module.pad_mode}, not replicate"
    return None
