# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: under the interpreter, or on a GPU where there is one; as binaries for every
architecture; and their guard."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import kandinsky_kernels as ops
from kandinsky_kernels import _guard, nabla, norm, reference, tuning, vae
from kandinsky_kernels.launch import nabla as launch_nabla
from kandinsky_kernels.launch import norm as launch_norm
from kandinsky_kernels.launch import vae as launch_vae
from kandinsky_kernels.triton import selection as triton_selection
from kandinsky_model.dit.geometry import Grid

from ..cases import (
    CASES,
    Case,
    attention,
    block_sparse_attention_peer,
    means,
    video,
)
from ..compare import assert_faithful
from ..conftest import needs_triton
from ..peers import norm_rope_means_peer
from ..support.backward import BACKWARDS

needs_triton()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAUNCHERS = {
    "modulated_norm": (norm, launch_norm.launch_modulated_norm),
    "gated_add_norm": (norm, launch_norm.launch_gated_add_norm),
    "norm_rope": (norm, launch_norm.launch_norm_rope),
    "norm_rope_means": (norm, launch_norm.launch_norm_rope),
    "select_blocks": (nabla, launch_nabla.launch_selection),
    "block_sparse_attention": (nabla, launch_nabla.launch_attention),
    "group_moments": (vae, launch_vae.launch_moments),
    "group_norm_silu": (vae, launch_vae.launch_normed),
    "frame_causal_attention": (vae, launch_vae.launch_attention),
    "modulated_norm_backward": (norm, launch_norm.launch_modulated_norm_backward),
    "gated_add_norm_backward": (norm, launch_norm.launch_gated_add_norm_backward),
    "norm_rope_backward": (norm, launch_norm.launch_norm_rope_backward),
    "norm_rope_means_backward": (norm, launch_norm.launch_norm_rope_backward),
    "block_sparse_attention_backward": (nabla, launch_nabla.launch_gradients),
}
# The interpreter multiplies the bit patterns of bf16 numbers, adds up 64 tokens one after the other
# and a row in another order than its products do (which shows where a block attends to a token
# alone), and takes seconds for a hundred rows of the block map. Refused are channels that are no
# power of two.
SLOW_OR_UNLIKE = (
    "norm_rope_means-lite-float32",
    "norm_rope_means_backward-odd-float32",
    "block_sparse_attention_backward-one-float32",
    "block_sparse_attention_backward-ragged-float32",
    "select_blocks-peaked-float32",
    "select_blocks-flat-float32",
    "select_blocks-everything-float32",
    "select_blocks-stable-float32",
)
ALL = [*CASES, *BACKWARDS]
REFUSED = {
    case.id
    for case in CASES
    if case.op == "group_moments" and launch_vae.refuse_moments(**case.inputs())
}
SKIPPED = REFUSED | {
    case.id
    for case in ALL
    if DEVICE == "cpu" and (case.dtype == torch.bfloat16 or case.id in SLOW_OR_UNLIKE)
}
TRITON_CASES = [case for case in ALL if case.op in LAUNCHERS and case.id not in SKIPPED]


def on_device(inputs):
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def launched(case, inputs, monkeypatch):
    """The public function with the launcher in the dispatcher's place."""
    module, launch = LAUNCHERS[case.op]
    monkeypatch.setattr(module, f"_{case.op.replace('_means', '')}", launch)
    outputs = case.run(on_device(inputs))
    monkeypatch.undo()
    return tuple(x.cpu() for x in outputs)


@pytest.mark.parametrize("case", TRITON_CASES, ids=lambda case: case.id)
def test_every_case(case, monkeypatch):  # law 1
    inputs = case.inputs()
    case.check(launched(case, inputs, monkeypatch), inputs)


