#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One command for a machine with a GPU and no network: installs the wheel of `make wheel-cuda` (or WHEEL) beside the benchmarks and the
# tests in a folder of its own, out of the environment's way, and runs `python -m benchmarks.gpu` there. JSON and a log go to $OUT (default:
# build/gpu_gate). --minutes N, a whole number: all of it takes no longer (default: 12). Other options are passed on, such as --only
# SECTIONS or --small.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-build/gpu_gate}"
minutes=12
passed=()
while [ $# -gt 0 ]; do
    case "$1" in
        --minutes) minutes="$2"; shift 2 ;;
        *) passed+=("$1"); shift ;;
    esac
done
wheel="${WHEEL:-$(ls dist/cuda/*.whl || true)}"
[ -f "$wheel" ] || { echo "dist/cuda must hold one wheel, got '$wheel'; run make wheel-cuda, or name one by WHEEL" >&2; exit 2; }
mkdir -p "$OUT"
OUT="$(cd "$OUT" && pwd)"
tree="$(mktemp -d)"
trap 'rm -rf "$tree"' EXIT
"$PYTHON" -m pip install --disable-pip-version-check -q --no-index --no-deps --target "$tree" "$wheel"
cp -r tests csrc pyproject.toml "$tree"
ln -s "$PWD/benchmarks" "$tree/benchmarks"  # a link, for git to tell the commit
cd "$tree"
echo "installed after $SECONDS s"
timeout $((60 * minutes - SECONDS)) "$PYTHON" -m benchmarks.gpu --out "$OUT" --minutes "$minutes" --spent "$SECONDS" "${passed[@]}" \
    2>&1 | tee "$OUT/gate.log" | cut -c1-400
