# SPDX-License-Identifier: Apache-2.0
"""Text encoders in one file each, as ComfyUI's users keep them: every published spelling of names,
fp8 with and without scales, GGUF, inside an all-in-one file; and what is refused, and by what."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints import contents, locate
from kandinsky_model.checkpoints.locate import Sources
from kandinsky_model.checkpoints.verify import verify
from kandinsky_model.config import get_preset
from kandinsky_model.media.picture import read_image
from kandinsky_model.text import networks
from kandinsky_model.text.parts import Parts
from kandinsky_model.text.qwen_clip import QwenClipEncoder

from ..support import tiny_models
from ..support.text_peers import picture

EDIT = (["a"], "image_edit", [picture()])
LLAMA_CPP = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "lm_head": "output",
}


def old_names(qwen):
    """As ComfyUI's files and older ones of transformers have them."""
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): x
        for name, x in qwen.state_dict().items()
    }


def clip_names(clip):
    return {
        f"text_model.{name.removeprefix('text_model.')}": x for name, x in clip.state_dict().items()
    }


@pytest.fixture
def places(text_parts, tmp_path):
    """Where ComfyUI's users have the files, with tokenizers and tiny configurations beside."""
    root = tmp_path / "text_encoders"
    root.mkdir()
    for part, network, folder in ((1, 0, "tokenizer"), (3, 2, "tokenizer_2")):
        text_parts[part].save_pretrained(root / folder)
        text_parts[network].config.save_pretrained(root / folder)
    save(old_names(text_parts[0]), root / "qwen.safetensors")
    save(clip_names(text_parts[2]), root / "clip_l.safetensors")
    return root


def save(state, path):
    save_file({name: x.detach().clone().contiguous() for name, x in state.items()}, path)
    return path


def sources(root, qwen="qwen.safetensors", clip="clip_l.safetensors"):
    return Sources(
        "a test",
        get_preset("i2i-lite-sft"),
        text_encoder=root / qwen,
        tokenizer=root / "tokenizer",
        text_encoder_2=root / clip,
        tokenizer_2=root / "tokenizer_2",
    )


def loaded(root, **files):
    return QwenClipEncoder.load(sources(root, **files), cache=False)


def assert_same(ours, theirs):
    for arguments in ((["a", "bc"],), EDIT):
        one, other = ours.encode(*arguments), theirs.encode(*arguments)
        assert torch.equal(one.embeds, other.embeds)
        assert torch.equal(one.pooled, other.pooled)


# Names


SPELLINGS = {
    "comfyui": lambda name: name,
    "newer transformers": lambda name: (
        name
        if name.startswith("lm_head")
        else name.replace("visual.", "model.visual.")
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1)
    ),
    "all in one": lambda name: f"text_encoders.qwen25_7b.transformer.{name}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_qwen(places, text_parts, spelling):
    rename = SPELLINGS[spelling]
    state = {rename(name): x for name, x in old_names(text_parts[0]).items()}
    # as old files have them, and as all-in-one files have other networks
    state["model.rotary_emb.inv_freq"] = torch.zeros(2)
    state["vae.decoder.conv_in.weight"] = torch.zeros(2)
    save(state, places / "OTHER.SAFETENSORS")
    encoder = loaded(places, qwen="OTHER.SAFETENSORS")
    reference = QwenClipEncoder(tiny_models.encoder_parts(text_parts))
    assert_same(encoder, reference)
    assert torch.equal(encoder.parts.head.weight, text_parts[0].lm_head.weight)


@pytest.mark.parametrize(
    "prefix", ["text_model.", "", "text_encoders.clip_l.transformer.text_model."]
)
def test_spellings_of_clip(places, text_parts, prefix):
    state = {
        name.replace("text_model.", prefix, 1): x for name, x in clip_names(text_parts[2]).items()
    }
    state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    state["text_projection.weight"] = state["logit_scale"] = torch.zeros(1)
    save(state, places / "other.safetensors")
    reference = QwenClipEncoder(tiny_models.encoder_parts(text_parts))
    assert_same(loaded(places, clip="other.safetensors"), reference)


