# SPDX-License-Identifier: Apache-2.0
"""The nodes, called as ComfyUI calls them, on random weights: what `generate` gives in ComfyUI's
forms, and every error one sentence."""

import asyncio
import shutil
import subprocess
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from kandinsky_model import comfyui
from kandinsky_model.checkpoints import contents
from kandinsky_model.comfyui.nodes import MODEL

from ..support import tiny_models
from ..support.node_calls import PROMPT, SIZE, SMALL, call, image


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, text_parts):
    """Checkpoints of pictures and of edited pictures."""
    root = tmp_path_factory.mktemp("pictures")
    folders = {
        task: tiny_models.diffusers_folder(
            root / f"Kandinsky-5.0-{task.upper()}-Lite-Diffusers", text_parts, task
        )
        for task in ("t2i", "i2i")
    }
    return {task: call("LoadModel", path=str(path)) for task, path in folders.items()}


def levels(picture):
    return (picture[0, ..., :3] * 255).round().to(torch.uint8)


def test_importing_imports_neither_torch_nor_comfyui():
    code = (
        "import sys, kandinsky_model.comfyui; sys.exit(str({'torch', 'comfy', 'comfy_api', "
        "'diffusers'} & {*sys.modules}))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip()
        == "set()"
    )


def test_every_node_is_whole():
    assert comfyui.NODE_CLASS_MAPPINGS.keys() == comfyui.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in comfyui.NODE_CLASS_MAPPINGS.values():
        assert node.TITLE
        assert node.__doc__ == node.DESCRIPTION
        assert callable(getattr(node, node.FUNCTION))
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
        assert node.INPUT_TYPES().keys() == {"required", "optional"}


@pytest.mark.parametrize("name", comfyui.NODE_CLASS_MAPPINGS)
def test_every_socket_and_widget_has_a_tooltip(name):
    node = comfyui.NODE_CLASS_MAPPINGS[name]
    for part in node.INPUT_TYPES().values():
        for key, kind in part.items():
            assert kind[1].get("tooltip"), f"{name} says nothing about {key}"
    assert all(node.OUTPUT_TOOLTIPS)


def test_nodes_make_the_video_that_generate_makes(model):
    text = call("EncodeText", model=model, prompt=PROMPT)
    latent = call("Sample", model=model, text=text, seed=7, **SIZE)
    images = call("Decode", model=model, latent=latent)
    video = model.model.generate(PROMPT, seed=7, **SMALL)
    assert torch.equal(images, video.frames.float() / 255)
    assert images.dtype == torch.float32
    assert latent["samples"].shape == (1, 16, 2, 6, 8)
    scaled = latent["samples"].permute(0, 2, 3, 4, 1) * model.model.vae.config.scaling_factor
    torch.testing.assert_close(scaled, video.latents, rtol=1e-6, atol=0)


def test_every_widget_of_the_sampler_arrives(model):
    text = call("EncodeText", model=model, prompt=PROMPT, negative_prompt="blue")
    widgets = dict(
        width=48,
        height=96,
        frames=5,
        steps=3,
        guidance=2.5,
        scheduler_scale=7.0,
        attention="dense",
        cache="first-block",
        precision="reference",
    )
    latent = call("Sample", model=model, text=text, seed=3, **widgets)
    video = model.model.generate(
        PROMPT,
        "blue",
        seed=3,
        width=48,
        height=96,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=2.5,
        scheduler_scale=7.0,
        attention="dense",
        cache="first-block",
        precision="reference",
    )
    assert torch.equal(
        model.staged.from_comfy(latent),
        model.staged.from_comfy(model.staged.to_comfy(video.latents)),
    )


def test_a_batch_is_its_runs_and_decodes_one_after_the_other(model):
    text = call("EncodeText", model=model, prompt=PROMPT)
    both = call("Sample", model=model, text=text, seed=7, batch_size=2, **SIZE)
    for i in range(2):
        alone = call("Sample", model=model, text=text, seed=7 + i, **SIZE)
        torch.testing.assert_close(both["samples"][i : i + 1], alone["samples"], rtol=0, atol=1e-4)
    images = call("Decode", model=model, latent=both)
    assert images.shape == (10, 48, 64, 3)
    assert torch.equal(
        images[5:], call("Decode", model=model, latent={"samples": both["samples"][1:]})
    )


