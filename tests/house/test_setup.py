# SPDX-License-Identifier: Apache-2.0
"""How setup.py finds a CUDA toolkit, before it compiles for many minutes and cannot link."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOLKIT = ("bin/nvcc", "include/cuda_runtime.h", "lib64/libcudart.so")
# answers as the compiler of CUDA 13.0 does
NVCC = """#!/bin/sh
case "$1" in
  --dryrun) echo '#$ _HERE_={home}/bin' >&2; echo '#$ TOP={home}/bin/..' >&2 ;;
  --version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
  --list-gpu-arch) echo compute_80; echo compute_90 ;;
esac
"""


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("kandinsky_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A toolkit of CUDA 13.0 in a folder of its own, of which PATH knows nothing."""
    home = tmp_path / "toolkit"
    for name in TOOLKIT:
        home.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        home.joinpath(name).touch()
    program(home / "bin/nvcc", NVCC.format(home=home))
    for variable in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(variable, "")  # so that what setup.py sets is taken back
        monkeypatch.delenv(variable)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return home


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


def first_on_path(monkeypatch, folder):
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_a_wrapper_leads_to_its_toolkit(setup, toolkit, tmp_path, monkeypatch):
    program(tmp_path / "local/bin/nvcc", f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    first_on_path(monkeypatch, tmp_path / "local/bin")
    assert setup.why_no_cuda() is None
    assert Path(os.environ["CUDA_HOME"]) == toolkit


def test_a_link_leads_to_its_toolkit(setup, toolkit, tmp_path, monkeypatch):
    program(toolkit / "bin/nvcc", NVCC.format(home=toolkit).replace("--dryrun", "--never"))
    tmp_path.joinpath("local").mkdir()
    tmp_path.joinpath("local/nvcc").symlink_to(toolkit / "bin/nvcc")
    first_on_path(monkeypatch, tmp_path / "local")
    assert setup.why_no_cuda() is None
    assert Path(os.environ["CUDA_HOME"]) == toolkit


@pytest.mark.parametrize("missing", TOOLKIT)
def test_half_a_toolkit_is_refused_before_compiling(setup, toolkit, missing, monkeypatch):
    toolkit.joinpath(missing).unlink()
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    why = setup.why_no_cuda()
    assert why == f"{toolkit} is no CUDA toolkit, it lacks {missing}; set CUDA_HOME"


def test_another_major_version_is_refused(setup, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert setup.why_no_cuda().startswith("nvcc is of CUDA 13, torch of CUDA 12.8")


def test_every_architecture_that_nvcc_knows(setup, toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    setup.set_architectures()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0+PTX"


def test_the_compiler_of_this_machine(setup, monkeypatch):
    """Wherever the nvcc on PATH stands, its toolkit is whole or the reason is said."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    home = setup.cuda_home()
    assert home.joinpath("bin/nvcc").exists(), home
