# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels: their source run on a CPU by tests/cuda_on_cpu, their binaries for several
architectures, and on a GPU if any."""

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import kandinsky_kernels as ops
from kandinsky_kernels import _guard, _library, reference, tuning
from kandinsky_kernels.launch import nabla as launch_nabla
from kandinsky_model.dit.geometry import local_window

from ..cases import CASES
from ..compare import assert_same_blocks

ROOT = Path(__file__).resolve().parents[2]
# tiles of 8 rows, and registers per lane for a row
CONFIGURATIONS = ((2, 24), (2, 46), (1, 46), (1, 60), (1, 122))


def compile_emulated(folder):
    """The path of a library of the kernels for this CPU."""
    library = str(folder / "select_blocks.so")
    command = ["g++", "-std=c++20", "-O2", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
    command += ["-shared", "-fPIC", "-o", library]
    command.append(str(ROOT / "tests/cuda_on_cpu/select_blocks.cpp"))
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return library


@pytest.fixture(scope="module")
def emulated(once):
    """select(query, key, keep_mass, ...) -> (packed selection, rows per thread block), by the
    kernel's source compiled for this CPU."""
    if not shutil.which("g++"):
        pytest.skip("needs g++ to compile the kernels for this processor")
    library = once("emulated-cuda", compile_emulated)
    function = ctypes.CDLL(library).select_blocks
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = (
        [pointer] * 3
        + [number] * 3
        + [ctypes.c_double, pointer, pointer, ctypes.c_bool, ctypes.c_int64, number, ctypes.c_bool]
    )

    def select(
        query,
        key,
        keep_mass,
        tiles=None,
        window=None,
        ties="all",
        shared_kib=227,
        blocks=1 << 30,
        backwards=False,
    ):
        H, N, D = query.shape[1:]
        words = -(-N // 32)
        # to see writes beyond the result
        padded = torch.full((H * N * words + 64,), 0x5A5A5A5A, dtype=torch.int32)
        grids = [(ctypes.c_int64 * 3)(*numbers) if numbers else None for numbers in (tiles, window)]
        rows = function(
            query.data_ptr(),
            key.data_ptr(),
            padded[32:].data_ptr(),
            H,
            N,
            D,
            keep_mass,
            *grids,
            ties == "stable",
            shared_kib << 10,
            blocks,
            backwards,
        )
        assert (padded[:32] == 0x5A5A5A5A).all() and (padded[-32:] == 0x5A5A5A5A).all()
        return padded[32:-32].view(1, H, N, words), rows

    return select


def means(N, D, H=2, sharp=1.0):
    return sharp * torch.randn(1, H, N, D), torch.randn(1, H, N, D)


def scores(query, key):
    return query.double() @ key.double().mT / math.sqrt(query.shape[-1])


@pytest.mark.parametrize("ties", ["all", "stable"])
@pytest.mark.parametrize("keep_mass", [1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    ("tiles", "D"),
    [
        ((1, 1, 1), 8),
        ((1, 1, 5), 64),
        ((3, 11, 1), 128),
        ((4, 4, 4), 24),
        ((4, 5, 5), 128),
        ((10, 5, 5), 64),
    ],
    ids=str,
)
def test_source_on_a_cpu(tiles, D, keep_mass, ties, emulated):
    for sharp, window in ((0.1, None), (4.0, None), (1.0, (3, 3, 5))):
        query, key = means(math.prod(tiles), D, sharp=sharp)
        chosen, _ = emulated(query, key, keep_mass, tiles if window else None, window, ties)
        assert_same_blocks(
            chosen,
            scores(query, key),
            keep_mass,
            local_window(tiles, window) if window else None,
            ties,
        )


def test_the_order_of_threads_and_the_rows_of_a_block_change_nothing(emulated):
    query, key = means(250, 64, 1)
    chosen, rows = emulated(query, key, 0.9, (10, 5, 5), (3, 3, 3))
    assert rows == 16 and torch.equal(
        chosen, emulated(query, key, 0.9, (10, 5, 5), (3, 3, 3), backwards=True)[0]
    )
    for shared_kib, fewer in ((16, 8), (10, 4)):
        again, rows = emulated(query, key, 0.9, (10, 5, 5), (3, 3, 3), shared_kib=shared_kib)
        assert rows == fewer and torch.equal(chosen, again)


@pytest.mark.parametrize(
    ("tiles", "D", "shared_kib", "rows"),
    [
        ((61, 4, 6), 64, 227, 16),
        ((61, 4, 6), 64, 99, 8),
        ((31, 6, 10), 64, 99, 8),
        ((61, 6, 10), 128, 227, 8),
        ((61, 8, 8), 128, 99, 4),
    ],
    ids=str,
)
def test_real_sizes(tiles, D, shared_kib, rows, emulated):
    """Lite and Pro 10 s, HD 5 and 10 s and the longest row: a few thread blocks of each
    configuration."""
    query, key = means(math.prod(tiles), D, 1)
    chosen, taken = emulated(query, key, 0.9, tiles, (11, 3, 3), shared_kib=shared_kib, blocks=3)
    assert taken == rows
    done, near = 3 * rows, local_window(tiles, (11, 3, 3))
    kept = ops.unpack_selection(chosen[:, :, :done], len(near))[0, 0]
    wanted = reference.select_blocks(query, key, 0.9, list(tiles), [11, 3, 3], "all")[:, :, :done]
    differs = kept != ops.unpack_selection(wanted, len(near))[0, 0]
    assert differs.sum() <= 2, "two blocks may be undecided by fp32"
    assert (kept | ~near[:done]).all() and 0.1 < kept.double().mean() < 0.9


@pytest.mark.parametrize("ties", ["all", "stable"])
@pytest.mark.parametrize("keep_mass", [1e-17, 0.01, 0.3, 0.5, 0.75, 0.9, 1.0])
def test_equal_and_distant_masses_choose_as_the_reference(keep_mass, ties, emulated):
    """Equal keys, and masses that differ by powers of two: no rounding can move the choice."""
    query, key = torch.zeros(2, 1, 2, 64, 8)
    query[0, 0, :, 0] = math.log(2) * math.sqrt(8)
    key[0, 0, :, 0] = -(torch.arange(64) * 7 % 40).float()
    chosen, _ = emulated(query, key, keep_mass, ties=ties)
    assert torch.equal(
        chosen, reference.select_blocks(query.double(), key.double(), keep_mass, [], [], ties)
    )


def test_masses_are_integers_of_32_bits(emulated):
    query, key = torch.zeros(2, 1, 1, 3, 8)
    query[..., 0] = math.sqrt(8)
    key[0, 0, :, 0] = torch.tensor([1.0, 0.75 * 2.0**-32, 0.25 * 2.0**-32]).log()
    assert emulated(query, key, 1 - 2.0**-40)[0].flatten().tolist() == [0b011] * 3


def test_what_is_not_finite_follows_the_rule(emulated):  # law 9
    query, key = means(70, 16)
    clean, _ = emulated(query, key, 0.5)
    for row, value in ((3, math.nan), (33, math.inf), (60, -math.inf)):
        query[0, 1, row, 5] = value
    dirty, _ = emulated(query, key, 0.5)
    assert ops.unpack_selection(dirty, 70)[0, 1, [3, 33, 60]].all()
    dirty[0, 1, [3, 33, 60]] = clean[0, 1, [3, 33, 60]]
    assert torch.equal(dirty, clean)
    query, key = means(70, 16)
    query[..., 0], key[0, 0, 9, 0], key[0, 1, 9, 0] = query[..., 0].abs() + 0.1, -math.inf, math.nan
    dirty, _ = emulated(query, key, 0.5)
    assert torch.equal(dirty, reference.select_blocks(query, key, 0.5, [], [], "all"))
    kept = ops.unpack_selection(dirty, 70)
    assert not kept[0, 0, :, 9].any() and not kept[0, 0].all(1).any() and kept[0, 1].all()


# ---- binaries


@pytest.fixture(scope="module", params=["80", "90a", "120"])
def binary(request, tmp_path_factory):
    """({(tiles, slots): what ptxas reports}, PTX) of the torch-free kernels."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp(f"sm_{request.param}")
    lines = [
        f"template __global__ void kandinsky::select_blocks<{a}, {b}>(SelectBlocks);"
        for a, b in CONFIGURATIONS
    ]
    source = folder / "kernels.cu"
    source.write_text(
        "\n".join(['#include "cuda/select_blocks.cuh"', "using kandinsky::SelectBlocks;", *lines])
    )
    run = subprocess.run(
        [
            "nvcc",
            "-std=c++20",
            "-O3",
            f"-arch=sm_{request.param}",
            "-Xptxas",
            "-v",
            "-keep",
            "-keep-dir",
            str(folder),
            "-I",
            str(ROOT / "csrc"),
            "-cubin",
            "-o",
            str(folder / "out.cubin"),
            str(source),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    reports = {
        tuple(int(x) for x in re.search(r"ILi(\d+)ELi(\d+)E", part).groups()): part
        for part in run.stderr.split("Compiling entry function")[1:]
    }
    return reports, (folder / "kernels.ptx").read_text()


def test_no_configuration_spills(binary):
    reports, ptx = binary
    assert set(reports) == set(CONFIGURATIONS)
    for (_, slots), report in reports.items():
        assert " 0 bytes spill stores, 0 bytes spill loads" in report, report
        # two blocks of 256, or one
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= (
            128 if slots <= 64 else 255
        ), report
    assert "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32" in ptx


def test_launcher_compiles_against_the_stable_headers(tmp_path):
    """Whatever torch is installed; the binary is left to the build."""
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    from torch.utils.cpp_extension import include_paths

    run = subprocess.run(
        [
            "nvcc",
            "-std=c++20",
            "-arch=compute_90",
            "-code=compute_90",
            "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            *(f"-I{path}" for path in (*include_paths(), ROOT / "csrc")),
            "-c",
            "-o",
            str(tmp_path / "launcher.o"),
            str(ROOT / "csrc/cuda/select_blocks.cu"),
        ],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


# ---- the choice between kernels


def test_kernel_is_used_only_once_a_gpu_has_verified_it(monkeypatch):
    assert "select_blocks" not in tuning.CUDA_CPP or "select_blocks" in tuning.VERIFIED
    monkeypatch.setattr(_library, "compiled", lambda name: abs)
    monkeypatch.setattr(_guard, "_verdicts", {})
    if _library.triton_absence() is None:
        assert "triton" in ops.kernels()["select_blocks"]["cuda"]
        monkeypatch.setattr(tuning, "CUDA_CPP", frozenset({"select_blocks"}))
        assert ops.kernels()["select_blocks"]["cuda"] == "cuda c++"
        monkeypatch.setattr(_guard, "_verdicts", {("select_blocks_cuda", 1): "it is off"})
        assert "triton" in ops.kernels()["select_blocks"]["cuda"]


def test_refusals_say_why():
    refuse = launch_nabla.refuse_compiled_selection
    long = torch.empty(1, 1, tuning.LONGEST_COMPILED_ROW + 1, 8)
    assert (
        "got 3905" in refuse(long)
        and refuse(long[:, :, 1:]) is None
        and "nothing" in refuse(long[:, :0])
    )
    assert "got 12" in refuse(torch.empty(1, 1, 4, 12)) and "got 136" in refuse(
        torch.empty(1, 1, 4, 136)
    )


@pytest.mark.skipif(
    not torch.cuda.is_available() or _library.compiled("select_blocks") is None,
    reason="needs a GPU and a build for it",
)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.op == "select_blocks"], ids=lambda case: case.id
)
def test_every_case_on_a_gpu(case):  # law 1
    inputs = case.inputs()
    query, key = inputs["query_means"].cuda(), inputs["key_means"].cuda()
    args = (
        query,
        key,
        inputs["keep_mass"],
        list(inputs["tiles"] or ()),
        list(inputs["window"] or ()),
        inputs["ties"],
    )
    if launch_nabla.refuse_compiled_selection(*args):
        pytest.skip("the kernel does not take this size")
    case.check((_library.compiled("select_blocks")(*args).cpu(),), inputs)
