# SPDX-License-Identifier: Apache-2.0
"""Weights and products in 8 bits: against quantising, dequantising and multiplying by hand, and
against the network in full width."""

import logging
import re
import weakref

import pytest
import torch
from torch.nn import functional as F

from kandinsky_model.checkpoints.load import empty_dit
from kandinsky_model.checkpoints.lora import Adapters
from kandinsky_model.config import LITE_DIT, PRO_DIT, QUANTIZATIONS
from kandinsky_model.dit import quantized
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import make_layout
from kandinsky_model.dit.linear import Linear
from kandinsky_model.dit.quantized import (
    QuantizedLinear,
    kind_of,
    quantization_report,
    quantize,
    quantize_rows,
)

from ..checkpoints.test_lora import matrices, write
from ..compare import assert_faithful
from ..support.plain_dit import plain_forward
from .test_transformer import CONFIG, MODES, NABLA, SCALE, build, inputs, rel_l2

GRID = Grid(1, 9, 8)
STEPS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
KINDS = {f"self_attention.{name}" for name in ("to_query", "to_key", "to_value", "out_layer")} | {
    "cross_attention.to_query",
    "cross_attention.out_layer",
    "feed_forward.in_layer",
    "feed_forward.out_layer",
}


@pytest.fixture(autouse=True)
def fresh_devices(monkeypatch):
    """Whether a device multiplies in 8 bits is found out anew, and no gradients are recorded."""
    monkeypatch.setattr(quantized, "_reasons", {})
    with torch.no_grad():
        yield


def by_hand(x, mode, wide=None):
    """Quantised to rows of the mode's dtype and back, in the dtype of x or in a wider one."""
    dtype, largest = STEPS[mode.removesuffix("-dynamic")]
    scale = x.abs().amax(-1, keepdim=True).float() / largest
    steps = (x / scale).round() if dtype == torch.int8 else x / scale
    wide = wide or x.dtype
    return (steps.to(dtype).to(wide) * scale).to(wide)


def peer(
    mode,
    data,
    dtype=torch.float32,
    nabla=None,
):
    """The network by hand: weights and, in dynamic modes, activations quantised and dequantised
    around plain linear layers."""

    def rounded(name, y):
        return by_hand(y, mode) if mode.endswith("-dynamic") and is_large(name) else y

    state = {
        name: by_hand(x, mode, dtype)
        if name.endswith("weight") and is_large(name.removesuffix(".weight"))
        else x.to(dtype)
        for name, x in build().state_dict().items()
    }
    return plain_forward(
        state,
        CONFIG,
        *(x.to(dtype) for x in data),
        SCALE,
        nabla,
        rounded,
    )[0]


def is_large(name):
    return name.startswith("visual_transformer_blocks") and name.split(".", 2)[2] in KINDS


def layer_of(mode, inner=64, outer=96):
    torch.manual_seed(0)
    plain = Linear(inner, outer)
    layer = QuantizedLinear(
        inner,
        outer,
        True,
        mode,
        device="meta",
    )
    packed = {
        name.removeprefix("layer."): x
        for name, x in quantized.pack("layer", plain.weight, mode).items()
    }
    layer.load_state_dict({**packed, "bias": plain.bias}, assign=True)
    return plain, layer


def needs_product(mode, dtype=torch.float32):
    """Skips where this PyTorch does not multiply in 8 bits on the CPU: 2.11 has no fp8 product with
    a scale per row."""
    if (
        mode.endswith("-dynamic")
        and quantized.reason_against(mode, torch.device("cpu"), dtype) is not None
    ):
        pytest.skip(f"{mode} computes as stored here")


# Rows


@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_rounded_to_the_nearest_step(mode, dtype):
    stored, largest = STEPS[mode]
    x = (
        torch.randn(37, 129, generator=torch.Generator().manual_seed(1))
        * torch.logspace(-3, 3, 37)[:, None]
    ).to(dtype)
    x[5] = 0
    values, scale = quantize_rows(x, stored)
    assert values.dtype == stored
    assert scale.dtype == torch.float32
    assert scale.shape == (37, 1)
    wide = values.double()
    exact = x.double()
    error = (wide * scale - exact).abs()
    unit = scale.double()
    # three bits, subnormals below
    step = (
        unit
        if mode == "int8"
        else torch.exp2((wide.abs().clamp_min(2**-6)).log2().floor() - 3) * unit
    )
    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert not values[5].double().any()
    rows = [i for i in range(37) if i != 5]
    assert (wide[rows].abs().amax(-1) == largest).all()
    assert wide.abs().amax() == largest


