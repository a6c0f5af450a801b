# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for every architecture without a GPU.

``python -m tests.support.cubins [sm ...]`` prints a line of JSON for each kernel and architecture,
and ``--record`` the table that `tuning.BINARIES` keeps of them. It runs as a process of its own,
because the tests' process has Triton's interpreter switched on.
"""

import itertools
import json
import math
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.gpu import machine
from kandinsky_kernels import tuning
from kandinsky_kernels.triton import nabla, norm, selection, vae

from . import dense_attention

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# those for which kernels without matrix products are compiled as well: nothing in them depends on
# the others
PLAIN = (80, 89, 90, 120)
CARDS = {card.sm: card for card in sorted(machine.CARDS, key=lambda card: card.sm)}
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
# barriers, exchanges between lanes, stores to shared memory, loads from the stack
COUNTED = ("BAR", "SHFL", "STS", "LDL")
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


def kernels_of(architecture):
    """(name, kernel, constants, Launch) of what is compiled for an architecture: everything with
    matrix products for all of them, the rest for `PLAIN` alone."""
    capability = divmod(architecture, 10)
    for name, *rest in (*kernels(capability), *vae_kernels(capability)):
        if architecture in PLAIN or "attention" in name or "conv3d" in name:
            yield name, *rest


def row_of(name, kernel, constants, launch, architecture, l2=machine.L2_BYTES):
    """What the tests read off one binary; attention's tiles come out of L2 at ``l2`` bytes a
    clock."""
    result = compiled(kernel, constants, launch, architecture)
    cubin = result.asm["cubin"]
    registers, local = machine.resources(cubin)
    shared = result.metadata.shared
    body = machine.main_loop(cubin)
    names = [x.name for x in body]
    row = {
        "kernel": name,
        "sm": architecture,
        "registers": registers,
        "local": local,
        "shared": shared,
        "warps": launch.num_warps,
        "stages": launch.num_stages,
        "programs": machine.programs_per_multiprocessor(
            registers, shared, launch.num_warps, architecture
        ),
        "turn": {counted: names.count(counted) for counted in COUNTED},
        "loads": names.count("LDG"),
        **{unit: word in result.asm["ptx"] for unit, word in UNITS.items()},
    }
    if "attention" in name:
        row["layouts"] = sorted(
            set(re.findall(r"mma<.*?warpsPerCTA = \[(\d+, \d+)\]", result.asm["ttgir"]))
        )
    if "block_sparse" in name and constants["FULL"] and architecture in CARDS:
        width = 64 if "-64" in name else 128
        tile_bytes = 2 * tuning.TOKENS * width
        row["clocks"] = {
            kind: machine.clocks(
                body,
                (row["programs"], launch.num_warps),
                launch.num_stages,
                tile_bytes,
                CARDS[architecture],
                rate,
            )
            for kind, rate in (("alone", math.inf), ("l2", l2))
        }
    return row


def dense_row():
    """What the model says of dense attention on an H100, whose speed is published: 403 TFLOP/s at
    16 k tokens and head dim 64 (arXiv 2407.08608, figure 5, Triton)."""
    constants = {"ROWS": 128, "KEYS": 64, "WIDTH": 64}
    launch = tuning.Launch(4, 3)
    result = compiled(dense_attention.dense_attention, constants, launch, 90)
    cubin = result.asm["cubin"]
    registers, _ = machine.resources(cubin)
    programs = machine.programs_per_multiprocessor(registers, result.metadata.shared, 4, 90)
    turn = machine.clocks(machine.main_loop(cubin), (programs, 4), 3, 0, CARDS[90])
    return {
        "kernel": "dense",
        "sm": 90,
        "tflops": machine.tflops(4 * 128 * 64 * 64, turn, CARDS[90]),
    }


def recorded(text):
    """Rows of the table `tuning.BINARIES` by kernel: programs by architecture, the most of each of
    `COUNTED` in a turn, and percents of the tensor cores' time by architecture."""
    rows = {}
    for line in text.strip().splitlines()[1:]:
        name, *cells = line.split()
        programs, turn, shares = cells[:5], cells[5:9], cells[9:]
        rows[name] = {
            "programs": numbers(CARDS, programs),
            "turn": numbers(COUNTED, turn),
            "shares": numbers(CARDS, shares),
        }
    return rows


def numbers(names, cells):
    """{name: number} of a table's cells, without those that are "-"."""
    return {name: int(cell) for name, cell in zip(names, cells, strict=True) if cell != "-"}


def share(row):
    """Percents of a turn in which the tensor cores work, if tiles are there at once."""
    card = CARDS[row["sm"]]
    flop = machine.turn_flop(row["kernel"])
    return 100 * machine.tflops(flop, row["clocks"]["alone"], card) / card.ceiling


def record(rows):
    """The table of `recorded`: programs, the worst turn and shares of each kernel. sm_100, of which
    there is no card in `machine.CARDS`, is left out."""
    rows = [row for row in rows if row["sm"] in CARDS]
    width = max(len(row["kernel"]) for row in rows)
    architectures = [str(sm) for sm in CARDS]
    lines = [" ".join([" " * width, *architectures, "", *COUNTED, "", *architectures])]
    for name in dict.fromkeys(row["kernel"] for row in rows):
        found = {row["sm"]: row for row in rows if row["kernel"] == name}
        programs = [found[sm]["programs"] if sm in found else "-" for sm in CARDS]
        turn = [max(row["turn"][counted] for row in found.values()) for counted in COUNTED]
        timed = [sm in found and "clocks" in found[sm] for sm in CARDS]
        shares = [
            min(99, math.floor(share(found[sm]))) if clocks else "-"
            for sm, clocks in zip(CARDS, timed, strict=True)
        ]
        titles = (architectures, COUNTED, architectures)
        parts = [
            " ".join(f"{cell:>{len(title)}}" for cell, title in zip(cells, over, strict=True))
            for cells, over in zip((programs, turn, shares), titles, strict=True)
        ]
        lines.append("  ".join([f"{name:{width}} {parts[0]}", *parts[1:]]))
    return "\n".join(lines)


def main():
    wanted = [int(word) for word in sys.argv[1:] if word != "--record"] or ARCHITECTURES
    found = []
    for architecture in wanted:
        for kernel in kernels_of(architecture):
            found.append(row_of(*kernel, architecture))
            if "--record" not in sys.argv:
                print(json.dumps(found[-1]), flush=True)
    if "--record" in sys.argv:
        print(record(found))
    else:
        print(json.dumps(dense_row()), flush=True)


if __name__ == "__main__":
    main()
