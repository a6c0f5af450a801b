# SPDX-License-Identifier: Apache-2.0
"""The released checkpoints' text encoders on disk: every layout they are published in, read when
needed and no sooner, strictly."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kandinsky_model import pipeline
from kandinsky_model.checkpoints.locate import locate
from kandinsky_model.devices import offload
from kandinsky_model.devices.budget import Weights
from kandinsky_model.devices.offload import LateOffload, LayerStream
from kandinsky_model.text.parts import Parts
from kandinsky_model.text.qwen_clip import QwenClipEncoder
from kandinsky_model.text.vision import Preprocessor

from ..support import tiny_models
from ..support.text_peers import picture


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr("kandinsky_model.text.expand.MOST_TOKENS", 4)


def copy_of(folder, target):
    shutil.copytree(folder, target)
    return target / "text_encoder" / "model.safetensors"


def loaded(folder):
    return pipeline.load(folder, device="cpu", parts=("text",)).text


def networks(encoder):
    return {name for name, part in vars(encoder.parts).items() if isinstance(part, nn.Module)}


def test_parts_are_read_when_they_are_needed(diffusers_folder):
    text = loaded(diffusers_folder)
    assert not networks(text)
    assert not list(text.parameters())
    text.encode(["a"])
    assert networks(text) == {"language", "clip"} == {name for name, _ in text.named_children()}
    assert not any("visual" in name or "lm_head" in name for name in text.state_dict())
    text.encode(["a"], "image_edit", [picture()])
    assert networks(text) == {"language", "clip", "vision"}
    text.expand("a")
    assert networks(text) == {"language", "clip", "vision", "head"}
    assert not any(parameter.requires_grad for parameter in text.parameters())


def test_what_is_read_is_what_was_saved(diffusers_folder, text_parts):
    text = loaded(diffusers_folder)
    encoder = QwenClipEncoder(tiny_models.encoder_parts(text_parts))
    for arguments in ((["a"],), (["a"], "image_edit", [picture()])):
        assert torch.equal(text.encode(*arguments).embeds, encoder.encode(*arguments).embeds)
    assert text.expand("a") == encoder.expand("a")
    assert text.parts.preprocessor == Preprocessor()


def test_networks_move_when_they_are_needed(diffusers_folder):
    """The layers can be had before that, for someone who streams them. "meta" stands for an
    accelerator."""
    text = loaded(diffusers_folder)
    assert len(text.layers) == 2
    assert networks(text) == {"language"}
    text.encode(["b"])
    assert text.to("meta") is text
    assert text.device.type == "meta"
    assert len(text.layers) == 2
    assert not any(parameter.is_meta for parameter in text.parameters())
    with pytest.raises(RuntimeError):  # of several kinds: there is no data
        text.encode(["a"])
    assert all(parameter.is_meta for parameter in text.parts.language.parameters())
    # nothing could be copied, but it was tried at once
    with pytest.raises(NotImplementedError, match="meta"):
        text.to("cpu")


def test_both_published_spellings_of_qwens_tensor_names_load(diffusers_folder, tmp_path, capfd):
    """Older files say model.layers and visual; newer ones model.language_model.layers and
    model.visual."""
    edit = (["a"], "image_edit", [picture()])
    wanted = loaded(diffusers_folder).encode(*edit).embeds
    file = copy_of(diffusers_folder, tmp_path / "model")
    # copies, because the tensors of a file may lie in the file that is written over
    tensors = {name: x.clone() for name, x in load_file(file).items()}
    old = {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in tensors.items()
    }
    new = {
        name
        if name.startswith("lm_head")
        else "model."
        + (
            name if name.startswith("visual") else name.replace("model.", "language_model.", 1)
        ): tensor
        for name, tensor in old.items()
    }
    assert set(old) != set(new)
    for renamed in (old, new):
        save_file(renamed, file, {"format": "pt"})
        assert torch.equal(loaded(tmp_path / "model").encode(*edit).embeds, wanted)
    assert "UNEXPECTED" not in capfd.readouterr().err, (
        "the tensors of other parts are meant to stay behind; no need to complain"
    )

    for lost, words in (
        (
            "language_model.layers.1.mlp.up_proj.weight",
            r"missing \(1\): layers\.1\.mlp\.up_proj\.weight",
        ),
        (
            "visual.blocks.0.norm1.weight",
            r"missing \(1\): blocks\.0\.norm1\.weight",
        ),
    ):
        save_file(
            {name: tensor for name, tensor in new.items() if not name.endswith(lost)},
            file,
            {"format": "pt"},
        )
        with pytest.raises(ValueError, match=words):
            loaded(tmp_path / "model").encode(*edit)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="complete safetensors file"):
        loaded(tmp_path / "model")


def test_encoders_in_several_files_load(diffusers_folder, text_parts, tmp_path):
    """As Qwen2.5-VL-7B is published: five shards and an index under the names of transformers."""
    wanted = loaded(diffusers_folder).encode(["a"]).embeds
    file = copy_of(diffusers_folder, tmp_path / "model")
    file.unlink()
    text_parts[0].save_pretrained(file.parent, max_shard_size="200KB")
    shards = sorted(file.parent.glob("*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(loaded(tmp_path / "model").encode(["a"]).embeds, wanted)
    shards[0].unlink()
    with pytest.raises(FileNotFoundError, match=f"index lists {shards[0].name}"):
        loaded(tmp_path / "model")


def test_a_flat_configuration_is_read(diffusers_folder, tmp_path):
    """As Qwen2.5-VL-7B is published: the language model's values are not in a part of their own,
    and its rotation has an old name."""
    edit = (["a"], "image_edit", [picture()])
    wanted = loaded(diffusers_folder).encode(*edit).embeds
    path = copy_of(diffusers_folder, tmp_path / "model").with_name("config.json")
    config = json.loads(path.read_text())
    text = {
        key: value
        for key, value in config.pop("text_config").items()
        if not key.startswith("rope") and key != "model_type"
    }
    path.write_text(
        json.dumps(
            {
                **text,
                **config,
                "rope_theta": 1e6,
                "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 4]},
            }
        )
    )
    assert torch.equal(loaded(tmp_path / "model").encode(*edit).embeds, wanted)


def test_clip_is_read_from_the_whole_model_too(diffusers_folder, text_parts, tmp_path):
    """openai/clip-vit-large-patch14 holds both towers and a configuration of both."""
    from transformers import CLIPConfig, CLIPModel

    wanted = loaded(diffusers_folder).encode(["a"]).pooled
    copy_of(diffusers_folder, tmp_path / "model")
    whole = CLIPModel(
        CLIPConfig(
            text_config=text_parts[2].config.to_dict(),
            vision_config=dict(
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=32,
                patch_size=16,
            ),
        )
    )
    names = {
        name.removeprefix("text_model."): tensor
        for name, tensor in text_parts[2].state_dict().items()
    }
    whole.text_model.load_state_dict(names)
    shutil.rmtree(tmp_path / "model" / "text_encoder_2")
    whole.save_pretrained(tmp_path / "model" / "text_encoder_2")
    assert torch.equal(loaded(tmp_path / "model").encode(["a"]).pooled, wanted)


def test_a_head_tied_to_the_embeddings_or_none(diffusers_folder, tmp_path):
    file = copy_of(diffusers_folder, tmp_path / "model")
    # copies, because the tensors of a file may lie in the file that is written over
    tensors = {name: x.clone() for name, x in load_file(file).items()}
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})
    parts = Parts(locate(tmp_path / "model", parts=("text",)))
    with pytest.raises(ValueError, match="holds no lm_head.weight"):
        _ = parts.head
    vars(parts)["_config"] = SimpleNamespace(**{**vars(parts._config), "tie_word_embeddings": True})
    assert parts.head.weight is parts.language.embed_tokens.weight


def test_without_transformers_one_sentence_says_so(diffusers_folder, monkeypatch):
    monkeypatch.setattr("kandinsky_model.text.parts.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="require transformers >= 4.57, which is not installed"):
        loaded(diffusers_folder)


# Within a budget


@pytest.mark.parametrize("resident", [2, 1, 0])
def test_networks_come_layer_by_layer(diffusers_folder, monkeypatch, resident):
    """Read when they are needed, streamed, with the table of tokens left where it is; the same
    embeddings and the same words."""
    requests = (["a"], "image_edit", [picture()]), (["a", "bc"],)
    plain, text = (
        QwenClipEncoder.load(locate(diffusers_folder, parts=("text",)), cache=False)
        for _ in range(2)
    )
    hosted = LateOffload(text, torch.device("cpu"))
    streams = []
    monkeypatch.setattr(
        offload,
        "LayerStream",
        lambda layers, *rest: streams.append(len(layers)) or LayerStream(layers, *rest),
    )
    with hosted.on_device(resident) as placed:
        assert not networks(text)
        for request in requests:
            torch.testing.assert_close(
                placed.encode(*request).embeds, plain.encode(*request).embeds, rtol=0, atol=1e-6
            )
            torch.testing.assert_close(
                placed.encode(*request).pooled, plain.encode(*request).pooled, rtol=0, atol=1e-6
            )
        table = text.parts.language.embed_tokens.weight
        assert not any(
            tensor is table
            for one in hosted.hosted.values()
            for store in (one.rest, *one.stores)
            for piece in store.pieces
            for tensor in piece.tensors
        )
    assert placed is text
    assert streams == ([2 - resident] if resident < 2 else [])
    with hosted.on_device(resident):
        assert text.expand("a") == plain.expand("a")
    torch.testing.assert_close(
        text.encode(["a"]).embeds, plain.encode(["a"]).embeds, rtol=0, atol=1e-6
    )
    assert not any(layer._forward_pre_hooks for layer in text.layers)


def test_networks_are_weighed_before_they_are_read(diffusers_folder):
    encoder = loaded(diffusers_folder)
    plain = encoder.weigh()
    more = encoder.weigh(vision=True, head=True)
    assert not networks(encoder)
    language, clip, vision, head = (
        Weights.of(getattr(encoder.parts, name)) for name in ("language", "clip", "vision", "head")
    )
    near = lambda size: pytest.approx(size, abs=100 * 256)  # noqa: E731 - the gaps between tensors
    assert plain.layers == near(language.layers)
    assert plain.once == near(language.once)
    assert plain.rest == near(language.rest + clip.total)
    assert more.rest == near(language.rest + clip.total + vision.total + head.total)
