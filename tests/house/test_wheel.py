# SPDX-License-Identifier: Apache-2.0
"""The wheel of `make wheel`, installed beside whatever Python and torch run this test: `make
test-oldest` and `make test-newest` run it beside the oldest and the newest."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky_kernels import reference

from ..compare import assert_faithful
from ..peers import modulated_norm_peer

WHEELS = list(Path(__file__).resolve().parents[2].glob("dist/kandinsky_kernels-*.whl"))
pytestmark = pytest.mark.skipif(not WHEELS, reason="there is no wheel; run make wheel")
USE = """
import sys
from safetensors.torch import load_file, save_file
import kandinsky_kernels as k

given = load_file("given.safetensors")
save_file({"y": k.modulated_norm(**given)}, "result.safetensors")
print(k.__file__, *(row["cpu"].partition(" ")[0] for row in k.kernels().values()))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(folder), str(WHEELS[0])], check=True)
    return folder


def test_there_is_one_for_every_python():
    (wheel,) = WHEELS
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    libraries = [name for name in names if name.endswith((".so", ".dll", ".dylib"))]
    assert libraries == ["kandinsky_kernels/libkandinsky_kernels.so"]
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "build", "csrc"))]


def test_it_runs_beside_this_torch(installed, tmp_path):
    x, scale, shift = torch.randn(2, 5, 96), torch.randn(2, 96), torch.randn(2, 96)
    given = {"x": x, "scale": scale, "shift": shift}
    save_file(given, tmp_path / "given.safetensors")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{USE}"]
    run = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    place, *states = run.stdout.split()
    assert Path(place).is_relative_to(installed)
    assert "cpp" in states, states
    exact = reference.modulated_norm(*(value.double() for value in given.values()), 1e-6)
    actual = load_file(tmp_path / "result.safetensors")["y"]
    assert_faithful(actual, exact, modulated_norm_peer(**given))
