# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: beside the weights and merged, under every published form of names, and refused
where they do not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file

from kandinsky_model.checkpoints.lora import Adapters
from kandinsky_model.cli.generate import scaled_path
from kandinsky_model.dit.geometry import Grid
from kandinsky_model.dit.layout import make_layout

from ..dit.test_transformer import CONFIG, NABLA, SCALE, build, inputs, rel_l2

MODULES = [
    f"visual_transformer_blocks.{i}.{kind}.{layer}"
    for i in range(3)
    for kind in ("self_attention", "cross_attention")
    for layer in ("to_query", "to_key", "to_value", "out_layer")
]
MODULES += [
    f"visual_transformer_blocks.{i}.feed_forward.{layer}"
    for i in range(3)
    for layer in ("in_layer", "out_layer")
]
PREFIXES = ["", "transformer.", "base_model.model.", "base_model.model.transformer."]
GRID = Grid(1, 9, 8)


def matrices(seed, rank=4, modules=MODULES):
    network = dict(build().named_modules())
    g = torch.Generator().manual_seed(seed)
    return {
        module: (
            torch.randn(rank, network[module].in_features, generator=g) / 12,
            torch.randn(network[module].out_features, rank, generator=g) / 12,
        )
        for module in modules
    }


def write(path, made, prefix="", default="", alpha=None, trigger=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{prefix}{module}.lora_{half}{default}.weight": x
        for module, pair in made.items()
        for half, x in zip("AB", pair, strict=True)
    }
    save_file(tensors, path, {"trigger": trigger} if trigger else None)
    if alpha is not None:
        (path.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha, "r": 4}))
    return path


def changed(*parts):
    """The network with scale * alpha / rank * B A added to its weights by hand, for (matrices,
    factor) parts."""
    dit = build()
    for made, factor in parts:
        for module, (down, up) in made.items():
            dit.get_submodule(module).weight.add_(factor * up @ down)
    return dit


def out(dit):
    return dit(*inputs(CONFIG, GRID), make_layout(CONFIG, GRID, SCALE, NABLA))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("default", ["", ".default"])
def test_every_form_of_names(tmp_path, prefix, default):
    made = matrices(1)
    dit = build().prepare()
    adapter = Adapters(dit).load(write(tmp_path / "camera.safetensors", made, prefix, default))
    assert (adapter.name, adapter.rank, set(adapter.modules)) == ("camera", 4, set(MODULES))
    wanted = out(changed((made, 1.0)))
    assert rel_l2(out(dit), wanted) <= 1e-5
    assert rel_l2(out(build()), wanted) > 1e-2


def test_several_scaled_switched_off_and_removed(tmp_path):
    a = matrices(1)
    b = matrices(2, rank=3, modules=MODULES[:5])
    dit = build().prepare()
    adapters = Adapters(dit)
    state = {name: x.clone() for name, x in dit.state_dict().items()}
    adapters.load(write(tmp_path / "a" / "lora.safetensors", a, alpha=8), scale=0.5)
    adapters.load(write(tmp_path / "b" / "lora.safetensors", b))
    assert rel_l2(out(dit), out(changed((a, 0.5 * 8 / 4), (b, 1.0)))) <= 1e-5
    adapters.set({"b": -0.7})
    assert rel_l2(out(dit), out(changed((b, -0.7)))) <= 1e-5
    adapters.set({})
    plain = out(build())
    assert rel_l2(out(dit), plain) <= 1e-6
    adapters.remove()
    assert rel_l2(out(dit), plain) <= 1e-6
    assert not adapters.loaded
    assert all(dit.get_submodule(m).additions is None for m in MODULES)
    assert all(torch.equal(x, state[name]) for name, x in dit.state_dict().items())


