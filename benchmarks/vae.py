# SPDX-License-Identifier: Apache-2.0
"""The VAE against diffusers' on the CPU: time and live memory, in turns, on the same weights,
latents and videos.

``python -m benchmarks.vae`` checks that both give the same, times them and writes
benchmarks/results/vae-<machine>.json.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from kandinsky_model.config import PRESETS, VAEConfig
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE
from kandinsky_model.vae.layers import Upsample
from kandinsky_model.vae.schemes import Accounting
from kandinsky_model.vae.stages import Chunk, Enlarge
from kandinsky_model.vae.stream import decoding, encoding
from tests.support.live_memory import LiveMemory

from .clock import keep_memory, machine, measure, roofs
from .ops import results_file
from .report import vae_table

# name, configuration, latent T, Y, X or video F, H, W; the wanted ratio of diffusers' time to ours
DECODES = {
    "tiny preset, 17 frames of 160x160": (PRESETS["tiny"].vae, (5, 20, 20)),
    "full size, latent 2x16x16": (VAEConfig(), (2, 16, 16)),
}
ENCODES = {
    "tiny preset, encoding 17 frames of 160x160": (PRESETS["tiny"].vae, (17, 160, 160)),
    "full size, encoding 5 frames of 64x64": (VAEConfig(), (5, 64, 64)),
}
# channels, factors, and the latent-level frames and sides in front of the upsampling
UPSAMPLINGS = {
    "512 channels, 3x32x32": (512, (1, 2, 2), (3, 32, 32)),
    "512 channels, 3x32x32, time too": (512, (2, 2, 2), (3, 32, 32)),
    "256 channels, 3x64x64, time too": (256, (2, 2, 2), (3, 64, 64)),
}
SCHEMES = {
    "decoding": ("KKKK", "KKKR", "KKKS", "KKRS", "KKSS", "KSSS"),
    "encoding": ("KKKK", "RKKK", "SKKK", "SRKK", "SHKK", "SSKK", "SSRK", "SSSK"),
}
LETTERS = {"decoding": "keep, recompute, stream", "encoding": "keep, recompute, head, stream"}
SECONDS = {"5 s": (31, 121), "10 s": (61, 241)}  # frames, latent and of video
WANTED_DECODE, WANTED_ENCODE, WANTED_UPSAMPLING, TOLERANCE = 1.5, 1.2, 2.5, 1e-4


def diffusers_peer(vae: HunyuanVideoVAE) -> nn.Module:
    """diffusers' class with the same weights, all frames at once as with us."""
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
    return peer.eval()


def peak_bytes(call: Callable) -> int:
    with LiveMemory() as memory:
        call()
    return memory.peak


def agree(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"both must give the same result, but they differ by {error:.2g} of "
            "its norm; nothing was timed"
        )
    return error


def _both(config: VAEConfig) -> tuple[HunyuanVideoVAE, nn.Module]:
    torch.manual_seed(0)
    # as `load_vae` gives it
    vae = (
        HunyuanVideoVAE(config)
        .eval()
        .requires_grad_(False)
        .to(memory_format=torch.channels_last_3d)
    )
    return vae, diffusers_peer(vae)


def decode_row(name: str, config: VAEConfig, size: tuple[int, int, int], budget_s: float) -> dict:
    (vae, peer), latents = _both(config), torch.randn(1, config.latent_channels, *size)
    return _row(
        name,
        {"ours": lambda: vae.decode(latents), "diffusers": lambda: peer.decode(latents).sample},
        WANTED_DECODE,
        budget_s,
    )


def encode_row(name: str, config: VAEConfig, size: tuple[int, int, int], budget_s: float) -> dict:
    (vae, peer), video = _both(config), torch.rand(1, 3, *size) * 2 - 1
    return _row(
        name,
        {
            "ours": lambda: torch.cat(vae.encode(video), 1),
            "diffusers": lambda: peer.encode(video).latent_dist.parameters,
        },
        WANTED_ENCODE,
        budget_s,
    )


def _row(name: str, calls: dict[str, Callable], wanted: float, budget_s: float) -> dict:
    error = agree(calls["ours"](), calls["diffusers"]())
    row = {
        "case": name,
        "error": error,
        "peak_bytes": {who: peak_bytes(call) for who, call in calls.items()},
    }
    timings = measure(calls, budget_s)
    return row | {
        "times_faster": round(timings["diffusers"].median_ms / timings["ours"].median_ms, 3),
        "wanted": wanted,
        "timings": {who: timing.record() for who, timing in timings.items()},
    }


