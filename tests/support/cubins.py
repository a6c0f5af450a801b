# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for every architecture without a GPU.

``python -m tests.support.cubins [sm ...]`` prints a line of JSON for each kernel and architecture.
It runs as a process of its own, because the tests' process has Triton's interpreter switched on.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kandinsky_kernels import tuning
from kandinsky_kernels.triton import nabla, norm, selection, vae

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
POINTERS = {
    "p_cos": "fp32",
    "p_sin": "fp32",
    "p_means": "fp32",
    "p_lse": "fp32",
    "p_scale": "fp32",
    "p_shift": "fp32",
    "p_gate": "fp32",
    "p_offsets": "i32",
    "p_positions": "i32",
    "p_count": "i32",
    "p_selection": "i32",
    "p_list": "i16",
    "p_logit": "fp32",
    "p_common": "fp32",
    "p_sums": "fp32",
    "p_grad_lse": "fp32",
    "p_mean": "fp64",
    "p_spread": "fp64",
    "p_moments": "fp64",
}
# channels in and out, taps and strides: the first and the usual convolutions of the VAE, an
# upsampling's phase, a downsampling, the last
CONVOLUTIONS = (
    (16, 512, (3, 3, 3), (1, 1, 1)),
    (512, 512, (3, 3, 3), (1, 1, 1)),
    (256, 128, (3, 3, 3), (1, 1, 1)),
    (256, 256, (2, 2, 2), (1, 1, 1)),
    (256, 256, (3, 3, 3), (2, 2, 2)),
    (128, 3, (3, 3, 3), (1, 1, 1)),
)
# KiB of shared memory of a multiprocessor
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
# barriers, exchanges between lanes, stores to and loads from shared memory, global memory, local
# memory, matrix products
COUNTED = ("BAR", "SHFL", "STS", "LDS", "LDG", "LDL", "STL", "HMMA", "HGMMA")
UNITS = {
    "wgmma": "wgmma.mma_async",
    "mma": "mma.sync",
    "tcgen05": "tcgen05.mma",
    "tma": "cp.async.bulk.tensor",
}
# what descriptors are for, where not key and value
DESCRIBED = {"block_sparse_attention_backward_key": ("p_query", "p_grad_out")}
FLOATS = (
    "eps",
    "scale",
    "scale_log2",
    "bound_log2",
    "root",
    "drop_high",
    "drop_middle",
    "drop_low",
)


def kernels(capability):
    """(name, kernel, constants, Launch) of everything the launchers start at the sizes of Lite (D
    64) and Pro (D 128), in bf16."""
    for N in (1464, 3660):
        block = tuning.padded(N, 32)
        for stable in (False, True):
            yield (
                f"select_blocks-{N}{'-stable' if stable else ''}",
                selection.select_blocks,
                {"WINDOW": True, "STABLE": stable, "BLOCK": block},
                tuning.row(block, stable),
            )
    yield "list_blocks", nabla.list_blocks, {"CHUNK": tuning.LIST_CHUNK}, tuning.LIST
    for D, C in ((64, 1792), (128, 4096)):
        rows, block = {"ROWS": tuning.norm_rows(93696), "BLOCK": tuning.padded(C)}, tuning.padded(C)
        yield f"modulated_norm-{C}", norm.modulated_norm, rows, tuning.norm(block)
        yield f"gated_add_norm-{C}", norm.gated_add_norm, {"NORM": True, **rows}, tuning.norm(block)
        heads = C // D
        tile = tuning.rope(heads, D)
        rope = {"AXES": 3, "VECTOR": 4, "TOKENS": tuning.TOKENS, "BLOCK": D}
        constants = {**rope, "MEANS": True, "TURN": tile.tokens, "HEADS": tile.heads}
        yield f"norm_rope-{D}", norm.norm_rope, constants, tile.launch
        rows = {"ROWS": tuning.norm_backward_rows(93696), "BLOCK": tuning.padded(C)}
        yield (
            f"modulated_norm_backward-{C}",
            norm.modulated_norm_backward,
            rows,
            tuning.norm_backward(block),
        )
        yield (
            f"gated_add_norm_backward-{C}",
            norm.gated_add_norm_backward,
            {"ADD": True, **rows},
            tuning.norm_backward(block),
        )
        tile = tuning.rope(heads, D)
        constants = {**rope, "TURN": tile.tokens, "HEADS": tile.heads}
        yield f"norm_rope_backward-{D}", norm.norm_rope_backward, constants, tile.launch
        for full, bounded in itertools.product((True, False), (True, False)):
            launch = tuning.attention(D, torch.bfloat16, capability, full)
            constants = {
                "FULL": full,
                "BOUNDED": bounded,
                "TMA": launch.descriptors,
                "SPLIT": launch.split,
                "PRECISION": "ieee",
                "WIDTH": D // 2 if launch.split else D,
                "TOKENS": tuning.TOKENS,
            }
            kind = f"{'' if full else '-ragged'}{'-bounded' if bounded else ''}"
            name = f"block_sparse_attention-{D}{kind}"
            yield name, nabla.block_sparse_attention, constants, launch
        for full in (True, False):
            yield from gradient_kernels(D, capability, full)


def gradient_kernels(D, capability, full):
    """The same for the gradients of block_sparse_attention."""
    launches = tuning.attention_backward(D, torch.bfloat16, capability, full)
    for kernel, launch, options in zip(
        (nabla.block_sparse_attention_backward_query, nabla.block_sparse_attention_backward_key),
        launches,
        ({"LSE": False}, {}),
        strict=True,
    ):
        constants = {
            "FULL": full,
            "TMA": launch.descriptors,
            "SPLIT": launch.split,
            "PRECISION": "ieee",
            "WIDTH": D // 2 if launch.split else D,
            "TOKENS": tuning.TOKENS,
            **options,
        }
        yield f"{kernel.__name__}-{D}{'' if full else '-ragged'}", kernel, constants, launch


