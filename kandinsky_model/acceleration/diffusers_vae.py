# SPDX-License-Identifier: Apache-2.0
"""diffusers' HunyuanVideo VAE by our operators: mixins for `class_swap`, keyed by the class they go
before.

Between modules videos are [B, C, T, Y, X] as ever, in channels-last memory. Inside, the parents
hand [B, T, Y, X, C] to norms and convolutions, together with how they are to be used; without that
these are the stock modules. Tiling and slicing stay diffusers'.
"""

from __future__ import annotations

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

from ..vae import winograd as vae_pairs
from ..vae.layers import fold
from ..vae.stages import pad
from .class_swap import falls_back, refusal, unexpected

SAME = (1, 1, 1)  # an output as large as the input


class GroupNorm:
    """torch.nn.GroupNorm."""

    def forward(self, x: Tensor, silu: bool | None = None) -> Tensor:
        """silu: given for x [B, T, Y, X, C]; True: SiLU follows, written into the padded input of a
        convolution."""
        if silu is None:
            return super().forward(x)
        scale, shift = group_affine(
            group_moments(x, self.num_groups), self.weight, self.bias, self.eps
        )
        return group_norm_silu(x, scale, shift, pad=silu, silu=silu)


class Conv3d:
    """torch.nn.Conv3d."""

    def forward(self, x: Tensor, factors: tuple[int, int, int] | None = None) -> Tensor:
        """factors: given for x [B, T, Y, X, C] that brings its padding; by how much each axis is
        enlarged before."""
        if factors is None:
            return super().forward(x)
        if self.kernel_size == SAME:
            return F.linear(x, self.weight.flatten(1), self.bias)
        if factors == SAME:
            return self._convolve(x, self.weight, self.stride)
        (time, up, across), frames, height, width = factors, *(n - 2 for n in x.shape[1:4])
        frames += time - 1  # of the input, whose first frame is not doubled
        out = x.new_empty(
            len(x), time * (frames - 1) + 1, up * height, across * width, self.out_channels
        )
        for (t, y, z), weight in fold(self.weight, factors).items():
            if frames > t:  # a single frame has no doubled one
                window = x[:, t:, y : y + height + 3 - up, z : z + width + 3 - across]
                out[:, t::time, y::up, z::across] = self._convolve(window, weight, SAME)
        return out

    def _convolve(self, x: Tensor, weight: Tensor, stride: tuple[int, int, int]) -> Tensor:
        """The first three frames of x are the same one, where there are three taps in time."""
        plain = stride != SAME or weight.shape[2] != 3 or torch.compiler.is_compiling()
        if not plain and vae_pairs.suits(self, x.shape[2] * x.shape[3]):
            return vae_pairs.convolve(x, vae_pairs.taps_of(weight), self.bias, True)
        return causal_conv3d(x, weight, self.bias, stride)


class CausalConv3d:
    def forward(self, hidden_states: Tensor, padded: bool = False) -> Tensor:
        """padded: hidden_states is [B, T, Y, X, C] and brings its padding."""
        if padded:
            return self.conv(hidden_states, SAME)
        if falls_back(self, refusal(self, hidden_states)):
            return super().forward(hidden_states)
        x = _rows(hidden_states)
        return _planes(self.conv(pad(x, None, 2) if any(self.time_causal_padding) else x, SAME))


class ResnetBlock:
    def forward(self, hidden_states: Tensor) -> Tensor:
        if falls_back(self, refusal(self, hidden_states)):
            return super().forward(hidden_states)
        x = _rows(hidden_states)
        y = self.conv2(self.norm2(self.conv1(self.norm1(x, True), True), True), True)
        return _planes(y.add_(x if self.conv_shortcut is None else self.conv_shortcut(x, True)))


class MidBlock:
    def forward(self, hidden_states: Tensor) -> Tensor:
        if falls_back(self, refusal(self, hidden_states)):
            return super().forward(hidden_states)
        hidden_states = self.resnets[0](hidden_states)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            if attention is not None:
                x = _rows(hidden_states)
                hidden_states = _planes(attention(x.flatten(1, 3), frames=x.shape[1]).view(x.shape))
            hidden_states = resnet(hidden_states)
        return hidden_states


class Processor:
    """Attention of every position to those of its own and earlier frames, without the mask [B, S,
    S]."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args,
        frames: int | None = None,
        **options,
    ) -> Tensor:
        if frames is None:
            return super().__call__(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **options
            )
        x = hidden_states.unflatten(1, (frames, -1))  # [B, T, P, C]
        tokens = attn.group_norm(x.unsqueeze(3), False).squeeze(3)
        out = frame_causal_attention(attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens))
        return (attn.to_out[0](out) + x).flatten(1, 2)  # [B, S, C]


class Upsample:
    def forward(self, hidden_states: Tensor) -> Tensor:
        if falls_back(self, refusal(self, hidden_states)):
            return super().forward(hidden_states)
        factors = tuple(int(factor) for factor in self.upsample_factor)
        return _planes(self.conv.conv(pad(_rows(hidden_states), None, 3 - factors[0]), factors))


class Encoder:
    def forward(self, hidden_states: Tensor) -> Tensor:
        if falls_back(self, refusal(self, hidden_states)):
            return super().forward(hidden_states)
        x = self.conv_in(hidden_states)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x)
        return _finish(self, x)


class Decoder:
    def forward(self, hidden_states: Tensor) -> Tensor:
        if falls_back(self, refusal(self, hidden_states)):
            return super().forward(hidden_states)
        x = self.conv_in(hidden_states)
        for block in (self.mid_block, *self.up_blocks):
            x = block(x)
        return _finish(self, x)


def _finish(network: nn.Module, x: Tensor) -> Tensor:
    return _planes(network.conv_out(network.conv_norm_out(_rows(x), True), True)).contiguous()


def _rows(x: Tensor) -> Tensor:
    """[B, C, T, Y, X] -> contiguous [B, T, Y, X, C], which is no work in channels-last memory."""
    return x.permute(0, 2, 3, 4, 1).contiguous()


def _planes(x: Tensor) -> Tensor:
    return x.permute(0, 4, 1, 2, 3)


SWAPS = {
    "HunyuanVideoDecoder3D": Decoder,
    "HunyuanVideoEncoder3D": Encoder,
    "HunyuanVideoMidBlock3D": MidBlock,
    "HunyuanVideoResnetBlockCausal3D": ResnetBlock,
    "HunyuanVideoUpsampleCausal3D": Upsample,
    "HunyuanVideoCausalConv3d": CausalConv3d,
    "AttnProcessor2_0": Processor,
    "GroupNorm": GroupNorm,
    "Conv3d": Conv3d,
}


def obstacle(vae: nn.Module) -> str | None:
    """What would be computed wrongly here, or None."""
    if vae.config.act_fn not in ("silu", "swish"):
        return f"its activation is {vae.config.act_fn}, not SiLU"
    convolutions = (
        module.conv
        for module in vae.modules()
        if type(module).__name__ == "HunyuanVideoCausalConv3d"
    )
    return unexpected(nn.Conv3d, convolutions) or unexpected(
        nn.GroupNorm, (m for m in vae.modules() if isinstance(m, nn.GroupNorm))
    )
