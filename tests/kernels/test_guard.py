# SPDX-License-Identifier: Apache-2.0
"""The guard: a GPU kernel is tried before its first use, and what it refuses is said."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from kandinsky_kernels import _guard, _library, kernels, tuning
from kandinsky_kernels.launch import nabla as launch_nabla
from kandinsky_kernels.launch import norm as launch_norm
from kandinsky_kernels.launch import vae as launch_vae
from kandinsky_model.dit.geometry import Grid

from ..cases import attention, frames, heads, normed, video
from .test_triton import DEVICE, LAUNCHERS


@pytest.fixture
def guard(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_guard, "_verdicts", {})
    return tmp_path / "kandinsky_kernels" / "checked.json"


def ask(launch, kind=()):
    case = (torch.randn(4, 8),)
    return _guard.trusted("double", launch, lambda x: 2 * x, lambda *_: case, case, kind)


def test_guard_tries_once_and_remembers(guard, monkeypatch):
    calls = []

    def launch(x):
        calls.append(x.shape)
        return 2 * x

    assert ask(launch) and ask(launch) and len(calls) == 1
    assert "double () torch.float32 8 cpu" in json.loads(guard.read_text())[0]
    assert ask(launch, (True,)) and len(calls) == 2, "another kind of call has its own trial"
    calls.pop()
    monkeypatch.setattr(_guard, "_verdicts", {})  # another process
    assert ask(launch) and len(calls) == 1
    monkeypatch.setattr(_guard, "_version", lambda: "another version")
    monkeypatch.setattr(_guard, "_verdicts", {})
    assert ask(launch) and len(calls) == 2


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
            (torch.randn(1, 1, 5, 64), None, 0.5, [], [], ties) for ties in ("all", "stable")
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
                (torch.empty(0), True, True),
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
                None,
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
