# SPDX-License-Identifier: Apache-2.0
"""Results as markdown: ``python -m benchmarks.report benchmarks/results/*.json [--into
benchmarks/README.md]``."""

import argparse
import json
from pathlib import Path

PROVIDERS = ("ours", "reference", "torch", "compiled", "dense")
GPU_KEYS = {
    "ms": "ms",
    "useful_tflop_s": "useful TFLOP/s",
    "of_copy": "share of a copy's rate",
    "over_eager": "times faster than eager",
    "over_compiled": "times faster than compiled",
    "over_flex": "times faster than compiled FlexAttention",
    "over_published": "times faster than the published recipe",
    "over_diffusers": "times faster than diffusers",
    "over_cudnn": "times faster than cuDNN",
    "budget_over_peak": "budget over measured peak",
    "predicted_over_peak": "predicted over measured peak",
}
GPU_BARS = (  # section, key, wanted, hoped for, the rows it is about; judged by the worst of them
    ("norms", "of_copy", 0.8, None, {}),
    ("norms", "over_eager", 3.0, None, {}),
    ("norms", "over_compiled", 1.2, None, {}),
    ("selection", "ms", 0.5, 0.25, {"size": "lite 10 s"}),
    ("selection", "ms", 0.8, 0.45, {"size": "pro 10 s"}),
    ("selection", "over_published", 30.0, None, {}),
    ("attention", "useful_tflop_s", 300.0, 340.0, {"size": "lite 10 s"}),
    ("attention", "useful_tflop_s", 350.0, 420.0, {"size": "pro 10 s"}),
    ("attention", "over_flex", 1.3, None, {}),
    ("together", "over_published", 2.0, None, {}),
    # or they stay cuDNN's
    ("convolutions", "over_cudnn", 1.15, None, {"size": "10 s, all frames"}),
    ("transformer", "ms", 1300.0, 1000.0, {"size": "lite 10 s"}),
    ("vae", "ms", 1800.0, 1300.0, {"size": "5 s", "policy": "global"}),
    ("vae", "ms", 3600.0, 2600.0, {"size": "10 s", "policy": "global"}),
    ("vae", "over_diffusers", 3.5, None, {"policy": "official"}),
    ("gradients", "ms", 56.0, 44.0, {"size": "lite 10 s"}),
    ("gradients", "over_flex", 1.3, None, {}),
    ("memory", "budget_over_peak", 1.0, None, {}),
    ("memory", "predicted_over_peak", 1.0, None, {}),
)
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
    return (
        f"{m['cpu']}, {m['threads']} threads, {m['simd']}, torch {m['torch']}, "
        f"{m['compiler']}, commit {m['commit']}; "
        f"copy {roofs['copy_gb_s']} GB/s, matrix product {roofs['matmul_gflop_s']} GFLOP/s."
    )


