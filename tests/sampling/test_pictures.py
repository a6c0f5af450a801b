# SPDX-License-Identifier: Apache-2.0
"""Pictures from text and pictures edited, on random weights: sizes, files, what the networks are
given, and refusals."""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import kandinsky_model
from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints.load import load_image_vae
from kandinsky_model.checkpoints.locate import locate
from kandinsky_model.config import get_preset
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.media.picture import crop, resize
from kandinsky_model.sampling.given import latent_of
from kandinsky_model.sampling.result import load_latents
from kandinsky_model.sampling.sampler import noise, sample
from kandinsky_model.text.templates import official_template

from ..support import tiny_models

SHORT = dict(height=64, width=96, num_inference_steps=2, guidance_scale=2.0)
PROMPT = "a red cube"


def picture(height=60, width=100):
    return torch.randint(
        256, (height, width, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, text_parts):
    root = tmp_path_factory.mktemp("pictures")
    names = {task: f"Kandinsky-5.0-{task.upper()}-Lite-Diffusers" for task in ("t2i", "i2i")}
    return {
        task: tiny_models.diffusers_folder(root / name, text_parts, task)
        for task, name in names.items()
    }


@pytest.fixture(scope="module")
def text_to_image(folders):
    return kandinsky_model.Kandinsky5ImageLite.from_pretrained(folders["t2i"], device="cpu")


class Listener:
    """An encoder that remembers what it was shown."""

    def __init__(self):
        self.calls = []

    def encode(self, prompts, kind, images=None):
        self.calls.append((prompts, kind, images))
        g = torch.Generator().manual_seed(len(prompts[0]))
        return pipeline.Conditioning(
            torch.randn(len(prompts), 5, 64, generator=g),
            torch.full((len(prompts),), 5),
            torch.randn(len(prompts), 32, generator=g),
        )

    def to(self, *_):
        return self


@pytest.fixture
def editor(folders):
    model = pipeline.load(
        folders["i2i"],
        device="cpu",
        parts=("dit", "vae"),
    )
    model.text = Listener()
    return model


def test_text_to_image(text_to_image, folders):
    made = text_to_image.generate(PROMPT, seed=3, **SHORT)
    assert made.frames.shape == (1, 64, 96, 3)
    assert made.settings.num_frames == 1
    assert made.settings.negative_prompt == ""
    assert torch.equal(made.frames, text_to_image.generate(PROMPT, seed=3, **SHORT).frames)
    vae = load_image_vae(folders["t2i"] / "vae", torch.float32).vae
    with torch.no_grad():  # the scale alone: the checkpoints were trained without FLUX.1's shift
        decoded = vae.decode(made.latents[:, 0].permute(0, 3, 1, 2) / 0.3611).sample[0]
    wanted = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    assert torch.equal(made.frames[0], wanted)


def test_prompts_are_read_as_for_images(text_to_image, monkeypatch):
    seen = []
    encode = text_to_image.text.encode
    monkeypatch.setattr(
        text_to_image.text,
        "encode",
        lambda prompts, kind: seen.append((prompts, kind)) or encode(prompts, kind),
    )
    text_to_image.generate(PROMPT, seed=0, **SHORT)
    assert seen == [([PROMPT], "image"), ([""], "image")]
    assert text_to_image.text.template("image") == official_template("image")


def test_a_batch_of_pictures_is_single_runs(text_to_image):
    prompts = [PROMPT, "a much longer prompt than that"]
    for i, made in enumerate(text_to_image.generate(prompts, seed=5, **SHORT)):
        alone = text_to_image.generate(prompts[i], seed=5 + i, **SHORT)
        assert torch.allclose(made.latents, alone.latents, atol=2e-5)


def test_defaults_of_pictures(folders):
    for task in ("t2i", "i2i"):
        preset = locate(folders[task]).preset
        assert (preset.task, preset.guidance, preset.scheduler_scale, preset.sizes[0]) == (
            task,
            3.5,
            3.0,
            (1024, 1024),
        )


def test_editing(editor, folders, monkeypatch):
    seen = []
    real = sample
    monkeypatch.setattr(pipeline, "sample", lambda *args: seen.append(args) or real(*args))
    made = editor.generate(
        ["make it blue", "greener"],
        seed=7,
        image=picture(),
        **SHORT,
    )
    shown = resize(
        crop(picture().permute(2, 0, 1), 64, 96),
        64,
        96,
    )
    for (prompts, kind, images), count in zip(editor.text.calls, (2, 1), strict=True):
        assert kind == "image_edit"
        assert len(prompts) == len(images) == count
        assert all(torch.equal(image, shown) for image in images)
    source = seen[0][6].source
    with torch.no_grad():
        wanted = torch.cat([latent_of(shown, editor.vae, seed) for seed in (7, 8)])
    assert torch.equal(source, wanted)
    assert torch.equal(seen[0][1], torch.cat([noise(seed, (1, 1, 8, 12, 16)) for seed in (7, 8)]))
    assert len(made) == 2
    assert made[0].settings.image == "given"
    assert made[0].frames.shape == (1, 64, 96, 3)
    other = editor.generate(
        "make it blue",
        seed=7,
        image=255 - picture(),
        **SHORT,
    )
    assert not torch.allclose(other.latents, made[0].latents, atol=1e-3)


def test_editing_with_an_encoder_that_sees_the_picture(folders):
    model = pipeline.load(folders["i2i"], device="cpu")
    one, again, other = (
        model.generate("make it blue", seed=7, image=image, **SHORT).latents
        for image in (picture(), picture(), 255 - picture())
    )
    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-3)
    assert dict(model.text.named_children()).keys() == {"language", "vision", "clip"}


