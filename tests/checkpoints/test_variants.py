# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as other programs write them load to the values they stand for, and formats that
cannot be read are refused by their names."""

import json
import shutil
import sys

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints.headers import CONFIG_NAME, WEIGHTS_NAME
from kandinsky_model.checkpoints.load import load_any_vae, load_dit, load_vae, save_dit
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.checkpoints.quantize import quantize_file
from kandinsky_model.checkpoints.verify import verify
from kandinsky_model.config import DiTConfig, VAEConfig
from kandinsky_model.dit.quantized import kind_of, quantize
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.media.picture import read_image
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE

from ..support.plain_dit import random_state
from ..support.tiny_models import random_vae
from ..vae.test_names import original, picture_vae

CONFIG = DiTConfig(
    in_text_dim=32,
    in_text_dim2=32,
    time_dim=32,
    model_dim=256,
    ff_dim=512,
    num_text_blocks=1,
    num_visual_blocks=2,
    visual_cond=True,
)
PREFIXES = ["model.diffusion_model.", "diffusion_model.", "transformer.", "model."]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(scope="module")
def state():
    return random_state(CONFIG)


def large(name):
    layer = name.removesuffix(".weight")
    return layer != name and bool(kind_of(layer))


def assert_equal(loaded, wanted):
    """Tensor by tensor, in values."""
    found = loaded.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0, atol=0)


# Names


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes(state, tmp_path, prefix):
    path = tmp_path / "a.safetensors"
    save_file({prefix + name: x for name, x in state.items()}, path)
    dit = load_dit(path)
    assert dit.config == CONFIG
    assert_equal(dit, state)
    assert verify(path)[0].startswith("transformer, complete: ")


def test_all_in_one_files(state, tmp_path):
    """The other networks of the file are left out; what is of no network is not."""
    vae = random_vae()
    path = tmp_path / "a.safetensors"
    others = {
        "text_encoders.qwen25_7b.transformer.model.norm.weight": torch.zeros(3),
        "conditioner.embedders.0.x": torch.zeros(3),
        **{f"vae.{name}": x.contiguous() for name, x in vae.state_dict().items()},
    }
    both = {f"model.diffusion_model.{name}": x for name, x in state.items()} | others
    save_file(both, path)
    assert_equal(load_dit(path), state)
    assert_equal(load_vae(path, vae.config), vae.state_dict())
    save_file({**both, "surplus": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"unexpected \(1\): surplus"):
        load_dit(path)


def test_two_networks_of_a_kind_are_refused(state, tmp_path):
    path = tmp_path / "a.safetensors"
    names = {**state, **{f"ema.{name}": x.clone() for name, x in state.items()}}
    save_file(names, path)
    with pytest.raises(ValueError, match="one network of a kind, but found .2.: one without"):
        load_dit(path)


def in_shards(state, folder, count=3):
    names = sorted(state)
    for i in range(count):
        part = {name: state[name] for name in names[i::count]}
        save_file(part, folder / f"model-{i + 1:05}-of-{count:05}.safetensors")


def test_shards_without_an_index(state, tmp_path):
    in_shards(state, tmp_path)
    assert_equal(load_dit(tmp_path), state)
    assert_equal(load_dit(tmp_path / "model-00002-of-00003.safetensors"), state)
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    for path in (tmp_path, tmp_path / "model-00001-of-00003.safetensors"):
        with pytest.raises(
            FileNotFoundError,
            match=r"one of 3 shards, but missing \(1\): model-00003-of-00003.safetensors; download",
        ):
            load_dit(path)


def test_shards_that_repeat_a_tensor(state, tmp_path):
    in_shards(state, tmp_path, 2)
    first = load_file(tmp_path / "model-00001-of-00002.safetensors")
    name = next(iter(first))
    second = load_file(tmp_path / "model-00002-of-00002.safetensors")
    save_file({**second, name: first[name]}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match=f"must hold different tensors, but .* repeats {name}"):
        load_dit(tmp_path)


# VAEs in one file


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("kind", ["video", "pictures"])
def test_a_vae_in_one_file(tmp_path, prefix, layout, kind):
    if kind == "video":
        config = VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1)
        state = HunyuanVideoVAE(config).state_dict()
    else:
        state = picture_vae(block_out_channels=(32, 32, 64, 64), layers_per_block=1).state_dict()
    state = {name: x.contiguous() for name, x in state.items()}
    dimensions = 3 if kind == "video" else 2
    stored = original(state, dimensions) if layout == "original" else state
    path = tmp_path / "vae.safetensors"
    others = {"model.diffusion_model.x": torch.zeros(1)} if prefix else {}
    save_file({prefix + name: x.contiguous() for name, x in stored.items()} | others, path)
    loaded = load_any_vae(path, torch.float32)
    assert_equal(loaded if kind == "video" else loaded.vae, state)
    first = next(iter(stored))
    del stored[first]
    save_file({prefix + name: x.contiguous() for name, x in stored.items()} | others, path)
    with pytest.raises(ValueError, match="VAE must have") as caught:
        load_any_vae(path, torch.float32)
    assert "\n" not in str(caught.value)


def test_the_command_takes_a_vae(tmp_path, capsys):
    """One that decodes to other colours shows that it is used; a file's configuration may lie
    beside it."""
    frames = {}
    weights = tmp_path / "vae" / WEIGHTS_NAME
    shutil.copytree(TINY / "vae", weights.parent)
    state = load_file(weights)
    state["decoder.conv_out.conv.bias"] += 0.5
    save_file(state, weights)
    arguments = ["--frames", "1", "--size", "64x64", "--steps", "1", "--seed", "1"]
    for name, vae in (("own", []), ("file", [weights]), ("folder", [weights.parent])):
        output = tmp_path / f"{name}.png"
        chosen = ["--vae", str(vae[0])] if vae else []
        command = ["generate", "a", *arguments, "--device", "cpu", *chosen, "-o", str(output)]
        assert main(command) == 0, capsys.readouterr().err
        frames[name] = read_image(output)
    assert torch.equal(frames["file"], frames["folder"])
    assert not torch.equal(frames["file"], frames["own"])
    again = tmp_path / "again.png"
    latents = str(tmp_path / "own.latents.safetensors")
    assert main(["decode", latents, "--vae", str(weights), "-o", str(again)]) == 0
    assert torch.equal(read_image(again), frames["file"])


# 8 bits


def cast_to(state, dtype):
    return {name: x.to(dtype) if large(name) else x for name, x in state.items()}


@pytest.mark.parametrize("dtype", FP8)
def test_plain_fp8(state, tmp_path, dtype):
    """Every value is kept, in bf16 where no dtype is asked for; other layers stay as stored."""
    path = tmp_path / "a.safetensors"
    stored = cast_to(state, dtype)
    save_file(stored, path)
    dit = load_dit(path)
    assert_equal(dit, stored)
    for name, tensor in dit.state_dict().items():
        assert tensor.dtype == (torch.bfloat16 if large(name) else torch.float32)
    assert_equal(load_dit(path, dtype=torch.float32), stored)
    kind = "F8_E4M3" if dtype == torch.float8_e4m3fn else "F8_E5M2"
    assert f"{kind} in 16" in verify(path)[0]


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_plain_fp8_is_quantised_from_its_values(state, tmp_path, dtype, mode):
    path = tmp_path / "a.safetensors"
    save_file(cast_to(state, dtype), path)
    wanted = quantize(load_dit(path, dtype=torch.float32), mode).state_dict()
    quantize_file(path, tmp_path / "small", mode)
    for dit in (load_dit(path, dtype=torch.float32, quantize=mode), load_dit(tmp_path / "small")):
        assert_equal(dit, wanted)


def scaled(state, dtype, name_of, per_row=False, extra=()):
    """As programs write fp8 with scales: each weight divided by its scale, the scale beside it."""
    result = dict(extra)
    meant = {}
    for name, x in state.items():
        if not large(name):
            result[name] = meant[name] = x
            continue
        most = x.abs().amax(1) if per_row else x.abs().amax()
        scale = most.float() / (448.0 if dtype == torch.float8_e4m3fn else 127.0)
        column = scale[:, None] if per_row else scale
        stored = x / column
        result[name] = (stored.round() if dtype == torch.int8 else stored).to(dtype)
        result[name_of(name.removesuffix(".weight"))] = scale
        meant[name] = result[name].float() * column
    return result, meant


@pytest.mark.parametrize(
    ("last", "extra"),
    [
        ("scale_weight", {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}),
        ("weight_scale", {}),
    ],
)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_weights(state, tmp_path, last, extra, per_row, dtype, prefix):
    stored, meant = scaled(state, dtype, lambda layer: f"{layer}.{last}", per_row, extra)
    layer = "visual_transformer_blocks.0.feed_forward.in_layer"
    stored[f"{layer}.{'scale_input' if last == 'scale_weight' else 'input_scale'}"] = torch.ones(())
    path = tmp_path / "a.safetensors"
    save_file({prefix + name: x for name, x in stored.items()}, path)
    assert_equal(load_dit(path, dtype=torch.float32), meant)
    assert load_dit(path).get_parameter(f"{layer}.weight").dtype == torch.bfloat16
    assert verify(path)[0].startswith("transformer, complete: ")
    wanted = quantize(load_dit(path, dtype=torch.float32), "int8").state_dict()
    assert_equal(load_dit(path, dtype=torch.float32, quantize="int8"), wanted)


def comfy_quant(form):
    text = json.dumps({"format": form}).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize("how", ["tensors", "header"])
def test_formats_that_a_file_names(state, tmp_path, how):
    """The known ones load; one that is not known is refused though its dtypes could be read."""
    stored, meant = scaled(state, torch.float8_e4m3fn, lambda layer: f"{layer}.weight_scale")
    layers = [name.removesuffix(".weight") for name in state if large(name)]
    path = tmp_path / "a.safetensors"
    for form in ("float8_e4m3fn", "nvfp4"):
        marks = {f"{layer}.comfy_quant": comfy_quant(form) for layer in layers}
        about = json.dumps({"layers": {layer: {"format": form} for layer in layers}})
        if how == "tensors":
            save_file({**stored, **marks}, path)
        else:
            save_file(stored, path, {"_quantization_metadata": about})
        if form == "float8_e4m3fn":
            assert_equal(load_dit(path, dtype=torch.float32), meant)
        else:
            for call in (load_dit, verify):
                with pytest.raises(ValueError, match="but a.safetensors has layers in nvfp4"):
                    call(path)
    for about in ("[]", "{", "[" * 10**5, '{"layers": 7}'):
        save_file(stored, path, {"_quantization_metadata": about})
        with pytest.raises(ValueError, match="has layers in a form that cannot be read"):
            load_dit(path)


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        ("weight_scale_2", "NVFP4"),
        ("weight_scale_inv", "fp8 in blocks"),
        ("weight.absmax", "bitsandbytes' 4 or 8 bits"),
        ("qweight", "GPTQ's or AWQ's integers"),
    ],
)
def test_other_formats_are_refused_by_name(state, tmp_path, last, kind):
    layer = "visual_transformer_blocks.0.feed_forward.in_layer"
    path = tmp_path / "a.safetensors"
    save_file({**state, f"{layer}.{last}": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=f"a.safetensors is in {kind}"):
        load_dit(path)


def test_scales_that_fit_no_weight(state, tmp_path):
    stored, _ = scaled(state, torch.float8_e4m3fn, lambda layer: f"{layer}.scale_weight")
    name = "visual_transformer_blocks.0.feed_forward.in_layer.scale_weight"
    path = tmp_path / "a.safetensors"
    save_file({**stored, name: torch.zeros(4, 4)}, path)
    with pytest.raises(ValueError, match=r"one number, or one of each row.*\[4, 4\] in a.saf"):
        load_dit(path)


# GGUF


def gguf_blocks(gguf, kind, rows, columns):
    """Rows of random blocks of a type, with scales that are small and finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    generator = numpy.random.default_rng(0)
    data = generator.integers(0, 256, (rows, columns // block, size), dtype=numpy.uint8)
    half = numpy.frombuffer(numpy.float16(0.01).tobytes(), numpy.uint8)
    places = {"Q8_0": [0], "Q6_K": [size - 2], "Q5_K": [0, 2], "Q4_K": [0, 2]}[kind.name]
    for place in places:
        data[..., place : place + 2] = half
    return data.reshape(rows, -1)


def by_hand(data, kind):
    """Q8_0 and Q6_K after the format's description, a block at a time."""
    rows = []
    for row in data:
        values = []
        if kind.name == "Q8_0":
            for block in row.reshape(-1, 34):
                scale = block[:2].view(numpy.float16)[0].astype(numpy.float32)
                values.append(scale * block[2:].view(numpy.int8).astype(numpy.float32))
        else:
            for block in row.reshape(-1, 210):
                low, high = block[:128].reshape(2, 64), block[128:192].reshape(2, 32)
                scales = block[192:208].view(numpy.int8).astype(numpy.float32)
                scale = block[208:].view(numpy.float16)[0].astype(numpy.float32)
                for half in range(2):
                    for quarter in range(4):
                        nibbles = low[half, 32 * (quarter % 2) : 32 * (quarter % 2) + 32]
                        nibbles = nibbles & 15 if quarter < 2 else nibbles >> 4
                        bits = (high[half] >> (2 * quarter)) & 3
                        q = (nibbles | (bits << 4)).astype(numpy.float32) - 32
                        own = scales[8 * half + 2 * quarter : 8 * half + 2 * quarter + 2]
                        values.append(scale * numpy.repeat(own, 16) * q)
        rows.append(numpy.concatenate(values))
    return torch.from_numpy(numpy.stack(rows))


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q5_K", "Q4_K"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_gguf(state, tmp_path, kind, prefix):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType[kind]
    path = tmp_path / "kandinsky5lite_t2v_sft_5s.gguf"
    writer = gguf.GGUFWriter(str(path), "kandinsky5")
    meant = {}
    for name, x in state.items():
        if large(name):
            data = gguf_blocks(gguf, kind, *x.shape)
            writer.add_tensor(prefix + name, data, raw_dtype=kind)
            known = kind.name in ("Q8_0", "Q6_K")
            values = by_hand(data, kind) if known else gguf.quants.dequantize(data, kind)
            meant[name] = torch.as_tensor(values)
        else:
            writer.add_tensor(prefix + name, x.numpy())
            meant[name] = x
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    dit = load_dit(path, dtype=torch.float32)
    assert dit.config == CONFIG
    for name, tensor in dit.state_dict().items():
        torch.testing.assert_close(tensor, meant[name], rtol=1e-6, atol=1e-7)
    assert_equal(load_dit(tmp_path, dtype=torch.float32), dit.state_dict())
    layer = "visual_transformer_blocks.0.feed_forward.in_layer.weight"
    assert load_dit(path).get_parameter(layer).dtype == torch.bfloat16
    assert f"{kind.name} in 16" in verify(path, values=True)[0]
    wanted = quantize(load_dit(path, dtype=torch.float32), "int8").state_dict()
    quantize_file(path, tmp_path / "small", "int8")
    assert_equal(load_dit(tmp_path / "small"), wanted)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="must be a whole GGUF file, got"):
        load_dit(path)


def test_gguf_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RuntimeError, match=r"through the package gguf.*pip install 'kand\S+\[gguf"):
        load_dit(tmp_path / "a.gguf")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt"])
def test_a_folder_of_pickles_says_so(state, tmp_path, suffix):
    torch.save(state, tmp_path / f"model{suffix}")
    with pytest.raises(ValueError, match=rf"but model{suffix} is a pickle .*; convert it"):
        load_dit(tmp_path)
    with pytest.raises(ValueError, match="but is a pickle"):
        load_dit(tmp_path / f"model{suffix}")


def test_the_folder_of_a_network_keeps_its_own_configuration(state, tmp_path):
    dit = DiffusionTransformer3D(CONFIG)
    dit.load_state_dict(state)
    save_dit(dit, tmp_path)
    assert (tmp_path / CONFIG_NAME).is_file()
    assert_equal(load_dit(tmp_path), state)
