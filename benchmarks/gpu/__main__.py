# SPDX-License-Identifier: Apache-2.0
"""The operators and one transformer pass at full size on a GPU, beside what one would run instead,
all in one process.

``python -m benchmarks.gpu --out gate.json [--only norms,selection,...]``; `benchmarks/gpu/gate.sh`
builds and tests first. ``--small`` runs everything at toy sizes on any device: a test that the
benchmark itself works, not a measurement.
"""

import argparse
import json
import traceback
from pathlib import Path

import torch

import kandinsky_kernels as ops

from .. import diffusers
from .attention import attention, gradients, launches, selection, together
from .card import (
    FULL,
    SMALL,
    Clock,
    card,
    ceilings,
)
from .convolutions import convolutions
from .memory import memory
from .networks import transformer, vae
from .norms import norm_gradients, norms

SECTIONS = {
    "norms": norms,
    "selection": selection,
    "attention": attention,
    "together": together,
    "convolutions": convolutions,
    "transformer": transformer,
    "vae": vae,
    "diffusers": diffusers.on_gpu,
    "gradients": gradients,
    "norm_gradients": norm_gradients,
}
MORE = {"launches": launches, "memory": memory}  # run only when named: they take minutes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, required=True, help="where the JSON goes; rewritten after every section"
    )
    parser.add_argument(
        "--only",
        default=",".join(SECTIONS),
        help=f"sections, comma-separated, in order: {','.join(SECTIONS | MORE)}",
    )
    parser.add_argument("--small", action="store_true", help="toy sizes on any device")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds per provider and row")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        parser.error(
            "a CUDA device is required, torch sees none; use --small for toy sizes on the CPU"
        )
    clock = Clock(device, 0.01 if options.small else options.budget)
    roof = ceilings(clock, options.small)
    result = {
        "machine": card(device),
        "ceilings": roof,
        "kernels": ops.kernels(),
        "rows": {},
        "failed": {},
    }
    torch._functorch.config.donated_buffer = False  # a peer's backward pass is run again and again
    print(json.dumps(result["machine"]), json.dumps(roof), flush=True)
    for name in options.only.split(","):
        print(f"== {name}", flush=True)
        try:
            for size in SMALL if options.small else FULL:
                result["rows"][name] = result["rows"].get(name, []) + (SECTIONS | MORE)[name](
                    clock, size, roof
                )
        except Exception as error:  # the other sections' figures must not be lost
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"
        result |= {"kernels_after": ops.kernels(), "first_call_s": clock.first_call_s}
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if result["failed"]:
        raise SystemExit(f"failed: {result['failed']}")


if __name__ == "__main__":
    main()
