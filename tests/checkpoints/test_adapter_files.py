# SPDX-License-Identifier: Apache-2.0
"""Adapters as programs save them have the strength they were trained with, and the kinds that are
not applied are refused by their names."""

import json
import logging
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kandinsky_model.checkpoints.adapter_files import read_adapter
from kandinsky_model.checkpoints.lora import Adapters
from kandinsky_model.dit.linear import Linear
from kandinsky_model.training.config import LoRAConfig
from kandinsky_model.training.outputs import save_lora

from .test_lora import MODULES, build, changed, matrices, out, rel_l2

SOME = MODULES[:3]
PREFIXES = [
    "",
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "base_model.model.transformer.",
]


def write(path, made, form="{module}.lora_{half}.weight", halves="AB", metadata=None, extra=()):
    """A file of matrices {module: (down, up)} under names of a form."""
    tensors = dict(extra)
    for module, pair in made.items():
        underscored = module.replace(".", "_")
        for half, x in zip(halves, pair, strict=True):
            tensors[form.format(module=module, underscored=underscored, half=half)] = x.contiguous()
    save_file(tensors, path, metadata)
    return path


def strengths(path, made):
    """strength of each layer of a file, from what is added to the weights."""
    adapter = read_adapter(path, build())
    assert adapter.matrices.keys() == made.keys()
    found = {}
    for module, (down, up) in adapter.matrices.items():
        torch.testing.assert_close(down.float(), made[module][0].float())
        found[module] = (up.float().norm() / made[module][1].float().norm()).item()
    return found


def all_are(found, wanted):
    assert found.values()
    for value in found.values():
        assert value == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(
    ("form", "halves"),
    [
        ("{module}.lora_{half}.weight", "AB"),
        ("{module}.lora_{half}.default.weight", "AB"),
        ("{module}.lora_{half}.my-adapter.weight", "AB"),
        ("{module}.lora_{half}.weight", ("down", "up")),
        ("{module}.lora.{half}.weight", ("down", "up")),
        ("{underscored}.lora_{half}.weight", ("down", "up")),
    ],
)
def test_names(tmp_path, prefix, form, halves):
    made = matrices(1, modules=SOME)
    all_are(strengths(write(tmp_path / "a.safetensors", made, prefix + form, halves), made), 1.0)


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_transformer_", "lycoris_"])
def test_names_with_underscores_and_alphas(tmp_path, prefix):
    """kohya's form, which musubi-tuner and others write: every layer has its alpha."""
    made = matrices(1, modules=SOME)
    form = prefix + "{underscored}.lora_{half}.weight"
    alphas = {
        f"{prefix}{module.replace('.', '_')}.alpha": torch.tensor(alpha)
        for module, alpha in zip(SOME, (1.0, 2.0, 16.0), strict=True)
    }
    path = write(tmp_path / "a.safetensors", made, form, ("down", "up"), {}, alphas)
    found = strengths(path, made)
    wanted = dict(zip(SOME, (1 / 4, 2 / 4, 16 / 4), strict=True))
    assert found == pytest.approx(wanted)


def test_an_adapter_of_this_package_stands_alone(tmp_path):
    """Its alpha is in the header: without the file beside it the strength is what it was."""
    made = matrices(1)
    tensors = {
        f"{module}.lora_{half}.weight": x
        for module, pair in made.items()
        for half, x in zip("AB", pair, strict=True)
    }
    config = LoRAConfig(4, alpha=16.0, trigger="pan left")
    (tmp_path / "run").mkdir()
    save_lora(tmp_path / "run", tensors, config, torch.float32, "tiny")
    saved = tmp_path / "run" / "lora.safetensors"
    alone = saved.rename(tmp_path / "camera.safetensors")
    dit = build().prepare()
    adapter = Adapters(dit).load(alone)
    assert adapter.trigger == "pan left"
    assert rel_l2(out(dit), out(changed((made, 4.0)))) <= 1e-5


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [
        ({"lora_adapter_metadata": json.dumps({"r": 4, "lora_alpha": 16})}, 4.0),
        ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 16})}, 4.0),
        ({"lora_adapter_metadata": json.dumps({"lora_alpha": 16, "use_rslora": True})}, 8.0),
        ({"lora_adapter_metadata": json.dumps({"r": 4})}, 1.0),
        ({"ss_network_alpha": "16", "ss_network_dim": "4"}, 4.0),
        ({"ss_network_alpha": "2.0"}, 0.5),
        ({"ss_network_alpha": "None"}, 1.0),
        ({"network_alpha": "8"}, 2.0),
        ({"lora_alpha": "8", "alpha": "1"}, 2.0),
        ({"format": "pt"}, 1.0),
    ],
)
def test_headers(tmp_path, metadata, wanted):
    made = matrices(1, modules=SOME)
    path = write(tmp_path / "a.safetensors", made, metadata=metadata)
    all_are(strengths(path, made), wanted)
    # Tensors say more than the header, and the header more than a file beside it.
    alphas = {f"{module}.alpha": torch.tensor([3.0]) for module in SOME}
    all_are(strengths(write(path, made, metadata=metadata, extra=alphas), made), 3 / 4)
    if wanted != 1.0:
        write(path, made, metadata=metadata)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 400}))
        all_are(strengths(path, made), wanted)