def test_halves_of_clip_are_read_as_their_values(places, text_parts):
    state = {name: x.half() for name, x in clip_names(text_parts[2]).items()}
    save(state, places / "half.safetensors")
    save({name: x.float() for name, x in state.items()}, places / "wide.safetensors")
    assert_same(loaded(places, clip="half.safetensors"), loaded(places, clip="wide.safetensors"))


@pytest.mark.parametrize("name", ["a-{}-of-00003.safetensors", "A-{}-OF-00003.SAFETENSORS"])
def test_shards_without_an_index(places, text_parts, name):
    folder = places / "shards"
    folder.mkdir()
    state = old_names(text_parts[0])
    for i in range(3):
        own = sorted(state)[i::3]
        save({key: state[key] for key in own}, folder / name.format(f"{i + 1:05}"))
    assert_same(loaded(places, qwen="shards"), loaded(places))
    assert_same(loaded(places, qwen=f"shards/{name.format('00001')}"), loaded(places))
    (folder / name.format("00002")).unlink()
    with pytest.raises(FileNotFoundError, match="is one of 3 shards, but missing"):
        loaded(places, qwen="shards")


def test_a_models_folder_may_hold_files_where_folders_are_usual(places, diffusers_folder, tmp_path):
    """As the results of a training link to the parts that they were trained with."""
    root = tmp_path / "model"
    root.mkdir()
    for name in ("transformer", "vae"):
        (root / name).symlink_to(diffusers_folder / name)
    (root / "text_encoder").symlink_to(places / "qwen.safetensors")
    (root / "text_encoder_2").symlink_to(places / "clip_l.safetensors")
    for name in ("tokenizer", "tokenizer_2"):
        (root / name).symlink_to(places / name)
    assert_same(pipeline.load(root, device="cpu", text_cache=False).text, loaded(places))
    lines = [line for line in verify(root) if " text encoder, complete" in line]
    assert [line.partition(",")[0] for line in lines] == [
        "text_encoder: Qwen2.5-VL text encoder",
        "text_encoder_2: CLIP text encoder",
    ]


# 8 bits


def matrices(state):
    return [name for name in state if name.endswith("_proj.weight")]


def in_fp8(state, how):
    """The state in fp8, and the values that it stands for."""
    stored, values = dict(state), dict(state)
    for name in matrices(state):
        scale = torch.ones(()) if how == "plain" else (state[name].abs().amax() / 448).reshape(())
        stored[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        values[name] = stored[name].float() * scale
        layer = name.removesuffix(".weight")
        if how == "scale_weight":
            stored[f"{layer}.scale_weight"] = scale.reshape(1)
            stored[f"{layer}.scale_input"] = torch.ones(1)
        if how == "comfy_quant":
            stored[f"{layer}.weight_scale"] = scale
            said = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(said), dtype=torch.uint8)
    if how == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return stored, values


@pytest.mark.parametrize("how", ["plain", "scale_weight", "comfy_quant"])
def test_fp8(places, text_parts, how):
    """As qwen_2.5_vl_7b_fp8_scaled.safetensors is, and as plain casts are."""
    stored, values = in_fp8(old_names(text_parts[0]), how)
    save(stored, places / "fp8.safetensors")
    save(values, places / "values.safetensors")
    assert_same(loaded(places, qwen="fp8.safetensors"), loaded(places, qwen="values.safetensors"))
    assert not torch.equal(
        loaded(places, qwen="fp8.safetensors").encode(["a"]).embeds,
        loaded(places).encode(["a"]).embeds,
    )
    about = verify(places / "fp8.safetensors")[0]
    assert about.startswith("Qwen2.5-VL text encoder, complete: ")
    assert "F8_E4M3 in " in about


