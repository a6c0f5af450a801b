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

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("KANDINSKY_KERNELS_BUILD", "auto")
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
STABLE_ABI = "0x020b000000000000"  # the oldest torch the binary runs on: 2.11
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]


def sources(pattern: str) -> list[str]:
    """Paths below csrc, relative as setuptools wants them."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.joinpath("csrc").glob(pattern))


def why_no_extension() -> str | None:
    """The reason nothing can be compiled here, or None."""
    compiler = os.environ.get("CXX", "c++").split()[0]
    if not any(shutil.which(name) for name in (compiler, "g++", "clang++", "cl")):
        return f"there is no C++ compiler ({compiler}, g++ or clang++) on PATH"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return (
            f"torch cannot be imported ({error}); install torch, then use pip install "
            "--no-build-isolation ."
        )
    return None


def why_no_cuda() -> str | None:
    """The reason the CUDA kernels cannot be built here, or None. A visible card is not needed."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not sources("cuda/*.cu"):
        return "this version has no CUDA sources"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    if not CUDA_HOME:
        return "nvcc is not found; set CUDA_HOME"
    told = subprocess.run(
        [str(Path(CUDA_HOME, "bin", "nvcc")), "--version"], capture_output=True, text=True
    ).stdout
    found = re.search(r"release (\d+)\.", told)
    # torch refuses to build with another major version
    if not found or found[1] != torch.version.cuda.partition(".")[0]:
        ours = f"of CUDA {found[1]}" if found else "not usable"
        return f"nvcc is {ours}, torch of CUDA {torch.version.cuda}; set CUDA_HOME to that version"
    return None


def set_architectures() -> None:
    """Without a choice of the user's: the visible card's architecture, or all that the kernels are
    for and this nvcc knows."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if "TORCH_CUDA_ARCH_LIST" in os.environ or torch.cuda.is_available():
        return  # torch compiles for the visible cards
    known = subprocess.run(
        [str(Path(CUDA_HOME, "bin", "nvcc")), "--list-gpu-arch"], capture_output=True, text=True
    ).stdout.split()
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
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

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
    files = sources("*.cpp") + sources("cpu/*.cpp") + ([] if no_cuda else sources("cuda/*.cu"))
    defines = [
        ("TORCH_TARGET_VERSION", STABLE_ABI),
        ("KANDINSKY_WITH_CUDA", "0" if no_cuda else "1"),
    ]
    return {
        "cmdclass": {"build_ext": BuildExtension},
        "ext_modules": [
            (CppExtension if no_cuda else CUDAExtension)(
                "kandinsky_kernels._C",
                files,
                include_dirs=[str(ROOT / "csrc")],
                define_macros=defines,
                # a source distribution takes these along too
                depends=sources("**/*.h") + sources("**/*.cuh") + sources("**/*.cu"),
                extra_compile_args={
                    "cxx": ["-O3", "-std=c++20", "-fvisibility=hidden", *WARNINGS],
                    # USE_CUDA: the headers then have streams
                    "nvcc": ["-O3", "-std=c++20", "-DUSE_CUDA"],
                },
            )
        ],
    }


setup(**extension_arguments())
