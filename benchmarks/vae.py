# SPDX-License-Identifier: Apache-2.0
"""The video VAE beside diffusers' on a CPU: time and memory, with the same weights and inputs.

``python -m benchmarks.vae`` checks that both give the same result, times them in turns and writes
benchmarks/results/vae-<machine>.json.
``python -m benchmarks.vae --schemes`` prints what each scheme of streaming is predicted to need.
"""

import argparse
import itertools
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kandinsky_model.config import PRESETS, VAEConfig
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE
from kandinsky_model.vae.layers import Upsample
from kandinsky_model.vae.schemes import Accounting
from kandinsky_model.vae.stages import Chunk, Enlarge
from kandinsky_model.vae.stream import decoding, encoding
from tests.support.live_memory import LiveMemory
from tests.support.tiny_models import diffusers_video_vae

from .clock import keep_memory, machine, measure, roofs
from .ops import results_file
from .report import vae_table

# Case -> configuration, and the size of its latents: T, Y, X.
DECODES = {
    "tiny preset, 17 frames of 160x160": (PRESETS["tiny"].vae, (5, 20, 20)),
    "full size, latent 2x16x16": (VAEConfig(), (2, 16, 16)),
}
# Case -> configuration, and the size of its video: frames, height, width.
ENCODES = {
    "tiny preset, encoding 17 frames of 160x160": (PRESETS["tiny"].vae, (17, 160, 160)),
    "full size, encoding 5 frames of 64x64": (VAEConfig(), (5, 64, 64)),
}
# Case -> channels, factors in time, height and width, and the size of what is enlarged: T, Y, X.
UPSAMPLINGS = {
    "512 channels, 3x32x32": (512, (1, 2, 2), (3, 32, 32)),
    "512 channels, 3x32x32, time too": (512, (2, 2, 2), (3, 32, 32)),
    "256 channels, 3x64x64, time too": (256, (2, 2, 2), (3, 64, 64)),
}
# How many times faster than the peer each kind must be.
WANTED_DECODE = 1.5
WANTED_ENCODE = 1.2
WANTED_UPSAMPLING = 2.5
TOLERANCE = 1e-4  # of the result's norm

SCHEMES = {
    "decoding": ("KKKK", "KKKR", "KKKS", "KKRS", "KKSS", "KSSS"),
    "encoding": ("KKKK", "RKKK", "SKKK", "SRKK", "SHKK", "SSKK", "SSRK", "SSSK"),
}
LETTERS = {"decoding": "keep, recompute, stream", "encoding": "keep, recompute, head, stream"}
SIZES = ((512, 768), (768, 1280))  # height, width
FRAMES = {"5 s": (31, 121), "10 s": (61, 241)}  # frames of latents, frames of video


def peak_bytes(call: Callable) -> int:
    """The most bytes of tensors alive at once during a call."""
    with LiveMemory() as memory:
        call()
    return memory.peak


