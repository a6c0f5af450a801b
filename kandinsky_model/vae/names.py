# SPDX-License-Identifier: Apache-2.0
"""Names of VAE weights in files of other programs, and how they become ours.

Two layouts exist, for the video VAE and for FLUX.1's. Ours is that of diffusers:
`decoder.up_blocks.0.resnets.0.conv1...`. The other comes from latent-diffusion code. The files
`ae.safetensors` (FLUX.1, by its authors) and `hunyuan_video_vae_bf16.safetensors` (ComfyUI) have
it: `decoder.up.3.block.0.conv1...`. There the decoder's levels are counted from the output, and the
projections of the attention are convolutions [C', C, 1, 1] or [C', C, 1, 1, 1] instead of matrices
[C', C]. The functions here read no files and know no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ..config import VAEConfig

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by name

# where all-in-one files keep their VAE
PREFIXES = ("", "vae.", "first_stage_model.")
_SIDES = ("encoder", "decoder")
# (theirs, ours) within a resnet and within the attention of the middle
_RESNET = {"nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_PROJECTION = re.compile(r"\.attentions\.0\.to_(q|k|v|out\.0)\.weight$")


def prefix_of(names: Iterable[str]) -> str | None:
    """What stands before `decoder.` in these names, one of `PREFIXES`; None where no VAE is."""
    names = list(names)
    for prefix in PREFIXES:
        if any(name.startswith(f"{prefix}decoder.conv_in.") for name in names):
            return prefix
    return None


def is_original(names: Iterable[str]) -> bool:
    """Whether the names of a VAE, without prefix, are in the layout of latent-diffusion code."""
    return any(name.startswith(("decoder.mid.", "decoder.up.")) for name in names)


def is_video(names: Iterable[str]) -> bool:
    """Whether the names, without prefix, are of the video VAE, whose convolutions are wrapped."""
    return "decoder.conv_in.conv.weight" in set(names)


def our_name(name: str, levels: int) -> str | None:
    """Our name of a weight that is called `name` in the original layout, without prefix.

    levels: of the network, by which the decoder's are turned round. None for a name that the layout
    does not have.
    """
    side, _, rest = name.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return name
    if side not in _SIDES:
        return None
    ours = _within(side, rest, levels)
    return None if ours is None else f"{side}.{ours}"


def _within(side: str, name: str, levels: int) -> str | None:
    """`our_name` within the encoder or decoder."""
    if match := re.fullmatch(r"(conv_in|conv_out)\.(.+)", name):
        return name
    if match := re.fullmatch(r"norm_out\.(.+)", name):
        return f"conv_norm_out.{match[1]}"
    if match := re.fullmatch(r"mid\.block_([12])\.(\w+)\.(.+)", name):
        return f"mid_block.resnets.{int(match[1]) - 1}.{_RESNET.get(match[2], match[2])}.{match[3]}"
    if match := re.fullmatch(r"mid\.attn_1\.(\w+)\.(.+)", name):
        layer = _ATTENTION.get(match[1])
        return layer and f"mid_block.attentions.0.{layer}.{match[2]}"
    direction = "down" if side == "encoder" else "up"
    match = re.fullmatch(
        rf"{direction}\.(\d+)\.(block\.(\d+)\.(\w+)|{direction}sample)\.(.+)", name
    )
    if match is None or int(match[1]) >= levels:
        return None
    level = int(match[1])
    if side == "decoder":
        level = levels - 1 - level
    inside = f"{direction}samplers.0"
    if match[3] is not None:
        inside = f"resnets.{match[3]}.{_RESNET.get(match[4], match[4])}"
    return f"{direction}_blocks.{level}.{inside}.{match[5]}"


def our_names(names: Iterable[str]) -> dict[str, str]:
    """Our name for each of `names`, which may have a prefix and either layout.

    In files that hold other networks too, only the names with the VAE's prefix are taken.
    ValueError where there is no VAE, or for names that the layout does not have; the first five
    are told.
    """
    names = list(names)
    prefix = prefix_of(names)
    if prefix is None:
        raise ValueError(
            "a file of a VAE must have tensors called decoder.conv_in, got "
            f"{_some(names) or 'none at all'}: give it a VAE"
        )
    bare = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if not is_original(bare.values()):
        return bare
    matches = [re.match(r"decoder\.up\.(\d+)\.", name) for name in bare.values()]
    ups = [int(match[1]) for match in matches if match is not None]
    levels = 1 + max(ups, default=-1)
    ours = {name: our_name(original, levels) for name, original in bare.items()}
    wrong = [name for name, found in ours.items() if found is None]
    if wrong:
        raise ValueError(
            "the names of a VAE in the original layout must be those of its encoder and decoder, "
            f"got {len(wrong)} others, {_some(wrong)}: use the file as it was published"
        )
    return {name: found for name, found in ours.items() if found is not None}


def our_shape(
    name: str,
    shape: tuple[int, ...],
) -> tuple[int, ...]:
    """The shape of the weight that we call `name`, stored with `shape` in either layout."""
    pointwise = len(shape) > 2 and all(size == 1 for size in shape[2:])
    return shape[:2] if pointwise and _PROJECTION.search(name) else shape


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The VAE in `state`, which may have a prefix and either layout, under our names and shapes.

    ValueError as for `our_names`. Whether the tensors are those of a network is for
    `load_state_dict` to say.
    """
    result = {}
    for name, ours in our_names(state).items():
        tensor = state[name]
        result[ours] = tensor.reshape(our_shape(ours, tuple(tensor.shape)))
    return result


