# SPDX-License-Identifier: Apache-2.0
"""Commands about checkpoints and this machine."""

from __future__ import annotations

from collections.abc import Iterator

from ..config import PRESETS, SIZES_HD, SIZES_SD


def doctor(args) -> None:
    from .doctor import report

    for line in report():
        print(line)


def verify(args) -> None:
    from ..checkpoints.verify import verify as lines_about

    for line in lines_about(args.path, args.values):
        print(line)


def quantize(args) -> None:
    from ..checkpoints.quantize import quantize_file

    for line in quantize_file(args.model, args.folder, args.mode):
        print(line)


def download(args) -> None:
    from ..checkpoints.locate import locate

    sources = locate(args.preset, args.revision)
    for name in ("dit", "vae", "text_encoder", "text_encoder_2"):
        if getattr(sources, name) is not None:
            print(f"{name.replace('_', ' '):14} {getattr(sources, name)}")


def comfyui(args) -> None:
    from ..comfyui.install import WORKFLOWS, install

    folder = install(args.path)
    print(f"{folder}\n{folder / WORKFLOWS}\nrestart ComfyUI to see the nodes, under Kandinsky 5")


def presets(args) -> None:
    rows = [list(next(preset_rows())), *(list(row.values()) for row in preset_rows())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(
            "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        )
    for name, sizes in (("SD", SIZES_SD), ("HD", SIZES_HD)):
        print(f"{name}: {', '.join(f'{width}x{height}' for height, width in sizes)}")


def preset_rows() -> Iterator[dict[str, str]]:
    """What `kandinsky presets` and the README say of every checkpoint, by column."""
    for preset in PRESETS.values():
        height, width = preset.sizes[0]
        kind = {frozenset(SIZES_SD): " SD", frozenset(SIZES_HD): " HD"}.get(
            frozenset(preset.sizes), ""
        )
        yield {
            "preset": preset.name,
            "mode": preset.task,
            "steps": str(preset.steps),
            "guidance": f"{preset.guidance:g}",
            "scale": f"{preset.scheduler_scale:g}",
            "attention": f"nabla {preset.nabla.keep_mass}" if preset.nabla else "dense",
            "frames": str(preset.frames),
            "size": f"the image's{kind}" if preset.task == "i2v" else f"{width}x{height}{kind}",
            "weights file": preset.filename or "bundled",
            "repository": preset.repo or "this package",
        }
