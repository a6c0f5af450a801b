# SPDX-License-Identifier: Apache-2.0
"""The benchmark of what sparsity costs in quality: its measures, and a small run of it."""

import json

import pytest
import torch

from benchmarks import sparsity
from kandinsky_model.checkpoints.locate import TINY


def test_ssim_is_one_for_equals_and_falls_with_noise():
    frames = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    assert sparsity.ssim(frames, frames) == pytest.approx(1.0)
    little, much = (
        (frames + torch.randn(frames.shape) * sigma).clamp(0, 255).byte() for sigma in (5, 50)
    )
    assert 1 > sparsity.ssim(frames, little) > 0.9 > sparsity.ssim(frames, much) > 0
    gray, lighter = (torch.full((1, 16, 16, 3), level, dtype=torch.uint8) for level in (100, 120))
    # flat pictures differ in luminance alone
    luminance = (2 * 100 * 120 + 2.55**2) / (100**2 + 120**2 + 2.55**2)
    assert sparsity.ssim(gray, lighter) == pytest.approx(luminance, rel=1e-6)


@pytest.fixture(scope="module")
def result():
    return sparsity.measure(TINY, count=1, steps=2, masses=(0.5, 1.0))


def test_all_mass_is_dense_attention(result):
    half, whole = result["rows"]
    assert whole["density"] == 1
    assert whole["ssim"] > 0.9999
    assert whole["psnr"] > 50
    assert 0 < half["density"] < 0.6
    assert half["ssim"] < whole["ssim"]
    densities = half["density_by_layer_and_step"]
    assert [len(steps) for steps in densities] == [2] * 4
    assert half["density"] == pytest.approx(sum(map(sum, densities)) / 8)


def test_the_result_is_shown(result):
    lines = sparsity.table(result)
    assert len(lines) == 5
    assert lines[3].startswith("| 1 | 100.0% |")
    assert lines[-1].startswith("| dense |")
    figure = sparsity.picture(result)
    assert [len(axes.lines) for axes in figure.axes] == [4, 4, 1, 4]
    steps = [line.get_ydata().tolist() for line in figure.axes[1].lines]
    assert steps == result["rows"][0]["density_by_layer_and_step"]
    assert (figure.get_size_inches() * figure.dpi).tolist() == [4 * 420, 320]


def test_the_readme_shows_what_was_measured():
    measured = json.loads((sparsity.RESULTS / "tiny_sparsity.json").read_text())
    page = (sparsity.RESULTS.parent / "README.md").read_text(encoding="utf-8")
    assert "\n".join(sparsity.table(measured)) in page
