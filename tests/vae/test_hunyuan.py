# SPDX-License-Identifier: Apache-2.0
"""The VAE against diffusers' class, against the golden files, and the laws of its tiles."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import kandinsky_kernels as ops
from kandinsky_model.config import VAEConfig
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE, sample_posterior
from kandinsky_model.vae.layers import CausalConv3d, FrameCausalAttention, Upsample
from kandinsky_model.vae.tiles import Tiling

from ..conftest import shared_data

SMALL = VAEConfig(
    latent_channels=4, block_out_channels=(8, 16, 16, 24), layers_per_block=1, norm_num_groups=4
)
SIZES = [
    (1, 4, 4),
    (2, 3, 5),
    (3, 5, 2),
    (5, 4, 3),
]  # latent T, Y, X
# on a CPU two ways of computing the same
MODES = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])


def rel_l2(actual, expected):
    exact = expected.double()
    return ((actual.double() - exact).norm() / exact.norm()).item()


def small_vae(config=SMALL, dtype=torch.float32):
    torch.manual_seed(1)
    vae = HunyuanVideoVAE(config)
    with torch.no_grad():  # nothing dead, nothing at its neutral value
        for name, parameter in vae.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return vae.to(dtype)


def frozen_vae(config=SMALL, dtype=torch.float32):
    """`small_vae` for decoding and encoding without gradients."""
    return small_vae(config, dtype).requires_grad_(False)


def peer_of(vae):
    """diffusers' class with the same weights, untiled."""
    from diffusers import AutoencoderKLHunyuanVideo

    config = vae.config
    peer = AutoencoderKLHunyuanVideo(
        latent_channels=config.latent_channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        down_block_types=("HunyuanVideoDownBlock3D",) * len(config.block_out_channels),
        up_block_types=("HunyuanVideoUpBlock3D",) * len(config.block_out_channels),
    )
    peer.use_framewise_decoding = peer.use_framewise_encoding = False
    peer.load_state_dict(vae.state_dict(), strict=True)
    return peer.to(next(vae.parameters()).dtype)


def video_like(t, y, x, dtype=torch.float32, batch=1):
    frames = 4 * (t - 1) + 1
    return torch.rand(batch, 3, frames, 8 * y, 8 * x, dtype=dtype) * 2 - 1


def test_published_names_and_sizes():
    with torch.device("meta"):
        state = HunyuanVideoVAE(VAEConfig()).state_dict()
    assert len(state) == 248
    assert sum(tensor.numel() for tensor in state.values()) == 246_478_803
    sizes = {"encoder": 0, "decoder": 0, "quant_conv": 0, "post_quant_conv": 0}
    for name, tensor in state.items():
        sizes[name.partition(".")[0]] += tensor.numel()
    assert sizes["encoder"] == 100_341_408
    assert sizes["decoder"] == 146_136_067
    shortcut = state["decoder.up_blocks.2.resnets.0.conv_shortcut.conv.weight"]
    assert shortcut.shape == (256, 512, 1, 1, 1)
    assert state["encoder.mid_block.attentions.0.to_out.0.weight"].shape == (512, 512)
    assert state["decoder.up_blocks.1.upsamplers.0.conv.conv.bias"].shape == (512,)


@MODES
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_decode_equals_diffusers(size, grad):
    vae = small_vae()
    latents = torch.randn(2, 4, *size)
    with torch.no_grad():
        expected = peer_of(vae).decode(latents).sample
    with torch.set_grad_enabled(grad):
        actual = vae.decode(latents)
    assert actual.shape == (2, 3, 4 * (size[0] - 1) + 1, 8 * size[1], 8 * size[2])
    assert actual.is_contiguous()
    assert rel_l2(actual, expected) <= 1e-5


@MODES
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_encode_equals_diffusers(size, grad):
    vae = small_vae()
    video = video_like(*size, batch=2)
    with torch.no_grad():
        expected = peer_of(vae).encode(video).latent_dist
    with torch.set_grad_enabled(grad):
        mean, logvar = vae.encode(video)
    assert mean.shape == logvar.shape == (2, 4, *size)
    assert mean.is_contiguous()
    assert rel_l2(mean, expected.mean) <= 1e-5
    assert rel_l2(logvar, expected.logvar) <= 1e-5


