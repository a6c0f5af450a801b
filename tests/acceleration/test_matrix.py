# SPDX-License-Identifier: Apache-2.0
"""Whatever else one does to a transformer of diffusers, before accelerating it or after: adapters,
offloading, casts, caches, copies.

Offloading takes a module's parameters away outside its own forward, so a bit that differs betrays a
parameter read elsewhere.
"""

import copy
from unittest import mock

import pytest
import torch
from torch import nn

from kandinsky_model import accelerate

from ..support.accelerated import ROUNDING, accelerated, inputs, off, stock, velocity

ORDERS = ["before", "after"]
CPU = torch.device("cpu")


def both_ways(model, change, order):
    """The model with `change` applied before or after it is accelerated."""
    if order == "before":
        change(model)
    accelerate(model)
    if order == "after":
        change(model)
    return model


# Adapters

ADAPTED = (
    r".*(self_attention|cross_attention|feed_forward)"
    r"\.(to_query|to_key|to_value|out_layer|in_layer)"
)


def lora():
    peft = pytest.importorskip(
        "peft", reason="peft is not installed, so no adapter of its can be added"
    )
    return peft.LoraConfig(r=2, lora_alpha=4, target_modules=ADAPTED, init_lora_weights=False)


@pytest.mark.parametrize("order", ORDERS)
def test_lora_is_added_disabled_fused_and_deleted(order, monkeypatch):
    model = stock(monkeypatch)
    config = lora()
    plain = None

    def add(model):
        torch.manual_seed(3)
        model.add_adapter(config, "one")

    theirs = copy.deepcopy(model)
    plain = velocity(model)
    add(theirs)
    wanted = velocity(theirs)
    assert off(wanted, plain) > 1e-2
    both_ways(model, add, order)
    assert off(velocity(model), wanted) <= ROUNDING
    model.disable_adapters()
    assert off(velocity(model), plain) <= ROUNDING
    model.enable_adapters()
    model.fuse_lora()
    assert off(velocity(model), wanted) <= ROUNDING
    model.unfuse_lora()
    model.delete_adapters("one")
    assert off(velocity(model), plain) <= ROUNDING