def test_merged_adapters_cost_nothing(tmp_path):
    made = matrices(1)
    dit = build().prepare()
    adapters = Adapters(dit)
    adapters.load(write(tmp_path / "a.safetensors", made, trigger="pan left,"), scale=0.5)
    attention = dit.visual_transformer_blocks[0].self_attention
    assert not attention._is_joint()
    assert attention.to_key.additions is not None
    adapters.merge()
    assert attention._is_joint()
    assert attention.to_key.additions is None
    assert rel_l2(out(dit), out(changed((made, 0.5)))) <= 1e-5
    assert adapters.prompt("a cat") == "pan left, a cat"


def test_adapters_move_and_cast_with_their_layer(tmp_path):
    dit = build().prepare()
    Adapters(dit).load(write(tmp_path / "a.safetensors", matrices(1)))
    dit.double()
    assert all(
        x.dtype == torch.float64 for x in dit.get_submodule(MODULES[0]).additions.matrices["a"]
    )


def test_triggers_stand_before_every_prompt(tmp_path):
    adapters = Adapters(build())
    adapters.load(
        write(tmp_path / "a.safetensors", matrices(1, modules=MODULES[:1]), trigger="dolly in")
    )
    adapters.load(
        write(tmp_path / "b.safetensors", matrices(1, modules=MODULES[:1])), trigger="arc right"
    )
    adapters.load(write(tmp_path / "c.safetensors", matrices(1, modules=MODULES[:1])))
    assert adapters.prompt("a dog") == "dolly in arc right a dog"
    assert adapters.prompt("dolly in on a dog") == "arc right dolly in on a dog"
    adapters.set({"c": 1.0})
    assert adapters.prompt("a dog") == "a dog"


def test_refusals(tmp_path):
    adapters = Adapters(build())
    fine = matrices(1, modules=MODULES[:2])
    adapters.load(write(tmp_path / "fine.safetensors", fine))
    wide = {MODULES[0]: (torch.zeros(4, 256), torch.zeros(256, 4))}
    cases = [
        (
            write(tmp_path / "wide.safetensors", wide),
            {},
            r"\(128 to 128 channels\) it holds 256 "
            r"to 4 and 4 to 256; .*another width",
        ),
        (
            write(tmp_path / "other.safetensors", {"blocks.0.linear": fine[MODULES[0]]}),
            {},
            "blocks.0.linear is no linear layer",
        ),
        (
            write(
                tmp_path / "norm.safetensors",
                {MODULES[0].replace("to_query", "query_norm"): fine[MODULES[0]]},
            ),
            {},
            "no linear",
        ),
        (tmp_path / "fine.safetensors", {}, "'fine' twice"),
        (
            tmp_path / "fine.safetensors",
            {"name": "again", "scale": float("nan")},
            "scale must be a finite number, got nan",
        ),
    ]
    save_file({f"{MODULES[0]}.lora_A.weight": fine[MODULES[0]][0]}, tmp_path / "half.safetensors")
    save_file({f"{MODULES[0]}.weight": fine[MODULES[0]][0]}, tmp_path / "whole.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "fine.safetensors").read_bytes()[:-9])
    cases += [
        (tmp_path / "half.safetensors", {}, "only one of its two matrices"),
        (tmp_path / "whole.safetensors", {}, "only LoRA tensors"),
        (tmp_path / "empty.safetensors", {}, "got none"),
        (tmp_path / "cut.safetensors", {}, "complete safetensors"),
    ]
    for path, options, message in cases:
        with pytest.raises(ValueError, match=message):
            adapters.load(path, **options)
    with pytest.raises(FileNotFoundError, match="exactly one"):
        adapters.load(tmp_path)
    with pytest.raises(ValueError, match="one of fine.*got 'nobody'; load it first"):
        adapters.set({"nobody": 1.0})


@pytest.mark.parametrize(
    "text, wanted",
    [("a/b.st", ("a/b.st", 1.0)), ("a/b:0.5", ("a/b", 0.5)), ("c:/d", ("c:/d", 1.0))],
)
def test_command_line_form(text, wanted):
    assert scaled_path(text) == wanted
