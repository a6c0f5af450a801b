# SPDX-License-Identifier: Apache-2.0
"""Result files as tables in Markdown.

``python -m benchmarks.report benchmarks/results/*.json`` prints them, and with
``--into benchmarks/README.md`` writes them between the markers of that file.
"""

import argparse
import json
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class GpuBar:
    """A limit on one figure of a section of ``benchmarks.gpu``, judged by the worst of its rows.

    ``about`` selects the rows: those that hold all of its items. Milliseconds must not exceed
    ``wanted``, every other figure must reach it.
    """

    section: str
    key: str
    wanted: float
    hoped: float | None = None
    about: dict[str, str] = field(default_factory=dict)

    def figure(self, row: dict) -> float | None:
        """The figure of a row, None where the row has none: not every row has every peer."""
        return row["ms"].get("ours") if self.key == "ms" else row.get(self.key)

    def worst(self, values: list[float]) -> float:
        return max(values) if self.key == "ms" else min(values)

    def holds(self, worst: float) -> bool:
        return worst <= self.wanted if self.key == "ms" else worst >= self.wanted

    def name(self, op: str) -> str:
        """What a table calls the bar; ``op`` is the operator of its first row."""
        subject = "every norm" if self.section == "norms" and not self.about else op
        return ", ".join([subject, *self.about.values(), GPU_KEYS[self.key]])


LITE = {"size": "lite 10 s"}
PRO = {"size": "pro 10 s"}
GPU_BARS = (
    GpuBar("norms", "of_copy", 0.8),
    GpuBar("norms", "over_eager", 3.0),
    GpuBar("norms", "over_compiled", 1.2),
    GpuBar("selection", "ms", 0.5, 0.25, LITE),
    GpuBar("selection", "ms", 0.8, 0.45, PRO),
    GpuBar("selection", "over_published", 30.0),
    GpuBar("attention", "useful_tflop_s", 300.0, 340.0, LITE),
    GpuBar("attention", "useful_tflop_s", 350.0, 420.0, PRO),
    GpuBar("attention", "over_flex", 1.3),
    GpuBar("together", "over_published", 2.0),
    # Where this one does not hold, convolutions stay with cuDNN.
    GpuBar("convolutions", "over_cudnn", 1.15, about={"size": "10 s, all frames"}),
    GpuBar("transformer", "ms", 1300.0, 1000.0, LITE),
    GpuBar("decode", "ms", 1800.0, 1300.0, {"size": "5 s", "policy": "global"}),
    GpuBar("decode", "ms", 3600.0, 2600.0, {"size": "10 s", "policy": "global"}),
    GpuBar("decode", "over_diffusers", 3.5, about={"policy": "official"}),
    GpuBar("gradients", "ms", 56.0, 44.0, LITE),
    GpuBar("gradients", "over_flex", 1.3),
    GpuBar("memory", "budget_over_peak", 1.0),
    GpuBar("memory", "predicted_over_peak", 1.0),
)
BEGIN = "<!-- figures: begin -->"
END = "<!-- figures: end -->"


def _ms(timing: dict | None) -> str:
    if timing is None:
        return "-"
    return f"{timing['median_ms']:.3g}{' (noisy)' if timing['noisy'] else ''}"


def _rate(row: dict) -> str:
    if row["gflop_s"]:
        return f"{row['gflop_s']:.0f} GFLOP/s"
    return f"{row['gb_s']:.1f} GB/s"


def machine_line(result: dict) -> str:
    """The machine of a result on a CPU, and the best it did in the same run."""
    machine = result["machine"]
    roofs = result["roofs"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['simd']}, "
        f"torch {machine['torch']}, {machine['compiler']}, commit {machine['commit']}; "
        f"copy {roofs['copy_gb_s']} GB/s, matrix product {roofs['matmul_gflop_s']} GFLOP/s."
    )