def vae_kernels(capability):
    """The same for the video VAE, whose levels have 128, 256 and 512 channels and whose attention
    is 512 wide."""
    for C in (128, 256, 512):
        slabs = {"SLAB": tuning.SLAB_ELEMENTS // C, "GROUPS": 32}
        yield (
            f"slab_moments-{C}",
            vae.slab_moments,
            {**slabs, "ROWS": tuning.SLAB_TILE // C, "BLOCK": C},
            tuning.SLABS,
        )
        normed = {"PAD": 1, "SILU": True, "ROWS": tuning.NORM_TILE // C, "BLOCK": C}
        for front in (False, True):
            yield (
                f"group_norm_silu-{C}{'-front' if front else ''}",
                vae.group_norm_silu,
                {**normed, "FRONT": front},
                tuning.NORMED,
            )
    yield "join_moments", vae.join_moments, {**slabs, "MANY": tuning.JOINED}, tuning.LIST
    tile = tuning.frame_attention(512, capability)
    constants = {
        "PRECISION": "ieee",
        "WHOLE": True,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "DEPTH": tile.depth,
        "BLOCK": 512,
    }
    yield "frame_causal_attention-512", vae.frame_causal_attention, constants, tile.launch
    for C, N, taps, stride in CONVOLUTIONS:
        tile = tuning.convolution(C, N, capability)
        constants = {
            "PRECISION": "ieee",
            "BIAS": True,
            "WHOLE": C % tile.depth == 0 and N % tile.columns == 0,
            **dict(zip(("KT", "KY", "KX", "ST", "SY", "SX"), (*taps, *stride), strict=True)),
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "DEPTH": tile.depth,
        }
        kind = "".join(map(str, taps)) + ("-strided" if max(stride) > 1 else "")
        name = f"causal_conv3d-{C}-{N}-{kind}"
        yield name, vae.causal_conv3d, constants, tile.launch


def compiled(kernel, constants, launch, architecture):
    """The compiled kernel, with the hints a real call gives: pointers and strides are multiples of
    16. architecture: 90 for sm_90, or any target of Triton's."""
    signature, hints = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif constants.get("TMA") and name in DESCRIBED.get(kernel.__name__, ("p_key", "p_value")):
            signature[name] = f"tensordesc<bf16[1,{tuning.TOKENS},1,{constants['WIDTH']}]>"
        elif name.startswith("p_"):
            signature[name] = "*" + POINTERS.get(name, "bf16")
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        multiple = re.search("_(batch|row|token|head|pixel)$|(x|q|front)_frame$", name) or name in (
            "D",
            "C",
        )
        multiple = multiple or name == "N" and constants.get("COLUMNS", 0) > 16
        if signature[name] != "constexpr" and (signature[name][0] == "*" or multiple):
            hints[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    target = GPUTarget("cuda", architecture, 32) if isinstance(architecture, int) else architecture
    return triton.compile(source, target=target, options=launch.options)


def tool(name, *arguments, cubin):
    """What one of NVIDIA's tools, which Triton brings, prints about a binary."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [program, *arguments, file.name], capture_output=True, text=True, check=True
        ).stdout


def resources(cubin):
    """Registers per thread and bytes of local memory, read off the binary: what does not fit into
    registers is on the stack."""
    text = tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    registers, stack, local = (
        int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK", "LOCAL")
    )
    return registers, stack + local


def longest_loop(cubin):
    """How often each of `COUNTED` stands in the longest loop, which is a turn of the one over
    blocks; predicated ones count too."""
    code = []
    labels = {}
    for line in tool("nvdisasm", "-c", cubin=cubin).splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
    loops = [[]]
    for end, instruction in enumerate(code):
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if branch and labels.get(branch[1], end + 1) <= end:
            loops.append(code[labels[branch[1]] : end + 1])
    body = max(loops, key=len)
    names = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0] for text in body]
    return {name: names.count(name) for name in COUNTED}


def programs_per_multiprocessor(registers, shared, warps, architecture):
    """How many programs are resident at once: registers are given to warps in units of 256, and
    1 KiB of shared memory is the system's (CUDA programming guide, technical specifications)."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = (SHARED_KIB[architecture] << 10) // (shared + 1024)
    by_warps = (64 if architecture in (80, 90, 100) else 48) // warps
    return min(by_registers, by_shared, by_warps)


def main():
    for architecture in [int(sm) for sm in sys.argv[1:]] or ARCHITECTURES:
        capability = divmod(architecture, 10)
        for name, kernel, constants, launch in (*kernels(capability), *vae_kernels(capability)):
            result = compiled(kernel, constants, launch, architecture)
            registers, local = resources(result.asm["cubin"])
            shared = result.metadata.shared
            row = {
                "kernel": name,
                "sm": architecture,
                "registers": registers,
                "local": local,
                "shared": shared,
                "warps": launch.num_warps,
                "stages": launch.num_stages,
                "programs": programs_per_multiprocessor(
                    registers, shared, launch.num_warps, architecture
                ),
                **{unit: word in result.asm["ptx"] for unit, word in UNITS.items()},
            }
            if "norm_rope" in name:
                row["loop"] = longest_loop(result.asm["cubin"])
            if "block_sparse" in name:
                row["loop"] = longest_loop(result.asm["cubin"])
                row["layouts"] = sorted(
                    set(re.findall(r"mma<.*?warpsPerCTA = \[(\d+, \d+)\]", result.asm["ttgir"]))
                )
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
