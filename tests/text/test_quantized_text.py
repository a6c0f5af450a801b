# SPDX-License-Identifier: Apache-2.0
"""The language model in 8 and 4 bits: how near it stays, against bitsandbytes' own layers; what it
weighs, how it is streamed, and what is refused."""

import copy
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints.locate import locate
from kandinsky_model.config import TEXT_QUANTIZATIONS
from kandinsky_model.devices.budget import Weights
from kandinsky_model.devices.offload import LateOffload
from kandinsky_model.text.parts import Parts
from kandinsky_model.text.quantized import (
    Int4Linear,
    Int8Linear,
    is_packed,
    pack,
    packed_bytes,
    replace_layers,
)
from kandinsky_model.text.qwen_clip import QwenClipEncoder

from ..compare import assert_faithful
from ..support import tiny_models
from ..support.text_peers import picture
from ..support.tiny_models import SMALL

NF4 = dict(quant_type="nf4", compute_dtype=torch.float32, compress_statistics=False)
KINDS = {"int8": Int8Linear, "int4": Int4Linear}


@pytest.fixture(params=TEXT_QUANTIZATIONS)
def mode(request):
    if request.param == "int4":
        pytest.importorskip("bitsandbytes")
    return request.param


def encoder_of(folder, mode=None, dtype=torch.float32):
    sources = locate(folder, parts=("text",))
    return QwenClipEncoder.load(sources, dtype, cache=False, quantize=mode)


def packed_layer(weight, bias, mode):
    """Our layer with this weight, as the loader makes it."""
    holder = nn.ModuleDict({"layers": nn.ModuleDict({"a_proj": nn.Linear(*weight.shape[::-1])})})
    if bias is None:
        holder["layers"]["a_proj"].bias = None
    replace_layers(holder, mode)
    state = pack("layers.a_proj.weight", weight, mode)
    if bias is not None:
        state["layers.a_proj.bias"] = bias
    holder.load_state_dict(state, assign=True)
    return holder["layers"]["a_proj"]


def dequantized(layer, mode):
    if mode == "int8":
        return layer.weight.double() * layer.weight_scale
    high, low = layer.weight >> 4, layer.weight & 15
    levels = layer.weight_levels[torch.cat([high, low], 1).flatten().long()]
    return (levels.view(-1, 64) * layer.weight_scale[:, None]).view(layer.shape).double()


# Layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 33])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_multiplies_by_the_values_it_keeps(mode, dtype, rows, has_bias):
    weight = torch.randn(96, 128)
    bias = torch.randn(96).to(dtype) if has_bias else None
    layer = packed_layer(weight, bias, mode)
    assert isinstance(layer, KINDS[mode])
    x = torch.randn(rows, 128).to(dtype)
    values = dequantized(layer, mode)
    exact = F.linear(x.double(), values, None if bias is None else bias.double())
    peer = F.linear(x, values.to(dtype), bias)
    assert_faithful(layer(x), exact, peer)


def test_rows_are_rounded_to_the_nearest_of_255_steps():
    weight = torch.randn(8, 64) * torch.logspace(-30, 30, 8)[:, None]
    weight[3] = 0
    state = pack("w", weight, "int8")
    error = (state["w"].double() * state["w_scale"] - weight.double()).abs()
    assert (error <= state["w_scale"].double() * (0.5 + 1e-5)).all()
    assert torch.equal(state["w"][3], torch.zeros(64, dtype=torch.int8))
    assert (state["w"].abs().amax(1)[torch.arange(8) != 3] == 127).all()


def test_nf4_is_that_of_bitsandbytes():
    """Bit for bit, so that nothing is lost on the way through our plain tensors."""
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(128, 96)
    theirs = bnb.nn.Linear4bit(128, 96, **NF4)
    theirs.load_state_dict(plain.state_dict())
    theirs = theirs.to("cpu")
    ours = packed_layer(plain.weight.detach(), plain.bias.detach(), "int4")
    x = torch.randn(5, 128)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def test_weights_that_are_not_finite_are_refused(mode):
    weight = torch.ones(64, 64)
    weight[3, 4] = torch.inf
    with pytest.raises(ValueError, match="finite to be quantised, but layers.x has NaN or inf"):
        pack("layers.x", weight, mode)


# The whole encoder


def like_bitsandbytes(qwen, mode):
    """The same network with bitsandbytes' own layers."""
    import bitsandbytes as bnb

    network = copy.deepcopy(qwen)
    for name, layer in list(network.named_modules()):
        if not is_packed(f"{name}.weight"):
            continue
        sizes = layer.in_features, layer.out_features, layer.bias is not None
        if mode == "int8":
            theirs = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        else:
            theirs = bnb.nn.Linear4bit(*sizes, **NF4)
        theirs.load_state_dict(layer.state_dict())
        network.set_submodule(name, theirs.to("cpu"))
    return network


def test_embeddings_are_as_near_as_those_of_bitsandbytes(diffusers_folder, text_parts, mode):
    pytest.importorskip("bitsandbytes")
    tokens = torch.tensor([text_parts[1]("a red fox in the snow, at dawn")["input_ids"]])
    language = text_parts[0].model.language_model
    ours = encoder_of(diffusers_folder, mode).parts.language
    with torch.no_grad():
        exact = copy.deepcopy(language).double()(input_ids=tokens).last_hidden_state
        peer = like_bitsandbytes(language, mode)(input_ids=tokens).last_hidden_state
        actual = ours(input_ids=tokens).last_hidden_state
    assert_faithful(actual, exact, peer)
    assert not torch.equal(actual, language(input_ids=tokens).last_hidden_state)


