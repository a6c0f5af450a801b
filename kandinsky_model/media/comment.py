# SPDX-License-Identifier: Apache-2.0
"""The comment tag that `video.save` puts into every format."""

from __future__ import annotations

from pathlib import Path

CONTAINERS = (".mp4", ".webm")


def read_comment(path: Path) -> str:
    """The comment in a video or picture; "" where there is none.

    Raises FileNotFoundError, or ValueError for what is neither.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file, but does not exist; check the path")
    return _of_container(path) if path.suffix.lower() in CONTAINERS else _of_picture(path)


def _of_container(path: Path) -> str:
    import av

    try:
        with av.open(str(path)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
    except (OSError, ValueError) as error:  # what PyAV's errors derive from
        raise ValueError(
            f"{path} must be a video that PyAV can read, but is not ({error}); choose another file"
        ) from None
    return tags.get("comment", "")


def _of_picture(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path) as image:
            value = image.info.get("comment", image.info.get("Comment", ""))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} must be a picture that Pillow can read, but is not ({error}); choose another "
            "file"
        ) from None
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
