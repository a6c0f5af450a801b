# SPDX-License-Identifier: Apache-2.0
"""Results as the markdown tables of the README: ``python -m benchmarks.report benchmarks/results/*.json``."""
import argparse
import json
from pathlib import Path

PROVIDERS = ("ours", "reference", "torch", "compiled", "dense")


def _ms(timing: dict | None) -> str:
    if timing is None:
        return "-"
    return f"{timing['median_ms']:.3g}{' (noisy)' if timing['noisy'] else ''}"


def _rate(row: dict) -> str:
    if row["gflop_s"]:
        return f"{row['gflop_s']:.0f} GFLOP/s"
    return f"{row['gb_s']:.1f} GB/s"


def operators_table(result: dict) -> str:
    """Milliseconds side by side. torch: the usual expression, compiled: the same through torch.compile."""
    lines = ["| case | ours, ms | reference, ms | torch, ms | torch compiled, ms | dense, ms | ours | of the roof |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in result["rows"]:
        times = " | ".join(_ms(row["timings"].get(provider)) for provider in PROVIDERS)
        lines.append(f"| {row['case']} | {times} | {_rate(row)} | {row['of_roof']:.0%} |")
    return "\n".join(lines)


def bars_table(result: dict) -> str:
    lines = ["| bar | measured | wanted | hoped for | |", "|---|---:|---:|---:|---|"]
    for bar in result["bars"]:
        lines.append(f"| {bar['name']} | {bar['measured']:.3g} | {bar['wanted']} | {bar['hoped'] or '-'} | "
                     f"{'holds' if bar['holds'] else 'does not hold'} |")
    return "\n".join(lines)


def machine_line(result: dict) -> str:
    m, roofs = result["machine"], result["roofs"]
    return (f"{m['cpu']}, {m['threads']} threads, {m['simd']}, torch {m['torch']}, {m['compiler']}, commit {m['commit']}; "
            f"copy {roofs['copy_gb_s']} GB/s, matrix product {roofs['matmul_gflop_s']} GFLOP/s")


def markdown(result: dict) -> str:
    return "\n\n".join((machine_line(result), operators_table(result), bars_table(result)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args().results:
        print(markdown(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
