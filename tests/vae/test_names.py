# SPDX-License-Identifier: Apache-2.0
"""VAEs in the layouts of other programs: names, shapes and sizes become ours, or the first wrong
name is told."""

import re
from dataclasses import replace

import pytest
import torch

from kandinsky_model.config import VAEConfig
from kandinsky_model.vae import flux, hunyuan, names
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE

from .test_hunyuan import SMALL, small_vae

DEEP = VAEConfig(
    latent_channels=4, block_out_channels=(8, 8, 16, 16, 24), layers_per_block=2, norm_num_groups=4
)
# the published sizes of ae.safetensors, with fewer channels
PICTURES = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
PROJECTIONS = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm"}


def original_name(name, levels):
    """The name in the original layout of a weight that we call `name`, written from the published
    lists of names and not from our rules."""
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    for index in (0, 1):
        name = name.replace(f"mid_block.resnets.{index}", f"mid.block_{index + 1}")
    for ours, theirs in PROJECTIONS.items():
        name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    for level in range(levels):
        mirrored = levels - 1 - level
        name = name.replace(f"down_blocks.{level}.resnets.", f"down.{level}.block.")
        name = name.replace(f"down_blocks.{level}.downsamplers.0.", f"down.{level}.downsample.")
        name = name.replace(f"up_blocks.{level}.resnets.", f"up.{mirrored}.block.")
        name = name.replace(f"up_blocks.{level}.upsamplers.0.", f"up.{mirrored}.upsample.")
    return name


def original(state, dimensions, prefix=""):
    """`state` as the original layout stores it; dimensions: of the convolutions, 2 or 3."""
    levels = 1 + max(
        int(match[1]) for match in (re.search(r"up_blocks\.(\d)", n) for n in state) if match
    )
    result = {}
    for name, tensor in state.items():
        if re.search(r"attentions.*to_.*weight", name):
            tensor = tensor[(...,) + (None,) * dimensions]
        result[prefix + original_name(name, levels)] = tensor
    return result


def picture_vae(**changes):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(2)
    return diffusers.AutoencoderKL(**PICTURES | changes)


def same(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert actual[name].shape == tensor.shape, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("prefix", names.PREFIXES)
@pytest.mark.parametrize("config", [SMALL, DEEP], ids=["four levels", "five levels"])
def test_video_vae_in_the_original_layout(config, prefix):
    state = small_vae(config).state_dict()
    file = original(state, 3, prefix)
    assert f"{prefix}decoder.up.0.block.0.conv1.conv.weight" in file
    assert f"{prefix}encoder.down.0.downsample.conv.conv.weight" in file
    assert file[f"{prefix}encoder.mid.attn_1.q.weight"].ndim == 5
    same(names.converted(file), state)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_video_vae_from_weights_decodes_the_same(dtype):
    vae = small_vae().to(dtype).eval().requires_grad_(False)
    latents = torch.randn(1, 4, 2, 3, 4).to(vae.dtype)
    loaded = hunyuan.from_weights(original(small_vae().state_dict(), 3), SMALL, dtype)
    assert not loaded.training
    assert torch.equal(loaded.decode(latents), vae.decode(latents))


def test_published_names_of_the_video_vae():
    """The names at the corners of the layout, as ComfyUI's network declares them."""
    pairs = {
        "encoder.conv_in.conv.weight": "encoder.conv_in.conv.weight",
        "encoder.down.2.block.0.nin_shortcut.conv.bias": (
            "encoder.down_blocks.2.resnets.0.conv_shortcut.conv.bias"
        ),
        "encoder.down.3.block.1.norm2.weight": "encoder.down_blocks.3.resnets.1.norm2.weight",
        "encoder.mid.block_2.conv1.conv.weight": "encoder.mid_block.resnets.1.conv1.conv.weight",
        "encoder.norm_out.bias": "encoder.conv_norm_out.bias",
        "decoder.mid.attn_1.proj_out.bias": "decoder.mid_block.attentions.0.to_out.0.bias",
        "decoder.mid.attn_1.norm.weight": "decoder.mid_block.attentions.0.group_norm.weight",
        "decoder.up.3.block.2.conv2.conv.weight": "decoder.up_blocks.0.resnets.2.conv2.conv.weight",
        "decoder.up.1.upsample.conv.conv.weight": (
            "decoder.up_blocks.2.upsamplers.0.conv.conv.weight"
        ),
        "post_quant_conv.weight": "post_quant_conv.weight",
    }
    with torch.device("meta"):
        ours = HunyuanVideoVAE(VAEConfig()).state_dict()
    for theirs, wanted in pairs.items():
        assert names.our_name(theirs, levels=4) == wanted
        assert wanted in ours


@pytest.mark.parametrize("prefix", names.PREFIXES)
def test_our_own_layout_is_left_alone(prefix):
    state = small_vae().state_dict()
    same(names.converted({prefix + name: tensor for name, tensor in state.items()}), state)


def test_other_networks_of_a_file_are_left_out():
    state = small_vae().state_dict()
    others = {"model.diffusion_model.in.weight": torch.ones(2), "cond_stage.x": torch.ones(3)}
    same(names.converted(others | original(state, 3, "first_stage_model.")), state)


@pytest.mark.parametrize("quant", [False, True], ids=["FLUX.1", "with quant convolutions"])
def test_picture_vae_in_the_original_layout(quant):
    vae = picture_vae(use_quant_conv=quant, use_post_quant_conv=quant)
    state = vae.state_dict()
    file = original(state, 2)
    assert file["decoder.mid.attn_1.q.weight"].ndim == 4
    assert "encoder.down.0.downsample.conv.weight" in file
    same(names.converted(file), state)


def test_picture_vae_as_diffusers_converts_it():
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    vae = picture_vae()
    file = original(vae.state_dict(), 2)
    same(names.converted(file), utils.convert_ldm_vae_checkpoint(file, dict(vae.config)))


def test_picture_vae_from_weights_decodes_the_same():
    vae = picture_vae().eval().requires_grad_(False)
    latents = torch.randn(1, 16, 4, 5)
    loaded = flux.from_weights(original(vae.state_dict(), 2))
    assert loaded.config.scaling_factor == 0.3611
    (picture,) = loaded.decode_frames(latents[:, :, None])
    assert torch.equal(picture[:, :, 0], vae.decode(latents).sample)


# Shapes do not tell the number of groups of a norm, which is 32 in every published VAE.
SIZES = {
    "small": replace(SMALL, block_out_channels=(32, 64, 64, 96), norm_num_groups=32),
    "deep": replace(DEEP, block_out_channels=(32, 32, 64, 64, 96), norm_num_groups=32),
    "released": VAEConfig(),
}


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES)
def test_sizes_are_read_from_shapes(config):
    with torch.device("meta"):
        state = HunyuanVideoVAE(config).state_dict()
    found = names.video_config({name: tuple(tensor.shape) for name, tensor in state.items()})
    assert found.latent_channels == config.latent_channels
    assert found.block_out_channels == config.block_out_channels
    assert found.layers_per_block == config.layers_per_block
    assert found.scaling_factor == VAEConfig().scaling_factor


