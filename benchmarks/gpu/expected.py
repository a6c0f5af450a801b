# SPDX-License-Identifier: Apache-2.0
"""What each card can reach at most in block-sparse attention, from its compiled kernels and without
a GPU: ``python -m benchmarks.gpu.expected [--into benchmarks/README.md]``.

The figures are modelled upper bounds, not measurements; `benchmarks/gpu/machine.py` is the model.
Compiling takes some minutes.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from ..report import insert
from . import machine

MARKERS = "<!-- expected: begin -->", "<!-- expected: end -->"
KERNELS = {
    "forward": ("block_sparse_attention-{}-bounded",),
    "running maximum": ("block_sparse_attention-{}",),
    "gradients": (
        "block_sparse_attention_backward_query-{}",
        "block_sparse_attention_backward_key-{}",
    ),
}


def speed(rows: Iterable[dict], names: tuple[str, ...], card: machine.Card, kind: str) -> float:
    """TFLOP/s of kernels that run one after the other, from rows of `tests.support.cubins`; kind is
    "alone" for tiles that are there at once, and "l2" for tiles that come out of L2."""
    found = [row for row in rows if row["sm"] == card.sm and row["kernel"] in names]
    flop = sum(machine.turn_flop(row["kernel"]) for row in found)
    return machine.tflops(flop, sum(row["clocks"][kind] for row in found), card)


def table(rows: list[dict]) -> str:
    """TFLOP/s of every card as Markdown, without and with the limit of L2."""
    lines = [
        "| card | ceiling | "
        + " | ".join(f"D = {width}, {kind}" for width in (64, 128) for kind in KERNELS)
        + " |",
        "|---|---:" + "|---:" * 2 * len(KERNELS) + "|",
    ]
    for card in machine.CARDS:
        cells = [card.name, f"{card.ceiling:.0f}"]
        for width in (64, 128):
            for names in KERNELS.values():
                names = tuple(name.format(width) for name in names)
                alone, l2 = (speed(rows, names, card, kind) for kind in ("alone", "l2"))
                cells.append(f"{alone:.0f}" if alone - l2 < 1 else f"{alone:.0f} ({l2:.0f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rows_of_attention(
    cards: Iterable[machine.Card], widths: Iterable[int], l2: float = machine.L2_BYTES
) -> list[dict]:
    """Rows of the kernels of the table, compiled now; tiles come out of L2 at ``l2`` bytes a
    clock."""
    os.environ.pop("TRITON_INTERPRET", None)
    from tests.support import cubins

    wanted = {
        name.format(width) for names in KERNELS.values() for name in names for width in widths
    }
    return [
        cubins.row_of(*kernel, card.sm, l2)
        for card in cards
        for kernel in cubins.kernels_of(card.sm)
        if kernel[0] in wanted
    ]


@functools.cache
def speeds(card: machine.Card, width: int, l2: float) -> dict[str, dict[str, float]]:
    """{kernel of KERNELS: {"alone" or "l2": TFLOP/s}}, by a process of its own: this one may have
    Triton's interpreter switched on."""
    command = [sys.executable, "-m", __spec__.name, "--speeds", str(card.sm), str(width), str(l2)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def print_speeds(sm: int, width: int, l2: float) -> None:
    (card,) = (card for card in machine.CARDS if card.sm == sm)
    rows = rows_of_attention([card], [width], l2)
    found = {}
    for kind, names in KERNELS.items():
        names = tuple(name.format(width) for name in names)
        found[kind] = {limit: speed(rows, names, card, limit) for limit in ("alone", "l2")}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--into", type=Path, help="a page whose markers the table is put between")
    parser.add_argument(
        "--speeds",
        nargs=3,
        metavar=("SM", "D", "L2"),
        help="print those of one card and head dim as JSON, with L2 bytes a clock",
    )
    options = parser.parse_args()
    if options.speeds:
        sm, width, l2 = options.speeds
        return print_speeds(int(sm), int(width), float(l2))
    text = table(rows_of_attention(machine.CARDS, (64, 128)))
    print(text)
    if options.into:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(insert(page, text, MARKERS), encoding="utf-8")


if __name__ == "__main__":
    main()
