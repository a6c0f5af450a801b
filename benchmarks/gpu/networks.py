# SPDX-License-Identifier: Apache-2.0
"""Whole networks at full size on a GPU: a pass of the transformer, and the decoding of a clip; ours
and diffusers' in one run."""

from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

import kandinsky_kernels as ops
from kandinsky_model.config import HUNYUAN_VAE, LITE_DIT, DiTConfig, NablaConfig, VAEConfig
from kandinsky_model.dit import nabla
from kandinsky_model.dit.layout import Layout, make_layout
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE
from kandinsky_model.vae.tiles import Tiling

from .card import FULL, Clock, Size, block_mask, masks, peak_memory, ratios

SCALE = (1.0, 2.0, 2.0)


@torch.no_grad()
def transformer(clock: Clock, size: Size, _: dict) -> Iterator[dict]:
    """Lite at 10 s (random weights) with 15 % of the blocks kept, against diffusers' compiled where
    diffusers is installed."""
    if size is FULL[1]:
        return
    toy = size is not FULL[0]
    config = (
        DiTConfig(model_dim=128, ff_dim=256, num_visual_blocks=2, visual_cond=True)
        if toy
        else LITE_DIT
    )
    dit = random_transformer(
        config, clock.device, torch.float32 if toy else torch.bfloat16
    ).prepare()
    layout = make_layout(config, size.grid, SCALE, NablaConfig(0.9), clock.device)
    grid, make = size.grid, dict(device=clock.device)
    inputs = (
        torch.randn(1, grid.T, 2 * grid.Y, 2 * grid.X, config.in_channels, **make),
        torch.randn(1, 256, config.in_text_dim, **make),
        torch.randn(1, config.in_text_dim2, **make),
        torch.tensor([700.0], **make),
    )
    chosen = masks(Size(size.name, grid, config.num_heads, config.head_dim), 0.15, clock.device)[
        "clustered"
    ]
    calls = {"ours": lambda: dit(*inputs, layout)}
    theirs = diffusers_transformer(dit, inputs, layout, chosen)
    if theirs is not None:
        calls["diffusers"] = theirs
    with mock.patch.object(nabla, "select_blocks", lambda *_: chosen):
        _, peak = peak_memory(calls["ours"], clock.device)
        times = clock.measure(calls)
    yield {
        "op": "transformer",
        "size": size.name,
        "ms": times,
        "peak_mib": peak,
        "density": ops.selection_density(chosen, grid.blocks),
        **ratios(times),
    }


def random_transformer(
    config: DiTConfig, device: torch.device, dtype: torch.dtype
) -> DiffusionTransformer3D:
    with torch.device("meta"):
        dit = DiffusionTransformer3D(config)
    dit = dit.to_empty(device=device).to(dtype).requires_grad_(False)
    for parameter in dit.parameters():
        parameter.normal_(0, 0.02)
    return dit


def diffusers_transformer(
    dit: DiffusionTransformer3D, inputs: tuple[Tensor, ...], layout: Layout, chosen: Tensor
) -> Callable | None:
    """diffusers' network with the same weights and blocks: compiled block by block on a GPU, its
    selection left out as ours is; or None.

    On a CPU, where its FlexAttention does not compile, nothing is, and it attends to all blocks:
    good for a test of this function only.
    """
    try:
        from diffusers.models.transformers import transformer_kandinsky as module
    except ImportError:
        return None
    x, text, pooled, time = inputs
    config = {
        key: getattr(dit.config, key)
        for key in dit.config.__dataclass_fields__
        if key != "instruct_type"
    }
    with torch.device(x.device):
        model = (
            module.Kandinsky5Transformer3DModel(**config).eval().requires_grad_(False).to(dit.dtype)
        )
    model.load_state_dict(dit.state_dict())
    model.set_attention_backend("flex")
    blocks = block_mask(chosen, layout.grid.blocks)
    if x.device.type == "cuda":
        model.compile_repeated_blocks(fullgraph=True)
    positions = [
        torch.arange(n, device=x.device) for n in (layout.grid.T, layout.grid.Y, layout.grid.X)
    ]
    sparse, given = {"sta_mask": None, "P": 0.9, "to_fractal": True}, lambda *_, **__: blocks

    def call() -> Tensor:
        with mock.patch.object(module, "nablaT_v2", given):
            return model(
                x.to(dit.dtype),
                text.to(dit.dtype),
                time,
                pooled.to(dit.dtype),
                positions,
                torch.arange(text.shape[1], device=x.device),
                SCALE,
                sparse,
                return_dict=False,
            )

    return call


@torch.no_grad()
def decode(clock: Clock, size: Size, _: dict) -> Iterator[dict]:
    """Decoding 5 s and 10 s of 512 x 768 (random weights, bf16): `global`, and `official` against
    diffusers' tiles of the same size."""
    if size is FULL[1]:
        return
    toy = size is not FULL[0]
    config = (
        VAEConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8)
        if toy
        else HUNYUAN_VAE
    )
    with torch.device(clock.device):
        ours = HunyuanVideoVAE(config).eval().requires_grad_(False)
    ours = ours.to(torch.float32 if toy else torch.bfloat16, memory_format=torch.channels_last_3d)
    theirs = diffusers_decoder(ours)
    for name, frames in {"toy": 5}.items() if toy else {"5 s": 31, "10 s": 61}.items():
        latents = torch.randn(
            1,
            16,
            frames,
            *((6, 8) if toy else (64, 96)),
            device=clock.device,
            dtype=ours.post_quant_conv.weight.dtype,
        )
        tiles = Tiling.for_frame(8 * latents.shape[3], 8 * latents.shape[4])
        _, peak = peak_memory(
            lambda latents=latents: drain(ours.decode_frames(latents)), clock.device
        )
        calls = {"ours": lambda latents=latents: drain(ours.decode_frames(latents))}
        yield {
            "op": "VAE decode",
            "size": name,
            "policy": "global",
            "ms": clock.measure(calls),
            "peak_mib": peak,
        }
        calls = {
            "ours": lambda latents=latents, tiles=tiles: drain(
                ours.decode_frames(latents, "official", tiles)
            )
        }
        if theirs is not None:
            calls["diffusers"] = lambda latents=latents: theirs.decode(latents).sample
        times = clock.measure(calls)
        yield {"op": "VAE decode", "size": name, "policy": "official", "ms": times, **ratios(times)}


def drain(pieces) -> None:
    for _ in pieces:
        pass


def diffusers_decoder(ours: HunyuanVideoVAE):
    """diffusers' decoder on the same weights, in the official temporal tiles of 17 frames every 8;
    None where it is not installed."""
    try:
        from diffusers import AutoencoderKLHunyuanVideo
    except ImportError:
        return None
    config, weight = ours.config, ours.post_quant_conv.weight
    with torch.device(weight.device):
        peer = (
            AutoencoderKLHunyuanVideo(
                latent_channels=config.latent_channels,
                block_out_channels=config.block_out_channels,
                layers_per_block=config.layers_per_block,
                norm_num_groups=config.norm_num_groups,
            )
            .eval()
            .requires_grad_(False)
            .to(weight.dtype)
        )
    peer.load_state_dict(ours.state_dict())
    peer.tile_sample_min_num_frames, peer.tile_sample_stride_num_frames = 16, 8
    return peer
