# SPDX-License-Identifier: Apache-2.0
"""What every test shares: seeds, poisoned memory, the number of threads, the place of the golden
files, and what is made once for all workers."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from packaging.version import Version

from kandinsky_kernels import _library

if not torch.cuda.is_available():
    # before anything imports Triton, which reads it once
    os.environ.setdefault("TRITON_INTERPRET", "1")


def shared_data() -> Path:
    """The folder of golden files beside the checkout; skips the test where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the shared test data beside the checkout (../shared/data)")
    return folder


def needs_triton() -> None:
    """Skips the test, or the module, where Triton is absent or its interpreter cannot run: before
    3.7 it takes the number in an array of one for a loop's bound, which NumPy 2.4 refuses."""
    triton = pytest.importorskip("triton", reason="needs Triton")
    versions = Version(triton.__version__), Version(np.__version__)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and versions[0] < Version("3.7") and versions[1] >= Version("2.4"):
        reason = "Triton's interpreter needs Triton 3.7 or NumPy before 2.4, got {} and {}"
        pytest.skip(reason.format(*versions), allow_module_level=True)


def simd_levels() -> list[str]:
    """The instruction sets this build and this processor have; none without the compiled
    extension."""
    levels = []
    for name in _library.build_info()["simd"].split() if _library.extension else ():
        try:
            _library.extension.set_simd(name)
        except ValueError:
            continue
        levels.append(name)
    if levels:
        _library.extension.set_simd(levels[-1])
    return levels


SIMD_LEVELS = simd_levels()


@pytest.fixture(params=SIMD_LEVELS or ["no extension"])
def simd(request):
    """Runs the test once per instruction set, the scalar fallback included."""
    if request.param not in SIMD_LEVELS:
        pytest.skip("the compiled extension is not built")
    _library.extension.set_simd(request.param)
    yield request.param
    _library.extension.set_simd(SIMD_LEVELS[-1])


@pytest.fixture(autouse=True)
def seeds_and_poison():
    """Law 6 and a fixed seed: fresh memory is full of NaN, or of the largest integer, so that a
    kernel that reads it gives itself away."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def log_levels():
    """Levels of the package's loggers are reset: every run of the command line lets them speak, and
    the next test must not hear them."""
    yield
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("kandinsky_")]:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.fixture(autouse=True, scope="session")
def empty_text_caches(tmp_path_factory):
    """Each text encoder begins with an empty cache of its own; the user's is neither read nor
    filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "kandinsky_model.text.cache.default_folder",
            lambda: tmp_path_factory.mktemp("text_cache"),
        )
        yield


@pytest.fixture(autouse=True, scope="session")
def empty_inductor_cache(tmp_path_factory):
    """Code that Inductor keeps on disk computes NaN under another instruction set, which is not in
    its key (torch 2.13)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], Any]], Any]:
    """once(name, make): what `make(folder)` returns, as JSON, made once for all workers of a run.

    For what takes many seconds to make, such as compiled kernels: with pytest-xdist a fixture of a
    module or a session is made by each worker that runs one of its tests.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the workers' folders lie side by side

    def result(name: str, make: Callable[[Path], Any]) -> Any:
        folder = root / f"once-{name}"
        made = folder / "result.json"
        with FileLock(root / f"once-{name}.lock"):
            if not made.exists():
                folder.mkdir(exist_ok=True)
                text = json.dumps(make(folder))
                made.write_text(text, encoding="utf-8")
        return json.loads(made.read_text(encoding="utf-8"))

    return result


@pytest.fixture(scope="session")
def text_parts():
    """Tiny text encoders; tests must not change them."""
    from .support import tiny_models

    return tiny_models.text_parts()


@pytest.fixture(scope="session")
def diffusers_folder(tmp_path_factory, text_parts):
    """A whole model around them, in diffusers' layout on disk; tests must not change it."""
    from .support import tiny_models

    return tiny_models.diffusers_folder(tmp_path_factory.mktemp("diffusers"), text_parts)


def pytest_collection_modifyitems(items):
    """The longest first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_binaries.py", "test_gate.py"))


def pytest_configure(config):
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    config.addinivalue_line(
        "filterwarnings", "ignore:.*does not have a deterministic implementation.*:UserWarning"
    )
