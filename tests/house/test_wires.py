# SPDX-License-Identifier: Apache-2.0
"""Wires that a moved file would cut without a sound: what is hashed, shipped, or found by a name
in a string."""

import importlib
import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import kandinsky_kernels
import kandinsky_model
from kandinsky_kernels import _guard
from kandinsky_model.text import cache

ROOT = Path(__file__).resolve().parents[2]
DATA = ("kandinsky_model/tiny/weights", "kandinsky_model/comfyui/templates")


def copied(module, tmp_path, monkeypatch):
    """A copy of the folder that a module lies in; the module's `__file__` points into the copy."""
    folder = tmp_path / "copy"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(module.__file__).parent, folder, ignore=ignored)
    monkeypatch.setattr(module, "__file__", str(folder / Path(module.__file__).name))
    return folder


def change(file):
    file.write_text(file.read_text(encoding="utf-8") + "\n# another line\n", encoding="utf-8")


@pytest.mark.parametrize("name", ["templates", "expand", "vision", "qwen_clip", "tiny", "cache"])
def test_an_embedding_is_forgotten_when_the_code_that_made_it_changes(name, tmp_path, monkeypatch):
    folder = copied(cache, tmp_path, monkeypatch)
    before = cache.identity([], torch.float32)
    assert before == cache.identity([], torch.float32)
    change(folder / f"{name}.py")
    assert cache.identity([], torch.float32) != before


@pytest.mark.parametrize("name", ["launch/norm.py", "triton/nabla.py", "reference.py", "tuning.py"])
def test_a_kernel_is_tried_again_when_a_source_of_it_changes(name, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    folder = copied(_guard, tmp_path, monkeypatch)
    version = _guard._version.__wrapped__  # without its memory
    before = version()
    assert before == version()
    change(folder / name)
    assert version() != before


@pytest.fixture(scope="module")
def wheel(once):
    """The path of a wheel of the tree without compiled files."""
    return Path(once("wheel", build_wheel))


def build_wheel(folder):
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", folder, "build", "-b"]
    command += [folder / "build", "bdist_wheel", "-b", folder / "wheel", "-d", folder]
    environment = {**os.environ, "KANDINSKY_KERNELS_BUILD": "none"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "pure Python, because KANDINSKY_KERNELS_BUILD=none" in done.stderr
    return str(next(folder.glob("*.whl")))


def test_a_wheel_holds_every_source_and_every_data_file(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    packages = [ROOT / "kandinsky_kernels", ROOT / "kandinsky_model"]
    wanted = {file for package in packages for file in package.rglob("*.py")}
    wanted |= {package / "py.typed" for package in packages}
    wanted |= {file for name in DATA for file in (ROOT / name).rglob("*") if file.is_file()}
    wanted.add(ROOT / "kandinsky_model/sampling/mag_ratios.json")
    held = set(zipfile.ZipFile(wheel).namelist())
    missing = {str(file.relative_to(ROOT)) for file in wanted} - held
    assert not missing, sorted(missing)
    assert not [name for name in held if name.endswith((".so", ".pyd", ".cpp"))]
    assert not [name for name in held if name.startswith(("tests", "benchmarks"))]


def test_a_wheel_draws_a_clip_in_an_empty_folder(wheel, tmp_path):
    """From the wheel alone: no file of the checkout is read."""
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(installed)
    empty.mkdir()
    command = [sys.executable, "-m", "kandinsky_model", "generate", "a red circle"]
    command += ["--steps", "1", "--size", "64x64", "--frames", "5", "-o", "clip.mp4"]
    home = tmp_path / "home"
    environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(home)}
    environment["XDG_CACHE_HOME"] = str(home)
    done = subprocess.run(command, cwd=empty, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (empty / "clip.mp4").stat().st_size > 500
    probe = "import kandinsky_model; print(kandinsky_model.__file__)"
    where = subprocess.run(
        [sys.executable, "-c", probe], cwd=empty, env=environment, capture_output=True
    )
    assert str(installed).encode() in where.stdout


PUBLIC = {
    "kandinsky_model": (
        "Kandinsky5",
        "Kandinsky5VideoLite",
        "Kandinsky5VideoPro",
        "Kandinsky5ImageLite",
        "Video",
        "accelerate",
        "load",
        "PRESETS",
        "get_preset",
    ),
    "kandinsky_model.comfyui": (
        "NODE_CLASS_MAPPINGS",
        "NODE_DISPLAY_NAME_MAPPINGS",
        "comfy_entrypoint",
    ),
    "kandinsky_model.training": ("train", "TrainConfig"),
}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_where_they_were(module):
    imported = importlib.import_module(module)
    for name in PUBLIC[module]:
        assert getattr(imported, name) is not None, name


def test_public_names_are_listed_for_editors():
    """What type checkers read, what `dir` shows and what can be imported are the same names."""
    source = Path(kandinsky_model.__file__).read_text(encoding="utf-8")
    listed = {line.rpartition(" as ")[2] for line in source.splitlines() if " as " in line}
    assert listed >= set(kandinsky_model.__all__) == set(PUBLIC["kandinsky_model"])
    assert set(kandinsky_model.__all__) <= set(dir(kandinsky_model))
    for package in (kandinsky_model, kandinsky_kernels):
        assert Path(package.__file__).with_name("py.typed").is_file()


def test_loggers_that_the_command_line_switches_exist():
    """A logger is found by the name of its module, so a moved module would fall silent."""
    from kandinsky_model.cli import generate

    for name in generate.SPOKEN_FOR.values():
        module = importlib.import_module(name)
        assert module._log is logging.getLogger(name)