@pytest.mark.parametrize("grid", [Grid(1, 11, 10), Grid(1, 16, 8)], ids=["ragged", "full"])
@pytest.mark.parametrize(
    ("D", "split"), [(32, False), (64, False), (96, False), (128, False), (96, True), (128, True)]
)
def test_attention_of_every_head_size_in_groups_of_heads(D, split, grid, monkeypatch):
    """A small scratch for lists cuts the heads into launches of one; by pointers where blocks are
    ragged, by descriptors where full; a wide head in one tile and in two."""
    monkeypatch.setattr(tuning, "LIST_BYTES", 1)
    full = grid.tokens == tuning.TOKENS * grid.blocks
    launch = dataclasses.replace(
        tuning.attention(D, torch.float32, (9, 0), full),
        descriptors=full and (DEVICE == "cpu" or D <= 64),
        split=split,
    )
    monkeypatch.setattr(tuning, "attention", lambda *_: launch)
    inputs = attention(2, 2, grid, D, 0.5)(torch.Generator().manual_seed(1))
    outputs = launch_nabla.launch_attention(*on_device(inputs).values(), 0.3, math.inf)
    exact = nabla.reference.block_sparse_attention(
        *(x.double() if x.is_floating_point() else x for x in inputs.values()), 0.3
    )
    peer = block_sparse_attention_peer(
        **inputs | {"query": inputs["query"] * 0.3 * math.sqrt(D)}, return_lse=True
    )
    for actual, *others in zip(outputs, exact, peer, strict=True):
        assert_faithful(actual.cpu(), *others)


@pytest.mark.parametrize("size", ["wide", "all"])
def test_gradients_of_split_heads(size, monkeypatch):  # law 1
    """Both kernels with a head in two tiles: ragged blocks by pointers, full ones by
    descriptors."""
    launch = tuning.Launch(4, 2, descriptors=size == "all" and DEVICE == "cpu", split=True)
    monkeypatch.setattr(tuning, "attention_backward", lambda *_: (launch, launch))
    name = f"block_sparse_attention_backward-{size}-float32"
    case = next(case for case in TRITON_CASES if case.id == name)
    inputs = case.inputs()
    case.check(launched(case, inputs, monkeypatch), inputs)


@pytest.mark.parametrize("bound", [math.inf, 20.0], ids=["online", "bounded"])
def test_attention_reads_strided_inputs_and_forgives_empty_rows(bound, monkeypatch):
    monkeypatch.setattr(launch_nabla, "attention_kind", lambda *_: (True, bound < math.inf))
    inputs = attention(1, 2, Grid(1, 8, 24), 32, 1.0)(torch.Generator().manual_seed(2))
    # [B, S, 3, H, D], as one projection gives
    packed = torch.stack([inputs[name] for name in ("query", "key", "value")], 2).to(DEVICE)
    selection = inputs["selection"].to(DEVICE).clone()
    selection[0, 1, 2] = 0
    args = (*packed.unbind(2), selection, inputs["block_offsets"].to(DEVICE), 0.2, bound)
    out, lse = launch_nabla.launch_attention(*args)
    exact, exact_lse = nabla.reference.block_sparse_attention(*args)
    torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-6)
    assert (
        not out[0, 128:, 1].any()
        and (lse[0, 1, 128:] == -torch.inf).all()
        and out[0, :128, 1].any()
    )


@pytest.mark.parametrize("logit, base", [(30.0, -1), (-30.0, -1), (30.0, 1)])
def test_a_bound_far_above_the_logits_loses_nothing(logit, base, monkeypatch):
    """Logits at the bound, at its negative and at both: shares between 1 and 2^-112, whose sum must
    not vanish."""
    monkeypatch.setattr(launch_nabla, "attention_kind", lambda *_: (True, True))
    q, v = (
        torch.full((1, 128, 1, 32), 1.0, device=DEVICE),
        torch.randn(1, 128, 1, 32, device=DEVICE),
    )
    k = torch.full((1, 128, 1, 32), logit / 32, device=DEVICE)
    k[:, 64:] *= -base
    args = (
        q,
        k,
        v,
        torch.full((1, 1, 2, 1), 3, dtype=torch.int32, device=DEVICE),
        torch.tensor([0, 64, 128], dtype=torch.int32, device=DEVICE),
        1.0,
    )
    exact, exact_lse = nabla.reference.block_sparse_attention(*args)
    for bound in (30.0, tuning.BOUND_LOG2 * math.log(2)):
        out, lse = launch_nabla.launch_attention(*args, bound)
        torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, exact_lse, rtol=1e-5, atol=1e-5)