def operators_table(result: dict) -> str:
    """Medians side by side, and the rate of ours as a share of the roof.

    The roof of norms is a copy, that of attention a matrix product, both of the same run.
    """
    lines = [
        "| case | ours, ms | reference, ms | torch, ms | torch compiled, ms | torch dense, ms "
        "| ours | of the roof |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        times = " | ".join(_ms(row["timings"].get(provider)) for provider in PROVIDERS)
        lines.append(f"| {row['case']} | {times} | {_rate(row)} | {row['of_roof']:.0%} |")
    return "\n".join(lines)


def bars_table(bars: list[dict]) -> str:
    lines = ["| bar | measured | wanted | hoped for | |", "|---|---:|---:|---:|---|"]
    for bar in bars:
        hoped = bar["hoped"] or "-"
        verdict = "holds" if bar["holds"] else "does not hold"
        lines.append(
            f"| {bar['name']} | {bar['measured']:.3g} | {bar['wanted']} | {hoped} | {verdict} |"
        )
    return "\n".join(lines)


def gpu_bars(result: dict) -> list[dict]:
    """GPU_BARS with what was measured; bars about rows that the run left out are left out."""
    judged = []
    for bar in GPU_BARS:
        section = result["rows"].get(bar.section, [])
        rows = [row for row in section if bar.about.items() <= row.items()]
        values = [value for row in rows if (value := bar.figure(row)) is not None]
        if not values:
            continue
        worst = bar.worst(values)
        judged.append(
            {
                "name": bar.name(rows[0]["op"]),
                "measured": worst,
                "wanted": bar.wanted,
                "hoped": bar.hoped,
                "holds": bar.holds(worst),
            }
        )
    return judged


def _gpu_row(row: dict) -> str:
    ours = row["ms"].get("ours")
    others = []
    for name, ms in row["ms"].items():
        if name != "ours":
            others.append(f"{name} {ms:.3g} ({ms / ours:.2f}x)" if ours else f"{name} {ms:.3g}")
    case = [row[key] for key in ("mask", "policy") if row.get(key)]
    if "density" in row:
        case.append(f"{row['density']:.1%}")
    reached = "-"
    if "useful_tflop_s" in row:
        reached = f"{row['useful_tflop_s']:.0f} TFLOP/s"
    elif "of_copy" in row:
        reached = f"{row['of_copy']:.0%} of a copy"
    cells = [
        row["op"],
        row["size"],
        " ".join(case) or "-",
        f"{ours:.3g}" if ours else "cannot run",
        "; ".join(others) or "-",
        reached,
    ]
    return f"| {' | '.join(cells)} |"


def gpu_table(result: dict) -> str:
    """Medians side by side: ours, and how many times as long each of the others takes."""
    lines = [
        "| operator | size | case | ours, ms | others, ms (times ours) | reached |",
        "|---|---|---|---:|---|---:|",
    ]
    rows = [row for section in result["rows"].values() for row in section]
    lines += [_gpu_row(row) for row in rows if "ms" in row]
    return "\n".join(lines)


def gpu_line(result: dict) -> str:
    """The machine of a result on a GPU, and the best it did in the same run."""
    machine = result["machine"]
    roofs = result["ceilings"]
    return (
        f"{machine.get('card', machine['device'])}, torch {machine['torch']}, "
        f"Triton {machine.get('triton', 'absent')}, commit {machine['commit']}; "
        f"copy {roofs['copy_gb_s']:.0f} GB/s, bf16 matrix product "
        f"{roofs['matmul_tflop_s']:.0f} TFLOP/s."
    )


def verdicts_line(result: dict) -> str:
    """How many kernels passed their self-tests on released shapes, and which did not."""
    rows = result["rows"]["selftests"]
    wrong = [f"{row['op']} ({row['size']})" for row in rows if row["verdict"] != "right"]
    count = f"Self-tests on released shapes: {len(rows) - len(wrong)} of {len(rows)} right"
    return f"{count}; not right: {', '.join(wrong)}." if wrong else f"{count}."


def vae_table(result: dict) -> str:
    """Decodes and encodes beside diffusers', and upsampling layers beside their plain form:
    upsample, pad and convolve."""
    lines = [
        "| case | ours, ms | theirs, ms | times faster | wanted | our peak, MB | their peak, MB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in (*result["decodes"], *result.get("encodes", ()), *result["upsamplings"]):
        ours, theirs = (timing["median_ms"] for timing in row["timings"].values())
        peaks = "- | -"
        if "peak_bytes" in row:
            peaks = " | ".join(f"{peak / 1e6:.0f}" for peak in row["peak_bytes"].values())
        lines.append(
            f"| {row['case']} | {ours:.0f} | {theirs:.0f} | {row['times_faster']:.2f} | "
            f"{row['wanted']} | {peaks} |"
        )
    return "\n".join(lines)


def markdown(result: dict) -> str:
    """The tables of one result file; its keys tell which benchmark wrote it."""
    if "decodes" in result:  # benchmarks.vae
        parts = (machine_line(result), vae_table(result))
    elif "ceilings" in result:  # benchmarks.gpu
        verdicts = [verdicts_line(result)] if "selftests" in result["rows"] else []
        parts = (
            gpu_line(result),
            *verdicts,
            gpu_table(result),
            bars_table(gpu_bars(result)),
        )
    else:  # benchmarks.ops
        parts = (machine_line(result), operators_table(result), bars_table(result["bars"]))
    return "\n\n".join(parts)


def joined(results: list[dict]) -> list[dict]:
    """The sections of one run of benchmarks.gpu, a file each, as one result; others as they are."""
    whole: list[dict] = []
    for result in results:
        if "ceilings" in result and whole and whole[-1]["machine"] == result["machine"]:
            rows = whole[-1]["rows"] | result["rows"]
            whole[-1] = whole[-1] | {"rows": rows, "ceilings": result["ceilings"]}
        else:
            whole.append(result)
    return whole


def insert(text: str, figures: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """``text`` with everything between the two markers replaced.

    Raises ValueError if a marker is missing or they stand in the wrong order.
    """
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
        description="Prints results as Markdown, or writes them into a file."
    )
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of the benchmarks")
    parser.add_argument(
        "--into", type=Path, help=f"write them between {BEGIN} and {END} of this file"
    )
    options = parser.parse_args()
    results = joined([json.loads(path.read_text()) for path in options.results])
    figures = "\n\n".join(map(markdown, results))
    if options.into:
        options.into.write_text(insert(options.into.read_text(), figures))
    else:
        print(figures)


if __name__ == "__main__":
    main()
