# SPDX-License-Identifier: Apache-2.0
"""Both published layouts load strictly and equally; whatever is wrong with a file is said in one
sentence, before any tensor is read."""

import io
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky_model.checkpoints.configs import read_dit_config
from kandinsky_model.checkpoints.headers import CONFIG_NAME, WEIGHTS_NAME
from kandinsky_model.checkpoints.load import load_dit, load_vae, save_dit, save_vae
from kandinsky_model.config import DiTConfig, NablaConfig, VAEConfig
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE

from ..support.plain_dit import random_state

CONFIG = DiTConfig(
    in_text_dim=24,
    in_text_dim2=12,
    time_dim=32,
    model_dim=128,
    ff_dim=96,
    num_text_blocks=1,
    num_visual_blocks=2,
    visual_cond=True,
)
SMALL_VAE = VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
FP32_KEYS = ("modulation", "time_embeddings")


@pytest.fixture(scope="module")
def state():
    return random_state(CONFIG)


def assert_holds(dit, state):
    loaded = dit.state_dict()
    assert list(loaded)
    assert loaded.keys() == state.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
        for name, tensor in state.items()
    )
    assert not dit.training
    assert not any(parameter.requires_grad for parameter in dit.parameters())


def build(state):
    dit = DiffusionTransformer3D(CONFIG)
    dit.load_state_dict(state)
    return dit


def test_official_single_file(state, tmp_path):
    save_file(state, tmp_path / "kandinsky5lite.safetensors")
    dit = load_dit(tmp_path / "kandinsky5lite.safetensors")
    assert dit.config == CONFIG  # read off the shapes
    assert_holds(dit, state)
    assert_holds(load_dit(tmp_path), state)  # the only file of a folder


def test_official_repository_keeps_it_under_model(state, tmp_path):
    (tmp_path / "model").mkdir()
    save_file(state, tmp_path / "model" / "kandinsky5lite.safetensors")
    (tmp_path / CONFIG_NAME).write_text(
        json.dumps({"architectures": ["DiffusionTransformer3D"], "model_type": "kandinsky5"})
    )
    assert_holds(load_dit(tmp_path), state)


@pytest.mark.parametrize("shard_size", ["5GB", "300KB"], ids=["one file", "shards"])
def test_diffusers_folder_written_by_diffusers(state, tmp_path, shard_size):
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    fields = {
        key: getattr(CONFIG, key) for key in CONFIG.__dataclass_fields__ if key != "instruct_type"
    }
    model = module.Kandinsky5Transformer3DModel(
        **fields,
        attention_type="nabla",
        attention_P=0.8,
        attention_wT=11,
        attention_wH=3,
        attention_wW=5,
    )
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "transformer", max_shard_size=shard_size)
    assert (len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1) == (
        shard_size != "5GB"
    )
    for path in (tmp_path, tmp_path / "transformer"):
        dit = load_dit(path)
        assert dit.config == CONFIG
        assert_holds(dit, state)
    assert read_dit_config(tmp_path / "transformer") == (CONFIG, NablaConfig(0.8, (11, 3, 5)))


@pytest.mark.parametrize("nabla", [None, NablaConfig(0.7, (3, 1, 5))], ids=["dense", "nabla"])
def test_diffusers_reads_what_we_write(state, tmp_path, nabla):
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    save_dit(build(state), tmp_path / "transformer", nabla)
    assert read_dit_config(tmp_path / "transformer") == (CONFIG, nabla)
    model = module.Kandinsky5Transformer3DModel.from_pretrained(tmp_path / "transformer")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.config.attention_type == ("regular" if nabla is None else "nabla")
    assert_holds(load_dit(tmp_path), state)


def test_stored_dtypes_are_kept(state, tmp_path):
    mixed = {
        name: t if any(part in name for part in FP32_KEYS) else t.bfloat16()
        for name, t in state.items()
    }
    save_file(mixed, tmp_path / "file.safetensors")
    assert_holds(load_dit(tmp_path), mixed)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_spares_modulation_and_time(state, tmp_path, stored):
    save_file(
        {name: tensor.to(stored) for name, tensor in state.items()}, tmp_path / "file.safetensors"
    )
    dit = load_dit(tmp_path, dtype=torch.float16)
    for name, tensor in dit.state_dict().items():
        assert tensor.dtype == (
            torch.float32 if any(part in name for part in FP32_KEYS) else torch.float16
        ), name


def test_unusual_head_dim_needs_a_config(tmp_path):
    config = DiTConfig(
        in_text_dim=8,
        in_text_dim2=8,
        time_dim=16,
        model_dim=64,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(8, 12, 12),
    )
    state = random_state(config)
    save_file(state, tmp_path / "file.safetensors")
    with pytest.raises(
        ValueError, match="axes of head dim 32 .* config.json with axes_dims beside"
    ):
        load_dit(tmp_path)
    assert_holds(load_dit(tmp_path, config), state)
    dit = DiffusionTransformer3D(config)
    save_dit(dit, tmp_path / "folder")
    (tmp_path / CONFIG_NAME).write_text((tmp_path / "folder" / CONFIG_NAME).read_text())
    assert load_dit(tmp_path / "file.safetensors").config == config