def test_editing_takes_the_nearest_trained_size(editor, monkeypatch):
    monkeypatch.setattr(pipeline, "sample", lambda dit, latents, *_: iter([(0, latents)]))
    made = editor.generate("x", seed=0, image=picture(60, 100))
    assert (made.settings.height, made.settings.width) == (768, 1280)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "I;16"])
def test_editing_takes_pictures_of_every_mode(editor, mode, tmp_path):
    """The official code stops at anything but RGB."""
    image = Image.fromarray(picture().numpy())
    image = (
        Image.fromarray(picture()[..., 0].numpy().astype("uint16") * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    image.save(tmp_path / "a.png")
    made = editor.generate("x", seed=0, image=tmp_path / "a.png", **SHORT)
    assert made.settings.image == str(tmp_path / "a.png")
    assert made.latents.isfinite().all()


def test_pictures_within_a_budget(editor):
    free = editor.generate(PROMPT, seed=0, image=picture(), **SHORT)
    with pytest.raises(ValueError, match="at least") as caught:
        editor.generate(
            PROMPT,
            seed=0,
            image=picture(),
            memory_budget=1,
            **SHORT,
        )
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    tight = editor.generate(
        PROMPT,
        seed=0,
        image=picture(),
        memory_budget=least,
        **SHORT,
    )
    torch.testing.assert_close(tight.latents, free.latents, rtol=0, atol=1e-5)
    assert (tight.frames.int() - free.frames.int()).abs().max() <= 1


def test_refusals(text_to_image, editor):
    for model, settings, words in (
        (text_to_image, {"num_frames": 5}, "makes pictures, decoded whole, got 5 frames"),
        (text_to_image, {"vae_policy": "preview"}, "got 1 frames and preview decoding"),
        (text_to_image, {"image": picture()}, "takes no image, got one"),
        (editor, {}, "begins with an image, got none"),
        (
            editor,
            {"image": picture(), "last_image": picture()},
            "makes no videos, so it takes no last image",
        ),
        (
            text_to_image,
            {"memory_budget": 10**5},
            "requires a memory budget of at least .* got 100000: raise it",
        ),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            model.generate(PROMPT, **SHORT | settings)
        assert "\n" not in str(caught.value)


def test_command_line(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--model",
        str(folders["t2i"]),
        "--size",
        "96x64",
        "--steps",
        "1",
        "--device",
        "cpu",
    ]
    assert main(["generate", PROMPT, "--seed", "1", *arguments]) == 0
    assert capsys.readouterr().out == (
        "out.png\nseed 1, 1 frame of 96x64, global decoding, latents in out.latents.safetensors\n"
    )
    assert Image.open("out.png").size == (96, 64)
    assert main(["decode", "out.latents.safetensors", "-o", "again.png", "--device", "cpu"]) == 0
    assert Image.open("again.png").tobytes() == Image.open("out.png").tobytes()
    assert load_latents("out.latents.safetensors")[1].model == str(folders["t2i"])


def test_official_layout_and_sizes_tell_what_a_file_is(folders, tmp_path):
    """The image VAE lies in flux/vae; a file of any name is known by the sizes of its tensors."""
    root = tmp_path / "weights"
    for name, part in (
        ("flux/vae", "vae"),
        ("text_encoder", "text_encoder"),
        ("text_encoder2", "text_encoder_2"),
    ):
        shutil.copytree(folders["t2i"] / part, root / name)
    (root / "model").mkdir()
    file = root / "model" / "kandinsky5lite_t2i.safetensors"
    shutil.copy(folders["t2i"] / "transformer" / "diffusion_pytorch_model.safetensors", file)
    found = locate(file)
    assert found.preset == get_preset("t2i-lite-sft")
    assert found.vae == root / "flux" / "vae"
    for name in ("t2i-lite-sft", "i2i-lite-sft", "t2v-lite-sft-5s", "t2v-pro-sft-5s"):
        folder = tmp_path / name / "transformer"
        folder.mkdir(parents=True)
        with torch.device("meta"):
            dit = DiffusionTransformer3D(get_preset(name).dit)
        shapes = {
            key: torch.zeros(1, dtype=torch.uint8).expand(tensor.shape)
            for key, tensor in dit.state_dict().items()
        }
        write_header(shapes, folder / "renamed.safetensors")
        assert locate(tmp_path / name, parts=("dit",)).preset.name == name


def write_header(tensors, path):
    """A sparse file that claims these tensors: only its header is read."""
    header = {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": "U8",
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.numel()],
        }
        end += tensor.numel()
    data = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)


def test_a_wrong_image_vae_is_named(folders, tmp_path):
    copy = shutil.copytree(folders["t2i"] / "vae", tmp_path / "vae")
    file = copy / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_in.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 do not, decoder\.conv_in\.bias first"):
        load_image_vae(copy, torch.float32)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="complete safetensors file"):
        load_image_vae(copy, torch.float32)
    vae = load_image_vae(folders["t2i"] / "vae", torch.float32)
    with pytest.raises(ValueError, match=r"\[B, 3, 1, H, W\], got \[1, 3, 2, 16, 16\]"):
        vae.encode(torch.zeros(1, 3, 2, 16, 16))