def upsampling_row(
    name: str,
    channels: int,
    factors: tuple[int, int, int],
    size: tuple[int, int, int],
    budget_s: float,
) -> dict:
    """Folded against upsample, pad, convolve; the weights are folded beforehand, as a decode does
    it once."""
    torch.manual_seed(0)
    upsample = Upsample(channels, factors).requires_grad_(False)
    stage, x = Enlarge(upsample), torch.randn(1, channels, *size)
    rows = x.permute(0, 2, 3, 4, 1).contiguous()

    def ours():
        return torch.cat(
            [chunk.x for chunk in stage.flow(iter([Chunk(rows)]), None, size[0])], 1
        ).permute(0, 4, 1, 2, 3)

    def plain():
        first, rest = x[:, :, :1], x[:, :, 1:]
        first = F.interpolate(first, scale_factor=(1, *factors[1:]), mode="nearest")
        return upsample.conv(
            torch.cat((first, F.interpolate(rest, scale_factor=factors, mode="nearest")), 2)
        )

    error = agree(ours(), plain())
    timings = measure({"ours": ours, "plain": plain}, budget_s)
    return {
        "case": name,
        "error": error,
        "times_faster": round(timings["plain"].median_ms / timings["ours"].median_ms, 3),
        "wanted": WANTED_UPSAMPLING,
        "timings": {who: timing.record() for who, timing in timings.items()},
    }


def schemes_table(doing: str = "decoding") -> str:
    """What the released VAE needs in bf16 under the schemes worth naming, from its own accounting:
    predicted, not measured."""
    with torch.device("meta"):
        vae = HunyuanVideoVAE(VAEConfig()).bfloat16()
    books = {}
    for (height, width), (name, (latent, video)) in itertools.product(
        ((512, 768), (768, 1280)), SECONDS.items()
    ):
        chain, shape = (
            decoding(vae.decoder, vae.post_quant_conv),
            (1, 16, latent, height // 8, width // 8),
        )
        if doing == "encoding":
            chain, shape = encoding(vae.encoder), (1, 3, video, height, width)
        books[f"{name} {height}x{width}"] = Accounting(chain, shape)
    lines = [
        f"| scheme (a letter per level: {LETTERS[doing]}) | {' | '.join(books)} | FLOPs, 10 "
        "s 512x768 |",
        "|---|" + "---:|" * 5,
    ]
    for scheme in SCHEMES[doing]:
        plans = {name: book.scheme(scheme) for name, book in books.items()}
        peaks = [plan.predicted_peak_bytes / 1e9 for plan in plans.values()]
        cells = [f"{peak:.0f} GB" if peak >= 100 else f"{peak:.1f} GB" for peak in peaks]
        lines.append(
            f"| {scheme} | {' | '.join(cells)} | {plans['10 s 512x768'].relative_flops:.2f}x |"
        )
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description="Times the VAE and writes benchmarks/results/vae-<machine>.json."
    )
    parser.add_argument(
        "--only", default="", help="run the cases whose name contains this, and write nothing"
    )
    parser.add_argument(
        "--schemes",
        action="store_true",
        help="only print what each scheme of decoding and encoding is predicted to need",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=20.0,
        help="seconds for each provider of a case (default: 20)",
    )
    options = parser.parse_args()
    if options.schemes:
        print("\n\n".join(f"{doing}:\n\n{schemes_table(doing)}" for doing in SCHEMES))
        return
    keep_memory()
    result = {"machine": machine(), "roofs": roofs()}
    rows = {
        "decodes": (decode_row, DECODES),
        "encodes": (encode_row, ENCODES),
        "upsamplings": (upsampling_row, UPSAMPLINGS),
    }
    for what, (row, cases) in rows.items():
        result[what] = [
            row(name, *case, options.budget) for name, case in cases.items() if options.only in name
        ]
    if not options.only:
        path = results_file(result["machine"])
        path = path.with_name(f"vae-{path.name}")
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {Path(path).name}")
    print(vae_table(result))


if __name__ == "__main__":
    main()