def test_videos_and_pictures_are_told_apart():
    assert names.is_video(names.our_names(original(small_vae().state_dict(), 3)).values())
    assert not names.is_video(names.our_names(original(picture_vae().state_dict(), 2)).values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"decoder.up.9.attn.0.q.weight": 0},
            r"got 1 others, decoder\.up\.9\.attn\.0\.q\.weight: ",
        ),
        (
            {"encoder.down.x.block": 0, "loss.weight": 0},
            r"got 2 others, encoder\.down\.x\.block, l",
        ),
        ({f"encoder.extra.{i}": 0 for i in range(7)}, r"got 7 others, .*extra\.4 and others: use"),
    ],
    ids=["unknown layer", "two", "many"],
)
def test_wrong_names_are_told(change, words):
    file = original(small_vae().state_dict(), 3) | change
    with pytest.raises(ValueError, match=words) as caught:
        names.our_names(file)
    assert "\n" not in str(caught.value)


def test_what_holds_no_vae_is_refused():
    with pytest.raises(
        ValueError, match="must have tensors called decoder.conv_in, got a, b: give"
    ):
        names.our_names(["b", "a"])
    with pytest.raises(ValueError, match="got none at all"):
        names.converted({})
    with pytest.raises(ValueError, match="post_quant_conv, got decoder.conv_in.conv.weight: give"):
        names.video_config({"decoder.conv_in.conv.weight": (8, 4, 3, 3, 3)})
    with pytest.raises(ValueError, match="decoder.conv_in, got no tensors: give"):
        names.picture_config({})


def test_a_picture_vae_that_lacks_a_tensor_is_refused():
    file = original(picture_vae().state_dict(), 2)
    del file["decoder.conv_out.bias"]
    with pytest.raises(ValueError, match=r"lacks 1 of them, decoder\.conv_out\.bias first"):
        flux.from_weights(file)


def test_a_video_vae_of_other_sizes_is_refused():
    file = original(small_vae().state_dict(), 3)
    with pytest.raises(ValueError, match=r"must have shape .* got \[.*24.*\]: use the file"):
        hunyuan.from_weights(file, replace(SMALL, block_out_channels=(8, 16, 16, 32)))
    file["decoder.mid.block_3.conv1.conv.weight"] = torch.ones(1)
    with pytest.raises(ValueError, match=r"got 1 others, decoder\.mid\.block_3"):
        hunyuan.from_weights(file, SMALL)
