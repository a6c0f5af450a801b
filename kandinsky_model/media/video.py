# SPDX-License-Identifier: Apache-2.0
"""Frames to files: mp4 (H.264), gif, png. Frames are uint8 [F, H, W, 3], RGB.

Every writer fills a temporary file beside the target and renames it at the end, so a target is
either whole or untouched.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..files import replacing

FORMATS = (".mp4", ".gif", ".png")
CRF = 16
BT709 = 1  # ITU-T H.273: the code of BT.709 for primaries, transfer and matrix alike
LIMITED_RANGE = 1  # FFmpeg's code for luma in 16..235
STRIP_GAP = 4  # pixels between the frames of a strip

_log = logging.getLogger(__name__)


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
    if path.suffix.lower() == ".mp4":
        h264_encoder()
    return path


def h264_encoder() -> str:
    """The name of the H.264 encoder that mp4 files are written with; RuntimeError if this machine
    has none."""
    try:
        import av
    except ImportError as error:
        raise RuntimeError(
            f"mp4 output requires PyAV, which cannot be imported ({error}); pip "
            "install av, or write a .gif"
        ) from error
    for name in ("libx264", "h264"):
        try:
            return av.codec.Codec(name, "w").name
        except ValueError:  # av's UnknownCodecError
            continue
    raise RuntimeError(
        "mp4 output requires an H.264 encoder, but this build of PyAV has none; "
        "pip install av from PyPI, or write a .gif"
    )


def save(
    frames: Tensor | Iterable[Tensor],
    path: str | os.PathLike,
    fps: int = 24,
    comment: str = "",
) -> list[Path]:
    """Write uint8 [F, H, W, 3] to `path` in the format of its extension; the files written.

    frames: all of them, or consecutive pieces of them, which an mp4 encodes as they come.
    mp4: H.264, yuv420p, BT.709, index in front; needs even sides. gif: loops. png: one frame gives
    exactly `path`, several give `<stem>_000.png`, `<stem>_001.png`, ... `comment` goes into the
    file's comment tag. Raises ValueError or TypeError for other frames, and what `check_output`
    raises.
    """
    path = check_output(path)
    pieces = _checked([frames] if isinstance(frames, Tensor) else frames)
    suffix = path.suffix.lower()
    if suffix == ".png":
        return _save_png(torch.cat(list(pieces)), path, comment)
    with replacing(path) as target:
        if suffix == ".mp4":
            _write_mp4(pieces, target, fps, comment)
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


def strip(
    frames: Tensor,
    count: int = 6,
    height: int = 160,
) -> Tensor:
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


def _save_png(
    frames: Tensor,
    path: Path,
    comment: str,
) -> list[Path]:
    from PIL import Image, PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_itxt("Comment", comment)
    paths = _numbered(path, len(frames))
    for frame, target in zip(frames, paths, strict=True):
        with replacing(target) as partial:
            Image.fromarray(frame.numpy()).save(partial, pnginfo=info)
    return paths


def _numbered(path: Path, count: int) -> list[Path]:
    """`path` itself for one frame, `<stem>_000.png` and so on for several."""
    if count == 1:
        return [path]
    digits = max(3, len(str(count - 1)))
    return [path.with_name(f"{path.stem}_{i:0{digits}d}{path.suffix}") for i in range(count)]


def _write_gif(
    frames: Tensor,
    path: Path,
    fps: int,
    comment: str,
) -> None:
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


def _write_mp4(
    pieces: Iterator[Tensor],
    path: Path,
    fps: int,
    comment: str,
) -> None:
    import av

    first = next(pieces)
    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(
            f"mp4 requires even sides, got {height}x{width} (height x width); crop a row or column"
        )
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        options = {"crf": str(CRF), "preset": "fast"}
        stream = container.add_stream(h264_encoder(), rate=fps, options=options)
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context
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