def test_a_memory_budget_changes_nothing(model):
    text = call("EncodeText", model=model, prompt=PROMPT, memory_gb=1.5)
    latent = call("Sample", model=model, text=text, seed=7, memory_gb=1.5, **SIZE)
    free = call(
        "Sample", model=model, text=call("EncodeText", model=model, prompt=PROMPT), seed=7, **SIZE
    )
    torch.testing.assert_close(latent["samples"], free["samples"], rtol=0, atol=1e-4)
    assert torch.equal(
        call("Decode", model=model, latent=latent, memory_gb=1.5),
        call("Decode", model=model, latent=latent),
    )
    with pytest.raises(ValueError, match="at least"):
        call("Sample", model=model, text=text, memory_gb=0.0005, **SIZE)


def test_a_video_from_pictures(from_image):
    first = image()
    last = image(seed=1)
    latent, seen, width, height = call("EncodeImage", model=from_image, image=first, seed=4)
    assert (width, height) == (80, 48)
    assert seen.shape == (1, 48, 80, 3)
    assert latent["samples"].shape == (1, 16, 1, 6, 10)
    end = call("EncodeImage", model=from_image, image=last, seed=4)[0]
    text = call("EncodeText", model=from_image, prompt=PROMPT)
    for given in ({"last_latent": end}, {"image_latent": latent, "last_latent": end}):
        made = call("Sample", model=from_image, text=text, seed=4, frames=5, steps=2, **given)
        video = from_image.model.generate(
            PROMPT,
            seed=4,
            num_frames=5,
            num_inference_steps=2,
            last_image=levels(last),
            image=levels(first) if "image_latent" in given else None,
        )
        torch.testing.assert_close(
            from_image.staged.from_comfy(made), video.latents, rtol=0, atol=1e-5
        )


def test_a_size_cuts_the_picture(from_image):
    latent, seen, width, height = call(
        "EncodeImage", model=from_image, image=image(), seed=4, width=64, height=64
    )
    _, middle, *_ = call(
        "EncodeImage", model=from_image, image=image()[:, :, 20:80], seed=4, width=64, height=64
    )
    assert (width, height) == (64, 64)
    assert torch.equal(seen, middle)
    assert latent["samples"].shape == (1, 16, 1, 8, 8)


def test_pictures_use_the_scale_of_their_own_vae(pictures):
    model = pictures["t2i"]
    text = call("EncodeText", model=model, prompt="a red cube")
    latent = call(
        "Sample", model=model, text=text, seed=5, width=96, height=64, steps=2, guidance=2.0
    )
    one = model.model.generate(
        "a red cube", seed=5, width=96, height=64, num_inference_steps=2, guidance_scale=2.0
    )
    # a picture's latent has no axis of time in ComfyUI
    assert latent["samples"].shape == (1, 16, 8, 12)
    torch.testing.assert_close(latent["samples"] * 0.3611, one.latents[:, 0].permute(0, 3, 1, 2))
    torch.testing.assert_close(
        call("Decode", model=model, latent=latent),
        one.frames.float() / 255,
        rtol=0,
        atol=1 / 255 + 1e-6,
    )


def test_an_edited_picture_is_seen_by_the_text_encoder_and_the_transformer(pictures, monkeypatch):
    model = pictures["i2i"]
    source = image(channels=4)
    source[..., 3].round_()  # so that blending rounds nothing
    monkeypatch.setattr(
        model.model, "preset", replace(model.model.preset, sizes=((64, 96), (96, 64)))
    )
    latent, seen, width, height = call("EncodeImage", model=model, image=source, seed=5)
    assert (width, height) == (96, 64)
    assert latent["samples"].shape == (1, 16, 8, 12)
    text = call("EncodeText", model=model, prompt="make it night", image=seen)
    made = call("Sample", model=model, text=text, seed=5, steps=2, image_latent=latent)
    white = source[..., :3] * source[..., 3:] + 1 - source[..., 3:]
    wanted = model.model.generate(
        "make it night", seed=5, num_inference_steps=2, image=levels(white)
    )
    torch.testing.assert_close(model.staged.from_comfy(made), wanted.latents, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="reads the picture"):
        call("EncodeText", model=model, prompt="make it night")


