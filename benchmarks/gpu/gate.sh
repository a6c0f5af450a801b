#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One command for a machine with a GPU and no network: builds in place, runs the GPU tests and compute-sanitizer on small cases, then
# the benchmarks. Everything goes to $OUT (default: build/gpu_gate). --only SECTIONS: those benchmarks alone, without build and tests.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-build/gpu_gate}"
mkdir -p "$OUT"
status=0
step() { # name, seconds, command...
    local name="$1" seconds="$2"; shift 2
    local start=$SECONDS
    timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1
    local code=$?
    echo "$name: exit $code after $((SECONDS - start)) s; last lines:"
    tail -n 4 "$OUT/$name.log" | cut -c1-300
    [ $code -eq 0 ] || status=1
}
if [ "${1:-}" = "--only" ]; then
    "$PYTHON" -m benchmarks.gpu --out "$OUT/gate.json" --only "$2"
    exit $?
fi
parallel=$("$PYTHON" -c 'import xdist' 2>/dev/null && echo "-n 8")  # most of the tests' time is compilation
step build 150 "$PYTHON" setup.py -q build_ext --inplace
step tests 150 "$PYTHON" -m pytest -q $parallel tests/kernels/test_triton.py tests/kernels/test_guard.py tests/kernels/test_gpu.py tests/kernels/test_cuda.py -k "not cubins and not spills and not matrix_units and not shared_memory"
if command -v compute-sanitizer >/dev/null; then
    step memcheck 90 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q -x tests/kernels/test_triton.py \
        -k "test_every_case and (odd or ragged-bfloat16 or select_blocks-one)"
else
    echo "memcheck: compute-sanitizer is not here, not run"
fi
timeout 390 "$PYTHON" -m benchmarks.gpu --out "$OUT/gate.json" 2>&1 | tee "$OUT/benchmarks.log" | cut -c1-400
[ "${PIPESTATUS[0]}" -eq 0 ] || status=1
# whole runs within memory budgets: needs about 60 GB of host memory, most of it pinned
step memory 300 "$PYTHON" -m benchmarks.gpu --out "$OUT/memory.json" --only memory
exit $status
