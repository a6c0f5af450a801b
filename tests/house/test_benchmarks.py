# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: a clock that takes turns, bars judged from medians, tables of what was measured,
and a README that shows the results as they lie in the tree."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from benchmarks import budgets, clock, diffusers, ops, report, vae
from benchmarks.gpu.convolutions import CONVOLUTIONS
from kandinsky_model.config import VAEConfig
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.vae import stages
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE

from ..cases import BENCHES, CASES

ROOT = Path(__file__).resolve().parents[2]


def test_clock_takes_turns(monkeypatch):
    monkeypatch.setattr(clock, "WARM_UP_S", 0.0)
    calls = []

    def slow():
        calls.append("slow")
        time.sleep(0.02)

    timings = clock.measure(
        {"slow": slow, "quick": lambda: calls.append("quick")}, budget_s=0.1, most=8
    )
    assert timings["slow"].runs <= 5
    assert timings["quick"].runs == 8
    assert calls[:6] == ["slow", "quick"] * 3
    assert timings["slow"].median_ms >= 20 > timings["quick"].median_ms
    assert timings["slow"].low_ms <= timings["slow"].median_ms <= timings["slow"].high_ms
    assert clock.Timing(1.0, 0.9, 1.1, 5).noisy
    assert not clock.Timing(1.0, 0.99, 1.01, 5).noisy


def test_machine_record_is_complete():
    record = clock.machine()
    keys = ["cpu", "cores", "threads", "simd", "compiler", "torch", "python", "system", "commit"]
    assert list(record) == keys
    assert all(record.values())
    assert json.loads(json.dumps(record)) == record


def planted(medians):
    """Rows of a result in which {case: {provider: median}} were measured, those of 1 ms noisy."""

    def timings(values):
        return {name: {"median_ms": value, "noisy": value == 1.0} for name, value in values.items()}

    return [
        {"case": case, "timings": timings(values), "gb_s": 12.5, "gflop_s": 0.0, "of_roof": 0.5}
        for case, values in medians.items()
    ]


def test_bars_are_judged_from_medians():
    rows = planted(
        {
            "block_sparse_attention-10_percent-float32": {"ours": 10.0, "dense": 70.0},
            "block_sparse_attention-100_percent-float32": {"ours": 100.0, "dense": 70.0},
            "select_blocks-128_blocks-float32": {"ours": 0.4},
            "block_sparse_attention_backward-10_percent-float32": {"ours": 31.0, "forward": 10.0},
        }
    )
    judged = {bar["name"]: bar for bar in ops.bars(rows)}
    assert len(judged) == 4  # nothing was measured at 20 %
    sparse, dense, selection, gradient = judged.values()
    assert (sparse["measured"], sparse["holds"]) == (7.0, True)
    assert (dense["measured"], dense["holds"]) == (0.7, False)
    assert (selection["measured"], selection["holds"]) == (0.04, True)
    assert (gradient["measured"], gradient["holds"]) == (3.1, False)


def test_every_bar_has_its_case():
    ids = [case.id for case in ops.ROWS]
    for bar in ops.BARS:
        for case, _ in (bar.over, bar.under):
            assert sum(case in one for one in ids) == 1, case
    assert {case.op for case in BENCHES} == {case.op for case in CASES}


def test_markdown_goes_between_the_markers():
    result = {
        "machine": clock.machine(),
        "roofs": {"copy_gb_s": 10.0, "matmul_gflop_s": 100.0},
        "bars": [],
        "rows": planted({"norm": {"ours": 2.0, "torch": 1.0}}),
    }
    text = report.insert(f"a\n{report.BEGIN}\nold\n{report.END}\nz\n", report.markdown(result))
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("z\n")
    assert "| norm | 2 | - | 1 (noisy) | - | - | 12.5 GB/s | 50% |" in text
    with pytest.raises(ValueError, match="markers"):
        report.insert("no place", "figures")


def test_gpu_bars_are_judged_by_the_worst_row():
    def row(op, size, ms, **figures):
        return {"op": op, "size": size, "ms": ms, **figures}

    rows = {
        "selection": [
            row("select_blocks", "lite 10 s", {"ours": 0.4, "published": 8.0}, over_published=20.0),
            row("select_blocks", "lite 10 s", {"ours": 0.3}),
            row("select_blocks", "pro 10 s", {"ours": 0.9}, over_published=100.0),
        ],
        "attention": [
            row("block_sparse_attention", "lite 10 s", {"ours": 1.0}, useful_tflop_s=400.0),
            row("block_sparse_attention", "lite 10 s", {"ours": 1.0}, useful_tflop_s=299.0),
        ],
        "convolutions": [
            row("causal_conv3d", "one layer", {"ours": 1.0}, over_cudnn=0.9),
            row("causal_conv3d", "10 s, all frames", {"ours": 1.0}, over_cudnn=1.1),
        ],
    }
    judged = [
        (bar["name"], bar["measured"], bar["holds"]) for bar in report.gpu_bars({"rows": rows})
    ]
    assert judged == [
        ("select_blocks, lite 10 s, ms", 0.4, True),
        ("select_blocks, pro 10 s, ms", 0.9, False),
        ("select_blocks, times faster than the published recipe", 20.0, False),
        ("block_sparse_attention, lite 10 s, useful TFLOP/s", 299.0, False),
        ("causal_conv3d, 10 s, all frames, times faster than cuDNN", 1.1, False),
    ]


