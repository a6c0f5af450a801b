# SPDX-License-Identifier: Apache-2.0
"""Triton kernels compile for an AMD card, whose capability (9, 4) is no Hopper: with its matrix
units, within its 64 KiB of shared memory and without spilling. None has run on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

# one of each kind; `python -m tests.support.amdgcn` compiles all, of which the gradient of keys
# and values, ragged or wide, and the VAE's attention spill
KERNELS = {
    "select_blocks-1464": False,
    "norm_rope-64": False,
    "gated_add_norm-4096": False,
    "block_sparse_attention-64-bounded": True,
    "block_sparse_attention-128": True,
    "block_sparse_attention_backward_query-64": True,
    "group_norm_silu-128": False,
    "causal_conv3d-256-128-333": True,
}


def test_kernels_compile_for_gfx942():
    command = [sys.executable, "-m", "tests.support.amdgcn", *KERNELS]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = {row["kernel"]: row for row in map(json.loads, run.stdout.splitlines())}
    assert rows.keys() == KERNELS.keys()
    for name, row in rows.items():
        assert bool(row["products"]) == KERNELS[name], name
        assert row["shared"] <= 64 << 10, name
        assert row["vgpr_spill_count"] == row["private_segment_fixed_size"] == 0, name