def test_gguf_of_the_language_model(places, text_parts):
    """As llama.cpp writes it: other names, and no vision tower."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(places / "qwen.gguf"), "qwen2vl")
    kind = gguf.GGMLQuantizationType.Q8_0
    state = {n: x for n, x in old_names(text_parts[0]).items() if not n.startswith("visual.")}
    values = {}
    for name, x in state.items():
        other = name.removeprefix("model.").replace("layers.", "blk.")
        for ours, theirs in LLAMA_CPP.items():
            other = other.replace(f"{ours}.", f"{theirs}.")
        if other == "norm.weight":
            other = "output_norm.weight"
        data = x.detach().numpy()
        if name in matrices(state):
            data = gguf.quants.quantize(data, kind)
            values[name] = torch.from_numpy(gguf.quants.dequantize(data, kind))
            writer.add_tensor(other, data, raw_dtype=kind)
        else:
            values[name] = x
            writer.add_tensor(other, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save(values, places / "values.safetensors")
    ours, theirs = (loaded(places, qwen=name) for name in ("qwen.gguf", "values.safetensors"))
    assert torch.equal(ours.encode(["a"]).embeds, theirs.encode(["a"]).embeds)
    assert torch.equal(ours.parts.head.weight, theirs.parts.head.weight)
    with pytest.raises(ValueError, match="needs its vision tower, but .* a language model alone"):
        ours.encode(*EDIT)
    assert "no vision tower" in verify(places / "qwen.gguf")[0]


# What is refused


WRONG = {
    "a T5 text encoder": {"encoder.block.0.layer.0.SelfAttention.q.weight": (2, 2)},
    "a CLIP under OpenCLIP's names": {"transformer.resblocks.0.attn.in_proj_weight": (2, 2)},
    "a LoRA": {"transformer.visual_transformer_blocks.0.x.lora_A.weight": (2, 2)},
    "a Kandinsky 5 transformer": {"visual_embeddings.in_layer.weight": (2, 2)},
    "a VAE of videos": {"decoder.conv_in.conv.weight": (2, 2)},
    "a transformer of Wan": {"blocks.0.self_attn.q.weight": (2, 2)},
    "a file of 1 tensors such as x": {"x": (2, 2)},
}


@pytest.mark.parametrize("what", WRONG)
def test_another_network_is_refused_by_what_it_is(places, what):
    shapes = WRONG[what]
    save({name: torch.zeros(shape) for name, shape in shapes.items()}, places / "w.safetensors")
    with pytest.raises(ValueError, match=f"must be Qwen2.5-VL, but .*w.safetensors is {what}; "):
        Parts(sources(places, qwen="w.safetensors"))
    with pytest.raises(ValueError, match=f"must be CLIP's text .*w.safetensors is {what}; "):
        Parts(sources(places, clip="w.safetensors"))
    if not what.startswith(("a VAE of", "a Kandinsky")):
        with pytest.raises(ValueError, match=f"must hold a part of a .* but is {what}; "):
            verify(places / "w.safetensors")


def test_swapped_encoders_are_told_apart(places):
    with pytest.raises(ValueError, match="Qwen2.5-VL, but .* is a CLIP text model of width 32;"):
        Parts(sources(places, qwen="clip_l.safetensors"))
    with pytest.raises(ValueError, match="CLIP's text model, but .* is a language model of width"):
        Parts(sources(places, clip="qwen.safetensors"))


def test_tensors_that_do_not_fit_are_named_before_anything_is_loaded(places, text_parts):
    state = old_names(text_parts[0])
    save({**state, "model.layers.0.surplus": torch.zeros(1)}, places / "more.safetensors")
    with pytest.raises(ValueError, match=r"more.safetensors unexpected \(1\): layers.0.surplus"):
        Parts(sources(places, qwen="more.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    save({**state, name: state[name][1:]}, places / "cut.safetensors")
    with pytest.raises(ValueError, match=r"another shape than in block 0 \(1\): layers.1.mlp.up_"):
        Parts(sources(places, qwen="cut.safetensors"))
    clip = clip_names(text_parts[2])
    del clip["text_model.final_layer_norm.bias"]
    for path in (save(clip, places / "less.safetensors"),):
        with pytest.raises(ValueError, match=r"missing \(1\): final_layer_norm.bias"):
            Parts(sources(places, clip=path.name))
        with pytest.raises(ValueError, match=r"missing \(1\): final_layer_norm.bias"):
            verify(path)


def test_sizes_of_another_qwen_are_refused_before_it_is_built(places):
    (places / "tokenizer" / "config.json").unlink()
    encoder = loaded(places)
    words = r"the sizes of the weights, but wrong \(4\): num_hidden_layers 28 instead of 2, vocab_"
    with pytest.raises(ValueError, match=words):
        encoder.encode(["a"])


def test_the_published_sizes():
    """Qwen2.5-VL-7B has 8,292,166,656 parameters, its head included, and CLIP's text model of
    ViT-L/14 has 123,060,480."""
    from transformers import CLIPTextModel
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

    config = networks.qwen_config()
    text = config.text_config
    with torch.device("meta"):
        language = qwen.Qwen2_5_VLTextModel(text)
        vision = qwen.Qwen2_5_VisionTransformerPretrainedModel(config.vision_config)
        clip = CLIPTextModel(networks.clip_config())
    count = [sum(x.numel() for x in one.parameters()) for one in (language, vision, clip)]
    assert count[0] + count[1] + text.vocab_size * text.hidden_size == 8_292_166_656
    assert count[2] == 123_060_480
    assert (text.hidden_size, contents.CLIP_WIDTH) == (contents.QWEN_WIDTH, 768)


# Tokenizers


@pytest.fixture
def official(diffusers_folder, places, tmp_path):
    """A transformer alone in a folder, under the name of a released one."""
    file = tmp_path / "models" / "kandinsky5lite_t2v_sft_5s.safetensors"
    file.parent.mkdir()
    weights = diffusers_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, file)
    shutil.copytree(diffusers_folder / "vae", tmp_path / "vae_folder")
    return file


def found(official, places, **more):
    given = {"text_encoder": places / "qwen.safetensors", "clip": places / "clip_l.safetensors"}
    return locate.locate(official, places=given | more, parts=("text",))


def test_tokenizers_are_looked_for_where_users_have_them(official, places, monkeypatch):
    asked = []

    def hub(repo, patterns, revision=None):
        asked.append((repo, patterns))
        return places / "hub"

    monkeypatch.setattr(locate, "download", hub)
    assert found(official, places).tokenizer == places / "tokenizer"
    elsewhere = found(official, places, tokenizer=places / "x", tokenizer_2=places / "y")
    assert (elsewhere.tokenizer, elsewhere.tokenizer_2) == (places / "x", places / "y")
    own = official.parent / "tokenizer"
    (places / "tokenizer").rename(own)
    assert found(official, places).tokenizer == own
    shutil.rmtree(own)
    assert not asked
    assert found(official, places).tokenizer == places / "hub"
    assert asked == [("Qwen/Qwen2.5-VL-7B-Instruct", ("*.json", "*.txt"))], "no weights"


def test_without_tokenizer_and_network_one_sentence_says_what_to_do(official, places, monkeypatch):
    shutil.rmtree(places / "tokenizer_2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with locate.without_downloads(), pytest.raises(RuntimeError) as caught:
        found(official, places)
    text = str(caught.value)
    assert "\n" not in text
    assert "clip_l.safetensors holds weights alone, and its tokenizer is neither in" in text
    assert f"of openai/clip-vit-large-patch14 into {places / 'tokenizer_2'}" in text


@pytest.mark.parametrize("case", ["other", "none", "damaged"])
def test_a_tokenizer_of_another_model_is_refused(places, case):
    folder = places / "tokenizer"
    shutil.rmtree(folder)
    if case == "other":
        shutil.copytree(places / "tokenizer_2", folder)
    else:
        folder.mkdir()
        if case == "damaged":
            (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="must hold the tokenizer of Qwen2.5-VL") as caught:
        _ = Parts(sources(places)).tokenizer
    assert "\n" not in str(caught.value)


# The command, and all in one file


def test_the_command_takes_all_parts_as_files(official, places, diffusers_folder, tmp_path, capsys):
    """The same picture as from a folder that holds everything; `resume` and `decode` take them
    too."""
    vae = next((tmp_path / "vae_folder").glob("*.safetensors"))
    parts = ["--text-encoder", places / "qwen.safetensors", "--clip", places / "clip_l.safetensors"]
    arguments = ["--frames", "1", "--size", "64x64", "--steps", "1", "--seed", "1"]
    arguments += ["--device", "cpu", "--attention", "dense", "--scheduler-scale", "5"]
    pictures = []
    for model, more in ((diffusers_folder, []), (official, [*parts, "--vae", vae])):
        output = tmp_path / f"{model.name}.png"
        words = ["generate", "a", "--model", model, *arguments, *more, "-o", output]
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
        pictures.append(read_image(output))
    assert torch.equal(*pictures)
    assert main(["generate", "a", "--model", str(official), *arguments]) == 2
    assert "no text_encoder at" in capsys.readouterr().err
    for command in ("resume", "inspect"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--text-encoder" in capsys.readouterr().out


def test_an_output_does_not_replace_a_text_encoder(official, places, capsys):
    qwen = str(places / "qwen.safetensors")
    path = places / "qwen.png"
    shutil.copy(qwen, path)
    chosen = ["--text-encoder", str(path), "--clip", str(places / "clip_l.safetensors")]
    words = ["generate", "a", "--model", str(official), *chosen, "-o", str(path)]
    assert main(words) == 2
    assert "the output must not be one of the inputs" in capsys.readouterr().err
    assert path.read_bytes() == (places / "qwen.safetensors").read_bytes()


def test_one_file_with_everything_inside(official, places, diffusers_folder, text_parts, tmp_path):
    from safetensors.torch import load_file

    vae = next((tmp_path / "vae_folder").glob("*.safetensors"))
    state = {f"model.diffusion_model.{name}": x for name, x in load_file(official).items()}
    state |= {f"vae.{name}": x for name, x in load_file(vae).items()}
    prefix = "text_encoders.qwen25_7b.transformer."
    state |= {prefix + name: x for name, x in old_names(text_parts[0]).items()}
    prefix = "text_encoders.clip_l.transformer."
    state |= {prefix + name: x for name, x in clip_names(text_parts[2]).items()}
    path = save(state, places / "kandinsky5lite_t2v_sft_5s.safetensors")
    # the sizes of the tiny VAE are in no file but its configuration
    shutil.copy(tmp_path / "vae_folder" / "config.json", places)
    where = locate.locate(path)
    assert {where.dit, where.vae, where.text_encoder, where.text_encoder_2} == {path}
    settings = dict(**tiny_models.SMALL, seed=3, attention="dense")
    whole = pipeline.load(path, device="cpu", text_cache=False)
    reference = pipeline.load(diffusers_folder, device="cpu", text_cache=False)
    reference.preset = replace(whole.preset, dit=reference.preset.dit)
    assert torch.equal(
        whole.generate("a", **settings).frames, reference.generate("a", **settings).frames
    )
    kinds = [line.partition(",")[0] for line in verify(path) if ", complete: " in line]
    assert kinds == ["transformer", "VAE", "Qwen2.5-VL text encoder", "CLIP text encoder"]


def test_a_model_with_a_small_encoder_of_its_own_takes_no_other(places):
    for option in ("text_encoder", "clip"):
        with pytest.raises(ValueError, match="small text encoder of its own, got .*; leave it out"):
            pipeline.load("tiny", device="cpu", **{option: places / "qwen.safetensors"})


@pytest.mark.parametrize("kind", ["a VAE of pictures", "a text encoder"])
def test_a_vae_of_another_kind_is_refused(diffusers_folder, places, tmp_path, kind):
    path = places / "clip_l.safetensors"
    words = "must be HunyuanVideo's, or FLUX.1's for pictures, but .* is a CLIP text model"
    if kind == "a VAE of pictures":
        tiny_models.random_image_vae().save_pretrained(tmp_path / "flux")
        path = tmp_path / "flux"
        words = "needs a VAE of videos, but .*flux is one of pictures"
    with pytest.raises(ValueError, match=words):
        pipeline.load(diffusers_folder, device="cpu", parts=("vae",), vae=path)
