# SPDX-License-Identifier: Apache-2.0
"""`accelerate` on diffusers' transformer: the same velocities, NABLA at once, and everything as it
was after `undo`."""

import copy
import inspect

import pytest
import torch

from kandinsky_model import accelerate

from ..compare import assert_faithful
from ..support.accelerated import (
    CONFIG,
    IN_FP32,
    RAGGED,
    ROUNDING,
    WHOLE,
    accelerated,
    exact,
    inputs,
    off,
    stock,
    told,
    velocity,
)

MODES = {"dense": False, "nabla": True}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("nabla", MODES.values(), ids=MODES)
def test_equals_stock(nabla, batch, monkeypatch):
    """Up to rounding, once diffusers' rounding of queries and keys to bf16 is out of the way; and
    NABLA is not dense attention."""
    model = stock(monkeypatch)
    wanted = velocity(model, nabla=nabla, batch=batch)
    accelerate(model)
    assert off(velocity(model, nabla=nabla, batch=batch), wanted) <= ROUNDING
    assert not nabla or off(velocity(model, batch=batch), wanted) >= 3e-3


@pytest.mark.parametrize("nabla", MODES.values(), ids=MODES)
def test_is_as_exact_as_stock(nabla, monkeypatch):
    """Against fp64, in fp32 and in bf16 with the parts in fp32 that diffusers keeps so."""
    for dtype in (torch.float32, torch.bfloat16):
        model = stock(monkeypatch, stripped=False)
        for name, parameter in model.named_parameters():
            if not any(part in name for part in model._keep_in_fp32_modules):
                parameter.data = parameter.to(dtype)
        peer = velocity(model, nabla=nabla, dtype=dtype)
        accelerate(model)
        ours = velocity(model, nabla=nabla, dtype=dtype)
        truth = exact(nabla=nabla)
        assert ours.dtype == dtype
        if dtype == torch.float32:
            assert_faithful(ours.contiguous(), truth, peer)
        assert off(ours, truth) <= 1.25 * off(peer, truth)


def test_nabla_needs_neither_backend_nor_size(monkeypatch):
    """A frame of 144 x 192 pixels, at which diffusers cannot even arrange the tokens."""
    model = stock(monkeypatch)
    with pytest.raises(RuntimeError, match="shape"):
        velocity(model, RAGGED, nabla=True)
    accelerate(model)
    assert off(velocity(model, RAGGED, nabla=True), exact(RAGGED, nabla=True)) <= IN_FP32
    monkeypatch.undo()  # the oracle's dense mask
    model.get_submodule(
        "visual_transformer_blocks.0.self_attention"
    ).processor._attention_backend = None
    assert off(velocity(model, nabla=True), exact(nabla=True)) <= IN_FP32


def test_nabla_as_installed_cannot_run(monkeypatch):
    """Why there is anything to fix: without the tests' oracle, diffusers' NABLA fails where no
    backend is set."""
    model = stock(monkeypatch)
    monkeypatch.undo()
    with pytest.raises(AttributeError, match="BlockMask"):
        velocity(model, nabla=True)
    accelerate(model)
    assert off(velocity(model, nabla=True), exact(nabla=True)) <= IN_FP32


def test_undo_restores_every_bit(monkeypatch):
    """Law 31. Classes never change; only attributes come and go."""
    model = stock(monkeypatch, stripped=False)
    before = velocity(model)
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    state = model.state_dict(keep_vars=True)
    for _ in range(2):
        with accelerate(model) as handle:
            assert str(handle).startswith("accelerated")
            assert [type(module) for module in model.modules()] == classes
            assert not torch.equal(velocity(model), before)
            now = model.state_dict(keep_vars=True)
            assert list(now) == list(state)
            assert all(now[name] is state[name] for name in state)
        assert str(handle).startswith("not accelerated")
        assert [type(module) for module in model.modules()] == classes
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert torch.equal(velocity(model), before)


def test_says_what_it_did(monkeypatch):
    model = stock(monkeypatch)
    handle = accelerate(model)
    blocks = CONFIG.num_visual_blocks
    assert handle.replaced["Kandinsky5TransformerDecoderBlock"] == blocks
    assert not handle.kept
    assert handle.replaced["RMSNorm"] == 4 * blocks + 2 * CONFIG.num_text_blocks
    assert f"replaced {blocks} x Kandinsky5TransformerDecoderBlock" in repr(handle)
    again = accelerate(model)
    assert not again.replaced
    assert "accelerated already" in str(again)
    again.undo()
    # only the first one undoes
    assert off(velocity(model, nabla=True), exact(nabla=True)) <= IN_FP32
    with pytest.raises(TypeError, match="Kandinsky 5 pipeline"):
        accelerate(torch.nn.Linear(3, 3))


