# SPDX-License-Identifier: Apache-2.0
"""A few cases of the fuzzer of files, always the same ones; `make fuzz` runs more."""

from .files import fuzz


def test_files_of_any_content_load_or_are_refused():
    fuzz(first=0, cases=60, seconds=600)