def test_negative_prompts_are_encoded_where_they_are_used(folder):
    model = call("LoadModel", path=str(folder))
    assert call("EncodeText", model=model, prompt=PROMPT).uncond is not None
    model.model.preset = replace(model.model.preset, guidance=1.0)
    text = call("EncodeText", model=model, prompt=PROMPT)
    assert text.uncond is None
    assert call("EncodeText", model=model, prompt=PROMPT, negative_prompt="blue").uncond is not None
    assert call("Sample", model=model, text=text, **SIZE)["samples"].isfinite().all()
    with pytest.raises(ValueError, match="requires a negative prompt"):
        call("Sample", model=model, text=text, guidance=3.0, **SIZE)


def test_a_lora_acts_in_its_branch_alone(model, tmp_path):
    layer = "visual_transformer_blocks.0.self_attention.to_value"
    save_file(
        {
            f"{layer}.lora_A.weight": torch.randn(2, 64),
            f"{layer}.lora_B.weight": torch.randn(64, 2),
        },
        tmp_path / "a.safetensors",
        {"trigger": "still"},
    )
    text = call("EncodeText", model=model, prompt=PROMPT)
    before = call("Sample", model=model, text=text, seed=7, **SIZE)["samples"]
    changed = call("LoadLora", model=model, path=str(tmp_path / "a.safetensors"), strength=0.5)
    during = call("Sample", model=changed, text=text, seed=7, **SIZE)["samples"]
    assert not torch.allclose(before, during, atol=1e-3)
    assert torch.equal(call("Sample", model=model, text=text, seed=7, **SIZE)["samples"], before)
    triggered, plain = (
        call("EncodeText", model=one, prompt=PROMPT).cond.embeds for one in (changed, model)
    )
    assert triggered.shape[1] == plain.shape[1] + 1
    with pytest.raises(FileNotFoundError, match="a LoRA is"):
        call("LoadLora", model=model, path="nowhere")
    assert call("LoadLora", model=model) is model  # nothing was chosen


def test_prompts_are_expanded_by_the_text_encoder(model, monkeypatch):
    monkeypatch.setattr(
        model.model.text,
        "expand",
        lambda prompt, kind, picture: f"{prompt}, {kind}, {picture}",
        raising=False,
    )
    assert call("ExpandPrompt", model=model, prompt=PROMPT) == f"{PROMPT}, video, None"
    assert call("ExpandPrompt", model=model, prompt=PROMPT, still=True) == f"{PROMPT}, image, None"
    assert "tensor(" in call("ExpandPrompt", model=model, prompt=PROMPT, image=image())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="which tiny lacks"):
        call("ExpandPrompt", model=model, prompt=PROMPT)


def test_comfyuis_models_make_room_on_a_gpu(model, comfy):
    latent = {"samples": torch.zeros(1, 16, 1, 4, 4)}
    call("Decode", model=model, latent=latent)
    assert comfy.freed == []
    comfy.device = "cuda"
    call("Decode", model=model, latent=latent)  # by a model that lies on the CPU
    assert comfy.freed == ["models", "cache"]


