# SPDX-License-Identifier: Apache-2.0
"""The operators beside their references and beside plain PyTorch, on a CPU.

What is timed are the benchmark rows of the table of cases, ``tests/cases.py``.
``python -m benchmarks.ops`` prints a table and writes benchmarks/results/<machine>.json;
``pytest benchmarks/ops.py`` runs the same rows under pytest-benchmark. Both check the outputs of a
row before they time it.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch

import kandinsky_kernels
from kandinsky_kernels import reference
from tests.cases import BENCHES, Case, bytes_moved
from tests.support.backward import BACKWARD_BENCHES, without_gradients

from .clock import keep_memory, machine, measure, roofs
from .report import markdown

RESULTS = Path(__file__).parent / "results"
ROWS = [*BENCHES, *BACKWARD_BENCHES]


@dataclass(frozen=True)
class Bar:
    """A limit on the ratio of two medians of one run, set before the work began.

    ``over`` and ``under`` are (part of a case's id, provider) of numerator and denominator.
    """

    name: str
    over: tuple[str, str]
    under: tuple[str, str]
    wanted: float
    hoped: float | None = None
    less_is_better: bool = False

    def holds(self, ratio: float) -> bool:
        return ratio <= self.wanted if self.less_is_better else ratio >= self.wanted


def faster_than_dense(percent: int, wanted: float, hoped: float | None = None) -> Bar:
    """How many times faster sparse attention must be than dense, at a share of blocks kept."""
    case = f"attention-{percent}_percent"
    name = f"block_sparse_attention, {percent} % of the blocks: times faster than dense"
    return Bar(name, (case, "dense"), (case, "ours"), wanted, hoped)


BARS = [
    faster_than_dense(10, 6.0, 8.0),
    faster_than_dense(20, 3.5, 4.2),
    faster_than_dense(100, 0.8),
    Bar(
        "select_blocks over block_sparse_attention at 10 %",
        over=("select_blocks-128_blocks", "ours"),
        under=("attention-10_percent", "ours"),
        wanted=0.05,
        less_is_better=True,
    ),
    Bar(
        "gradient of block_sparse_attention over the forward pass at 10 %, in turns",
        over=("attention_backward-10_percent", "ours"),
        under=("attention_backward-10_percent", "forward"),
        wanted=3.0,
        hoped=2.5,
        less_is_better=True,
    ),
]


def kernel_of(case: Case) -> str:
    """The name of the kernel that a case times; `norm_rope_means` is a form of `norm_rope`."""
    return case.op.replace("_means", "")


def reference_call(case: Case, inputs: dict) -> Callable:
    """A call of the operator that runs its reference instead of the kernel, on the same inputs."""
    name = kernel_of(case)
    run = case.ready(case.operator.call, inputs)
    families = (kandinsky_kernels.norm, kandinsky_kernels.nabla, kandinsky_kernels.vae)
    module = next(family for family in families if hasattr(family, f"_{name}"))

    def call():
        with mock.patch.object(module, f"_{name}", getattr(reference, name)):
            return run()

    return call


def providers(case: Case, inputs: dict, compiled: bool) -> dict[str, Callable]:
    """Name -> call of everything that is timed for a case, on the same inputs.

    ``compiled`` adds torch.compile of the plain expression, for norms.
    """
    operator = case.operator
    calls = {
        "ours": case.ready(operator.call, inputs),
        "reference": reference_call(case, inputs),
        "torch": case.ready(operator.peer, inputs),
    }
    if compiled and "norm" in case.op and case in BENCHES:
        torch._dynamo.reset()
        calls["compiled"] = case.ready(torch.compile(operator.peer), inputs)
    if case in BACKWARD_BENCHES:
        calls["forward"] = lambda: case.forward.run(without_gradients(inputs))
    if operator.dense:
        calls["dense"] = operator.dense(**inputs)
    return calls


def row(case: Case, roof: dict[str, float], compiled: bool) -> dict:
    """Check the outputs of a case, time it, and compare its rate with the machine's roofs."""
    inputs = case.inputs()
    outputs = case.run(inputs)
    case.check(outputs, inputs)
    timings = measure(providers(case, inputs, compiled))
    ours = timings["ours"].median_ms
    flops = case.operator.flops(inputs)
    gb_s = bytes_moved(inputs, outputs) / 1e6 / ours
    gflop_s = flops / 1e6 / ours
    of_roof = gflop_s / roof["matmul_gflop_s"] if flops else gb_s / roof["copy_gb_s"]
    return {
        "case": case.id,
        "kernel": kandinsky_kernels.kernels()[kernel_of(case)]["cpu"],
        "gb_s": round(gb_s, 3),
        "gflop_s": round(gflop_s, 2),
        "of_roof": round(of_roof, 3),
        "timings": {name: timing.record() for name, timing in timings.items()},
    }


def bars(rows: list[dict]) -> list[dict]:
    """Every bar whose two medians are among the rows, with its ratio and whether it holds."""

    def median(case: str, provider: str) -> float:
        return next(row["timings"][provider]["median_ms"] for row in rows if case in row["case"])

    judged = []
    for bar in BARS:
        try:
            ratio = median(*bar.over) / median(*bar.under)
        except StopIteration:  # this run left the case out
            continue
        judged.append(
            {
                "name": bar.name,
                "measured": round(ratio, 4),
                "wanted": bar.wanted,
                "hoped": bar.hoped,
                "holds": bar.holds(ratio),
            }
        )
    return judged


def results_file(record: dict) -> Path:
    """Where the results of a machine are kept, given its record."""
    machine_name = f"{record['cpu']} {record['threads']} threads {record['simd']}"
    slug = re.sub(r"[^a-z0-9]+", "-", machine_name.lower()).strip("-")
    return RESULTS / f"{slug}.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Times the operators and writes benchmarks/results/<machine>.json."
    )
    parser.add_argument(
        "--only", default="", help="run the cases whose id contains this, and write nothing"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile of the plain expressions"
    )
    parser.add_argument(
        "--simd",
        help="restrict our kernels to scalar, avx2 or avx512; torch's own are restricted by "
        "ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2",
    )
    options = parser.parse_args()
    if options.simd:
        kandinsky_kernels._library.extension.set_simd(options.simd)
    keep_memory()
    roof = roofs()
    rows = []
    for case in ROWS:
        if options.only in case.id:
            print(f"timing {case.id}", flush=True)
            rows.append(row(case, roof, not options.no_compile))
    result = {"machine": machine(), "roofs": roof, "rows": rows, "bars": bars(rows)}
    if not options.only:
        RESULTS.mkdir(exist_ok=True)
        path = results_file(result["machine"])
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {path}")
    print(markdown(result))


@pytest.mark.parametrize("provider", ["ours", "reference", "torch"])
@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.id)
def test_speed(benchmark, case: Case, provider: str):
    """One provider of one case, for pytest-benchmark."""
    inputs = case.inputs()
    if provider == "ours":
        case.check(case.run(inputs), inputs)
    benchmark.extra_info.update(machine())
    benchmark.pedantic(providers(case, inputs, compiled=False)[provider], rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