def test_signatures_stay(monkeypatch):
    """Hooks and caches find arguments by their names, on the class and on the bound forward."""
    model = stock(monkeypatch)
    wanted = {
        name: list(inspect.signature(module.forward).parameters)
        for name, module in model.named_modules()
    }
    accelerate(model)
    for name, module in model.named_modules():
        names = list(inspect.signature(module.forward).parameters)
        assert names[: len(wanted[name])] == wanted[name] or type(module).__name__ == "RMSNorm"


def with_wide_weights(model):
    model.double().time_embeddings.float()  # diffusers computes these in fp32 whatever the rest is


def with_parallel_config(model):
    for processor in model.attn_processors.values():
        processor._parallel_config = object()


def with_another_processor(model):
    attention = model.visual_transformer_blocks[1].cross_attention
    stock_class = type(attention.processor)
    attention.set_processor(type("Other", (stock_class,), {})())


FALLBACKS = {
    "gradients": (torch.nn.Module.requires_grad_, "gradients are recorded"),
    "float64": (with_wide_weights, "activations are torch.float64"),
    "processor": (with_another_processor, "an attention processor has been replaced"),
    "parallel": (with_parallel_config, "split over several devices"),
}


@pytest.mark.parametrize(("change", "reason"), FALLBACKS.values(), ids=FALLBACKS)
def test_falls_back_to_stock_and_says_so_once(change, reason, monkeypatch, caplog):
    model = stock(monkeypatch, stripped=False)
    ours = copy.deepcopy(model)
    handle = accelerate(ours)
    if change is not with_another_processor:
        change(model)
    change(ours)
    if change is with_parallel_config:  # the dispatcher would look into it
        module = inspect.getmodule(type(model))
        monkeypatch.setattr(
            module,
            "dispatch_attention_fn",
            lambda q, k, v, **_: q + k.mean(1, keepdim=True) + v.mean(1, keepdim=True),
        )
    data = inputs(dtype=torch.float64 if change is with_wide_weights else torch.float32)
    with told(caplog) as messages, torch.set_grad_enabled("gradients" in reason):
        results = [ours(**data) for _ in range(2)]
        wanted = model(**data)
    assert torch.equal(results[0], wanted)
    assert torch.equal(results[1], wanted)
    assert len(messages) == 1
    assert reason in messages[0]
    assert handle.reports == [messages[0].partition(" ")[2]]
    if "gradients" in reason:
        results[0].square().mean().backward()
        wanted.square().mean().backward()
        assert all(
            torch.equal(a.grad, b.grad)
            for a, b in zip(ours.parameters(), model.parameters(), strict=True)
        )
        with torch.no_grad():
            assert off(ours(**data), wanted) > 1e-6  # the next pass is ours again


def test_a_backend_that_was_set_is_used(monkeypatch, caplog):
    """Dense attention goes through it by our processor, NABLA by theirs."""
    model = stock(monkeypatch, stripped=False)
    model.set_attention_backend("_native_math")
    try:
        wanted = velocity(model, nabla=True)
        ours = copy.deepcopy(model)
        accelerate(ours)
        with told(caplog) as messages:
            assert torch.equal(velocity(ours, nabla=True), wanted)
            assert off(velocity(ours), exact()) <= IN_FP32
        assert len(messages) == 1
        assert "NATIVE_MATH" in messages[0].upper()
        ours.reset_attention_backend()
        assert off(velocity(ours, nabla=True), exact(nabla=True)) <= IN_FP32
    finally:
        from diffusers.models.attention_dispatch import (
            AttentionBackendName,
            _AttentionBackendRegistry,
        )

        # diffusers sets it for all models and leaves it
        _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def test_nabla_has_gradients(monkeypatch, caplog):
    """Of ours, because diffusers' own code has none without FlexAttention."""
    model = accelerated(monkeypatch)
    model.visual_transformer_blocks[0].feed_forward.in_layer.requires_grad_()
    wanted = velocity(model, RAGGED, nabla=True)
    with told(caplog) as messages:
        result = model(**inputs(RAGGED, nabla=True))
    result.square().mean().backward()
    assert off(result.detach(), wanted) <= ROUNDING
    assert len(messages) == 1
    assert "gradients" in messages[0]
    assert model.visual_transformer_blocks[0].feed_forward.in_layer.weight.grad.norm() > 0


def test_positions_are_those_given(monkeypatch):
    """A later part of a video, and a batch of one time for all samples."""
    model = stock(monkeypatch)
    data = inputs(WHOLE)
    data["visual_rope_pos"] = [axis + 5 for axis in data["visual_rope_pos"]]
    data["text_rope_pos"] = torch.arange(7).flip(0)
    with torch.no_grad():
        wanted = model(**data)
        accelerate(model)
        assert off(model(**data), wanted) <= ROUNDING
        assert off(wanted, exact()) > 1e-3
