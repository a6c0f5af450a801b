# SPDX-License-Identifier: Apache-2.0
"""How many kernels a visual block launches on a GPU, counted without one."""

import pytest

from kandinsky_model.config import PRESETS

pytest.importorskip("triton", reason="needs Triton")


def test_a_block_for_all_tokens_takes_a_third_of_the_launches_and_copies_nothing():
    from benchmarks.launches import WAYS, count

    preset = PRESETS["t2v-lite-sft-10s"]
    parts, whole = (count(preset, chunks).counts for chunks in WAYS.values())
    assert whole.total() <= 30 < 90 <= parts.total()
    assert "copy_" in parts
    assert "copy_" not in whole
    assert whole["norm_rope (Triton)"] == 4
    assert whole["gated_add_norm (Triton)"] == 3
