# SPDX-License-Identifier: Apache-2.0
"""Results as markdown: ``python -m benchmarks.report benchmarks/results/*.json [--into README.md]``."""
import argparse
import json
from pathlib import Path

PROVIDERS = ("ours", "reference", "torch", "compiled", "dense")
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def _ms(timing: dict | None) -> str:
    if timing is None:
        return "-"
    return f"{timing['median_ms']:.3g}{' (noisy)' if timing['noisy'] else ''}"


def _rate(row: dict) -> str:
    if row["gflop_s"]:
        return f"{row['gflop_s']:.0f} GFLOP/s"
    return f"{row['gb_s']:.1f} GB/s"


def machine_line(result: dict) -> str:
    m, roofs = result["machine"], result["roofs"]
    return (f"{m['cpu']}, {m['threads']} threads, {m['simd']}, torch {m['torch']}, {m['compiler']}, commit {m['commit']}; "
            f"copy {roofs['copy_gb_s']} GB/s, matrix product {roofs['matmul_gflop_s']} GFLOP/s.")


def operators_table(result: dict) -> str:
    """Medians side by side, and what ours reaches of the copy (norms) or the matrix product (attention) of the same run."""
    lines = ["| case | ours, ms | reference, ms | torch, ms | torch compiled, ms | torch dense, ms | ours | of the roof |",
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


def markdown(result: dict) -> str:
    return "\n\n".join((machine_line(result), operators_table(result), bars_table(result)))


def insert(text: str, figures: str) -> str:
    """``text`` with everything between the two markers replaced. Raises ValueError where they are missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the file must hold the markers {BEGIN} and {END}, in this order; add them where the figures belong.")
    return f"{before}{begin}\n{figures}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints results as markdown, or writes them into a file.")
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, help=f"replace what stands between {BEGIN} and {END} in this file")
    options = parser.parse_args()
    figures = "\n\n".join(markdown(json.loads(path.read_text())) for path in options.results)
    if options.into:
        options.into.write_text(insert(options.into.read_text(), figures))
    else:
        print(figures)


if __name__ == "__main__":
    main()
