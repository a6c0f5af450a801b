# SPDX-License-Identifier: Apache-2.0
"""A few writes of each command fail, always the same ones; `tests.fuzz.faults_cli` lets all of them
fail."""

from ..fuzz.faults_cli import SCENARIOS, sweep


def test_a_write_that_fails_loses_nothing(tmp_path):
    counts = sweep(tmp_path, most=4)
    assert set(counts) == set(SCENARIOS) and min(counts.values()) == 4
