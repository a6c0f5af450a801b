# SPDX-License-Identifier: Apache-2.0
"""Charts in matplotlib: a figure outside pyplot's global state, one curve for each layer, a grid of
maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

DPI = 100
NAMED = 10  # curves in a legend at most
SINGLE = 20  # points of a curve at most that are marked one by one
SIDE, GAP = 96, 4  # pixels of a map's side, and between two maps


def require() -> None:
    """RuntimeError where charts cannot be drawn; for before the work that they will show."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"charts require matplotlib, which cannot be imported ({error}); "
            "pip install 'kandinsky-kernels[charts]'"
        ) from error


def figure(width: float = 560, height: float = 360):
    """An empty matplotlib Figure of `width` x `height` pixels. RuntimeError without matplotlib."""
    require()
    from matplotlib.figure import Figure

    return Figure((width / DPI, height / DPI), dpi=DPI, layout="constrained")


def describe(axes, title: str, x: str, y: str) -> None:
    """Put a title over `axes`, taken literally whatever signs it holds, and names at its sides."""
    axes.set_title(_literal(title), loc="left", fontsize="medium", wrap=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x == "step":  # of which there are no halves
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")


def curves(axes, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw one curve for each name, through its (x, y) points; colours follow the order.

    Names stand beside the curves, unless there is only one; of many, only some are named.
    """
    from matplotlib import colormaps

    # up to 0.85: the colours after it are too pale for white paper
    shades = colormaps["viridis"]([0.85 * i / max(1, len(series) - 1) for i in range(len(series))])
    every = -(-len(series) // NAMED)
    for i, (name, points) in enumerate(series.items()):
        axes.plot(
            *zip(*points, strict=True),
            color=shades[i],
            marker="o" if len(points) <= SINGLE else None,
            markersize=4,
            label=name if i % every == 0 else None,
        )
    if len(series) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def grid_of_maps(maps: Tensor, title: str, rows: str = "row", columns: str = "column"):
    """A matplotlib Figure of maps [R, C, N, N], 0 black and 1 white, in squares of SIDE pixels.

    rows, columns: what a row and what a column of squares is called. A map larger than its square
    is averaged down.
    """
    drawn = figure()
    from matplotlib import colormaps

    R, C, N = maps.shape[:3]
    squares = interpolate(maps.float(), (SIDE, SIDE), mode="nearest" if N < SIDE else "area")
    tiles = pad(squares, (GAP, 0, GAP, 0), value=torch.nan)  # [R, C, GAP + SIDE, GAP + SIDE]
    step = SIDE + GAP
    image = tiles.transpose(1, 2).reshape(R * step, C * step).cpu()
    image = pad(image, (0, GAP, 0, GAP), value=torch.nan)

    left, top, margin = 60, 72, 10  # pixels around the image
    down, across = image.shape
    width, height = max(560, left + across + margin), top + down + margin
    drawn.set_size_inches(width / DPI, height / DPI)
    drawn.set_layout_engine("none")  # a pixel of the figure for each of the image
    axes = drawn.add_axes((left / width, margin / height, across / width, down / height))
    axes.set_frame_on(False)
    shades = colormaps["gray"].with_extremes(bad="0.85")  # tells white maps from white paper
    axes.imshow(image.numpy(), cmap=shades, vmin=0, vmax=1, interpolation="none", aspect="auto")
    axes.set_xticks([GAP + SIDE / 2 + step * i for i in range(C)], [str(i) for i in range(C)])
    axes.set_yticks([GAP + SIDE / 2 + step * i for i in range(R)], [str(i) for i in range(R)])
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set_xlabel(columns)
    axes.set_ylabel(rows)
    drawn.text(margin / width, 1 - margin / height, _literal(title), va="top")
    return drawn


def _literal(text: str) -> str:
    """`text` for matplotlib, which takes what is between two dollars for a formula."""
    return text.replace("$", r"\$")
