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

    def noisy(sigma):
        noise = torch.randn(frames.shape) * sigma
        return (frames + noise).clamp(0, 255).byte()

    little = sparsity.ssim(frames, noisy(5))
    much = sparsity.ssim(frames, noisy(50))
    assert 0.9 < little < 1
    assert 0 < much < 0.9


def test_ssim_of_flat_pictures_is_that_of_their_luminance():
    gray = torch.full((1, 16, 16, 3), 100, dtype=torch.uint8)
    lighter = torch.full_like(gray, 120)
    constant = 2.55**2
    product = 2 * 100 * 120 + constant
    squares = 100**2 + 120**2 + constant
    ssim = sparsity.ssim(gray, lighter)
    assert ssim == pytest.approx(product / squares, rel=1e-6)


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
    densities = torch.tensor(half["density_by_layer_and_step"], dtype=torch.float64)
    assert densities.shape == (4, 2)
    mean = densities.mean().item()
    assert half["density"] == pytest.approx(mean)


def test_the_result_is_shown(result):
    lines = sparsity.table(result)
    assert len(lines) == 5
    assert lines[3].startswith("| 1 | 100.0% |")
    assert lines[-1].startswith("| dense |")


def test_the_picture_has_a_line_for_each_layer(result):
    figure = sparsity.picture(result)
    lines = [axes.lines for axes in figure.axes]
    assert [len(each) for each in lines] == [4, 4, 1, 4]
    half = result["rows"][0]
    steps = [line.get_ydata().tolist() for line in lines[1]]
    assert steps == half["density_by_layer_and_step"]
    pixels = figure.get_size_inches() * figure.dpi
    assert pixels.tolist() == [4 * 420, 320]


def test_the_readme_shows_what_was_measured():
    results = sparsity.RESULTS / "tiny_sparsity.json"
    measured = json.loads(results.read_text())
    readme = sparsity.RESULTS.parent / "README.md"
    page = readme.read_text(encoding="utf-8")
    table = "\n".join(sparsity.table(measured))
    assert table in page