def test_only_the_matrices_of_the_layers_are_quantised(diffusers_folder, mode):
    parts = encoder_of(diffusers_folder, mode, torch.bfloat16).parts
    kinds = {name: type(one) for name, one in parts.language.named_modules()}
    assert sum(kind is KINDS[mode] for kind in kinds.values()) == 2 * 7
    assert not any(type(one) is nn.Linear for one in parts.language.modules())
    for network in (parts.vision, parts.clip, parts.head):
        assert not any(isinstance(one, Int8Linear | Int4Linear) for one in network.modules())
    assert parts.language.embed_tokens.weight.dtype == torch.bfloat16


def test_real_bytes_are_weighed_before_and_after_reading(diffusers_folder, mode):
    encoder = encoder_of(diffusers_folder, mode)
    before = encoder.weigh()
    assert not list(encoder.children())
    after = Weights.of(encoder.parts.language)
    near = lambda size: pytest.approx(size, abs=100 * 256)  # noqa: E731 - the gaps between tensors
    assert before.layers == near(after.layers)
    assert before.once == near(after.once)
    exact = [
        sum(x.nbytes for x in layer.state_dict().values())
        for layer in encoder.parts.language.layers
    ]
    assert list(before.layers) == exact
    assert sum(before.layers) < 0.6 * sum(encoder_of(diffusers_folder).weigh().layers)


def test_a_weight_of_qwens_takes_a_half_or_a_quarter():
    wide = 2 * 18944 * 3584
    assert packed_bytes((18944, 3584), "int8") / wide == pytest.approx(0.5, abs=0.001)
    assert packed_bytes((18944, 3584), "int4") / wide == pytest.approx(0.25 + 1 / 32, abs=0.001)


@pytest.mark.parametrize("resident", [2, 1, 0])
def test_quantised_layers_are_streamed(diffusers_folder, mode, resident):
    plain, text = (encoder_of(diffusers_folder, mode) for _ in range(2))
    with LateOffload(text, torch.device("cpu")).on_device(resident) as placed:
        for request in ((["a"], "image_edit", [picture()]), (["a", "bc"],)):
            assert torch.equal(placed.encode(*request).embeds, plain.encode(*request).embeds)


def test_it_moves_with_its_scales(diffusers_folder, mode):
    """ "meta" stands for an accelerator."""
    network = encoder_of(diffusers_folder, mode).parts.language.to("meta")
    assert all(x.is_meta for x in [*network.parameters(), *network.buffers()])
    for layer in network.modules():
        if isinstance(layer, Int8Linear | Int4Linear):
            assert layer.weight.dtype in (torch.int8, torch.uint8)


def test_fp8_files_are_quantised_from_their_values(diffusers_folder, tmp_path, mode):
    folder = tmp_path / "model"
    shutil.copytree(diffusers_folder, folder)
    path = folder / "text_encoder" / "model.safetensors"
    state = {name: x.clone() for name, x in load_file(path).items()}
    narrow = {
        name: x.to(torch.float8_e4m3fn) if name.endswith("_proj.weight") else x
        for name, x in state.items()
    }
    save_file({name: x.to(torch.float32) for name, x in narrow.items()}, path, {"format": "pt"})
    wanted = encoder_of(folder, mode).encode(["a"]).embeds
    save_file(narrow, path, {"format": "pt"})
    assert torch.equal(encoder_of(folder, mode).encode(["a"]).embeds, wanted)


# Options


def test_the_option_reaches_the_encoder_and_its_cache(
    diffusers_folder, tmp_path, monkeypatch, mode, capsys
):
    monkeypatch.setattr("kandinsky_model.text.cache.default_folder", lambda: tmp_path / "cache")
    made = []
    read = Parts.__init__

    def watched(self, sources, dtype=torch.float32, quantize=None):
        made.append(quantize)
        read(self, sources, dtype, quantize)

    monkeypatch.setattr(Parts, "__init__", watched)
    frames = []
    for chosen in (None, mode):
        model = pipeline.load(diffusers_folder, device="cpu", text_quantize=chosen)
        frames.append(model.generate("a", seed=1, memory_budget=10**9, **SMALL).latents)
    assert made == [None, mode]
    assert not torch.equal(*frames), "embeddings of one must not serve the other"
    words = ["generate", "a", "--model", str(diffusers_folder), *tiny_models.SMALL_ARGS]
    words += ["--seed", "1", "--text-quantize", mode, "-o", str(tmp_path / "a.mp4")]
    assert main(words) == 0, capsys.readouterr().err
    assert made[-1] == mode


def test_refusals(diffusers_folder, monkeypatch):
    load = lambda mode, model=diffusers_folder: pipeline.load(  # noqa: E731
        model, device="cpu", parts=("text",), text_quantize=mode
    )
    with pytest.raises(ValueError, match="text_quantize must be int8 or int4, got 'int3'"):
        load("int3")
    with pytest.raises(ValueError, match="tiny reads prompts with a small encoder of its own"):
        load("int8", "tiny")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    words = r"int4 requires bitsandbytes >= 0.50, which cannot be .*pip install 'kand\S+\[int4\]'"
    with pytest.raises(RuntimeError, match=words) as caught:
        load("int4")
    assert "\n" not in str(caught.value)
    assert load("int8").text.encode(["a"]).embeds.isfinite().all()
