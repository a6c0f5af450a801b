# SPDX-License-Identifier: Apache-2.0
"""The layout of `make hub`, read and loaded as users of the Hugging Face hub do it.

The package `kernels` is no requirement of the tests, because it asks for a newer huggingface_hub
than the oldest that this package allows.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build/hub"
LOAD = """
import sys
from pathlib import Path
import torch
import kandinsky_kernels as package
from kernels import get_local_kernel

hub = get_local_kernel(Path(sys.argv[1]), backend="cpu")
assert hub.__name__ != "kandinsky_kernels" and hub._library.extension is not None
assert hub.build_info()["stable_abi"] == "2.11"
assert {row["cpu"].partition(" ")[0] for row in hub.kernels().values()} >= {"cpp"}
# beside the package, under a namespace of its own
x, v = torch.randn(1, 5, 16), torch.randn(1, 16)
assert torch.equal(hub.modulated_norm(x, v, v), package.modulated_norm(x, v, v))
assert hub._ops.ops.name == hub.__name__ != package._ops.ops.name
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout") / "hub"
    subprocess.run([sys.executable, "csrc/hub/make.py", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def build(layout):
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    return tomllib.loads(layout.joinpath("build.toml").read_text(encoding="utf-8"))


def test_the_builder_finds_every_source(layout, build):
    named = {*build["torch"]["src"]}
    for kernel in build["kernel"].values():
        named |= {*kernel["src"]}
    written = {path.relative_to(layout) for path in layout.rglob("*")}
    assert named <= {str(path) for path in written}
    compiled = {path for path in written if path.suffix in (".cpp", ".cu", ".h", ".cuh")}
    assert {str(path) for path in compiled} == named
    mine = {path.relative_to(ROOT) for path in ROOT.joinpath("csrc").rglob("*.c*")}
    assert {path for path in mine if path.parts[1] != "hub"} <= compiled


def test_the_package_imports_itself_by_relative_names_only(layout):
    """The hub gives it another name."""
    files = list(layout.joinpath("torch-ext/kandinsky_kernels").rglob("*.py"))
    assert files and not [path for path in files if path.name == "_ops.py"]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) kandinsky", text, re.MULTILINE), path
        assert "torch.ops.kandinsky_kernels" not in text, path


def test_the_builder_reads_its_configuration(layout):
    pytest.importorskip("kernels")
    from kernels._rust import Build

    assert len(Build.open(layout).general.backends) == 2


def test_kernels_loads_what_was_built():
    pytest.importorskip("kernels")
    if not list(BUILT.glob("build/*/metadata.json")):
        pytest.skip("nothing is built; run make hub")
    command = [sys.executable, "-c", LOAD, str(BUILT)]
    run = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
