# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton kernels for an AMD card (gfx942) without one.

``python -m tests.support.amdgcn [kernel ...]`` prints a line of JSON for each; all of them without
names. It runs as a process of its own, because the tests' process has Triton's interpreter on.
"""

import json
import re
import sys

from triton.backends.compiler import GPUTarget

from kandinsky_kernels import cards

from . import cubins

TARGET = GPUTarget("hip", "gfx942", 64)
COUNTS = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")


def main():
    wanted = sys.argv[1:]
    for name, kernel, constants, launch in (
        *cubins.kernels(cards.AMD),
        *cubins.vae_kernels(cards.AMD),
    ):
        if wanted and name not in wanted:
            continue
        result = cubins.compiled(kernel, constants, launch, TARGET)
        code = result.asm["amdgcn"]
        counts = {key: int(re.search(rf"\.{key}:\s*(\d+)", code)[1]) for key in COUNTS}
        row = {
            "kernel": name,
            **counts,
            "shared": result.metadata.shared,
            "products": code.count("v_mfma"),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
