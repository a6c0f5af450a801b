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
import triton

from benchmarks.gpu import expected, machine
from kandinsky_kernels import tuning

from ..support import cubins as cubin_rows

# architectures that a card of the table has
CARDS = {card.sm for card in machine.CARDS}
RECORDED = pytest.mark.skipif(
    not triton.__version__.startswith("3.9."), reason="records are of Triton 3.9's binaries"
)


@pytest.fixture(scope="module")
def made(once):
    """What `tests.support.cubins` prints."""
    return once("cubins", compile_everything)


@pytest.fixture(scope="module")
def cubins(made):
    """One row for each kernel and architecture."""
    return [row for row in made if row["kernel"] != "dense"]


@pytest.fixture(scope="module")
def limits():
    """What is recorded of each kernel."""
    return cubin_rows.recorded(tuning.BINARIES)


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
        described = "block_sparse" in row["kernel"] and "ragged" not in row["kernel"]
        assert row["tma"] == (described and row["sm"] == 100), row


def test_warps_of_attention_lie_along_rows(cubins):
    """Nothing passes between warps, then."""
    rows = [row for row in cubins if "layouts" in row and row["kernel"] not in tuning.ACROSS]
    assert {row["sm"] for row in rows} == {80, 86, 89, 90, 100, 120}
    for row in rows:
        assert all(layout.endswith(", 1") for layout in row["layouts"]), row


def test_turns_of_norm_rope_read_angles_by_fours_and_pass_nothing_between_warps(cubins):
    """Two tokens a turn: each has a load of x (and of a gradient), two of four angles, and three
    positions."""
    rows = [row for row in cubins if row["kernel"].startswith("norm_rope")]
    assert rows
    for row in rows:
        loads = 2 * (7 if "backward" in row["kernel"] else 6)
        assert row["loads"] == loads, row
        assert not any(row["turn"][name] for name in ("BAR", "STS", "LDL")), row


@RECORDED
def test_every_kernel_of_every_card_is_recorded(cubins, limits):
    assert {row["kernel"] for row in cubins} == set(limits)


@RECORDED
def test_turns_take_no_more_than_is_recorded(cubins, limits):
    """Barriers, exchanges between lanes, stores to shared memory and reads of the stack in a turn
    of the main loop."""
    for row in cubins:
        if row["sm"] in CARDS:
            most = limits[row["kernel"]]["turn"]
            over = {name: n for name, n in row["turn"].items() if n > most[name]}
            assert not over, row


@RECORDED
def test_as_many_programs_are_resident_as_is_recorded(cubins, limits):
    """From registers, shared memory and warps of the binary."""
    found = {}
    for row in cubins:
        if row["sm"] in CARDS:
            found.setdefault(row["kernel"], {})[row["sm"]] = row["programs"]
    assert found == {name: limit["programs"] for name, limit in limits.items()}


@RECORDED
def test_the_modelled_share_of_tensor_time_is_no_less_than_is_recorded(cubins, limits):
    rows = [row for row in cubins if "clocks" in row]
    assert {row["sm"] for row in rows} == CARDS
    for row in rows:
        least = limits[row["kernel"]]["shares"][row["sm"]]
        assert cubin_rows.share(row) >= least, row


@RECORDED
def test_no_turn_of_attention_has_more_than_three_barriers(limits):
    """But for eight warps, which share keys or queries."""
    rows = {name: row for name, row in limits.items() if name.startswith("block_sparse")}
    over = {name for name, row in rows.items() if row["turn"]["BAR"] > 3}
    assert over <= tuning.ACROSS


@RECORDED
def test_what_pro_may_reach_at_most(cubins):
    """Head dim 128: 66 % of an H100's tensor time before L2, and TFLOP/s of a 4090."""
    h100 = [row for row in cubins if row["sm"] == 90 and "clocks" in row]
    forward = [row for row in h100 if re.match(r"block_sparse_attention-128", row["kernel"])]
    assert len(forward) == 2
    assert all(cubin_rows.share(row) >= 66 for row in forward)
    (card,) = (card for card in machine.CARDS if card.sm == 89)
    speeds = {
        kind: expected.speed(cubins, tuple(name.format(128) for name in names), card, "l2")
        for kind, names in expected.KERNELS.items()
    }
    assert speeds["forward"] >= 155, speeds
    assert speeds["running maximum"] >= 155, speeds
    assert speeds["gradients"] >= 110, speeds


def test_the_model_bounds_a_published_measurement(made):
    """403 TFLOP/s of dense attention in Triton on an H100 (arXiv 2407.08608): not above what the
    model allows, and no less than three fifths of it."""
    (dense,) = (row for row in made if row["kernel"] == "dense")
    assert 403 <= dense["tflops"] <= 403 / 0.6


@RECORDED
def test_the_table_of_expected_speeds_is_of_these_binaries(cubins):
    readme = Path(expected.__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    begin, end = expected.MARKERS
    stated = readme.partition(begin)[2].partition(end)[0].strip()
    assert stated == expected.table(cubins)
