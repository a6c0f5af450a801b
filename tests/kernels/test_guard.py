# SPDX-License-Identifier: Apache-2.0
"""The guard: a GPU kernel is tried before its first use, and what it refuses is said."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from kandinsky_kernels import _guard, _library, cards, kernels, reference, tuning
from kandinsky_kernels.launch import gathered, trials
from kandinsky_kernels.launch import nabla as launch_nabla
from kandinsky_kernels.launch import norm as launch_norm
from kandinsky_kernels.launch import vae as launch_vae
from kandinsky_kernels.triton import nabla as triton_nabla
from kandinsky_kernels.triton import norm as triton_norm
from kandinsky_kernels.triton import selection as triton_selection
from kandinsky_kernels.triton import vae as triton_vae
from kandinsky_model.dit.geometry import Grid

from ..cases import attention, frames, heads, normed, video
from .test_triton import DEVICE, LAUNCHERS


@pytest.fixture
def guard(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_guard, "_verdicts", {})
    return tmp_path / "kandinsky_kernels" / "checked.json"


def ask(launch, trial=None, **constants):
    case = (torch.randn(4, 8),)
    trial = trial or (lambda *_: case)
    return _guard.trusted("double", launch, lambda x: 2 * x, trial, case, constants)


def test_guard_tries_once_and_remembers(guard, monkeypatch):
    calls = []

    def launch(x, rows=1):
        calls.append(rows)
        return 2 * x

    assert ask(launch) and ask(launch) and calls == [1]
    assert json.loads(guard.read_text())[0].startswith("double [(), 8, (('float32', 'nnn1', ")
    assert ask(launch, rows=8) and calls == [1, 8], "other constants make another binary"
    monkeypatch.setattr(_guard, "_verdicts", {})  # another process
    assert ask(launch) and calls == [1, 8]
    monkeypatch.setattr(_guard, "_version", lambda: "another version")
    monkeypatch.setattr(_guard, "_verdicts", {})
    assert ask(launch) and calls == [1, 8, 1]


def test_a_version_or_a_trial_that_fails_is_a_verdict(guard, monkeypatch):
    def broken(*_):
        raise OSError("no such library")

    monkeypatch.setattr(_guard, "_version", broken)
    assert not ask(lambda x: 2 * x) and "no such library" in _guard.failure("double")
    monkeypatch.undo()
    monkeypatch.setattr(_guard, "_verdicts", {})
    assert not ask(lambda x: 2 * x, broken) and "OSError" in _guard.failure("double")


def test_memory_that_runs_out_says_nothing_about_a_kernel(guard):
    def full(_):
        raise torch.OutOfMemoryError("nothing left")

    with pytest.raises(torch.OutOfMemoryError):
        ask(full)
    assert ask(lambda x: 2 * x)


def test_a_signature_is_all_but_values():
    x = torch.zeros(4, 32)
    same = _guard.signature((torch.ones(4, 32), None, [1, 2], 0.5))
    assert hash(same) == hash(_guard.signature((x, None, [1, 2], 0.5)))
    others = [
        (x.half(), None, [1, 2], 0.5),
        (x.t(), None, [1, 2], 0.5),
        (torch.zeros(129)[1:].view(4, 32), None, [1, 2], 0.5),
        (x, x, [1, 2], 0.5),
        (x, None, [1, 3], 0.5),
        (x, None, [1, 2], 0.6),
    ]
    assert same not in {_guard.signature(args) for args in others}


@pytest.mark.parametrize(
    "fault, word",
    [
        (lambda x: 2 * x + 0.1, "off by"),
        (lambda x: 2 * x[:2], "shape"),
        (lambda x: x * torch.nan, "off by nan"),
        (lambda x: [][0], "IndexError"),
    ],
)
def test_guard_falls_back_with_one_line(guard, caplog, fault, word):
    with caplog.at_level(logging.WARNING, "kandinsky_kernels"):
        assert not ask(fault) and not ask(fault)
    assert len(caplog.records) == 1 and word in caplog.text and "please report" in caplog.text
    assert word in _guard.failure("double") and not guard.exists()


@pytest.mark.parametrize("op", sorted(set(_library._references) - tuning.PYTORCH))
def test_trials_agree(op, guard, monkeypatch):
    """The guard's own small cases pass, ragged and full, with and without what is optional."""
    module, launch = LAUNCHERS[op]
    reference = _library._references[op]
    kinds = {
        "modulated_norm": [(torch.randn(2, 5, 40), torch.randn(2, 40), torch.randn(2, 40), 1e-5)],
        "gated_add_norm": [
            (torch.randn(2, 5, 40), torch.randn(2, 5, 40), *(torch.randn(2, 40),) * 3, 1e-5),
            (torch.randn(2, 5, 40), torch.randn(2, 5, 40), torch.randn(2, 40), None, None, 1e-5),
        ],
        "norm_rope": [
            (*heads(1, 9, 1, 22, block=4, axes=axes)(torch.Generator()).values(), 1e-6)
            for axes in (1, 2, 3)
        ]
        + [(torch.randn(1, 9, 1, 22), torch.ones(22), None, None, None, (), None, 1e-6)],
        "select_blocks": [
            (*(torch.randn(1, 1, 5, 64),) * 2, 0.5, [], [], ties) for ties in ("all", "stable")
        ],
        "block_sparse_attention": [
            tuple(attention(1, 1, grid, 64, 1.0)(torch.Generator()).values()) + (0.1, bound)
            for grid in (Grid(1, 8, 8), Grid(1, 9, 7))
            for bound in (20.0, math.inf)
        ],
        "group_moments": [
            tuple(video(1, 1, 2, 3, C, 8)(torch.Generator()).values()) for C in (32, 512)
        ],
        "group_norm_silu": [
            (*list(normed(1, 1, 2, 3, 24)(torch.Generator()).values()), front, pad, silu)
            for front, pad, silu in (
                (None, True, True),
                (torch.empty(1, 2, 4, 5, 24), True, True),
                (None, False, False),
            )
        ],
        "frame_causal_attention": [
            (*frames(1, 1, 2, D)(torch.Generator()).values(), 0, 0.1) for D in (40, 128)
        ],
        "modulated_norm_backward": [
            (torch.randn(2, 5, 40), torch.randn(2, 40), torch.randn(2, 5, 40), 1e-5)
        ],
        "gated_add_norm_backward": [
            (
                *(torch.randn(2, 5, 40),) * 2,
                *(torch.randn(2, 40),) * 2,
                grad_y,
                torch.randn(2, 5, 40),
                1e-5,
            )
            for grad_y in (torch.randn(2, 5, 40), None)
        ],
        "norm_rope_backward": [
            (
                *heads(1, 9, 1, 22, rotate)(torch.Generator()).values(),
                *(() if rotate else (None, None, None, ())),
                torch.randn(1, 9, 1, 22),
                1e-6,
            )
            for rotate in (True, False)
        ],
        "block_sparse_attention_backward": [
            (
                *(torch.empty(1, grid.tokens, 1, 64),) * 4,
                torch.empty(1, 1, grid.tokens),
                torch.empty(1, 1, 1, 1),
                None,
                torch.empty(1, grid.tokens, 1, 64),
                grad_lse,
                0.1,
            )
            for grid in (Grid(1, 8, 8), Grid(1, 9, 7))
            for grad_lse in (None, torch.empty(0))
        ],
    }
    trials = {
        "norm_rope": launch_norm.trial_norm_rope,
        "select_blocks": launch_nabla.trial_selection,
        "block_sparse_attention": launch_nabla.trial_attention,
        "group_moments": launch_vae.trial_moments,
        "group_norm_silu": launch_vae.trial_normed,
        "frame_causal_attention": launch_vae.trial_attention,
        "norm_rope_backward": launch_norm.trial_norm_rope_backward,
        "block_sparse_attention_backward": launch_nabla.trial_gradients,
    }
    monkeypatch.setattr(
        launch_nabla, "attention_kind", lambda *args: (args[0].shape[1] == 64, args[-1] < math.inf)
    )
    for args in kinds[op]:
        args = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in args]
        small = trials.get(op, launch_norm.trial_norm)(*args)
        assert (
            _guard.disagreement(launch(*small), reference(*(_guard._double(x) for x in small)))
            is None
        )