@pytest.mark.parametrize("widths", [(8, 8, 16), (8, 8, 16, 16, 16)], ids=str)
def test_other_depths_equal_diffusers(widths):
    vae = small_vae(
        VAEConfig(
            latent_channels=4, block_out_channels=widths, layers_per_block=2, norm_num_groups=4
        ),
        torch.float64,
    )
    peer = peer_of(vae)
    latents = torch.randn(1, 4, 3, 2, 3).double()
    video = video_like(3, 2, 3, torch.float64)
    with torch.no_grad():
        assert rel_l2(vae.decode(latents), peer.decode(latents).sample) <= 1e-12
        assert rel_l2(vae.encode(video)[0], peer.encode(video).latent_dist.mean) <= 1e-12


def test_gradients_equal_diffusers():
    vae = small_vae(dtype=torch.float64)
    peer = peer_of(vae)
    video = video_like(2, 2, 3, torch.float64)
    vae.decode(vae.encode(video)[0]).square().mean().backward()
    peer.decode(peer.encode(video).latent_dist.mean).sample.square().mean().backward()
    gradients = dict(peer.named_parameters())
    for name, parameter in vae.named_parameters():
        # a convolution's bias in front of a one-channel-wide shift can have a true gradient of
        # zero: compare with the largest
        assert (parameter.grad - gradients[name].grad).norm() <= 1e-9 * (
            1e-3 + gradients[name].grad.norm()
        ), name


def test_no_grad_path_equals_the_differentiable_one_in_fp64():
    vae = small_vae(dtype=torch.float64)
    latents = torch.randn(2, 4, 3, 3, 5).double()
    video = video_like(2, 3, 2, torch.float64)
    with torch.no_grad():
        plain = vae.decode(latents)
        moments = torch.cat(vae.encode(video))
    assert rel_l2(plain, vae.decode(latents).detach()) <= 1e-12
    assert rel_l2(moments, torch.cat(vae.encode(video)).detach()) <= 1e-12


def test_bf16_runs():
    vae = small_vae()
    latents = torch.randn(1, 4, 2, 3, 2)
    with torch.no_grad():
        expected = vae.decode(latents)
        actual = vae.to(torch.bfloat16).decode(latents.bfloat16())
    assert actual.dtype == torch.bfloat16
    assert rel_l2(actual, expected) <= 5e-2


def test_golden_files():
    folder = shared_data() / "golden"
    config = json.loads((folder / "config.json").read_text())
    sizes = config["vae"]
    tile = config["vae_official_tile"]
    vae = HunyuanVideoVAE(
        VAEConfig(**{**sizes, "block_out_channels": tuple(sizes["block_out_channels"])})
    )
    vae.load_state_dict(load_file(folder / "vae.safetensors"), strict=True)
    io = load_file(folder / "vae_io.safetensors")
    tiling = Tiling(
        tile["min_height"],
        tile["min_width"],
        overlap=tile["min_height"] - tile["stride_height"],
        frames=tile["min_frames"] + 1,
        frame_stride=tile["stride_frames"],
    )
    with torch.no_grad():
        assert rel_l2(torch.cat(vae.encode(io["video"]), dim=1), io["moments"]) <= 1e-5
        assert rel_l2(vae.decode(io["latents"]), io["decoded_global"]) <= 1e-5
        assert rel_l2(vae.decode(io["latents"], "official", tiling), io["decoded_official"]) <= 1e-5


