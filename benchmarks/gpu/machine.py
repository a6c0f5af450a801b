# SPDX-License-Identifier: Apache-2.0
"""What a binary says without a GPU: the instructions of its loops, how many programs a
multiprocessor holds, and a lower bound of the clocks that a turn of a loop takes.

The clocks come from a model of one quarter of a multiprocessor. Each resident program has one warp
there (or two, of eight). Warps issue in order and one instruction a clock, after the stall counts
and scoreboards that the compiler wrote into the instructions, and share the pipes: tensor cores,
exponentials, fp32, integers and a quarter of the port of shared memory. Tiles arrive at `l2` bytes
a clock. Latencies are assumptions. A warp never waits for its fellows at a
barrier, and what wgmma and arriving tiles take of the port delays nobody else. What it gives are
therefore upper bounds of speed.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Card:
    """A graphics card: its architecture, multiprocessors, clock in GHz, and the clocks that one
    product of 16 x 8 x 16 in bf16 with sums in fp32 keeps a tensor core busy (mma.sync)."""

    name: str
    sm: int
    multiprocessors: int
    ghz: float
    product: int

    @property
    def ceiling(self) -> float:
        """TFLOP/s of its tensor cores in bf16 with sums in fp32."""
        per_clock = 4 * 2 * 16 * 8 * 16 / self.product
        return per_clock * self.multiprocessors * self.ghz / 1e3


# multiprocessors and boost clocks of the vendor's data sheets
CARDS = (
    Card("RTX 3090", 86, 82, 1.695, 32),
    Card("RTX 4090", 89, 128, 2.52, 32),
    Card("RTX 5090", 120, 170, 2.407, 32),
    Card("A100", 80, 108, 1.41, 8),
    Card("H100, H200", 90, 132, 1.755, 4),
)
# KiB of shared memory of a multiprocessor, and warps that it holds (CUDA programming guide,
# technical specifications)
SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}
# bytes a clock and multiprocessor out of L2: 5.5 TB/s of an H100; assumed of every card
L2_BYTES = 24.0
# clocks until a tile is there that was asked for, at least
L2_LATENCY = 650
# clocks until results are there: exponentials, loads from shared memory (once the port is free),
# numbers of a block's list, which the L1 cache holds, and constants
LATENCY = {"MUFU": 23, "LDG": 35} | dict.fromkeys(("SYNCS", "LDC", "R2UR", "VOTEU", "S2R"), 20)
SHARED_LATENCY = 25
WGMMA_LATENCY = 30
# clocks of a barrier, and of a fence before wgmma
STALLS = {"BAR": 20, "MEMBAR": 20}
# clocks until the operands of an instruction of unknown duration are read
READ_LATENCY = 10
# clocks between the starts of two programs
APART = 130
# clocks of queue before shared memory: a warp waits when its requests lie that far in the future
QUEUE = 64
SHARED = {"LDSM", "LDS", "STS", "STSM", "SHFL"}
INTEGER = (
    *("F2FP", "FMNMX", "ISETP", "LOP3", "SHF", "PRMT", "SEL"),
    *("IADD3", "LEA", "PLOP3", "FSETP", "FSEL", "VIADD", "MOV"),
)
PIPES = {
    "MUFU": "exponential",
    "HMMA": "tensor",
    **dict.fromkeys(("FFMA", "FADD", "FMUL"), "fp32"),
    **dict.fromkeys(INTEGER, "integer"),
}
# products of 64 x 64 x D of each kernel of attention: of the gradients seven in all
PRODUCTS = {
    "block_sparse_attention": 2,
    "block_sparse_attention_backward_query": 3,
    "block_sparse_attention_backward_key": 4,
}


@dataclass(frozen=True)
class Instruction:
    """One instruction with what the compiler says about its issue: clocks until the next one, the
    scoreboards (of six, or 7 for none) that its result and its operands release, and those that it
    waits for, as bits."""

    address: int
    text: str
    stall: int
    result: int
    operands: int
    waits: int

    @functools.cached_property
    def words(self) -> tuple[str, ...]:
        """("HGMMA", "64x64x16", "F32", "BF16"): name and modifiers, without predicate."""
        text = re.sub(r"^@!?U?P\w+\s+", "", self.text)
        return tuple(text.split()[0].split("."))

    @property
    def name(self) -> str:
        return self.words[0]


def tool(name: str, *arguments: str, cubin: bytes) -> str:
    """What one of NVIDIA's tools, which Triton brings, prints about a binary."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [program, *arguments, file.name], capture_output=True, text=True, check=True
        ).stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory, read off the binary: what does not fit into
    registers is on the stack."""
    text = tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    found = {word: int(count) for word, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def read(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a binary, and the addresses of its labels."""
    code, labels, waiting, low = [], {}, [], None
    for line in tool("nvdisasm", "-c", "-hex", cubin=cubin).splitlines():
        if label := re.match(r"\s*(\.L_[\w.]+):", line):
            waiting.append(label[1])
        elif first := re.match(
            r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;?\s*/\* 0x[0-9a-f]{16} \*/", line
        ):
            low = int(first[1], 16), first[2].rstrip("; ")
        elif low and (second := re.search(r"/\* (0x[0-9a-f]{16}) \*/", line)):
            control = int(second[1], 16) >> 41
            fields = control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
            code.append(Instruction(*low, max(1, control & 15), *fields))
            labels.update(dict.fromkeys(waiting, low[0]))
            waiting, low = [], None
    return code, labels