@pytest.mark.parametrize("mode", STEPS)
def test_extreme_rows(mode):
    x = torch.tensor(
        [[3e38, -1e38, 1.0], [1e-45, 0.0, -1e-45], [1e-38, -1e-38, 0.0], [0.0, 0.0, 0.0]]
    )
    values, scale = quantize_rows(x, STEPS[mode][0])
    back = values.double() * scale
    assert back.isfinite().all()
    assert (scale > 0).all()
    assert ((back - x).abs() <= 0.07 * x.abs().amax(-1, keepdim=True) + 1e-38).all()


def test_which_layers():
    for config in (LITE_DIT, PRO_DIT):
        dit = empty_dit(config, "int8")
        found = {
            name: layer for name, layer in dit.named_modules() if isinstance(layer, QuantizedLinear)
        }
        assert {kind_of(name) for name in found} == KINDS
        assert len(found) == len(KINDS) * config.num_visual_blocks
        assert all(is_large(name) for name in found)
        share = sum(layer.weight.numel() for layer in found.values()) / sum(
            x.numel() for x in empty_dit(config).state_dict().values()
        )
        assert share > 0.7


# One layer


@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_in_8_bits_is_the_product_by_hand(mode, dtype):
    plain, layer = layer_of(mode)
    x = torch.randn(2, 57, 64).to(dtype)
    exact = F.linear(x.double(), by_hand(plain.weight, mode, torch.float64), plain.bias.double())
    by_peer = F.linear(x, by_hand(plain.weight, mode).to(dtype), plain.bias.to(dtype))
    assert_faithful(layer(x), exact, by_peer)
    assert torch.equal(layer(x.double()), exact)


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 100])
@pytest.mark.parametrize("mode", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multiplied_in_8_bits_is_the_product_by_hand(
    mode,
    dtype,
    rows,
    monkeypatch,
):
    needs_product(f"{mode}-dynamic", dtype)
    monkeypatch.setattr(quantized, "ROWS_AT_ONCE", 40)
    plain, layer = layer_of(f"{mode}-dynamic", outer=512)
    x = torch.randn(1, rows, 64).to(dtype)
    exact = F.linear(
        by_hand(x.float(), mode, torch.float64),
        by_hand(plain.weight, mode, torch.float64),
        plain.bias.double(),
    )
    y = layer(x)
    assert quantized._reasons == {(layer.mode, x.device, dtype): None}
    assert_faithful(
        y,
        exact,
        F.linear(by_hand(x.float(), mode), by_hand(plain.weight, mode), plain.bias).to(dtype),
    )
    assert rows == 0 or rel_l2(y, plain(x.float())) > 1e-3  # it was in 8 bits


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 40])
def test_int8_products_keep_to_the_limits_of_cublas(rows, monkeypatch):
    multiply = torch._int_mm
    called = []

    def strict(a, b):
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == 0
        assert b.shape[1] % 8 == 0
        assert a.is_contiguous()
        assert b.T.is_contiguous()
        called.append(a.shape[0])
        return multiply(a, b)

    monkeypatch.setattr(quantized, "CPU_MULTIPLIES", False)
    _, layer = layer_of("int8-dynamic")
    x = torch.randn(1, rows, 64)
    wanted = layer(x)
    monkeypatch.setattr(quantized, "CPU_MULTIPLIES", True)
    monkeypatch.setattr(torch, "_int_mm", strict)
    assert torch.equal(layer(x), wanted)
    assert called == [max(rows, 17)]


@pytest.mark.parametrize("inner, outer", [(60, 64), (64, 40)])
@pytest.mark.parametrize("mode", ["int8-dynamic", "fp8-dynamic"])
def test_widths_that_do_not_fit_compute_as_stored(mode, inner, outer):
    _, layer = layer_of(mode, inner, outer)
    _, stored = layer_of(mode.removesuffix("-dynamic"), inner, outer)
    x = torch.randn(1, 20, inner)
    assert torch.equal(layer(x), stored(x))
    assert not quantized._reasons


@pytest.mark.parametrize("fault", ["refused", "wrong"])
@pytest.mark.parametrize("mode", ["int8-dynamic", "fp8-dynamic"])
def test_devices_that_cannot_multiply_compute_as_stored_and_say_so_once(
    mode,
    fault,
    monkeypatch,
    caplog,
):
    def refused(*_):
        raise NotImplementedError("not on this card\nnor on that")

    if fault == "wrong":
        needs_product(mode)
        quantized._reasons.clear()
    multiply = quantized.multiply
    monkeypatch.setattr(
        quantized,
        "multiply",
        refused if fault == "refused" else lambda *args: 1.1 * multiply(*args),
    )
    _, layer = layer_of(mode)
    _, stored = layer_of(mode.removesuffix("-dynamic"))
    x = torch.randn(1, 20, 64)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(layer(x), stored(x))
        assert torch.equal(layer(2 * x), stored(2 * x))
    (record,) = caplog.records
    wanted = (
        r"refused \(not on this card\)"
        if fault == "refused"
        else (
            r"wrong by \d+\.\d% of "
            r"its largest"
        )
    )
    assert re.fullmatch(
        rf"{mode} computes as \w+ for torch.float32 activations on cpu: the "
        rf"product is {wanted}.*",
        record.message,
    )