def test_a_bound_is_used_only_where_it_is_safe():
    q, selection, offsets = (
        torch.zeros(1, 64, 1, 32),
        torch.ones(1, 1, 1, 1, dtype=torch.int32),
        torch.tensor([0, 64], dtype=torch.int32),
    )

    def bounded(dtype, bound):
        return launch_nabla.attention_kind(*(q.to(dtype),) * 3, selection, offsets, 1.0, bound)[1]

    assert (
        bounded(torch.bfloat16, 38.8)
        and not bounded(torch.float32, 30.0)
        and not bounded(torch.float16, 30.0)
    )
    assert not bounded(torch.bfloat16, 38.9) and not bounded(torch.bfloat16, math.inf)


@pytest.mark.parametrize("ties", ["all", "stable"])
@pytest.mark.parametrize("keep_mass", [0.3, 0.9, 1.0])
def test_selection_in_pieces(ties, keep_mass, monkeypatch):
    """Whole heads and parts of heads at a time, with a local window; equal masses at the
    threshold."""
    case = Case(
        "select_blocks",
        "pieces",
        means(1, 2, (1, 3, 6), 8, keep_mass, (1, 3, 3), ties),
        torch.float32,
    )
    inputs = case.inputs()
    inputs["key_means"][:, :, 4:9] = inputs["key_means"][:, :, :1]
    for pieces in (8 * 18 * 18, 4 * 18 * 7):
        monkeypatch.setattr(tuning, "MAP_BYTES", pieces)
        chosen = launched(case, inputs, monkeypatch)
        case.check(chosen, inputs)
        assert torch.equal(chosen[0], case.run(inputs)[0])


def kept_by_sorting(query, key, keep_mass, stable):
    """The choice for each row of [S, D] means as the kernel defines it: integer masses in order,
    dropped up to the share of their sum."""
    logits = (query @ key.T).numpy() / np.float32(math.sqrt(query.shape[1]))
    mass = np.exp(logits - logits.max(1, keepdims=True)) * np.float32(2**32)
    mass = torch.from_numpy(mass).double().round().long()  # half to even
    ordered, order = mass.sort(dim=1, stable=True)
    target = (mass.sum(1).double() * (1 - keep_mass))[:, None]
    reached = ordered.cumsum(1).double() >= target
    if stable:
        return torch.zeros_like(reached).scatter(1, order, reached)
    first = reached.int().argmax(1, keepdim=True)
    return mass >= ordered.gather(1, first)