def operators_table(result: dict) -> str:
    """Medians side by side, and what ours reaches of the copy (norms) or the matrix product
    (attention) of the same run."""
    lines = [
        "| case | ours, ms | reference, ms | torch, ms | torch compiled, ms | torch dense, "
        "ms | ours | of the roof |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        times = " | ".join(_ms(row["timings"].get(provider)) for provider in PROVIDERS)
        lines.append(f"| {row['case']} | {times} | {_rate(row)} | {row['of_roof']:.0%} |")
    return "\n".join(lines)


def bars_table(result: dict) -> str:
    lines = ["| bar | measured | wanted | hoped for | |", "|---|---:|---:|---:|---|"]
    for bar in result["bars"]:
        lines.append(
            f"| {bar['name']} | {bar['measured']:.3g} | {bar['wanted']} | "
            f"{bar['hoped'] or '-'} | "
            f"{'holds' if bar['holds'] else 'does not hold'} |"
        )
    return "\n".join(lines)


def gpu_bars(result: dict) -> list[dict]:
    """GPU_BARS judged by the worst row each of them is about; bars about nothing measured are left
    out."""
    judged = []
    for section, key, wanted, hoped, about in GPU_BARS:
        rows = [row for row in result["rows"].get(section, []) if about.items() <= row.items()]
        values = [row["ms"].get("ours") if key == "ms" else row.get(key) for row in rows]
        values = [value for value in values if value is not None]  # not every row has every peer
        if not values:
            continue
        worst = max(values) if key == "ms" else min(values)
        name = ", ".join(
            [
                rows[0]["op"] if section != "norms" or about else "every norm",
                *about.values(),
                GPU_KEYS[key],
            ]
        )
        judged.append(
            {
                "name": name,
                "measured": worst,
                "wanted": wanted,
                "hoped": hoped,
                "holds": worst <= wanted if key == "ms" else worst >= wanted,
            }
        )
    return judged


def gpu_table(result: dict) -> str:
    """Medians side by side: ours, and each of the others with how many times longer it takes."""
    lines = [
        "| operator | size | case | ours, ms | others, ms (times ours) | reached |",
        "|---|---|---|---:|---|---:|",
    ]
    for row in (row for rows in result["rows"].values() for row in rows):
        ours = row["ms"].get("ours")
        others = [
            f"{name} {ms:.3g}" + (f" ({ms / ours:.2f}x)" if ours else "")
            for name, ms in row["ms"].items()
            if name != "ours"
        ]
        case = [
            row.get("mask"),
            row.get("policy"),
            f"{row['density']:.1%}" if "density" in row else None,
        ]
        reached = "-"
        if "useful_tflop_s" in row:
            reached = f"{row['useful_tflop_s']:.0f} TFLOP/s"
        elif "of_copy" in row:
            reached = f"{row['of_copy']:.0%} of a copy"
        lines.append(
            f"| {row['op']} | {row['size']} | {' '.join(filter(None, case)) or '-'} | "
            f"{f'{ours:.3g}' if ours else 'cannot run'} | "
            f"{'; '.join(others) or '-'} | {reached} |"
        )
    return "\n".join(lines)


def gpu_line(result: dict) -> str:
    m, roofs = result["machine"], result["ceilings"]
    return (
        f"{m.get('card', m['device'])}, torch {m['torch']}, Triton "
        f"{m.get('triton', 'absent')}, commit {m['commit']}; "
        f"copy {roofs['copy_gb_s']:.0f} GB/s, bf16 matrix product "
        f"{roofs['matmul_tflop_s']:.0f} TFLOP/s."
    )


def vae_table(result: dict) -> str:
    """Decodes and encodes beside diffusers', upsampling layers beside upsample, pad and
    convolve."""
    lines = [
        "| case | ours, ms | theirs, ms | times faster | wanted | our peak, MB | their peak, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in (*result["decodes"], *result.get("encodes", ()), *result["upsamplings"]):
        ours, theirs = (timing["median_ms"] for timing in row["timings"].values())
        peaks = (
            " | ".join(f"{peak / 1e6:.0f}" for peak in row["peak_bytes"].values())
            if "peak_bytes" in row
            else "- | -"
        )
        lines.append(
            f"| {row['case']} | {ours:.0f} | {theirs:.0f} | {row['times_faster']:.2f} | "
            f"{row['wanted']} | {peaks} |"
        )
    return "\n".join(lines)


def markdown(result: dict) -> str:
    if "decodes" in result:  # of benchmarks.vae
        return "\n\n".join((machine_line(result), vae_table(result)))
    if "ceilings" in result:  # of benchmarks.gpu
        return "\n\n".join(
            (gpu_line(result), gpu_table(result), bars_table({"bars": gpu_bars(result)}))
        )
    return "\n\n".join((machine_line(result), operators_table(result), bars_table(result)))


def insert(text: str, figures: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """``text`` with everything between the two markers replaced. Raises ValueError where they are
    missing."""
    before, begin, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(
            f"the file must hold the markers {' and '.join(markers)}, in this order; "
            "add them where the figures belong."
        )
    return f"{before}{begin}\n{figures}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Prints results as markdown, or writes them into a file."
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument(
        "--into", type=Path, help=f"replace what stands between {BEGIN} and {END} in this file"
    )
    options = parser.parse_args()
    figures = "\n\n".join(markdown(json.loads(path.read_text())) for path in options.results)
    if options.into:
        options.into.write_text(insert(options.into.read_text(), figures))
    else:
        print(figures)


if __name__ == "__main__":
    main()
