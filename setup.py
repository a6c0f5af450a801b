# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled kernels; everything else about the packages is in pyproject.toml.

KANDINSKY_KERNELS_BUILD chooses what to build: ``auto`` (default) the CPU kernels, and the CUDA ones
where torch and nvcc allow it; ``cpu`` or ``cuda``, failing when impossible; ``none`` a pure Python
package whose operators run references.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("KANDINSKY_KERNELS_BUILD", "auto")
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
STABLE_ABI = "0x020b000000000000"  # the oldest torch the binary runs on: 2.11
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]


class AnyPython(bdist_wheel):
    """A wheel for one kind of machine and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def sources(pattern: str) -> list[str]:
    """Paths below csrc, relative as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.joinpath("csrc").glob(pattern))


def why_no_extension() -> str | None:
    """The reason nothing can be compiled here, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not any(shutil.which(name) for name in (compiler, "g++", "clang++", "cl")):
        return f"there is no C++ compiler ({compiler}, g++ or clang++) on PATH"
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return (
            f"torch cannot be imported ({error}); install torch, then use pip install "
            "--no-build-isolation ."
        )
    return None


def cuda_home() -> Path | None:
    """The folder of the CUDA toolkit: CUDA_HOME or CUDA_PATH, else the one that the nvcc on PATH
    reports, for it may be a wrapper that stands in another folder."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return Path(named)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        usual = Path("/usr/local/cuda")
        return usual if usual.is_dir() else None
    told = subprocess.run([nvcc, "--dryrun", "any.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    return Path(top[1] if top else Path(nvcc).resolve().parents[1]).resolve()


def why_no_toolkit(home: Path) -> str | None:
    """What compiling and linking would miss in this folder, or None."""
    needed = ["bin/nvcc", "include/cuda_runtime.h"]
    if sys.platform == "linux":
        folders = ("lib64", "lib")  # torch links with the first that there is
        lib = next((name for name in folders if home.joinpath(name).is_dir()), "lib64")
        needed += [f"{lib}/libcudart.so"]
    missing = [name for name in needed if not home.joinpath(name).exists()]
    if sys.platform == "win32" or not missing:
        return None
    return f"{home} is no CUDA toolkit, it lacks {' and '.join(missing)}; set CUDA_HOME"


def why_no_cuda() -> str | None:
    """The reason the CUDA kernels cannot be built here, or None. A visible card is not needed.

    Where they can be built, CUDA_HOME names the toolkit.
    """
    import torch

    if not sources("cuda/*.cu"):
        return "this version has no CUDA sources"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    home = cuda_home()
    if home is None:
        return "nvcc is not found; set CUDA_HOME"
    lack = why_no_toolkit(home)
    if lack:
        return lack
    told = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+)\.", told.stdout)
    # torch refuses to build with another major version
    if not found or found[1] != torch.version.cuda.partition(".")[0]:
        ours = f"of CUDA {found[1]}" if found else "not usable"
        return f"nvcc is {ours}, torch of CUDA {torch.version.cuda}; set CUDA_HOME to that version"
    os.environ["CUDA_HOME"] = str(home)  # which torch reads when its builder is imported
    return None


def set_architectures() -> None:
    """Without a choice of the user's: the visible card's architecture, or all that the kernels are
    for and this nvcc knows."""
    import torch

    if "TORCH_CUDA_ARCH_LIST" in os.environ or torch.cuda.is_available():
        return  # torch compiles for the visible cards
    nvcc = Path(os.environ["CUDA_HOME"], "bin", "nvcc")
    told = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = told.stdout.split()
    wanted = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(
        wanted[:-1] + [f"{arch}+PTX" for arch in wanted[-1:]]
    )


def extension_arguments() -> dict:
    """ext_modules and cmdclass for setup()."""
    if MODE not in MODES:
        sys.exit(f"KANDINSKY_KERNELS_BUILD must be one of {', '.join(MODES)}, got {MODE!r}.")
    absence = "KANDINSKY_KERNELS_BUILD=none" if MODE == "none" else why_no_extension()
    if absence and MODE in ("cpu", "cuda"):
        sys.exit(f"KANDINSKY_KERNELS_BUILD={MODE} needs a compiler and torch, but {absence}.")
    if absence:
        print(f"kandinsky_kernels: pure Python, because {absence}", file=sys.stderr)
        return {}
    no_cuda = "KANDINSKY_KERNELS_BUILD=cpu" if MODE == "cpu" else why_no_cuda()
    if no_cuda and MODE == "cuda":
        sys.exit(f"KANDINSKY_KERNELS_BUILD=cuda cannot be satisfied: {no_cuda}.")
    print(
        "kandinsky_kernels: building CPU "
        f"kernels{f', no CUDA kernels: {no_cuda}' if no_cuda else ' and CUDA kernels'}",
        file=sys.stderr,
    )
    if not no_cuda:
        set_architectures()
    # after CUDA_HOME is known
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class BuildLibrary(BuildExtension):
        """Builds a library that knows no Python, and no module of one."""

        def get_ext_filename(self, name: str) -> str:
            return str(Path(*name.split("."))) + ".so"

    files = sources("*.cpp") + sources("cpu/*.cpp") + ([] if no_cuda else sources("cuda/*.cu"))
    defines = [
        ("TORCH_TARGET_VERSION", STABLE_ABI),
        ("KANDINSKY_WITH_CUDA", "0" if no_cuda else "1"),
    ]
    return {
        "cmdclass": {"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
        "ext_modules": [
            (CppExtension if no_cuda else CUDAExtension)(
                "kandinsky_kernels.libkandinsky_kernels",
                files,
                py_limited_api=True,  # links nothing of Python's
                include_dirs=[str(ROOT / "csrc")],
                define_macros=defines,
                # a source distribution takes these along too
                depends=sources("**/*.h") + sources("**/*.cuh") + sources("**/*.cu"),
                extra_compile_args={
                    "cxx": ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden", *WARNINGS],
                    # USE_CUDA: the headers then have streams
                    "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA"],
                },
            )
        ],
    }


if __name__ == "__main__":
    setup(**extension_arguments())