@pytest.fixture
def models(comfy, folder, tmp_path, text_parts, monkeypatch):
    """ComfyUI's folders of models, with files of Kandinsky and of others in each."""
    monkeypatch.setattr(contents, "QWEN_WIDTH", 64)
    monkeypatch.setattr(contents, "CLIP_WIDTH", 32)
    contents._held.cache_clear()
    weights = "diffusion_pytorch_model.safetensors"
    for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
        (tmp_path / kind / "deep").mkdir(parents=True)
        (tmp_path / kind / "old.ckpt").write_bytes(b"\x80\x02")
        (tmp_path / kind / "web page.safetensors").write_text("<html>")
        save_file({"x": torch.zeros(1)}, tmp_path / kind / "other.safetensors")
        save_file({"blocks.0.lora_A.weight": torch.zeros(1)}, tmp_path / kind / "l.safetensors")
    transformers = tmp_path / "diffusion_models"
    shutil.copy(folder / "transformer" / weights, transformers / "deep" / "Mine.SAFETENSORS")
    shutil.copy(folder / "vae" / weights, tmp_path / "vae" / "mine.safetensors")
    shutil.copy(folder / "vae" / "config.json", tmp_path / "vae")
    shutil.copy(folder / "vae" / weights, transformers / "vae.safetensors")
    for part, name in ((0, "qwen"), (2, "clip_l")):
        state = {key: x.clone() for key, x in text_parts[part].state_dict().items()}
        save_file(state, tmp_path / "text_encoders" / f"{name}.safetensors")
    up = "visual_transformer_blocks.0.self_attention.to_query.lora_B.weight"
    save_file({up: torch.zeros(1, 1)}, tmp_path / "loras" / "fox.safetensors")

    def names(kind):
        root = tmp_path / kind
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def place(kind, name):
        path = tmp_path / kind / name
        return str(path) if path.exists() else None

    comfy.folders.get_filename_list = names
    comfy.folders.get_full_path = place
    return tmp_path


def choices(node, part, widget):
    return comfyui.NODE_CLASS_MAPPINGS[f"KandinskyKernels{node}"].INPUT_TYPES()[part][widget][0]


def test_lists_have_the_files_of_kandinsky_alone(models):
    shown = choices("LoadModel", "required", "model")
    assert {"tiny", "t2v-pro-sft-10s-hd"} < {*shown}
    assert shown[-1] == "deep/Mine.SAFETENSORS"
    assert not [name for name in shown[:-1] if "safetensors" in name.lower()]
    for widget, file in (("text_encoder", "qwen"), ("clip", "clip_l"), ("vae", "mine")):
        shown = choices("LoadModel", "optional", widget)
        assert shown == ["with the model", f"{file}.safetensors"]
    assert choices("LoadLora", "required", "lora") == ["none", "fox.safetensors"]


def test_files_are_looked_into_once_and_again_when_they_change(models, monkeypatch):
    looked = []
    read = contents.read_headers
    monkeypatch.setattr(contents, "read_headers", lambda files: looked.append(files) or read(files))
    for _ in range(3):
        choices("LoadLora", "required", "lora")
    assert len(looked) == 4  # what is no .ckpt
    save_file({"y": torch.zeros(9)}, models / "loras" / "fox.safetensors")
    assert choices("LoadLora", "required", "lora") == ["none"]
    assert len(looked) == 5


@pytest.mark.parametrize("has_tokenizers", [True, False])
def test_a_model_of_files_in_comfyuis_folders(models, text_parts, comfy, tmp_path, has_tokenizers):
    """With the tokenizers that come with ComfyUI, so that nothing is fetched."""
    root = tmp_path / "comfy"
    places = root / "text_encoders" / "qwen25_tokenizer", root / "sd1_tokenizer"
    if not has_tokenizers:
        encoders = models / "text_encoders"
        places = encoders / "tokenizer", encoders / "tokenizer_2"
    for part, network, place in ((1, 0, places[0]), (3, 2, places[1])):
        text_parts[part].save_pretrained(place)
        text_parts[network].config.save_pretrained(place)
    comfy.sd1_clip.__file__ = str(root / "sd1_clip.py")
    model = call(
        "LoadModel",
        model="deep/Mine.SAFETENSORS",
        text_encoder="qwen.safetensors",
        clip="clip_l.safetensors",
        vae="mine.safetensors",
        text_quantize="int8",
    )
    parts = model.model.text.parts
    assert parts.places["text_encoder"] == models / "text_encoders" / "qwen.safetensors"
    assert (parts.places["tokenizer"], parts.places["tokenizer_2"]) == places
    assert parts.quantize == "int8"
    assert parts.tokenizer("a")["input_ids"] == text_parts[1]("a")["input_ids"]
    assert parts.clip_tokenizer("a")["input_ids"] == text_parts[3]("a")["input_ids"]


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("EncodeText", {"prompt": " "}, "the prompt must say something"),
        ("Sample", {"width": 100, "height": 64}, "multiples of 16"),
        ("Sample", {"frames": 6}, "4k \\+ 1"),
        ("Sample", {"width": 64}, "given together, got 64x0"),
        ("Sample", {"image_latent": {"samples": torch.zeros(1, 16, 1, 8, 8)}}, "takes no image"),
        (
            "Sample",
            {"last_latent": {"samples": torch.zeros(1, 16, 1, 8, 8)}},
            "takes no last frame",
        ),
        ("Sample", {"cache": "mag"}, "calibrated"),
        ("EncodeImage", {"image": image()}, "takes no image"),
        ("EncodeImage", {"image": image(), "width": 64}, "given together"),
        ("Decode", {"latent": {"samples": torch.zeros(1, 4, 8, 8)}}, "comes from another model"),
        ("Decode", {"latent": {"samples": torch.full((1, 16, 1, 8, 8), torch.nan)}}, "finite"),
    ],
)
def test_what_does_not_fit_is_one_sentence(model, name, inputs, message):
    given = {"text": call("EncodeText", model=model, prompt=PROMPT)} if name == "Sample" else {}
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message) as error:
        call(name, model=model, **given, **inputs)
    assert "\n" not in str(error.value)