class Tree(nn.Module):
    """Layers under the names of a transformer's, for PEFT to adapt."""

    def __init__(self, kind):
        super().__init__()
        network = build()
        for module in SOME:
            *path, last = module.split(".")
            parent = self
            for name in path:
                if not hasattr(parent, name):
                    parent.add_module(name, nn.Module())
                parent = getattr(parent, name)
            layer = network.get_submodule(module)
            parent.add_module(last, kind(layer.in_features, layer.out_features))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", [False, True])
def test_what_peft_saves_has_the_strength_that_peft_gives_it(tmp_path, rslora, patterns):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules=[name.rpartition(".")[2] for name in SOME],
        rank_pattern={SOME[0]: 8, "to_value": 2} if patterns else {},
        alpha_pattern={SOME[1]: 30, "to_value": 5} if patterns else {},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(Tree(nn.Linear), config)
    model.save_pretrained(tmp_path)
    read = read_adapter(tmp_path / "adapter_model.safetensors", Tree(Linear))
    assert set(read.matrices) == set(SOME)
    for module in SOME:
        down, up = read.matrices[module]
        wanted = model.base_model.model.get_submodule(module).get_delta_weight("default")
        torch.testing.assert_close(up @ down, wanted)


def test_a_stray_configuration_is_left_aside_with_a_note(tmp_path, caplog):
    made = matrices(1, modules=SOME)
    path = write(tmp_path / "a.safetensors", made)
    beside = tmp_path / "adapter_config.json"
    beside.write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    all_are(strengths(path, made), 2.0)
    for other in ({"r": 64, "lora_alpha": 8}, {"r": 4, "rank_pattern": {"to_key": 7}}):
        beside.write_text(json.dumps({"lora_alpha": 8, **other}))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            all_are(strengths(path, made), 1.0)
        (note,) = [record.getMessage() for record in caplog.records]
        assert note.startswith("adapter_config.json is not about a.safetensors (it says rank ")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_narrow_adapters(tmp_path, dtype):
    made = {
        module: tuple(x.to(dtype) for x in pair)
        for module, pair in matrices(1, modules=SOME).items()
    }
    path = write(tmp_path / "a.safetensors", made, metadata={"ss_network_alpha": "8"})
    all_are(strengths(path, made), 2.0)
    dit = build().prepare()
    Adapters(dit).load(path)
    wide = {module: tuple(x.float() for x in pair) for module, pair in made.items()}
    assert rel_l2(out(dit), out(changed((wide, 2.0)))) <= 1e-3


def test_scaled_fp8_adapters(tmp_path):
    made = matrices(1, modules=SOME)
    stored = {}
    for module, pair in made.items():
        for half, x in zip(("down", "up"), pair, strict=True):
            scale = x.abs().amax() / 448
            stored[f"{module}.lora_{half}.weight"] = (x / scale).to(torch.float8_e4m3fn)
            stored[f"{module}.lora_{half}.scale_weight"] = scale
    save_file(stored, tmp_path / "a.safetensors")
    read = read_adapter(tmp_path / "a.safetensors", build())
    for module, pair in made.items():
        for found, x in zip(read.matrices[module], pair, strict=True):
            assert rel_l2(found, x) <= 0.05


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        ("lokr_w1", "LoKr"),
        ("lokr_w2_a", "LoKr"),
        ("hada_w1_a", "LoHa"),
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.default.weight", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("diff", r"a file of full differences \(.diff\)"),
        ("diff_b", r"a file of full differences \(.diff\)"),
        ("lora_mid.weight", "a LoRA of convolutions"),
        ("oft_blocks", "OFT"),
        ("lora_B.bias", "a LoRA with biases"),
        ("modules_to_save.weight", "a LoRA with whole modules"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "lora_unet_"])