def video_config(shapes: Shapes) -> VAEConfig:
    """The sizes of the video VAE whose weights, under our names, have these shapes.

    What shapes do not tell, the groups of the norms and the scaling factor, is as in the released
    VAE. ValueError where a size is missing.
    """
    widths, layers = _sizes(shapes, "conv.weight")
    latents = shapes.get("post_quant_conv.weight")
    if not widths or not layers or latents is None:
        raise ValueError(
            "the video VAE must have encoder.down_blocks and post_quant_conv, got "
            f"{_some(shapes) or 'no tensors'}: give the whole VAE"
        )
    return VAEConfig(latent_channels=latents[0], block_out_channels=widths, layers_per_block=layers)


def picture_config(shapes: Shapes) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKL for a picture VAE whose weights have these shapes.

    What shapes do not tell is as in FLUX.1's VAE. ValueError where a size is missing.
    """
    widths, layers = _sizes(shapes, "weight")
    latents = shapes.get("decoder.conv_in.weight")
    if not widths or not layers or latents is None:
        raise ValueError(
            "the picture VAE must have encoder.down_blocks and decoder.conv_in, got "
            f"{_some(shapes) or 'no tensors'}: give the whole VAE"
        )
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": latents[1],
        "norm_num_groups": 32,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def check_complete(wanted: Shapes, found: Shapes) -> None:
    """ValueError unless both hold the same names with the same shapes; the first fault is named."""
    lacking = sorted(wanted.keys() - found.keys())
    others = sorted(found.keys() - wanted.keys())
    if lacking or others:
        what = f"lacks {len(lacking)} of them" if lacking else f"has {len(others)} others"
        raise ValueError(
            f"a VAE must have the {len(wanted)} tensors of its network, but this one {what}, "
            f"{(lacking or others)[0]} first: use the file as it was published"
        )
    for name, shape in wanted.items():
        if tuple(shape) != tuple(found[name]):
            raise ValueError(
                f"{name} must have shape {list(shape)}, got {list(found[name])}: "
                "use the file as it was published"
            )


def _sizes(
    shapes: Shapes,
    weight: str,
) -> tuple[tuple[int, ...], int]:
    """Channels of each level, and resnets of the first, of the encoder with these shapes.

    weight: what the weight of a convolution is called behind the name of its layer.
    """
    widths: list[int] = []
    while (name := f"encoder.down_blocks.{len(widths)}.resnets.0.conv2.{weight}") in shapes:
        widths.append(shapes[name][0])
    layers = 0
    while f"encoder.down_blocks.0.resnets.{layers}.conv1.{weight}" in shapes:
        layers += 1
    return tuple(widths), layers


def _some(names: Iterable[str]) -> str:
    """The first five names."""
    names = sorted(names)
    return ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")