def test_an_image_to_video_checkpoint_asks_for_its_image(from_image):
    with pytest.raises(ValueError, match="begins with an image"):
        call(
            "Sample",
            model=from_image,
            text=call("EncodeText", model=from_image, prompt=PROMPT),
            frames=5,
            steps=2,
        )
    with pytest.raises(TypeError, match="an IMAGE is"):
        call("EncodeImage", model=from_image, image=torch.zeros(3, 4))


def test_a_missing_package_is_one_sentence(monkeypatch, diffusers_folder):
    monkeypatch.setattr("kandinsky_model.text.parts.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="require transformers") as error:
        call("LoadModel", path=str(diffusers_folder))
    assert "\n" not in str(error.value)


def test_the_current_convention_has_the_same_nodes(monkeypatch, model):
    def kind(io_type):
        class Socket:
            def __init__(self, id, **options):
                self.id = id
                self.io_type = io_type
                self.options = options

        return type(io_type, (), {"Input": Socket, "Output": Socket})

    class Schema(SimpleNamespace):
        pass

    io = SimpleNamespace(
        ComfyNode=object,
        Schema=Schema,
        NodeOutput=lambda *outputs: outputs,
        Custom=kind,
        Combo=kind("COMBO"),
        **{
            name: kind(name.upper())
            for name in ("Int", "Float", "String", "Boolean", "Image", "Latent", "Model")
        },
    )
    latest = ModuleType("comfy_api.latest")
    latest.io = io
    latest.ComfyExtension = object
    monkeypatch.setitem(sys.modules, "comfy_api", ModuleType("comfy_api"))
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    nodes = asyncio.run(asyncio.run(comfyui.comfy_entrypoint()).get_node_list())
    schemas = {node.define_schema().node_id: (node, node.define_schema()) for node in nodes}
    assert schemas.keys() == comfyui.NODE_CLASS_MAPPINGS.keys()
    for name, (_, schema) in schemas.items():
        old = comfyui.NODE_CLASS_MAPPINGS[name]
        inputs = {key: kind[0] for part in old.INPUT_TYPES().values() for key, kind in part.items()}
        kinds = {key: "COMBO" if isinstance(kind, list) else kind for key, kind in inputs.items()}
        assert {socket.id: socket.io_type for socket in schema.inputs} == kinds
        assert [socket.io_type for socket in schema.outputs] == list(old.RETURN_TYPES)
        assert [socket.id for socket in schema.inputs if socket.options["optional"]] == list(
            old.INPUT_TYPES()["optional"]
        )
        # ComfyUI refuses shared ids
        assert not {socket.id for socket in schema.inputs} & {
            socket.id for socket in schema.outputs
        }
    encode = schemas["KandinskyKernelsEncodeText"][0]
    assert encode.execute(model=model, prompt=PROMPT)[0].cond.embeds.shape[0] == 1
    assert schemas["KandinskyKernelsSample"][1].inputs[0].io_type == MODEL
