# SPDX-License-Identifier: Apache-2.0
"""Commands about checkpoints and this machine."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator

from ..config import PRESETS, SIZES_HD, SIZES_SD


def doctor(args: Namespace) -> None:
    from .doctor import facts, report

    if args.json:
        print(json.dumps(facts(), indent=2))
        return
    for line in report():
        print(line)


def verify(args: Namespace) -> None:
    from ..checkpoints.verify import verify as lines_about

    for line in lines_about(args.path, args.values):
        print(line)


def quantize(args: Namespace) -> None:
    from ..checkpoints.quantize import quantize_file

    for line in quantize_file(args.model, args.folder, args.mode):
        print(line)


def download(args: Namespace) -> None:
    from ..checkpoints.locate import locate

    sources = locate(args.preset, args.revision)
    for name in ("dit", "vae", "text_encoder", "text_encoder_2"):
        if getattr(sources, name) is not None:
            print(f"{name.replace('_', ' '):14} {getattr(sources, name)}")


def comfyui(args: Namespace) -> None:
    from ..comfyui.install import WORKFLOWS, install

    folder = install(args.path)
    print(f"{folder}\n{folder / WORKFLOWS}\nrestart ComfyUI to see the nodes, under Kandinsky 5")


def presets(args: Namespace) -> None:
    rows = list(preset_rows())
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = [f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)]
        print("  ".join(padded).rstrip())
    for name, sizes in (("SD", SIZES_SD), ("HD", SIZES_HD)):
        print(f"{name}: {', '.join(f'{width}x{height}' for height, width in sizes)}")


def preset_rows() -> Iterator[dict[str, str]]:
    """One row for every preset, by column: the table of `kandinsky presets` and of the README."""
    families = {frozenset(SIZES_SD): " SD", frozenset(SIZES_HD): " HD"}
    for preset in PRESETS.values():
        height, width = preset.sizes[0]
        family = families.get(frozenset(preset.sizes), "")
        size = "the image's" if preset.task == "i2v" else f"{width}x{height}"
        yield {
            "preset": preset.name,
            "mode": preset.task,
            "steps": str(preset.steps),
            "guidance": f"{preset.guidance:g}",
            "scale": f"{preset.scheduler_scale:g}",
            "attention": f"nabla {preset.nabla.keep_mass}" if preset.nabla else "dense",
            "frames": str(preset.frames),
            "size": f"{size}{family}",
            "weights file": preset.filename or "bundled",
            "repository": preset.repo or "this package",
        }