def test_the_convolutions_are_the_decoders(monkeypatch):
    """The list of convolutions that the GPU benchmark times is the decoder's at 10 s.

    They are counted while a decoder with a sixteenth of the channels decodes one and two latent
    frames with a sixteenth of the height and width; each further latent frame adds the difference.
    """
    config = VAEConfig(block_out_channels=(8, 16, 32, 32), norm_num_groups=4)
    decoder = HunyuanVideoVAE(config).bfloat16().requires_grad_(False)
    convolve = stages.ops.causal_conv3d

    def frames(latent_frames):
        counts = Counter()

        def count(x, weight, *rest):
            out = convolve(x, weight, *rest)
            N, C, *taps = weight.shape
            _, T, Y, X, _ = out.shape
            counts[C, N, Y, X, tuple(taps)] += T
            return out

        monkeypatch.setattr(stages.ops, "causal_conv3d", count)
        decoder.decode(torch.randn(1, 16, latent_frames, 4, 6).bfloat16())
        monkeypatch.undo()
        return counts

    one, two = frames(1), frames(2)
    grown = {key: one[key] + 60 * (two[key] - one[key]) for key in two if key[-1] != (1, 1, 1)}
    scaled = {
        (C if C == 16 else C // 16, N if N == 3 else N // 16, Y // 16, X // 16, taps): n
        for C, N, Y, X, taps, n in CONVOLUTIONS
    }
    assert grown == scaled


def test_vaes_are_compared_on_equal_results(monkeypatch):
    monkeypatch.setattr(clock, "WARM_UP_S", 0.0)
    config = VAEConfig(
        latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    )
    with torch.no_grad():
        decodes = [vae.decode_row("a decode", config, (2, 3, 3), budget_s=0.0)]
        encodes = [vae.encode_row("an encode", config, (5, 16, 24), budget_s=0.0)]
        upsamplings = [
            vae.upsampling_row("a level", 8, factors, (3, 4, 4), budget_s=0.0)
            for factors in ((1, 2, 2), (2, 2, 2))
        ]
    for row in (*decodes, *encodes):
        assert min(row["peak_bytes"].values()) > 0
        assert row["error"] < 1e-5
    table = report.vae_table({"decodes": decodes, "encodes": encodes, "upsamplings": upsamplings})
    assert table.count("| a level |") == 2
    assert "| an encode |" in table
    assert json.loads(json.dumps(decodes)) == decodes
    with pytest.raises(RuntimeError, match="nothing was timed"):
        vae.agree(torch.zeros(3), torch.ones(3))


def results(*names):
    """Result files of the operators and the VAE on CPUs, those whose name begins with one."""
    found = sorted(ROOT.joinpath("benchmarks/results").glob("*-threads-*.json"))
    return [json.loads(path.read_text()) for path in found if path.name.startswith(names)]


def test_the_readme_shows_operators_and_vae_as_measured():
    readme = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    measured = results("intel", "vae")
    assert len(measured) >= 4
    assert all(report.markdown(result) in readme for result in measured)


def test_the_front_page_shows_the_bars_as_measured():
    """The README of the tree has the bars of one result, that of AVX-512."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (measured,) = [one for one in results("intel") if one["machine"]["simd"] == "avx512"]
    assert report.bars_table(measured["bars"]) in readme


def test_the_readme_counts_the_bundled_models_clips_as_judged():
    readme = " ".join((ROOT / "benchmarks/README.md").read_text(encoding="utf-8").split())
    right = {}
    for name in ("tiny_check", "tiny_check_nocfg", "tiny_check_unguided"):
        path = ROOT / "benchmarks/results" / f"{name}.json"
        samples = json.loads(path.read_text())["samples"]
        assert len(samples) == 96
        right[name] = sum(all(sample["right"].values()) for sample in samples)
    assert f"all words are right in {right['tiny_check_nocfg']} of the 96 clips" in readme
    assert f"without the adapter in {right['tiny_check_unguided']}" in readme
    assert f"in twice the passes, in {right['tiny_check']}." in readme


def test_the_readme_shows_the_schemes_as_they_are_accounted():
    readme = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert all(vae.schemes_table(doing) in readme for doing in vae.SCHEMES)


def test_the_readme_shows_what_runs_need():
    assert budgets.table() in (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")


def test_diffusers_is_compared_with_itself(monkeypatch):
    """Ours and NABLA by a mask are the same up to diffusers' rounding to bf16; as installed it is
    another function."""
    monkeypatch.setattr(clock, "WARM_UP_S", 0.0)
    transformer = diffusers.transformer_row("a transformer", diffusers.TINY, Grid(2, 16, 16), 0.0)
    config = VAEConfig(
        latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    )
    decoder = diffusers.vae_row("a decoder", config, (2, 3, 3), 0.0)
    errors = transformer["errors"]
    assert (
        errors["ours"] < 5e-6 < errors["mask"] < 5e-4 < 5e-3 < errors["dense"]
        and 0.2 < transformer["density"] < 0.6
    )
    assert max(decoder["errors"].values()) < 1e-5
    table = diffusers.table({"machine": clock.machine(), "rows": [transformer, decoder]})
    assert (
        "| a transformer, 512 tokens |" in table
        and "| a decoder | - |" in table
        and json.loads(json.dumps(transformer)) == transformer
    )


def test_the_readme_shows_diffusers_as_measured():
    results = [
        json.loads(path.read_text())
        for path in sorted(ROOT.glob("benchmarks/results/diffusers-*.json"))
    ]
    readme = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    assert results and all(diffusers.table(result) in readme for result in results)