def test_wrong_keys_are_named(state, tmp_path):
    path = tmp_path / "file.safetensors"
    lacking = {
        name: tensor for name, tensor in state.items() if "cross_attention.to_key" not in name
    }
    save_file(lacking, path)
    with pytest.raises(
        ValueError,
        match=r"missing \(4\): "
        r"visual_transformer_blocks.0.cross_attention.to_key.weight, [^;]*; check",
    ):
        load_dit(path)
    save_file(state | {f"extra.{i}": torch.zeros(1) for i in range(7)}, path)
    with pytest.raises(
        ValueError,
        match=r"unexpected \(7\): extra.0, extra.1, extra.2, extra.3, "
        r"extra.4 and 2 more",
    ):
        load_dit(path)
    save_file(state | {"text_embeddings.norm.bias": torch.zeros(3)}, path)
    with pytest.raises(
        ValueError,
        match=r"wrong shape \(1\): text_embeddings.norm.bias \[3\] "
        r"instead of \[128\]",
    ):
        load_dit(path)
    save_vae(HunyuanVideoVAE(SMALL_VAE), tmp_path / "vae")
    with pytest.raises(
        ValueError,
        match=r"missing \(6\): visual_embeddings.in_layer.weight.* "
        r"found \(\d+\): decoder.conv_in",
    ):
        load_dit(tmp_path / "vae" / WEIGHTS_NAME)


def cut(data):
    return data[:-100]


def longer(data):
    return data + b"x"


def cut_in_header(data):
    return data[:200]


def no_header(data):
    return b"\x80\x02}q\x00" + b"junk" * 100


def not_json(data):
    return struct.pack("<Q", 17) + b"{this is not json"


def not_tensors(data):
    return struct.pack("<Q", 13) + b'{"a": [1, 2]}'


def empty(data):
    return b""


def gguf(data):
    pytest.importorskip("gguf")
    return b"GGUF" + bytes(range(256))


def zipped(data):
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(3)}, file)
    return file.getvalue()


def pointer(data):
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"


def page(data):
    return b"<!DOCTYPE html>\n<html>404</html>"


def zeros(data):
    return bytes(10000)


def noise(data):
    return bytes(range(255, 100, -1))


@pytest.mark.parametrize(
    "damage, text",
    [
        (cut, r"declares [\d,]+ bytes, the file has [\d,]+; download it again"),
        (longer, r"declares [\d,]+ bytes, the file has [\d,]+"),
        (cut_in_header, r"header claims [\d,]+ bytes, the file has 200; it is cut short"),
        (no_header, "must be a safetensors file, but is a pickle; give a safetensors file"),
        (not_json, r"must be a safetensors file, but the 17 bytes of its header are not one"),
        (not_tensors, r"must be a safetensors file, but the 13 bytes of its header are not one"),
        (empty, "but is an empty file"),
        (gguf, "must be a whole GGUF file, got"),
        (zipped, r"but is a pickle \(a zip archive of torch.save\)"),
        (pointer, "but is a Git LFS pointer and not the file itself"),
        (page, "but is a web page, perhaps what the server said"),
        (zeros, "but is a file that begins with zeros, as an unfinished download does"),
        (noise, "but is of no kind that is known here"),
    ],
)
@pytest.mark.parametrize("layout", ["file", "folder"])
def test_damaged_files(state, tmp_path, layout, damage, text):
    """One sentence for each, a pickle included: nothing else than safetensors is ever opened."""
    save_dit(build(state), tmp_path)
    path = tmp_path / WEIGHTS_NAME
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=text) as caught:
        load_dit(path if layout == "file" else tmp_path)
    assert "\n" not in str(caught.value)


def test_overlapping_tensors_are_refused(tmp_path, state):
    save_file(state, tmp_path / "file.safetensors")
    data = (tmp_path / "file.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["text_embeddings.norm.bias"]["data_offsets"] = header["text_embeddings.norm.weight"][
        "data_offsets"
    ]
    rewritten = json.dumps(header).encode()
    (tmp_path / "file.safetensors").write_bytes(
        struct.pack("<Q", len(rewritten)) + rewritten + data[8 + length :]
    )
    with pytest.raises(ValueError, match="must be a valid safetensors file"):
        load_dit(tmp_path)


def test_paths_that_lead_nowhere(state, tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; check the path"):
        load_dit(tmp_path / "nothing.safetensors")
    with pytest.raises(
        FileNotFoundError,
        match="must hold .safetensors weights, here or in transformer/ or model/, got none",
    ):
        load_dit(tmp_path)
    for name in ("a", "b"):
        save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        ValueError,
        match=r"must hold one model, but found \(2\): a.safetensors, "
        r"b.safetensors",
    ):
        load_dit(tmp_path)
    (tmp_path / f"{WEIGHTS_NAME}.index.json").write_text(
        json.dumps({"weight_map": {name: "lost.safetensors" for name in state}})
    )
    with pytest.raises(FileNotFoundError, match="index lists lost.safetensors"):
        load_dit(tmp_path)
    (tmp_path / f"{WEIGHTS_NAME}.index.json").write_text("{")
    with pytest.raises(ValueError, match="must be valid JSON"):
        load_dit(tmp_path)


def test_vae_round_trip(tmp_path):
    vae = HunyuanVideoVAE(SMALL_VAE)
    save_vae(vae, tmp_path / "vae")
    for path in (tmp_path, tmp_path / "vae"):
        loaded = load_vae(path)
        assert loaded.config == SMALL_VAE
        assert_holds(loaded, vae.state_dict())
    assert (
        load_vae(tmp_path, dtype=torch.bfloat16).decoder.conv_in.conv.weight.dtype == torch.bfloat16
    )


def test_diffusers_vae_folder(tmp_path):
    """Written by diffusers, read by us, and the other way round."""
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_vae(tmp_path / "theirs")
    assert ours.config == SMALL_VAE
    assert_holds(ours, theirs.state_dict())
    save_vae(ours, tmp_path / "ours")
    again = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(tmp_path / "ours")
    assert all(
        torch.equal(tensor, load_file(tmp_path / "ours" / WEIGHTS_NAME)[name])
        for name, tensor in again.state_dict().items()
    )