def test_statistics_survive_many_values_far_from_zero():
    norm = torch.nn.GroupNorm(2, 4, eps=1e-6)
    # [B, T, Y, X, C]
    rows = torch.randn(1, 3, 300, 300, 4) * 0.1 + torch.tensor([30.0, 30.1, -7.0, -7.2])
    moments = ops.group_moments(rows, 2)
    scale, shift = ops.group_affine(moments, norm.weight, norm.bias, norm.eps)  # [B, C]
    grouped = rows.double().unflatten(-1, (2, 2))  # [B, T, Y, X, G, C / G]
    variance, mean = torch.var_mean(grouped, (1, 2, 3, 5), correction=0)  # [B, G]
    inverse = (variance + 1e-6).rsqrt()
    assert rel_l2(scale, inverse.repeat_interleave(2, dim=1)) <= 1e-6
    assert rel_l2(shift, -(mean * inverse).repeat_interleave(2, dim=1)) <= 1e-6


def test_attention_equals_masked_attention():
    attention = FrameCausalAttention(8, 2).double()
    x = torch.randn(2, 8, 4, 3, 2).double()
    tokens = attention.group_norm(x).flatten(2).transpose(1, 2)  # [B, T*Y*X, C]
    query = attention.to_q(tokens)
    key = attention.to_k(tokens)
    value = attention.to_v(tokens)
    frame = torch.arange(4).repeat_interleave(6)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=frame[:, None] >= frame)
    expected = x + attention.to_out[0](out).transpose(1, 2).view_as(x)
    assert rel_l2(attention(x).detach(), expected.detach()) <= 1e-12


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_is_causal(stride):
    conv = CausalConv3d(4, 4, stride=(stride, 1, 1))
    x = torch.randn(1, 4, 7, 3, 3)
    later = x.clone()
    later[:, :, 4:] += 1
    before = conv(x)
    after = conv(later)
    first = 4 // stride  # the output frame that first sees input frame 4
    assert torch.equal(before[:, :, :first], after[:, :, :first])
    assert not torch.allclose(before[:, :, first], after[:, :, first])


@MODES
def test_upsampling_and_attention_are_causal(grad):
    x = torch.randn(1, 4, 4, 3, 3)
    later = x.clone()
    later[:, :, 2:] += 1
    upsample = Upsample(4, (2, 2, 2))
    attention = FrameCausalAttention(4, 2)
    attention.group_norm = torch.nn.Identity()  # its statistics see every frame, by design
    with torch.set_grad_enabled(grad):
        assert upsample(x).shape == (1, 4, 7, 6, 6)
        # frame 2 becomes output frames 3 and 4
        assert torch.equal(upsample(x)[:, :, :3], upsample(later)[:, :, :3])
        before = attention(x)
        after = attention(later)
    assert torch.allclose(before[:, :, :2], after[:, :, :2], atol=1e-6)
    assert not torch.allclose(before[:, :, 2:], after[:, :, 2:], atol=1e-1)


@MODES
@pytest.mark.parametrize(
    "factors",
    [
        (1, 2, 2),
        (2, 2, 2),
        (2, 1, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 6, 1, 3, 5),
        (2, 6, 2, 1, 1),
        (1, 6, 5, 4, 7),
    ],
    ids=str,
)
def test_folded_upsampling_is_upsampling_and_convolution(grad, factors, shape):
    upsample = Upsample(6, factors).double()
    x = torch.randn(shape, dtype=torch.float64)
    wide = x
    for dim, factor in zip((2, 3, 4), factors, strict=True):
        wide = wide.repeat_interleave(factor, dim=dim)
    exact = upsample.conv(wide[:, :, factors[0] - 1 :])  # the first frame is not doubled
    with torch.set_grad_enabled(grad):
        assert (upsample(x) - exact).abs().max() <= 1e-12


# Tiles