class Wrapped(nn.Module):
    """A linear layer inside another module with something added, which is what adapters and
    quantisers put in its place."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def wrap(model):
    torch.manual_seed(3)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name.rpartition(".")[2] in (
            "to_query",
            "to_key",
            "to_value",
            "out_layer",
            "in_layer",
        ):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Wrapped(module).requires_grad_(False))


def unwrap(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, Wrapped):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base)


@pytest.mark.parametrize("order", ORDERS)
def test_linear_layers_may_be_wrapped_and_unwrapped(order, monkeypatch):
    model = stock(monkeypatch)
    plain = velocity(model)
    theirs = copy.deepcopy(model)
    wrap(theirs)
    wanted = velocity(theirs)
    both_ways(model, wrap, order)
    assert off(wanted, plain) > 1e-2
    assert off(velocity(model), wanted) <= ROUNDING
    unwrap(model)
    assert off(velocity(model), plain) <= ROUNDING


# Offloading


def group_offload(kind, folder):
    def change(model):
        from diffusers.hooks import apply_group_offloading

        blocks = dict(offload_type="block_level", num_blocks_per_group=1)
        leaves = dict(offload_type="leaf_level")
        options = {
            "leaf": leaves,
            "block": blocks,
            "disk": leaves | dict(offload_to_disk_path=str(folder)),
        }
        # diffusers up to 0.40 insists on one
        with mock.patch.object(torch.accelerator, "current_accelerator", lambda *_: CPU):
            apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options[kind])

    return change


@pytest.mark.parametrize("kind", ["leaf", "block", "disk"])
@pytest.mark.parametrize("order", ORDERS)
def test_group_offloading(order, kind, monkeypatch, tmp_path):
    """Results are those of the accelerated model without it, bit for bit, and after undoing those
    of the stock model.

    Tensors from a file lie elsewhere in a cache line, which changes the last digits of stock code,
    too.
    """
    model = stock(monkeypatch)
    plain = velocity(model, nabla=True)
    handle = accelerate(model)
    wanted = velocity(model, nabla=True)
    handle.undo()
    change = group_offload(kind, tmp_path)
    if order == "before":
        change(model)
    handle = accelerate(model)
    if order == "after":
        change(model)
    ours = velocity(model, nabla=True)
    handle.undo()
    theirs = velocity(model, nabla=True)
    if kind == "disk":
        assert off(ours, wanted) <= ROUNDING
        assert off(theirs, plain) <= ROUNDING
    else:
        assert torch.equal(ours, wanted)
        assert torch.equal(theirs, plain)
        assert not torch.equal(wanted, plain)


def weights_on_meta(model):
    """accelerate's sequential offloading: outside of its owner's forward a parameter has no data at
    all."""
    pytest.importorskip("accelerate").cpu_offload(model, execution_device=CPU)
    assert all(parameter.is_meta for parameter in model.parameters())


def model_offload(model):
    """What pipe.enable_model_cpu_offload() does to each model."""
    pytest.importorskip("accelerate").cpu_offload_with_hook(model, execution_device=CPU)


@pytest.mark.parametrize("change", [weights_on_meta, model_offload])
@pytest.mark.parametrize("order", ORDERS)
def test_cpu_offload(order, change, monkeypatch):
    model = stock(monkeypatch)
    plain = velocity(model)
    ours = copy.deepcopy(model)
    accelerate(ours)
    wanted = velocity(ours)
    if order == "before":
        change(model)
    handle = accelerate(model)
    if order == "after":
        change(model)
    assert torch.equal(velocity(model), wanted)
    assert not torch.equal(wanted, plain)
    handle.undo()
    assert torch.equal(velocity(model), plain)


# Other ways to store weights


@pytest.mark.parametrize("order", ORDERS)
def test_layerwise_casting_to_fp8(order, monkeypatch):
    def change(model):
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)

    model = stock(monkeypatch)
    plain = velocity(model)
    theirs = copy.deepcopy(model)
    change(theirs)
    wanted = velocity(theirs)
    both_ways(model, change, order)
    assert off(wanted, plain) > 1e-2
    assert off(velocity(model), wanted) <= ROUNDING


@pytest.mark.parametrize("order", ORDERS)
def test_int8_by_torchao(order, monkeypatch):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def change(model):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())

    model = stock(monkeypatch)
    plain = velocity(model)
    theirs = copy.deepcopy(model)
    change(theirs)
    wanted = velocity(theirs)
    both_ways(model, change, order)
    assert off(wanted, plain) > 1e-4
    assert off(velocity(model), wanted) <= ROUNDING


# Caches, copies, files


@pytest.mark.parametrize("order", ORDERS)
def test_magcache_skips_the_same_passes(order, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    config = diffusers.MagCacheConfig(
        threshold=0.3,
        max_skip_steps=2,
        retention_ratio=0.2,
        num_inference_steps=6,
        mag_ratios=[0.97] * 6,
    )
    model = stock(monkeypatch)
    seen = []
    theirs = copy.deepcopy(model)
    theirs.enable_cache(config)
    both_ways(model, lambda model: model.enable_cache(config), order)
    for one in (theirs, model):
        count = []
        one.visual_transformer_blocks[1].feed_forward.register_forward_hook(
            lambda *_, count=count: count.append(1)
        )
        with torch.no_grad(), one.cache_context("cond"):
            results = [one(**inputs(seed=seed)) for seed in range(6)]
        seen.append((len(count), results))
    assert seen[0][0] == seen[1][0] < 6
    assert all(
        off(ours, wanted) <= ROUNDING
        for wanted, ours in zip(*(results for _, results in seen), strict=True)
    )


def test_a_saved_model_loads_as_stock(monkeypatch, tmp_path):
    model = accelerated(monkeypatch)
    wanted = velocity(model, nabla=True)
    model.save_pretrained(tmp_path)
    stock_class = type(model)
    loaded = stock_class.from_pretrained(tmp_path)
    assert "forward" not in vars(loaded)
    assert loaded.config.attention_P == model.config.attention_P
    with accelerate(loaded.requires_grad_(False)):
        assert torch.equal(velocity(loaded, nabla=True), wanted)


def test_a_copy_is_accelerated_and_on_its_own(monkeypatch):
    model = accelerated(monkeypatch)
    wanted = velocity(model, nabla=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(velocity(twin, nabla=True), wanted)
    accelerate(twin).undo()  # finds it accelerated by another handle and leaves it so
    assert torch.equal(velocity(twin, nabla=True), wanted)
