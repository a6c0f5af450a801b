# SPDX-License-Identifier: Apache-2.0
"""A few cases of the fuzzer, always the same ones; `make fuzz` runs more."""

import pytest

from .operators import fuzz


@pytest.mark.parametrize("references", [False, True], ids=["kernels", "references"])
def test_operators_answer_or_refuse(references):
    fuzz(first=0, cases=800, seconds=600, references=references)