def agree(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference over the norm of ``theirs``.

    Raises RuntimeError if it exceeds TOLERANCE.
    """
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"both must give the same result, but they differ by {error:.2g} of its norm; "
            "nothing was timed"
        )
    return error


def _both(config: VAEConfig) -> tuple[HunyuanVideoVAE, nn.Module]:
    """Our VAE with random weights in the memory format of `load_vae`, and diffusers' with them."""
    torch.manual_seed(0)
    vae = HunyuanVideoVAE(config).eval().requires_grad_(False)
    vae = vae.to(memory_format=torch.channels_last_3d)
    return vae, diffusers_video_vae(vae)


def decode_row(name: str, config: VAEConfig, size: tuple[int, int, int], budget_s: float) -> dict:
    """One case of DECODES; ``budget_s`` seconds for each provider."""
    vae, peer = _both(config)
    latents = torch.randn(1, config.latent_channels, *size)  # [1, C, T, Y, X]
    calls = {
        "ours": lambda: vae.decode(latents),
        "diffusers": lambda: peer.decode(latents).sample,
    }
    return _network_row(name, calls, WANTED_DECODE, budget_s)


def encode_row(name: str, config: VAEConfig, size: tuple[int, int, int], budget_s: float) -> dict:
    """One case of ENCODES; ``budget_s`` seconds for each provider."""
    vae, peer = _both(config)
    video = torch.rand(1, 3, *size) * 2 - 1  # [1, 3, frames, height, width]
    calls = {
        "ours": lambda: torch.cat(vae.encode(video), 1),
        "diffusers": lambda: peer.encode(video).latent_dist.parameters,
    }
    return _network_row(name, calls, WANTED_ENCODE, budget_s)


def _network_row(name: str, calls: dict[str, Callable], wanted: float, budget_s: float) -> dict:
    peaks = {provider: peak_bytes(call) for provider, call in calls.items()}
    return _row(name, calls, wanted, budget_s) | {"peak_bytes": peaks}


def _row(name: str, calls: dict[str, Callable], wanted: float, budget_s: float) -> dict:
    """Check two providers against each other and time them; ``calls`` holds ours, then the peer."""
    ours, theirs = calls
    error = agree(calls[ours](), calls[theirs]())
    timings = measure(calls, budget_s)
    return {
        "case": name,
        "error": error,
        "times_faster": round(timings[theirs].median_ms / timings[ours].median_ms, 3),
        "wanted": wanted,
        "timings": {provider: timing.record() for provider, timing in timings.items()},
    }


def upsampling_row(
    name: str,
    channels: int,
    factors: tuple[int, int, int],
    size: tuple[int, int, int],
    budget_s: float,
) -> dict:
    """One case of UPSAMPLINGS: our folded convolution beside upsample, pad and convolve.

    The weights are folded before the clock starts, as a decode folds them once.
    """
    torch.manual_seed(0)
    upsample = Upsample(channels, factors).requires_grad_(False)
    stage = Enlarge(upsample)
    x = torch.randn(1, channels, *size)  # [1, C, T, Y, X]
    rows = x.permute(0, 2, 3, 4, 1).contiguous()  # [1, T, Y, X, C]

    def ours() -> Tensor:
        pieces = [chunk.x for chunk in stage.flow(iter([Chunk(rows)]), None, size[0])]
        return torch.cat(pieces, 1).permute(0, 4, 1, 2, 3)

    def plain() -> Tensor:
        # the first frame is not enlarged in time
        first = F.interpolate(x[:, :, :1], scale_factor=(1, *factors[1:]), mode="nearest")
        rest = F.interpolate(x[:, :, 1:], scale_factor=factors, mode="nearest")
        return upsample.conv(torch.cat((first, rest), 2))

    return _row(name, {"ours": ours, "plain": plain}, WANTED_UPSAMPLING, budget_s)


def _accounting(vae: HunyuanVideoVAE, doing: str, height: int, width: int, length) -> Accounting:
    """What decoding or encoding a video needs; ``length`` is its latent and its video frames."""
    latent_frames, video_frames = length
    if doing == "encoding":
        return Accounting(encoding(vae.encoder), (1, 3, video_frames, height, width))
    shape = (1, 16, latent_frames, height // 8, width // 8)
    return Accounting(decoding(vae.decoder, vae.post_quant_conv), shape)


def schemes_table(doing: str = "decoding") -> str:
    """What the released VAE needs in bf16 under SCHEMES, in Markdown.

    The figures come from the VAE's own accounting: they are predicted, not measured.
    """
    with torch.device("meta"):
        vae = HunyuanVideoVAE(VAEConfig()).bfloat16()
    accounts = {}
    for (height, width), (seconds, length) in itertools.product(SIZES, FRAMES.items()):
        accounts[f"{seconds} {height}x{width}"] = _accounting(vae, doing, height, width, length)
    lines = [
        f"| scheme (a letter per level: {LETTERS[doing]}) | {' | '.join(accounts)} | "
        "FLOPs, 10 s 512x768 |",
        "|---|" + "---:|" * 5,
    ]
    for scheme in SCHEMES[doing]:
        schemes = {name: account.scheme(scheme) for name, account in accounts.items()}
        peaks = [one.predicted_peak_bytes / 1e9 for one in schemes.values()]
        cells = [f"{peak:.0f} GB" if peak >= 100 else f"{peak:.1f} GB" for peak in peaks]
        flops = schemes["10 s 512x768"].relative_flops
        lines.append(f"| {scheme} | {' | '.join(cells)} | {flops:.2f}x |")
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
    kinds = {
        "decodes": (decode_row, DECODES),
        "encodes": (encode_row, ENCODES),
        "upsamplings": (upsampling_row, UPSAMPLINGS),
    }
    for kind, (row, cases) in kinds.items():
        chosen = {name: case for name, case in cases.items() if options.only in name}
        result[kind] = [row(name, *case, options.budget) for name, case in chosen.items()]
    if not options.only:
        path = results_file(result["machine"])
        path = path.with_name(f"vae-{path.name}")
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
    print(vae_table(result))


if __name__ == "__main__":
    main()