def selected_rows(query, key, keep_mass, stable):
    """bool [R, N]: what the kernel keeps for R queries over N keys [.., D], without a window."""
    R, D = query.shape
    N = key.shape[0]
    logits = torch.full((R, 16 * (N // 16 + 1)), -math.inf)
    logits[:, :N] = query @ key.T
    words = -(-N // 32)
    chosen = torch.empty(R, words, dtype=torch.int32)
    sizes = (0, N, words, logits.numel(), logits.shape[1], chosen.numel(), math.sqrt(D))
    block = tuning.padded(logits.shape[1], 32)
    triton_selection.select_blocks[(R, 1)](
        logits,
        chosen,
        *sizes,
        *launch_nabla.thirds(1 - keep_mass),
        *(1, 1, 0, 0, 0),
        WINDOW=False,
        STABLE=stable,
        BLOCK=block,
    )
    assert not (chosen[:, -1] >> N % 32).any(), "bits beyond the last block are zeros"
    return ops.unpack_selection(chosen, N)


@pytest.mark.skipif(DEVICE == "cuda", reason="exponentials of a GPU are others")
@pytest.mark.parametrize("stable", [False, True], ids=["all", "stable"])
def test_selection_is_what_sorted_masses_give(stable):
    """Bit for bit, with equal masses, and with masses of nothing."""
    key = torch.randn(75, 16, generator=torch.Generator().manual_seed(11))
    key[20:26] = key[19]
    for keep_mass in (0.0, 0.3, 0.9, 1.0):
        for spread in (0.0, 0.1, 2.0, 30.0):
            query = spread * key[18:20]
            kept = selected_rows(query, key, keep_mass, stable)
            assert torch.equal(kept, kept_by_sorting(query, key, keep_mass, stable))


@pytest.mark.skipif(DEVICE == "cuda", reason="counts calls under the interpreter")
def test_a_row_is_bisected_in_half_as_many_passes_as_a_mass_has_bits(monkeypatch):
    """Of 300 masses one is alone between the limits after about ten passes, not 32."""
    calls = []
    sum_up_to = triton_selection._sum_up_to
    monkeypatch.setattr(
        triton_selection, "_sum_up_to", lambda *args: calls.append(0) or sum_up_to(*args)
    )
    key = torch.randn(300, 16, generator=torch.Generator().manual_seed(12))
    selected_rows(key[:4], key, 0.9, False)
    assert 4 <= len(calls) <= 4 * 16


def test_rows_without_a_finite_maximum_keep_every_block():  # law 9
    query, key = torch.zeros(1, 1, 5, 4, device=DEVICE), torch.randn(1, 1, 5, 4, device=DEVICE)
    query[..., 0] = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 0.0])
    key[..., 0] = torch.tensor([9.0, -9.0, -9.0, -9.0, -9.0])
    kept = ops.unpack_selection(launch_nabla.launch_selection(query, key, 0.5, [], [], "all"), 5)[
        0, 0
    ]
    assert kept[1:].all() and kept[0].tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("x", [0.1, 1 - 0.9, 1 / 3, 2.0**-40 + 2.0**-60, 0.0])
def test_a_double_is_the_sum_of_three_floats(x):
    parts = launch_nabla.thirds(x)
    assert sum(parts[::-1]) == x and all(
        torch.tensor(part).double().item() == part for part in parts
    )


@pytest.mark.parametrize(
    "name", ["gated_add_norm-edge", "gated_add_norm_backward-edge", "modulated_norm_backward-past"]
)
def test_rows_beyond_one_program(name, monkeypatch):
    """The configurations for long inputs: several rows per program, the last program with fewer."""
    monkeypatch.setattr(tuning, "norm_rows", lambda _: 5)
    monkeypatch.setattr(tuning, "norm_backward_rows", lambda _: 5)
    case = next(case for case in TRITON_CASES if case.id == f"{name}-float32")
    inputs = case.inputs()
    assert inputs["x"].shape[1] % 5
    case.check(launched(case, inputs, monkeypatch), inputs)


def test_positions_are_held_inside_of_the_tables():
    """A GPU does not look for positions outside, but must not read what lies there."""
    x = torch.randn(1, 70, 2, 16, device=DEVICE)
    weight = torch.rand(16, device=DEVICE)
    cos, sin = torch.randn(2, 9, 8, device=DEVICE)
    places = torch.arange(-70, 70, dtype=torch.int32, device=DEVICE).view(70, 2)
    inside = places.clamp(0, 8)
    for launch, last in (
        (launch_norm.launch_norm_rope, None),
        (launch_norm.launch_norm_rope_backward, torch.randn_like(x)),
    ):
        results = [launch(x, weight, cos, sin, p, [3, 5], last, 1e-6) for p in (places, inside)]
        for held, wanted in zip(*results, strict=True):
            assert torch.equal(held, wanted)


@pytest.mark.parametrize("pairs", [[4, 8, 12], [1, 20, 3], [2, 22]], ids=str)
def test_pairs_of_every_axis_and_blocks_longer_than_a_tile(pairs):  # law 1
    """Angles side by side by fours, twos and one at a time; blocks of 1 to 130 tokens."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 200, 6, 48, generator=generator).to(DEVICE)
    angles = torch.randn(9, 24, generator=generator).to(DEVICE)
    places = torch.randint(9, (200, len(pairs)), generator=generator, dtype=torch.int32)
    offsets = torch.tensor([0, 1, 131, 200], dtype=torch.int32, device=DEVICE)
    weight = torch.rand(48, generator=generator).to(DEVICE)
    args = (weight, angles.cos(), angles.sin(), places.to(DEVICE), pairs, offsets, 1e-6)
    outputs = launch_norm.launch_norm_rope(x, *args)
    wide = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]
    exact = reference.norm_rope(x.double(), *wide)
    rotary = dict(cos=args[1], sin=args[2], positions=args[3], pairs=pairs)
    peer = norm_rope_means_peer(x, weight, block_offsets=offsets, **rotary)
    for triple in zip(outputs, exact, peer, strict=True):
        assert_faithful(*triple)


@pytest.mark.parametrize("elements", [64, 1 << 16])
def test_moments_far_from_zero_in_slabs(elements, monkeypatch):
    """Slabs of two tiles each and one slab for all; frames are bitwise what they are alone."""
    monkeypatch.setattr(tuning, "SLAB_ELEMENTS", elements)
    monkeypatch.setattr(tuning, "SLAB_TILE", elements // 2)
    monkeypatch.setattr(tuning, "JOINED", 4)
    x = video(1, 3, 9, 7, 8, 4)(torch.Generator())["x"].to(DEVICE) + 1000
    x[0, 0, 0, 0] = 1e4  # an outlier where the pivot is taken
    moments = launch_vae.launch_moments(x, 4)
    torch.testing.assert_close(
        moments,
        vae.reference.group_moments(x.double(), 4),
        rtol=2e-5 if elements > 64 else 2e-6,
        atol=0,
    )
    assert torch.equal(moments[:, 1:2], launch_vae.launch_moments(x[:, 1:2], 4))
    x[0, 1, 3, 3, 5] = torch.nan
    spoilt = launch_vae.launch_moments(x, 4)
    assert spoilt[0, 1, 2].isnan().all() and torch.equal(
        spoilt[0, 1, [0, 1, 3]], moments[0, 1, [0, 1, 3]]
    )


@pytest.mark.parametrize("D", [512, 96])
def test_frame_attention_of_every_tile(D, monkeypatch):
    """The tiles of every card; strided inputs, as one projection gives them; rows and keys that
    fill no tile."""
    packed = torch.randn(1, 2, 70, 3, D, device=DEVICE)
    query, key, value = packed.unbind(3)
    exact = vae.reference.frame_causal_attention(
        query.double(), key.double(), value.double(), 0, 0.05
    )
    peer = vae.reference.frame_causal_attention(query, key, value, 0, 0.05)
    for capability in ((8, 0), (8, 6), (9, 0), (10, 0), (12, 0)):
        tile = tuning.frame_attention(tuning.padded(D), capability)
        monkeypatch.setattr(tuning, "frame_attention", lambda *_, tile=tile: tile)
        outputs = launch_vae.launch_attention(query, key, value, 0, 0.05)
        monkeypatch.undo()
        for triple in zip(outputs, exact, peer, strict=True):
            assert_faithful(*triple)


# channels in and out, taps, strides
CONVOLUTIONS = {
    "whole": (64, 128, (2, 2, 1), (1, 1, 1)),
    "ragged": (24, 20, (3, 3, 3), (1, 1, 1)),
    "phase": (32, 16, (3, 2, 2), (1, 1, 1)),
    "strided": (16, 48, (3, 3, 3), (2, 2, 2)),
    "strided in space": (16, 16, (3, 3, 3), (1, 2, 2)),
    "last": (40, 3, (3, 3, 3), (1, 1, 1)),
    "single": (16, 16, (1, 1, 1), (1, 1, 1)),
}


def convolution(C, N, taps, stride, dtype):
    """Inputs whose frames, rows and pixels lie apart in memory."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(n - 1) * step + k for n, k, step in zip((2, 10, 13), taps, stride, strict=True)]
    x = torch.randn(2, sizes[0] + 1, sizes[1] + 2, sizes[2] + 3, C + 8, generator=generator)[
        :, 1:, 1:-1, 1:-2, :C
    ]
    weight, bias = (
        torch.randn(N, C, *taps, generator=generator) / math.sqrt(C * math.prod(taps)),
        torch.randn(N, generator=generator),
    )
    return *(t.to(DEVICE, dtype) for t in (x, weight, bias)), stride


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", CONVOLUTIONS)
def test_convolution(size, dtype):  # law 1
    x, weight, bias, stride = convolution(*CONVOLUTIONS[size], dtype)
    for b in (bias, None):
        exact = reference.causal_conv3d(
            x.double(), weight.double(), None if b is None else b.double(), stride
        )
        assert_faithful(
            launch_vae.launch_conv(x, weight, b, stride),
            exact,
            reference.causal_conv3d(x, weight, b, stride),
        )
    trial = launch_vae.trial_conv(x, weight, bias, stride)
    assert (
        _guard.disagreement(
            launch_vae.launch_conv(*trial),
            reference.causal_conv3d(*(_guard._double(value) for value in trial)),
        )
        is None
    )


@pytest.mark.parametrize("size", ["whole", "ragged"])
@pytest.mark.parametrize("tile", [(64, 32, 32), (128, 128, 32), (256, 128, 64)], ids=str)
def test_convolution_of_every_tile(size, tile, monkeypatch):  # laws 1 and 12
    """Several tiles, ragged ones too, and tiles beyond the result; a frame is bitwise what it is in
    another piece."""
    monkeypatch.setattr(
        tuning, "convolution", lambda *_: tuning.ConvolutionTile(*tile, tuning.Launch(8, 2))
    )
    x, weight, bias, stride = convolution(*CONVOLUTIONS[size], torch.float16)
    whole = launch_vae.launch_conv(x, weight, bias, stride)
    exact = reference.causal_conv3d(x.double(), weight.double(), bias.double(), stride)
    assert_faithful(whole, exact, reference.causal_conv3d(x, weight, bias, stride))
    assert torch.equal(launch_vae.launch_conv(x[1:, 1:], weight, bias, stride), whole[1:, 1:])
    x[0, -1, 3, 4, 5] = torch.nan
    assert torch.equal(launch_vae.launch_conv(x, weight, bias, stride)[:, :-1], whole[:, :-1])


def test_convolution_is_chosen_only_once_a_gpu_has_found_it_faster(monkeypatch):
    assert tuning.TRITON <= tuning.VERIFIED
    args = convolution(*CONVOLUTIONS["single"], torch.float16)
    assert "found the Triton kernel faster" in launch_vae.refuse_conv(*args)
    monkeypatch.setattr(tuning, "TRITON", frozenset({"causal_conv3d"}))
    assert launch_vae.refuse_conv(*args) is None
    assert "got float32" in launch_vae.refuse_conv(*(x.float() for x in args[:3]), args[3])
    weight = args[1].clone().requires_grad_()  # PyTorch differentiates its own convolution
    out = ops.causal_conv3d(args[0], weight, *args[2:])
    assert "ConvolutionBackward" in {type(f).__name__.strip("0") for f in ancestors(out.grad_fn)}


def ancestors(function):
    """A node of autograd's graph and every node that its gradient flows to."""
    yield function
    for following, _ in function.next_functions:
        if following is not None:
            yield from ancestors(following)