class Recorder:
    """Stands for a Triton kernel, and notes for which binary it is called."""

    def __init__(self, kernel, binaries):
        self.names = kernel.arg_names
        self.binaries = binaries

    def __getitem__(self, grid):
        return self.call

    def call(self, *args, **constants):
        binary = {}
        for name, value in {**dict(zip(self.names, args, strict=False)), **constants}.items():
            if isinstance(value, torch.Tensor):
                binary[name] = value.dtype, value.data_ptr() % 16 == 0
            elif hasattr(value, "block_shape"):  # a tensor descriptor
                binary[name] = tuple(value.block_shape)
            elif name not in ("first", "first_frame") and not isinstance(value, float):
                exact = name in constants or isinstance(value, bool | str)
                binary[name] = value if exact else trials.kinds(value)
        self.binaries.append(binary)


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


def released(op, H, N, D, C):
    """The arguments of an operator in Lite and Pro: H heads, N blocks, head dim, channels."""
    S = 64 * N
    vector, x = empty(1, C, dtype=torch.float32), empty(1, S, C)
    head, weight = empty(1, S, 3, H, D)[:, :, 1], empty(D, dtype=torch.float32)
    means = empty(1, 2, N, D, dtype=torch.float32)
    table, positions = torch.empty(200, D // 2), torch.zeros(S, 3, dtype=torch.int32)
    offsets = torch.arange(0, S + 1, 64, dtype=torch.int32)
    selection = torch.zeros(1, H, N, -(-N // 32), dtype=torch.int32)
    rope = (head, weight, table, table, positions, [D // 8, D // 16 * 3, D // 16 * 3])
    lse, grad = empty(1, H, S, dtype=torch.float32), empty(1, S, H, D)
    return {
        "modulated_norm": (x, vector, vector, 1e-5),
        "gated_add_norm": (x, x, vector, vector, vector, 1e-5),
        "norm_rope": (*rope, offsets, 1e-6),
        "modulated_norm_backward": (x, vector, x, 1e-5),
        "gated_add_norm_backward": (x, x, vector, vector, x, x, 1e-5),
        "norm_rope_backward": (*rope, grad, 1e-6),
        "select_blocks": (means, means, 0.9, [N // 12, 2, 6], [11, 3, 3], "all"),
        "block_sparse_attention": (head, head, head, selection, offsets, 0.1, 9.0),
        "block_sparse_attention_backward": (
            *(head, head, head, grad, lse, selection, offsets, grad, None, 0.1),
        ),
        "group_moments": (empty(1, 5, 64, 96, C // 7 * 2 if C == 1792 else 128), 32),
        "group_norm_silu": (empty(1, 5, 64, 96, 512), vector[:, :512], vector[:, :512], None)
        + (True, True),
        "frame_causal_attention": (*(empty(1, 5, 6144, 512),) * 3, 0, 0.1),
    }[op]


def far_apart(arg):
    """The only sample of a tensor, as one whose neighbour is 2^31 numbers away."""
    if not isinstance(arg, torch.Tensor) or arg.dim() < 3:
        return arg
    return arg.as_strided(arg.shape, (1 << 31, *arg.stride()[1:]))


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@pytest.mark.parametrize("size", [(28, 1464, 64, 1792), (32, 960, 128, 4096)], ids=["lite", "pro"])
@pytest.mark.parametrize("op", sorted(set(_library._references) - tuning.PYTORCH))
def test_a_trial_makes_the_callers_binary(op, size, wide, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    entry = _library.launchers[op]
    args = released(op, *size)
    if wide:
        near = _guard.specialisation(args)
        args = tuple(map(far_apart, args))
        assert _guard.specialisation(args) != near, "a binary of its own, and a trial"
    binaries = []
    for module in (triton_nabla, triton_norm, triton_selection, triton_vae):
        for name in _library._references.keys() | {
            "list_blocks",
            "slab_moments",
            "join_moments",
            "block_sparse_attention_backward_query",
            "block_sparse_attention_backward_key",
        }:
            if hasattr(module, name):
                recorder = Recorder(getattr(module, name), binaries)
                monkeypatch.setattr(module, name, recorder)
    constants = entry.constants(*args)
    entry.launch(*args, **constants)
    callers = [binaries.pop() for _ in range(len(binaries))]
    assert callers
    entry.launch(*entry.trial(*args), **constants)
    assert all(binary in binaries for binary in callers)


def test_a_bound_that_is_used_has_a_trial_of_its_own():
    *args, bound = released("block_sparse_attention", 2, 3, 64, 128)
    chosen = [launch_nabla.attention_constants(*args, b)["bounded"] for b in (bound, math.inf)]
    assert chosen == [True, False]


@pytest.mark.parametrize("op", ["modulated_norm", "block_sparse_attention", "norm_rope"])
def test_a_trial_leaves_the_users_generator_alone(op):
    args = released(op, 2, 3, 64, 128)
    before = torch.random.get_rng_state()
    _library.launchers[op].trial(*args)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("grid", [Grid(1, 11, 10), Grid(1, 16, 8)], ids=["ragged", "full"])
def test_attention_without_a_kernel_is_the_reference_many_blocks_at_a_time(grid, monkeypatch):
    """The fallback, all blocks at once and two at a time; a block that keeps nothing."""
    inputs = attention(2, 2, grid, 32, 0.5, lse=True)(torch.Generator().manual_seed(3))
    args = [inputs[name] for name in ("query", "key", "value", "selection", "block_offsets")]
    args[3] = args[3].clone()
    args[3][0, 1, 1] = 0
    out, lse = reference.block_sparse_attention(*args, 0.2)
    grads = torch.randn_like(out), torch.randn_like(lse)
    tensors = (*args[:3], out, lse, *args[3:], *grads, 0.2)
    wanted = reference.block_sparse_attention_backward(*tensors)
    for elements in (1 << 26, 1 << 15):
        monkeypatch.setattr(gathered, "ELEMENTS", elements)
        for pair in (
            *zip(gathered.block_sparse_attention(*args, 0.2), (out, lse), strict=True),
            *zip(gathered.block_sparse_attention_backward(*tensors), wanted, strict=True),
        ):
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hip", "found", "wanted"),
    [(None, (7, 5), "8.0 or newer, got 7.5"), (None, (8, 0), None), ("6.4", (9, 4), None)],
)
def test_cards_that_are_too_old_are_refused(hip, found, wanted, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found)
    refusal = cards.refuse_card(torch.device("cuda"))
    assert refusal is None if wanted is None else wanted in refusal
    assert cards.refuse_card(torch.device("cpu")) is None


def test_amd_is_no_hopper(monkeypatch):
    """gfx942 calls itself (9, 4); warpgroups, whose tiles are not split, are NVIDIA's."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    launch = tuning.attention(128, torch.bfloat16, cards.capability_of(torch.device("cuda")), True)
    assert launch.split


def test_fused_multiply_add_is_asked_for():
    assert tuning.Launch(4, 1).options["enable_fp_fusion"] is True
    for path in Path(launch_nabla.__file__).parent.glob("*.py"):
        assert "num_warps=" not in path.read_text(), "launches take Launch.options"


def test_refusals_say_why():
    q, selection = torch.randn(1, 64, 1, 160), torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    assert "up to 128, got 160" in launch_nabla.refuse_attention(q, q, q, selection)
    long = torch.empty(1, 1, tuning.LONGEST_ROW + 1, 1)
    assert (
        "got 16385" in launch_nabla.refuse_selection(long)
        and launch_nabla.refuse_selection(long[:, :, 1:]) is None
    )
    assert "nothing" in launch_nabla.refuse_selection(long[:, :0])
    assert "nothing" in launch_nabla.refuse_attention(
        q[:, :0], q, q, selection
    ) and "nothing" in launch_norm.refuse_norm(q[:0])
    assert "float64" in launch_nabla.refuse_attention(q[..., :64].double(), q, q, selection)
    assert launch_nabla.refuse_attention(q[..., :64], q, q, selection) is None
    assert "got float32" in launch_vae.refuse_attention(
        q
    ) and "nothing" in launch_vae.refuse_attention(q[:0])
    assert (
        "up to 512, got 640" in launch_vae.refuse_attention(torch.empty(1, 1, 1, 640).half())
        and launch_vae.refuse_attention(q.half()) is None
    )
    assert "powers of two, got 160 and 5" in launch_vae.refuse_moments(
        q, 5
    ) and "nothing" in launch_vae.refuse_moments(q[:0], 5)
    assert "up to 8192 channels, got 16384" in launch_vae.refuse_moments(torch.empty(1, 16384), 32)
    assert launch_vae.refuse_moments(q[..., :128], 4) is None
    assert "up to 4096 channels, got 5000" in launch_vae.refuse_normed(
        torch.empty(1, 5000)
    ) and "nothing" in launch_vae.refuse_normed(q[:0])
    assert launch_vae.refuse_normed(q) is None
    assert "got float32" in launch_vae.refuse_conv(q, q) and "nothing" in launch_vae.refuse_conv(
        q[:0], q
    )
    assert "input's dtype, got float32" in launch_vae.refuse_conv(
        q.half(), q
    ) and "faster" in launch_vae.refuse_conv(q.half(), q.half())


def test_kernels_tell_what_is_not_verified(monkeypatch):
    monkeypatch.setattr(tuning, "VERIFIED", frozenset({"modulated_norm"}))
    rows = kernels()
    assert (
        rows["modulated_norm"]["cuda"] == "triton"
        and "not yet verified" in rows["block_sparse_attention"]["cuda"]
    )
    monkeypatch.setattr(_guard, "_verdicts", {("norm_rope", 1): "it is off"})
    assert kernels()["norm_rope"]["cuda"] == "reference: it is off"