@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_what_is_not_finite_stays_in_its_row(mode):
    _, layer = layer_of(mode)
    x = torch.randn(1, 20, 64)
    clean = layer(x)
    x[0, 3, 5] = torch.nan
    x[0, 9, 7] = torch.inf
    y = layer(x)
    assert not y[0, [3, 9]].isfinite().any()
    rows = [i for i in range(20) if i not in (3, 9)]
    assert torch.equal(y[0, rows], clean[0, rows])


@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_gradients_reach_the_input(mode):
    """As those of the weight in full: what multiplies in 8 bits has none."""
    plain, layer = layer_of(mode)
    x = torch.randn(1, 20, 64)
    with torch.enable_grad():
        layer.requires_grad_(True)
        layer(x.requires_grad_()).square().sum().backward()
        mine = x.grad
        x.grad = None
        F.linear(x, by_hand(plain.weight.detach(), mode), plain.bias).square().sum().backward()
    assert rel_l2(mine, x.grad) <= 1e-6
    assert not layer.weight.requires_grad


# The network


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("mode", STEPS)
def test_the_network_computes_with_the_weights_it_stores(mode, attention):
    """Not a bit more error than plain fp32 with the same 8-bit weights."""
    data = inputs(CONFIG, GRID, 2)
    nabla = MODES[attention]
    data = (*data[:3], data[3] / 100)
    dit = quantize(build(), mode)
    ours = dit(*data, make_layout(CONFIG, GRID, SCALE, nabla))
    assert_faithful(
        ours, peer(mode, data, torch.float64, nabla), peer(mode, data, torch.float32, nabla)
    )


@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_error_against_full_width_is_that_of_the_peer(mode):
    needs_product(mode)
    data = inputs(CONFIG, GRID)
    layout = make_layout(CONFIG, GRID, SCALE)
    exact = plain_forward(
        {name: x.double() for name, x in build().state_dict().items()},
        CONFIG,
        *(x.double() for x in data),
        SCALE,
    )[0]
    ours = quantize(build(), mode)(*data, layout)
    theirs = peer(mode, data)
    print(
        f"{mode}: relative error of the velocity {rel_l2(ours, exact):.3%}, by hand "
        f"{rel_l2(theirs, exact):.3%}"
    )
    assert_faithful(ours, exact, theirs)
    assert 1e-3 < rel_l2(ours, exact) < 0.06


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("mode", STEPS)
def test_one_product_gives_queries_keys_and_values(mode, attention):
    data = inputs(CONFIG, GRID)
    layout = make_layout(CONFIG, GRID, SCALE, MODES[attention])
    dit = quantize(build(), mode)
    attentions = [block.self_attention for block in dit.visual_transformer_blocks]
    assert all(
        a._is_joint() and type(a._joint[0]) is QuantizedLinear and a._joint[0].out_features == 384
        for a in attentions
    )
    assert all(
        a.to_value.weight_scale.data_ptr() == a._joint[0].weight_scale[256:].data_ptr()
        for a in attentions
    )
    together = dit(*data, layout)
    for a in attentions:
        a.forget()
    assert not attentions[0]._is_joint()
    assert rel_l2(dit(*data, layout), together) <= 1e-6


def test_the_joint_weight_in_full_width_is_let_go(monkeypatch):
    """Before the new ones are joined: nothing is there twice."""
    dit = build().prepare()
    left = []
    whole = weakref.ref(dit.visual_transformer_blocks[0].self_attention._joint[0].weight)
    prepare = dit.prepare
    monkeypatch.setattr(dit, "prepare", lambda: left.append(whole()) or prepare())
    assert quantize(dit, "int8") is dit
    assert left == [None]


@pytest.mark.parametrize("mode", STEPS)
def test_casts_and_moves_keep_8_bits(mode):
    data = inputs(CONFIG, GRID)
    layout = make_layout(CONFIG, GRID, SCALE)
    dit = quantize(build(), mode)
    state = {name: x.clone() for name, x in dit.state_dict().items()}
    before = dit(*data, layout)
    attention = dit.visual_transformer_blocks[1].self_attention
    for dtype in (torch.bfloat16, torch.float64):
        dit.to(dtype)
        assert attention._is_joint()
        assert attention.to_key.bias.dtype == dtype
        assert dit(*data, layout).dtype == dtype
    for name, x in dit.float().state_dict().items():
        is_quantized = "weight" in name and is_large(name.rpartition(".")[0])
        assert not is_quantized or torch.equal(x, state[name]) and x.dtype == state[name].dtype, (
            name
        )
    assert rel_l2(dit(*data, layout), before) <= 1e-2  # the rest has been in bf16
    layer = attention.to_key.to("meta")
    assert layer.weight.is_meta
    assert layer.weight_scale.is_meta
    assert layer.bias.is_meta


