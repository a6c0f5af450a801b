# SPDX-License-Identifier: Apache-2.0
"""Every kernel once on the shapes of the released models, against fp64 by the laws of the tests."""

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator

import torch

import kandinsky_kernels as ops
from kandinsky_kernels import _library
from kandinsky_model.dit.geometry import Grid, block_offsets
from tests import cases
from tests.support.backward import Backward

from .attention import WINDOW, gradient_check, normed_heads, spot_check
from .card import FULL, Clock, Size, masks
from .convolutions import CONVOLUTIONS, TOY_CONVOLUTIONS, conv_check, drawn, kernel_on

# channels, height and width of the decoder's levels at 512 x 768
LEVELS = ((512, 64, 96), (512, 128, 192), (256, 256, 384), (128, 512, 768))
TOY_LEVELS = ((32, 3, 4),)
HEADS = 4  # of the map that is compared, because sorting it in fp64 takes long


def selftests(clock: Clock, size: Size, _: dict) -> Iterator[dict]:
    """A row for each kernel: what ran, and "right" or what is wrong; the seconds are mostly those
    of compiling and of fp64. A kernel that fails does not
    keep the others from being tried; the section fails at its end."""
    wrong = []
    for op, name, check, *kernel in checks(clock, size):
        verdict, start = "right", time.monotonic()
        try:
            check()
        except Exception as error:
            traceback.print_exc()
            verdict = f"{type(error).__name__}: {str(error)[:300]}"
        (ran,) = kernel or [ops.kernels()[op.replace("_means", "")][clock.device.type]]
        if clock.device.type == "cuda" and not ran.startswith(("triton", "cuda")):
            verdict = f"the kernel did not run: {ran}" if verdict == "right" else verdict
        if verdict != "right":
            wrong.append(f"{op} {name}")
        seconds = round(time.monotonic() - start, 1)
        yield {"op": op, "size": name, "ran": ran, "verdict": verdict, "seconds": seconds}
        gc.collect()
    assert not wrong, f"not right: {'; '.join(wrong)}"


def checks(clock: Clock, size: Size) -> Iterator[tuple]:
    """(operator, size, a call that raises where the operator is wrong), and the kernel's name where
    it is not the one that the dispatcher runs."""
    toy = size not in FULL
    S, C, H, D = size.grid.tokens, size.H * size.D, size.H, size.D
    makers = {
        "modulated_norm": cases.rows(1, S, C),
        "gated_add_norm": cases.rows(1, S, C, branch=True),
        "norm_rope": cases.heads(1, S, H, D),
        "norm_rope_means": cases.heads(1, S, H, D, block=64),
    }
    yield "block_sparse_attention", size.name, lambda: attend(clock, size)
    yield "select_blocks", size.name, lambda: select(clock, size)
    compiled = _library.compiled("select_blocks")
    if compiled and clock.device.type == "cuda":
        yield "select_blocks", size.name, lambda: select(clock, size, compiled), "cuda c++"
    for op, make in makers.items():
        case = cases.Case(op, size.name, make, torch.bfloat16)
        yield op, size.name, lambda case=case: faithful(case, clock.device)
    yield "block_sparse_attention_backward", size.name, lambda: differentiate(clock, size)
    # half the length, because the fp64 graph of a pass must fit as well
    half = S if toy else Grid(31, size.grid.Y, size.grid.X).tokens
    makers = {
        "modulated_norm": cases.rows(1, half, C),
        "gated_add_norm": cases.rows(1, half, C, branch=True),
        "norm_rope": cases.heads(1, half, H, D),
    }
    for op, make in makers.items():
        case = Backward(f"{op}_backward", size.name, make, torch.bfloat16)
        yield case.op, size.name, lambda case=case: faithful(case, clock.device)
    if size is FULL[1]:
        return
    for C, Y, X in TOY_LEVELS if toy else LEVELS:
        makers = {
            "group_moments": cases.video(1, 2, Y, X, C, 32),
            "group_norm_silu": cases.normed(1, 2, Y, X, C),
        }
        for op, make in makers.items():
            case = cases.Case(op, "", make, torch.bfloat16)
            name = f"{C} channels, {Y}x{X}"
            yield op, name, lambda case=case: faithful(case, clock.device)
    C, Y, X = (TOY_LEVELS if toy else LEVELS)[0]
    case = cases.Case("frame_causal_attention", "", cases.frames(1, 2, Y * X, C), torch.bfloat16)
    yield case.op, f"{C} channels, {Y}x{X}", lambda: faithful(case, clock.device)
    shapes = TOY_CONVOLUTIONS if toy else CONVOLUTIONS
    kernel = "reference" if clock.device.type == "cpu" else "triton"
    yield "causal_conv3d", "decoder", lambda: convolve(clock, shapes), kernel


def inputs_of(case: cases.Case, device: torch.device) -> dict:
    """A case's inputs, drawn on the device: a CPU would take seconds for each."""
    with torch.device(device):
        made = case.make(torch.Generator(device).manual_seed(0))
        made = {
            name: x.to(case.dtype) if name in case.operator.narrow else x
            for name, x in made.items()
        }
        if isinstance(case, Backward):
            outputs = case.forward.run(made)
            made |= {f"grad_{i}": torch.randn_like(x) for i, x in enumerate(outputs)}
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in made.items()}


def faithful(case: cases.Case, device: torch.device) -> None:
    inputs = inputs_of(case, device)
    case.check(case.run(inputs), inputs)


def convolve(clock: Clock, shapes: tuple) -> None:
    for *shape, _ in shapes:
        conv_check(kernel_on(clock.device), drawn(*shape, clock.device))


def select(clock: Clock, size: Size, compiled: Callable | None = None) -> None:
    """The operator's choice, or that of its CUDA C++ kernel."""
    make = cases.means(1, size.H, size.grid.tiles, size.D, 0.9, WINDOW, sharp=4.0)
    case = cases.Case("select_blocks", size.name, make, torch.float32)
    inputs = inputs_of(case, clock.device)
    if compiled is None:
        (chosen,) = case.run(inputs)
    else:
        tensors = inputs["query_means"], inputs["key_means"]
        chosen = compiled(*tensors, inputs["keep_mass"], list(size.grid.tiles), list(WINDOW), "all")
    few = {name: inputs[name][:, :HEADS].cpu() for name in ("query_means", "key_means")}
    case.check((chosen[:, :HEADS].cpu(),), inputs | few)


def attend(clock: Clock, size: Size) -> None:
    q, k, v, bound = normed_heads(size, clock.device)
    offsets = block_offsets(size.grid).to(clock.device)
    chosen = masks(size, 0.1, clock.device)["clustered"]
    for limit in (bound, math.inf):
        spot_check(q, k, v, chosen, offsets, limit)


def differentiate(clock: Clock, size: Size) -> None:
    *qkv, bound = normed_heads(size, clock.device)
    offsets = block_offsets(size.grid).to(clock.device)
    chosen = masks(size, 0.1, clock.device)["clustered"]
    leaves = [x.requires_grad_() for x in qkv]
    out = ops.block_sparse_attention(*leaves, chosen, offsets, logit_bound=bound)
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, grad)
    gradient_check(gradients, *(x.detach() for x in qkv), grad, chosen, offsets)
