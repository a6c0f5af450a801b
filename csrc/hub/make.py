# SPDX-License-Identifier: Apache-2.0
"""Lays the operators out as the kernel-builder of the Hugging Face hub wants them.

``python csrc/hub/make.py build/hub`` writes the sources: build.toml, torch-ext and csrc.
``--variant`` also compiles them for CPUs and writes what the builder would, into build/hub/build,
from where the package ``kernels`` loads it. Nothing is published.
"""

import argparse
import hashlib
import json
import platform
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PACKAGE = "kandinsky_kernels"
STABLE_ABI = "2.11"
# The sources register their operators in the namespace kandinsky_kernels; the hub wants one that
# bears the name of the build.
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", f"-D{PACKAGE}=TORCH_EXTENSION_NAME"]

BUILD = """\
[general]
name = "kandinsky-kernels"
version = 0
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch]
src = ["torch-ext/torch_binding.cpp"]

[torch.stable-abi]
cpu = "{abi}"
cuda = "{abi}"

[kernel.cpu]
backend = "cpu"
depends = ["torch"]
include = ["csrc"]
cxx-flags = {without_cuda}
src = {cpu}

[kernel.cuda]
backend = "cuda"
depends = ["torch"]
include = ["csrc"]
cuda-capabilities = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
cxx-flags = {with_cuda}
cuda-flags = {nvcc}
src = {cuda}
"""

# What the builder needs to pin its own version by.
FLAKE = """\
{
  description = "kandinsky-kernels for the Hugging Face hub";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

OPS = """\
import torch

from . import {name}

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""


def sources(*patterns: str) -> list[str]:
    """Paths of files below csrc, relative to the tree."""
    found = (path for pattern in patterns for path in ROOT.joinpath("csrc").glob(pattern))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def toml(values: list[str]) -> str:
    """A list, one value a line."""
    return "[\n" + "".join(f"    {json.dumps(value)},\n" for value in values) + "]"


def package_files() -> list[Path]:
    """The Python files of the package, but for the module that the builder replaces."""
    files = sorted(ROOT.joinpath(PACKAGE).rglob("*.py"))
    return [path for path in files if path.name != "_ops.py"]


def copy(paths: list[Path], base: Path, to: Path) -> None:
    for path in paths:
        target = to / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def lay_out(folder: Path) -> None:
    """Write all that the builder reads."""
    headers = sources("*.h", "cpu/*.h")
    cpu = sources("*.cpp", "cpu/*.cpp") + headers
    cuda = cpu + sources("cuda/*.cu", "cuda/*.cuh")
    text = BUILD.format(
        abi=STABLE_ABI,
        cpu=toml(cpu),
        cuda=toml(cuda),
        without_cuda=toml([*CXX_FLAGS, "-DKANDINSKY_WITH_CUDA=0"]),
        with_cuda=toml([*CXX_FLAGS, "-DKANDINSKY_WITH_CUDA=1"]),
        nvcc=toml(["-O3", "-std=c++20", "-DUSE_CUDA", CXX_FLAGS[-1]]),
    )
    shutil.rmtree(folder, ignore_errors=True)
    copy([ROOT / name for name in cuda], ROOT, folder)
    copy(package_files(), ROOT, folder / "torch-ext")
    copy([HERE / "torch_binding.cpp"], HERE, folder / "torch-ext")
    copy([HERE / "CARD.md"], HERE, folder)
    copy([ROOT / "LICENSE", ROOT / "NOTICE"], ROOT, folder)
    folder.joinpath("build.toml").write_text(text, encoding="utf-8")
    folder.joinpath("flake.nix").write_text(FLAKE, encoding="utf-8")


def digest(paths: list[Path]) -> str:
    """Seven digits that change with any of the files."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()[:7]


def compile_variant(folder: Path) -> Path:
    """Compile what was laid out for CPUs, and return the folder that ``kernels`` loads."""
    from torch.utils import cpp_extension

    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")]
    name = f"_{PACKAGE}_cpu_{digest(files)}"
    machine = platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")
    system = platform.system().lower()
    abi = STABLE_ABI.replace(".", "")
    variant = folder / "build" / f"torch-stable-abi{abi}-cpu-{machine}-{system}"
    copy(package_files(), ROOT / PACKAGE, variant)
    major, minor = map(int, STABLE_ABI.split("."))
    target = f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#018x}"
    objects = folder / "objects"
    objects.mkdir()
    library = cpp_extension.load(
        name,
        [str(folder / "torch-ext/torch_binding.cpp")]
        + [str(folder / path) for path in sources("*.cpp", "cpu/*.cpp")],
        extra_cflags=[*CXX_FLAGS, target, "-DKANDINSKY_WITH_CUDA=0", "-DPy_LIMITED_API=0x030a0000"],
        extra_include_paths=[str(folder / "csrc")],
        build_directory=str(objects),
        is_python_module=False,
    )
    shutil.copyfile(library or objects / f"{name}.so", variant / f"{name}.abi3.so")
    shutil.rmtree(objects)
    variant.joinpath("_ops.py").write_text(OPS.format(name=name), encoding="utf-8")
    metadata = {
        "name": PACKAGE.replace("_", "-"),
        "id": name,
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    variant.joinpath("metadata.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    return variant


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="is emptied first")
    parser.add_argument("--variant", action="store_true", help="compile for CPUs, too")
    options = parser.parse_args()
    lay_out(options.folder)
    print(compile_variant(options.folder) if options.variant else options.folder)