def main_loop(cubin: bytes) -> list[Instruction]:
    """The loop that does the work: the shortest with tensor products, otherwise the longest, or all
    of the code where there is no loop. Loops that only spin at a barrier are none."""
    code, labels = read(cubin)
    loops = []
    for x in code:
        target = re.search(r"\bBRA\b.*`\((\.L_[\w.]+)\)", x.text)
        if target and labels.get(target[1], x.address) < x.address:
            loops.append([y for y in code if labels[target[1]] <= y.address <= x.address])
    products = [body for body in loops if any(x.name in ("HMMA", "HGMMA") for x in body)]
    if products:
        return min(products, key=len)
    return max((body for body in loops if len(body) > 8), key=len, default=code)


def programs_per_multiprocessor(registers: int, shared: int, warps: int, sm: int) -> int:
    """How many programs are resident at once. Registers are given to warps in units of 256, shared
    memory to programs in units of 128 bytes, and 1 KiB of it each is the system's (CUDA programming
    guide, technical specifications)."""
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = (SHARED_KIB[sm] << 10) // (-(-shared // 128) * 128 + 1024)
    return min(by_registers, by_shared, WARPS[sm] // warps)


class Warp:
    """A warp on its way through turns of a loop."""

    def __init__(self, start: float, body: list[Instruction], turns: int):
        self.body = body
        self.at = 0  # the next instruction
        self.time = start  # when it may issue, as far as stall counts go
        self.boards = [0.0] * 8
        self.product = 0.0  # when its last wgmma ends
        self.arrivals = [0.0] * turns  # of the tiles of each turn
        self.ends: list[float] = []

    @property
    def next(self) -> Instruction:
        return self.body[self.at]

    def move(self, now: float, stall: int) -> None:
        """To the next instruction, `stall` clocks after this one has issued."""
        self.time = now + stall
        self.at = (self.at + 1) % len(self.body)
        if self.at == 0:
            self.ends.append(now)

    def ready(self, x: Instruction, pipes: dict[str, float]) -> float:
        """The first clock at which its next instruction x can issue."""
        waits = [self.boards[i] for i in range(6) if x.waits >> i & 1]
        time = max(self.time, *waits) if waits else self.time
        if x.name in PIPES:
            return max(time, pipes[PIPES[x.name]])
        if x.name in SHARED:
            return max(time, pipes["port"] - QUEUE)
        if x.name == "WARPGROUP" and "DEPBAR" in x.words:
            return max(time, self.product + WGMMA_LATENCY)
        if x.name == "DEPBAR" or x.name == "SYNCS" and "PHASECHK" in x.words:
            return max(time, self.arrivals[len(self.ends)])
        return time


def _wgmma(x: Instruction) -> tuple[float, float]:
    """Clocks of the tensor core and of the port of shared memory that a wgmma takes."""
    (columns,) = map(int, re.findall(r"64x(\d+)x16", x.text))
    from_registers = re.search(r"R\d+, R\d+, gdesc", x.text)
    read_bytes = 32 * columns + (0 if from_registers else 2048)
    return columns / 2, read_bytes / 128


class Quarter:
    """A quarter of a multiprocessor: what its warps share, as the clocks at which each is free."""

    def __init__(self, card: Card, l2: float, tile_bytes: float, ahead: int):
        self.l2, self.tile_bytes, self.ahead = l2, tile_bytes, ahead
        names = ("issue", "exponential", "fp32", "integer", "port", "tensor", "fill")
        self.free = dict.fromkeys(names, 0.0)
        fp32 = 2 if card.sm == 80 else 1  # 16 lanes a quarter instead of 32
        self.busy = {"exponential": 8, "fp32": fp32, "integer": 2, "tensor": card.product}

    def issue(self, warp: Warp, x: Instruction, now: float) -> None:
        """The next instruction of a warp, x, issues now."""
        self.free["issue"] = now + 1
        stall = min(x.stall, 8) if x.name == "MUFU" else max(x.stall, STALLS.get(x.name, 0))
        latency: float | None = LATENCY.get(x.name)
        if x.name in PIPES:
            self.free[PIPES[x.name]] = now + self.busy[PIPES[x.name]]
        elif x.name == "HGMMA":
            start = max(self.free["tensor"], now)
            warp.product = self.free["tensor"] = start + max(_wgmma(x))
        elif x.name in SHARED:
            wide = "x4" in x.text or {"4", "128"} & set(x.words)
            size = 512 if wide else 256 if {"2", "64"} & set(x.words) else 128
            self.free["port"] = max(self.free["port"], now) + size / 32
            latency = self.free["port"] - now + SHARED_LATENCY
        elif x.name in ("UTMALDG", "LDGSTS"):
            self._load(warp, x, now)
        if latency is not None:
            warp.boards[x.result] = max(warp.boards[x.result], now + latency)
            warp.boards[x.operands] = max(warp.boards[x.operands], now + READ_LATENCY)
        warp.move(now, stall)

    def _load(self, warp: Warp, x: Instruction, now: float) -> None:
        """One thread asks for a whole tile, or each of four warps for 512 bytes."""
        size = self.tile_bytes if x.name == "UTMALDG" else 2048
        self.free["fill"] = max(self.free["fill"], now) + size / self.l2
        turn = len(warp.ends) + self.ahead
        done = max(self.free["fill"], now + L2_LATENCY)
        warp.arrivals[turn] = max(warp.arrivals[turn], done)


def clocks(
    body: list[Instruction],
    resident: tuple[int, int],
    stages: int,
    tile_bytes: int,
    card: Card,
    l2: float = L2_BYTES,
    turns: int = 16,
) -> float:
    """Clocks of a multiprocessor for one turn of one program; `resident` are the programs that it
    holds and the warps of each. A descriptor reads `tile_bytes`; loads run `stages` - 1 turns
    ahead."""
    programs, warps = resident
    beside = max(1, warps // 4)
    quarter = Quarter(card, l2, tile_bytes / beside, max(0, stages - 1))
    crew = [Warp(APART * (i // beside), body, turns + stages) for i in range(programs * beside)]
    while moving := [warp for warp in crew if len(warp.ends) < turns]:
        ready = {warp: warp.ready(warp.next, quarter.free) for warp in moving}
        warp = min(moving, key=lambda one: (ready[one], one.time))
        quarter.issue(warp, warp.next, max(ready[warp], quarter.free["issue"]))
    skip = turns // 5
    spans = [(warp.ends[-1] - warp.ends[skip]) / (turns - 1 - skip) for warp in crew]
    return sum(spans) / len(spans) / programs


def tflops(flop: float, clocks_per_turn: float, card: Card) -> float:
    """TFLOP/s of a card whose multiprocessors do `flop` in so many clocks."""
    return flop / clocks_per_turn * card.multiprocessors * card.ghz / 1e3


def turn_flop(kernel: str) -> int:
    """Floating-point operations of a turn of a kernel of attention, by its name in the tests:
    "block_sparse_attention-128-bounded"."""
    name, width, *_ = kernel.split("-")
    return PRODUCTS[name] * 2 * 64 * 64 * int(width)