@pytest.mark.parametrize("mode", ["int8", "fp8-dynamic"])
def test_the_quantised_network_is_one_graph(mode):
    data = inputs(CONFIG, GRID)
    layout = make_layout(CONFIG, GRID, SCALE, NABLA)
    dit = quantize(build(), mode)
    torch._dynamo.reset()
    compiled = torch.compile(dit, fullgraph=True, backend="aot_eager")
    assert rel_l2(compiled(*data, layout), dit(*data, layout)) <= 1e-6


def test_report_is_that_of_the_definition():
    plain = build()
    dit = quantize(build(), "fp8")
    lines = quantization_report(plain, dit)
    weights = {
        name.removesuffix(".weight"): x.double()
        for name, x in plain.state_dict().items()
        if name.endswith("weight")
    }
    changes = {
        name: by_hand(x.float(), "fp8").double() - x
        for name, x in weights.items()
        if is_large(name)
    }
    for kind in KINDS:
        names = [name for name in changes if name.endswith(kind)]
        share = (
            sum(changes[name].square().sum() for name in names)
            / sum(weights[name].square().sum() for name in names)
        ).sqrt()
        assert f"{kind:26} {share.item():7.3%} in 3 layers" in lines
    worst = max(changes, key=lambda name: rel_l2(changes[name] + weights[name], weights[name]))
    assert lines[-1].startswith(f"worst: {worst}, ")
    assert len(lines) == len(KINDS) + 3


def test_refusals():
    with pytest.raises(ValueError, match="one of int8, fp8, int8-dynamic, fp8-dynamic, got 'int4'"):
        quantize(build(), "int4")
    with pytest.raises(ValueError, match="in int8-dynamic already; load the original"):
        quantize(quantize(build(), "int8-dynamic"), "fp8")
    dit = build()
    dit.get_submodule("visual_transformer_blocks.1.feed_forward.in_layer").weight[3, 4] = torch.inf
    with pytest.raises(
        ValueError, match="NaN or infinity in visual_transformer_blocks.1.feed_forward.in_layer"
    ):
        quantize(dit, "int8")


# Adapters


@pytest.mark.parametrize("mode", QUANTIZATIONS)
@pytest.mark.parametrize("order", ["quantised first", "adapted first"])
def test_adapters_add_to_quantised_layers(mode, order, tmp_path):
    made = matrices(1)
    x = torch.randn(1, 20, CONFIG.model_dim)
    path = write(tmp_path / "a.safetensors", made, alpha=8)
    dit = build()
    if order == "quantised first":
        quantize(dit, mode)
    adapters = Adapters(dit)
    adapters.load(path, scale=0.5)
    if order == "adapted first":
        quantize(dit, mode)
    layers = {
        name: layer for name, layer in dit.named_modules() if isinstance(layer, QuantizedLinear)
    }
    attention = dit.visual_transformer_blocks[0].self_attention
    assert not attention._is_joint()
    assert layers
    name = "visual_transformer_blocks.0.self_attention.to_key"
    down, up = made[name]
    wanted = layers[name].product(x) + F.linear(F.linear(x, down), up)  # 0.5 * 8 / 4
    assert rel_l2(attention.to_key(x), wanted) <= 1e-6
    adapters.remove()
    fresh = quantize(build(), mode)
    assert attention._is_joint()
    assert torch.equal(attention.to_key(x), fresh.get_submodule(name)(x))


@pytest.mark.parametrize("mode", STEPS)
def test_merging_quantises_the_sum(mode, tmp_path):
    made = matrices(1)
    dit = quantize(build(), mode)
    adapters = Adapters(dit)
    adapters.load(write(tmp_path / "a.safetensors", made), scale=0.5)
    adapters.merge()
    for name in (
        "visual_transformer_blocks.0.self_attention.to_value",
        "visual_transformer_blocks.2.feed_forward.in_layer",
    ):
        down, up = made[name]
        wanted = by_hand(by_hand(build().get_submodule(name).weight, mode) + 0.5 * up @ down, mode)
        # a step here and there
        assert rel_l2(dit.get_submodule(name).dequantized(torch.float32), wanted) <= 1e-3
    attention = dit.visual_transformer_blocks[0].self_attention
    assert attention._is_joint()
    assert torch.equal(attention._joint[0].weight_scale[128:256], attention.to_key.weight_scale)
    name = "visual_transformer_blocks.0.self_attention.to_value"
    before = build().get_submodule(name).weight
    assert rel_l2(attention.to_value.dequantized(torch.float32), before) > 1e-2
