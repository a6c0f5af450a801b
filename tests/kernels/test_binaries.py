# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as binaries for every architecture, read without a GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky_kernels import tuning


@pytest.fixture(scope="module")
def cubins(once):
    """One row for each kernel and architecture, as `tests.support.cubins` prints them."""
    return once("cubins", compile_everything)


def compile_everything(_folder):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.cubins"]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_no_kernel_spills_and_every_architecture_is_built(cubins):
    assert {row["sm"] for row in cubins} == {80, 86, 89, 90, 100, 120}
    stack = {row["kernel"]: 0 for row in cubins} | tuning.STACK_BYTES
    assert [row for row in cubins if row["local"] > stack[row["kernel"]]] == []


def test_products_use_the_matrix_units_of_their_architecture(cubins):
    rows = [row for row in cubins if "attention" in row["kernel"] or "conv" in row["kernel"]]
    wanted = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
    for row in rows:
        assert [unit for unit in ("wgmma", "mma", "tcgen05") if row[unit]] == [wanted[row["sm"]]], (
            row
        )
        described = row["sm"] in (90, 100) or row["sm"] == 120 and "backward" not in row["kernel"]
        assert row["tma"] == (
            described and "block_sparse" in row["kernel"] and "ragged" not in row["kernel"]
        ), row


def test_shared_memory_leaves_room_for_a_second_program(cubins):
    # KiB, CUDA programming guide, table of technical specifications
    per_sm = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
    for row in cubins:
        alone = re.match("block_sparse_attention.*-128|frame_causal_attention-512", row["kernel"])
        residents = 1 if alone or "conv" in row["kernel"] and row["sm"] in (90, 100) else 2
        assert residents * (row["shared"] + 1024) <= per_sm[row["sm"]] << 10, row


def test_turns_of_attention_on_mma_sync_stay_within_their_warps(cubins):
    """Warps lie along rows only, so that nothing passes between them; and what a turn may cost at
    most. Loops over descriptors also wait in loops of their own, and are not counted."""
    rows = [row for row in cubins if "block_sparse" in row["kernel"]]
    rows = [row for row in rows if row["mma"] and not row["tma"]]
    rows = [row for row in rows if row["kernel"] not in tuning.EIGHT_WARPS]
    assert {row["sm"] for row in rows} == {80, 86, 89, 120}
    for row in rows:
        if row["kernel"] == "block_sparse_attention_backward_query-128-ragged" and row["sm"] == 120:
            continue  # not split there
        assert all(layout.endswith(", 1") for layout in row["layouts"]), row
        over = {name: n for name, n in row["loop"].items() if n > tuning.TURN.get(name, n)}
        assert not over, row


def test_two_programs_of_the_forward_kernel_are_resident(cubins):
    rows = [row for row in cubins if re.match("block_sparse_attention-", row["kernel"])]
    assert [row for row in rows if row["programs"] < 2] == []


def test_turns_of_norm_rope_read_angles_by_fours_and_pass_nothing_between_warps(cubins):
    """Two tokens a turn: each has a load of x (and of a gradient), two of four angles, and three
    positions."""
    rows = [row for row in cubins if row["kernel"].startswith("norm_rope")]
    assert rows
    for row in rows:
        loads = 2 * (7 if "backward" in row["kernel"] else 6)
        assert row["loop"]["LDG"] == loads, row
        assert not any(row["loop"][name] for name in ("BAR", "STS", "LDL", "STL")), row