def test_other_kinds_are_refused_by_name(tmp_path, last, kind, prefix):
    module = SOME[0].replace(".", "_") if prefix == "lora_unet_" else SOME[0]
    extra = {f"{prefix}{module}.{last}": torch.zeros(3)}
    path = write(tmp_path / "a.safetensors", matrices(1, modules=SOME), extra=extra)
    with pytest.raises(
        ValueError, match=f"but a.safetensors is {kind} .*not applied here"
    ) as caught:
        read_adapter(path, build())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lora_te1_text_model_x", "text_encoder.layers.0.q_proj"])
def test_text_encoders_are_refused_by_name(tmp_path, name):
    path = tmp_path / "a.safetensors"
    save_file({f"{name}.lora_down.weight": torch.zeros(4, 4)}, path)
    with pytest.raises(ValueError, match="is a LoRA of a text encoder"):
        read_adapter(path, build())


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"lora_adapter_metadata": "["}, "must have a JSON object as lora_adapter_metadata"),
        ({"lora_adapter_metadata": "[]"}, "must have a JSON object as lora_adapter_metadata"),
        ({"lora_adapter_metadata": '{"lora_alpha": "a"}'}, "a finite number as alpha, got a"),
        ({"lora_adapter_metadata": '{"lora_alpha": NaN}'}, "a finite number as alpha, got nan"),
        ({"lora_adapter_metadata": '{"lora_alpha": [4]}'}, "a finite number as alpha"),
        ({"lora_adapter_metadata": '{"lora_alpha": 4, "use_dora": true}'}, "is DoRA .use_dora"),
        ({"lora_adapter_metadata": '{"lora_alpha": 4, "lora_bias": true}'}, "LoRA with biases"),
        ({"lora_adapter_metadata": '{"lora_alpha": 4, "peft_type": "ADALORA"}'}, "is ADALORA"),
        (
            {"lora_adapter_metadata": '{"lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}'},
            "for weights that pissa_niter_4 has changed",
        ),
        ({"lora_adapter_metadata": '{"lora_alpha": 4, "r": 8}'}, "says rank 8 for"),
        (
            {"lora_adapter_metadata": '{"lora_alpha": 4, "alpha_pattern": {".*key": 1}}'},
            "got the regular expression",
        ),
        ({"ss_network_alpha": "inf"}, "a finite number as alpha, got inf"),
    ],
)
def test_headers_that_cannot_be_right(tmp_path, metadata, words):
    path = write(tmp_path / "a.safetensors", matrices(1, modules=SOME), metadata=metadata)
    with pytest.raises(ValueError, match=words) as caught:
        read_adapter(path, build())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 32), (0, 128)])
def test_matrices_of_other_shapes(tmp_path, shape):
    made = {SOME[0]: (torch.zeros(shape), torch.zeros(shape))}
    with pytest.raises(ValueError, match="it holds .* was made for a checkpoint of another width"):
        read_adapter(write(tmp_path / "a.safetensors", made), build())


def test_alphas_that_cannot_be_right(tmp_path):
    made = matrices(1, modules=SOME)
    for alpha, words in (
        (torch.zeros(2), "one number as alpha"),
        (torch.tensor(math.nan), "finite"),
    ):
        extra = {f"{SOME[0]}.alpha": alpha}
        with pytest.raises(ValueError, match=words):
            read_adapter(write(tmp_path / "a.safetensors", made, extra=extra), build())


def test_the_same_layer_twice(tmp_path):
    made = matrices(1, modules=SOME)
    extra = {f"lora_unet_{SOME[0].replace('.', '_')}.lora_down.weight": made[SOME[0]][0].clone()}
    with pytest.raises(ValueError, match="must hold each matrix once"):
        read_adapter(write(tmp_path / "a.safetensors", made, extra=extra), build())
