# SPDX-License-Identifier: Apache-2.0
"""The page of operators says what is so: its examples run, and its table names what there is."""

import re
from pathlib import Path

import torch

import kandinsky_kernels as ops

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "kandinsky_kernels" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def table() -> dict[str, list[str]]:
    """The other cells of the row of each operator."""
    rows = {}
    for line in PAGE.partition("\n## Operators\n")[2].partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows.update((name, cells) for name in re.findall(r"`(\w+)`", names))
    return rows


def test_examples_run_one_after_the_other(capsys):
    """Later examples go on with the names of earlier ones, as a reader would."""
    names: dict = {}
    for example in EXAMPLES:
        exec(compile(example, "kandinsky_kernels/README.md", "exec"), names)
    assert names["out"].shape == (1, 256, 2, 64)
    assert names["out"].isfinite().all()
    shape_and_density, share = capsys.readouterr().out.splitlines()
    density = float(shape_and_density.split()[-1])
    assert shape_and_density == f"torch.Size([1, 256, 2, 64]) {density}"
    assert 0.25 <= density <= 1.0  # the diagonal at least
    assert float(share) == density


def test_the_first_example_has_fifteen_lines():
    assert len(EXAMPLES[0].strip().splitlines()) <= 15


def test_the_table_names_every_operator():
    functions_of_operators = {"norm_rope_means"}
    assert set(table()) == set(ops.kernels()) | functions_of_operators


def test_the_table_knows_which_operators_have_a_cpp_kernel():
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    if ops._library.extension is None:
        return
    for name in ops.kernels():
        _, cpu, *_ = table()[name]
        assert (cpu == "C++") == has(f"kandinsky_kernels::{name}", "CPU"), name
