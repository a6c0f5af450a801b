# SPDX-License-Identifier: Apache-2.0
"""The operators against their references and against plain PyTorch, over the benchmark rows of the
table of cases.

``python -m benchmarks.ops`` prints the side-by-side table and writes
benchmarks/results/<machine>.json; ``pytest benchmarks/ops.py`` runs the same rows under
pytest-benchmark. Both check a row's outputs before they time it.
"""

import argparse
import json
import re
from collections.abc import Callable
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
# What is judged: a name, the medians (case, provider) of numerator and denominator, the wanted and
# the hoped-for ratio, and whether less is better.
BARS = [
    *(
        (
            f"block_sparse_attention, {percent} % of the blocks: times faster than dense",
            (f"attention-{percent}_percent", "dense"),
            (f"attention-{percent}_percent", "ours"),
            wanted,
            hoped,
            False,
        )
        for percent, wanted, hoped in ((10, 6.0, 8.0), (20, 3.5, 4.2), (100, 0.8, None))
    ),
    (
        "select_blocks over block_sparse_attention at 10 %",
        ("select_blocks-128_blocks", "ours"),
        ("attention-10_percent", "ours"),
        0.05,
        None,
        True,
    ),
    (
        "gradient of block_sparse_attention over the forward pass at 10 %, in turns",
        ("attention_backward-10_percent", "ours"),
        ("attention_backward-10_percent", "forward"),
        3.0,
        2.5,
        True,
    ),
]


def kernel_of(case: Case) -> str:
    """The operator that a case times."""
    return case.op.replace("_means", "")


def reference_call(case: Case, inputs: dict) -> Callable:
    """The operator with its reference in the kernel's place, on the same inputs."""
    name, run = kernel_of(case), case.ready(case.operator.call, inputs)
    families = (kandinsky_kernels.norm, kandinsky_kernels.nabla, kandinsky_kernels.vae)
    module = next(family for family in families if hasattr(family, f"_{name}"))

    def call():
        with mock.patch.object(module, f"_{name}", getattr(reference, name)):
            return run()

    return call


def providers(case: Case, inputs: dict, compiled: bool) -> dict[str, Callable]:
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
    """Checks the case, times it, and says how far from the machine's roof it is."""
    inputs = case.inputs()
    outputs = case.run(inputs)
    case.check(outputs, inputs)
    timings = measure(providers(case, inputs, compiled))
    ours, flops = timings["ours"].median_ms, case.operator.flops(inputs)
    gb_s, gflop_s = bytes_moved(inputs, outputs) / 1e6 / ours, flops / 1e6 / ours
    return {
        "case": case.id,
        "kernel": kandinsky_kernels.kernels()[kernel_of(case)]["cpu"],
        "gb_s": round(gb_s, 3),
        "gflop_s": round(gflop_s, 2),
        "of_roof": round(
            gflop_s / roof["matmul_gflop_s"] if flops else gb_s / roof["copy_gb_s"], 3
        ),
        "timings": {name: timing.record() for name, timing in timings.items()},
    }


def bars(rows: list[dict]) -> list[dict]:
    """The issue's limits, from medians of this run."""

    def median(case: str, provider: str) -> float:
        return next(row["timings"][provider]["median_ms"] for row in rows if case in row["case"])

    judged = []
    for what, over, under, wanted, hoped, smaller in BARS:
        try:
            measured = median(*over) / median(*under)
        except StopIteration:  # this run left the case out
            continue
        judged.append(
            {
                "name": what,
                "measured": round(measured, 4),
                "wanted": wanted,
                "hoped": hoped,
                "holds": measured <= wanted if smaller else measured >= wanted,
            }
        )
    return judged


def results_file(record: dict) -> Path:
    slug = re.sub(
        r"[^a-z0-9]+", "-", f"{record['cpu']} {record['threads']} threads {record['simd']}".lower()
    ).strip("-")
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
        help="restrict our kernels to scalar, avx2 or avx512; torch's "
        "own listen to ATEN_CPU_CAPABILITY=avx2 "
        "MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2",
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
def test_speed(benchmark, case, provider):
    inputs = case.inputs()
    if provider == "ours":
        case.check(case.run(inputs), inputs)
    benchmark.extra_info.update(machine())
    benchmark.pedantic(providers(case, inputs, compiled=False)[provider], rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    main()
