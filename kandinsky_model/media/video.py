# SPDX-License-Identifier: Apache-2.0
"""Frames to files: mp4 (H.264), webm (VP9), gif, png, jpg. Frames are uint8 [F, H, W, 3], RGB.

Every writer fills a temporary file beside the target and renames it at the end, so a target is
either whole or untouched.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import replacing

PICTURES = (".png", ".jpg", ".jpeg")
FORMATS = (".mp4", ".webm", ".gif", *PICTURES)
# libx264's macroblock tree writes other bytes from run to run for the same frames, even with one
# thread; without it a given number of threads always writes the same bytes. Frames lose as little
# at CRF 17 without the tree (mean and worst PSNR 43.08 and 42.09 dB) as at CRF 16 with it (42.86
# and 42.01 dB), and the file is 1.24 times as large: a published clip of 768x512x121. Times were
# not told apart. The number of threads is fixed, because the bytes depend on it.
X264_OPTIONS = {"crf": "17", "preset": "fast", "x264-params": "mbtree=0"}
VP9_OPTIONS = {"crf": "20", "b": "0", "deadline": "good", "cpu-used": "4"}  # quality, any rate
THREADS = 4
JPEG_QUALITY = 95  # above that, files grow and nobody sees why
BT709 = 1  # ITU-T H.273: the code of BT.709 for primaries, transfer and matrix alike
LIMITED_RANGE = 1  # FFmpeg's code for luma in 16..235
STRIP_GAP = 4  # pixels between the frames of a strip

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Container:
    """How clips with one suffix are written. encoders: by name, the preferred one first. options:
    of the encoder. muxing: options of the file. standard: what the encoders implement, with an
    article."""

    standard: str
    encoders: tuple[str, ...]
    options: Mapping[str, str]
    muxing: Mapping[str, str]


CONTAINERS = {
    ".mp4": Container("an H.264", ("libx264", "h264"), X264_OPTIONS, {"movflags": "+faststart"}),
    # Unless told to be bit-exact, the muxer draws random identifiers.
    ".webm": Container("a VP9", ("libvpx-vp9",), VP9_OPTIONS, {"fflags": "+bitexact"}),
}


def check_output(path: str | os.PathLike, formats: tuple[str, ...] = FORMATS) -> Path:
    """`path` as a Path, if a file could be written there now; to be called before any long work.

    Raises ValueError for an unknown extension or a directory, OSError where nothing can be written,
    RuntimeError without an encoder.
    """
    path = Path(path)
    if path.suffix.lower() not in formats:
        raise ValueError(
            f"the output must end in {' or '.join(formats)}, got {str(path)!r}; rename it"
        )
    if path.is_dir():
        raise ValueError(
            f"the output must be a file, but {str(path)!r} is a directory; name a file in it"
        )
    if not path.parent.is_dir():
        raise OSError(
            f"the output needs an existing directory, but {str(path.parent)!r} is none; "
            "create it or write elsewhere"
        )
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(
            f"the output directory {str(path.parent)!r} must be writable, got "
            f"{error.strerror!r}; write elsewhere"
        ) from error
    if path.suffix.lower() in CONTAINERS:
        encoder(path.suffix.lower())
    return path


def h264_encoder() -> str:
    """The name of the H.264 encoder that mp4 files are written with; RuntimeError if this machine
    has none."""
    return encoder(".mp4")


def encoder(suffix: str) -> str:
    """The name of the encoder that files with this suffix, a key of `CONTAINERS`, are written with;
    RuntimeError if this machine has none."""
    container = CONTAINERS[suffix]
    name = suffix[1:]
    try:
        import av
    except ImportError as error:
        raise RuntimeError(
            f"{name} output requires PyAV, which cannot be imported ({error}); pip "
            "install av, or write a .gif"
        ) from error
    for codec in container.encoders:
        try:
            return av.codec.Codec(codec, "w").name
        except ValueError:  # av's UnknownCodecError
            continue
    raise RuntimeError(
        f"{name} output requires {container.standard} encoder, but this build of PyAV has none; "
        "pip install av from PyPI, or write a .gif"
    )


def save(
    frames: Tensor | Iterable[Tensor], path: str | os.PathLike, fps: int = 24, comment: str = ""
) -> list[Path]:
    """Write uint8 [F, H, W, 3] to `path` in the format of its extension; the files written.

    frames: all of them, or consecutive pieces of them, which mp4 and webm encode as they come.
    mp4: H.264, yuv420p, BT.709, index in front; needs even sides. webm: the same in VP9. gif:
    loops. png, jpg: one frame gives exactly `path`, several give `<stem>_000.png`,
    `<stem>_001.png`, ... `comment` goes into the file's comment tag. The same frames give the same
    file. Raises ValueError or TypeError for other frames, and what `check_output` raises.
    """
    path = check_output(path)
    pieces = _checked([frames] if isinstance(frames, Tensor) else frames)
    suffix = path.suffix.lower()
    if suffix in PICTURES:
        return _save_pictures(torch.cat(list(pieces)), path, comment)
    with replacing(path) as target:
        if suffix in CONTAINERS:
            _write_clip(pieces, target, fps, comment)
        else:
            _write_gif(torch.cat(list(pieces)), target, fps, comment)
    return [path]


def _checked(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """The pieces on the CPU, at least one; ValueError or TypeError for what are no frames."""
    empty = True
    for frames in pieces:
        if frames.dtype != torch.uint8:
            raise TypeError(
                f"frames must be uint8, got {frames.dtype}; scale them to 0..255 and convert"
            )
        if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise ValueError(
                "frames must be [F, H, W, 3] with at least one frame, got "
                f"{list(frames.shape)}; permute them to that"
            )
        empty = False
        yield frames.cpu()
    if empty:
        raise ValueError(
            "frames must be [F, H, W, 3] with at least one frame, got no piece; "
            "decode a video first"
        )


def strip(frames: Tensor, count: int = 6, height: int = 160) -> Tensor:
    """A contact strip [1, h, w, 3] of frames [F, H, W, 3]: `count` of them, evenly spread from the
    first to the last, `height` pixels high, side by side with white gaps."""
    count = min(count, len(frames))
    chosen = frames[torch.linspace(0, len(frames) - 1, count).round().long()]  # [count, H, W, 3]
    width = round(frames.shape[2] * height / frames.shape[1])
    planes = chosen.permute(0, 3, 1, 2).float()  # [count, 3, H, W]
    small = F.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    levels = small.round().clamp(0, 255).byte()  # [count, 3, h, width]
    gap = torch.full((3, height, STRIP_GAP), 255, dtype=torch.uint8)
    columns = [levels[0]]
    for picture in levels[1:]:
        columns += [gap, picture]
    return torch.cat(columns, dim=2).permute(1, 2, 0)[None]  # [1, h, w, 3]


def _save_pictures(frames: Tensor, path: Path, comment: str) -> list[Path]:
    from PIL import Image, PngImagePlugin

    options: dict = {"comment": comment, "quality": JPEG_QUALITY}
    if path.suffix.lower() == ".png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("Comment", comment)
        options = {"pnginfo": info}
    paths = _numbered(path, len(frames))
    for frame, target in zip(frames, paths, strict=True):
        with replacing(target) as partial:
            Image.fromarray(frame.numpy()).save(partial, **options)
    return paths


def _numbered(path: Path, count: int) -> list[Path]:
    """`path` itself for one frame, `<stem>_000.png` and so on for several."""
    if count == 1:
        return [path]
    digits = max(3, len(str(count - 1)))
    return [path.with_name(f"{path.stem}_{i:0{digits}d}{path.suffix}") for i in range(count)]


def _write_gif(frames: Tensor, path: Path, fps: int, comment: str) -> None:
    from PIL import Image

    images = [Image.fromarray(frame.numpy()) for frame in frames]
    # A gif counts in hundredths of a second. Rounding when each frame ends, and not how long it
    # lasts, keeps the clip's speed.
    ends = [round(100 * (i + 1) / fps) for i in range(len(images))]
    milliseconds = [10 * (end - start) for start, end in pairwise([0, *ends])]
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=milliseconds,
        loop=0,
        comment=comment.encode(),
    )


def _write_clip(pieces: Iterator[Tensor], path: Path, fps: int, comment: str) -> None:
    import av

    suffix = path.suffix.lower()
    written = CONTAINERS[suffix]
    first = next(pieces)
    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"{suffix[1:]} requires even sides, got {height}x{width} (height x width); crop a row "
            "or column"
        )
    with av.open(str(path), "w", format=suffix[1:], options=dict(written.muxing)) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream(encoder(suffix), rate=fps, options=dict(written.options))
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
        codec.thread_count = THREADS
        codec.color_primaries = BT709
        codec.color_trc = BT709
        codec.colorspace = BT709
        codec.color_range = LIMITED_RANGE
        for frames in chain([first], pieces):
            for frame in frames:
                rgb = av.VideoFrame.from_ndarray(frame.numpy(), format="rgb24")
                yuv = rgb.reformat(
                    format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED_RANGE
                )
                container.mux(stream.encode(yuv))
        container.mux(stream.encode())  # what the encoder still holds