@pytest.mark.parametrize(
    "size, tile, tiles",
    [
        (
            (512, 768),
            (512, 768),
            (1, 1),
        ),
        (
            (768, 512),
            (768, 512),
            (1, 1),
        ),
        (
            (256, 256),
            (256, 256),
            (1, 1),
        ),
        (
            (16, 24),
            (40, 40),
            (1, 1),
        ),
        (
            (768, 1280),
            (400, 448),
            (2, 3),
        ),
        (
            (1024, 1024),
            (528, 528),
            (2, 2),
        ),
        (
            (896, 1152),
            (464, 592),
            (2, 2),
        ),
        (
            (640, 1408),
            (640, 496),
            (1, 3),
        ),
        (
            (1408, 640),
            (496, 640),
            (3, 1),
        ),
        (
            (768, 1408),
            (400, 496),
            (2, 3),
        ),
    ],
    ids=str,
)
def test_plan_of_a_frame(size, tile, tiles):
    tiling = Tiling.for_frame(*size)
    assert (tiling.height, tiling.width, tiling.overlap, tiling.frames, tiling.frame_stride) == (
        *tile,
        32,
        17,
        8,
    )
    covered = [1 + max(0, -(-(s - t) // (t - 32))) for s, t in zip(size, tile, strict=True)]
    assert tuple(covered) == tiles


class Marked(HunyuanVideoVAE):
    """A VAE whose decoder only repeats the latent, so that any misplaced, missing or doubled pixel
    of a tiling shows."""

    def marks(self, latents):
        x = latents[:, :3].repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
        return x.repeat_interleave(4, dim=2)[:, :, 3:]

    def _decoding(self, *_, **__):
        return lambda latents: iter([self.marks(latents)])


@pytest.mark.parametrize("frames", [1, 4, 5, 6, 7, 9, 12])
@pytest.mark.parametrize(
    "height, width",
    [
        (2, 3),
        (5, 11),
        (16, 35),
        (17, 24),
    ],
)
def test_official_tiles_put_every_pixel_in_its_place(frames, height, width):
    vae = Marked(SMALL)
    latents = torch.randn(1, 4, frames, height, width)
    for tiling in (
        None,
        Tiling(64, 96),
        Tiling(
            64,
            48,
            overlap=16,
            frames=9,
            frame_stride=4,
        ),
        Tiling(48, 64, overlap=0),
    ):
        actual = vae.decode(latents, "official", tiling)
        assert actual.shape == (1, 3, 4 * frames - 3, 8 * height, 8 * width)
        torch.testing.assert_close(actual, vae.marks(latents), rtol=0, atol=1e-6)


def test_official_tiles_reach_the_border_upstream_does_not():
    """Proportions of 640x1408, whose last columns upstream loses: two latents are left after tiles
    at 0, 14 and 28."""
    vae = small_vae()
    latents = torch.randn(1, 4, 2, 5, 47)
    with torch.no_grad():
        tiled = vae.decode(latents, "official", Tiling(40, 136, overlap=24))
        last = vae.decode(latents[..., -17:])
    assert tiled.shape == (1, 3, 5, 40, 376)
    assert tiled.isfinite().all()
    # the fourth tile moves from latent 42 to 30 and shows from where it has faded in over 24 pixels
    torch.testing.assert_close(tiled[..., 8 * 42 + 24 :], last[..., 8 * 12 + 24 :])


def test_one_official_tile_is_the_global_decode():
    vae = small_vae()
    latents = torch.randn(1, 4, 5, 4, 6)
    with torch.no_grad():
        assert torch.equal(vae.decode(latents, "official"), vae.decode(latents))


def blended(tiles, extent):
    """Upstream's order, written pixel by pixel: every tile fades in from the one above and then
    from the one on its left."""
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            for y in range(extent if i else 0):
                tile[y] = tiles[i - 1][j][y - extent] * (1 - y / extent) + tile[y] * y / extent
            for x in range(extent if j else 0):
                tile[:, x] = row[j - 1][:, x - extent] * (1 - x / extent) + tile[:, x] * x / extent
    kept = [
        [
            tile[: None if row is tiles[-1] else -extent, : None if tile is row[-1] else -extent]
            for tile in row
        ]
        for row in tiles
    ]
    return torch.cat([torch.cat(row, dim=1) for row in kept])


def test_blends_follow_upstreams_order():
    vae = small_vae()
    latents = torch.randn(1, 4, 1, 8, 11)
    with torch.no_grad():
        # starts 0, 3 down and 0, 3, 6 across: 3 x 5 latents share 2 with the next
        tiles = [
            [vae.decode(latents[..., y : y + 5, x : x + 5])[0, 0, 0] for x in (0, 3, 6)]
            for y in (0, 3)
        ]
        actual = vae.decode(latents, "official", Tiling(40, 40, overlap=16))[0, 0, 0]
    torch.testing.assert_close(actual, blended(tiles, 16), rtol=0, atol=1e-6)


def test_time_blend_is_linear_over_eight_frames():
    vae = small_vae()
    latents = torch.randn(1, 4, 7, 3, 3)
    with torch.no_grad():
        first = vae.decode(latents[:, :, :5])
        second = vae.decode(latents[:, :, 2:])[:, :, 1:]
        actual = vae.decode(latents, "official")
    weight = (torch.arange(8) / 8).view(8, 1, 1)
    torch.testing.assert_close(actual[:, :, :9], first[:, :, :9])
    torch.testing.assert_close(
        actual[:, :, 9:17], first[:, :, 9:] * (1 - weight) + second[:, :, :8] * weight
    )
    torch.testing.assert_close(actual[:, :, 17:], second[:, :, 8:])


# Posterior and errors


def test_posterior_is_seeded_and_clamped():
    mean = torch.randn(1, 4, 2, 3, 3)
    logvar = torch.full((1, 4, 2, 3, 3), 2.0)
    draws = [
        sample_posterior(mean, logvar, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(draws[0], mean + torch.e * noise)
    torch.testing.assert_close(sample_posterior(mean, logvar - 1e6), mean, atol=1e-5, rtol=0)
    assert sample_posterior(mean, logvar + 1e6).isfinite().all()


@pytest.mark.parametrize(
    "video, error, words",
    [
        (torch.zeros(1, 3, 4, 16, 16), ValueError, r"4k\+1 frames .* got 4 frames of 16x16: crop"),
        (torch.zeros(1, 3, 5, 16, 12), ValueError, r"divisible by 8, got 5 frames of 16x12"),
        (torch.zeros(1, 4, 5, 16, 16), ValueError, r"\[B, 3, F, H, W\], got \[1, 4, 5, 16, 16\]"),
        (torch.zeros(3, 5, 16, 16), ValueError, r"got \[3, 5, 16, 16\]: permute"),
        (torch.zeros(1, 3, 0, 16, 16), ValueError, r"non-empty"),
        (
            torch.zeros(1, 3, 5, 16, 16, dtype=torch.int64),
            TypeError,
            r"float dtype or torch.uint8, "
            r"got torch.int64",
        ),
    ],
    ids=range(6),
)
def test_encode_says_what_is_wrong(video, error, words):
    with pytest.raises(error, match=words):
        Marked(SMALL).encode(video)


def test_decode_says_what_is_wrong():
    vae = Marked(SMALL)
    latents = torch.zeros(1, 4, 2, 3, 3)
    with pytest.raises(
        ValueError,
        match=r"latents must be a non-empty \[B, 4, T, Y, X\], got "
        r"\[1, 3, 2, 3, 3\]",
    ):
        vae.decode(latents[:, :3])
    with pytest.raises(ValueError, match=r"got \[1, 4, 0, 3, 3\]"):
        vae.decode(latents[:, :, :0])
    with pytest.raises(ValueError, match="one of global, official, .* got 'fast'"):
        vae.decode(latents, "fast")
    with pytest.raises(ValueError, match="tiles only come with official"):
        vae.decode(latents, "global", Tiling(64, 64))
    with pytest.raises(TypeError, match="torch.int64"):
        vae.decode(latents.long())


@pytest.mark.parametrize(
    "height, options, words",
    [
        (60, {}, r"multiples of 8, got \(60, 64, 32\)"),
        (32, {}, "exceed its overlap"),
        (64, {"frames": 16}, "got 16 and 8"),
        (64, {"frame_stride": 20}, "got 17 and 20"),
    ],
    ids=str,
)
def test_impossible_plans_are_refused(height, options, words):
    with pytest.raises(ValueError, match=words):
        Tiling(height, 64, **options)


def test_impossible_configs_are_refused():
    with pytest.raises(ValueError, match="3 or more block_out_channels .* got 2"):
        HunyuanVideoVAE(VAEConfig(block_out_channels=(8, 8), norm_num_groups=4))
