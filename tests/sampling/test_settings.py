# SPDX-License-Identifier: Apache-2.0
"""Settings: types are checked before any work, in the words that users of diffusers write, and
settings that are stored are checked against the tensors beside them."""

import json

import numpy
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.sampling.result import load_latents
from kandinsky_model.sampling.settings import Settings

from ..support import tiny_models
from ..support.tiny_models import SMALL

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return pipeline.load(folder, device="cpu")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A file of latents."""
    path = tmp_path_factory.mktemp("saved") / "a.latents.safetensors"
    return model.generate(PROMPT, seed=3, **SMALL).save_latents(path)


# Types


@pytest.mark.parametrize(
    ("name", "value", "equal"),
    [
        ("num_frames", numpy.int64(5), 5),
        ("num_inference_steps", torch.tensor(2), 2),
        ("guidance_scale", numpy.float32(2.5), 2.5),
        ("guidance_scale", torch.tensor(2.5), 2.5),
        ("guidance_scale", 3, 3.0),
        ("scheduler_scale", numpy.float64(9.0), 9.0),
        ("seed", numpy.uint32(7), 7),
        ("seed", torch.tensor(7), 7),
        ("memory_budget", numpy.int64(10**9), None),
    ],
)
def test_numbers_of_other_libraries_are_taken(model, name, value, equal):
    video = model.generate(PROMPT, **{"seed": 3, **SMALL, name: value})
    if equal is not None:
        stored = getattr(video.settings, name)
        assert stored == equal
        assert type(stored) in (int, float)
    json.loads(video.settings.to_json())


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"num_frames": 5.0}, TypeError, "num_frames must be an int, got float 5.0"),
        ({"height": "64"}, TypeError, "height must be an int, got str '64'"),
        ({"num_inference_steps": True}, TypeError, "num_inference_steps must be an int"),
        ({"num_inference_steps": [2]}, TypeError, "num_inference_steps must be an int"),
        ({"num_inference_steps": 10**9}, ValueError, "at most 1000, got 1000000000"),
        ({"height": 10**9, "width": 64}, ValueError, "at most 16384"),
        ({"num_frames": 4 * 10**8 + 1}, ValueError, "at most 16385"),
        ({"guidance_scale": "5"}, TypeError, "guidance_scale must be a number, got str '5'"),
        ({"guidance_scale": torch.ones(2)}, TypeError, "guidance_scale must be a number"),
        ({"guidance_scale": float("inf")}, ValueError, "guidance_scale must be finite, got inf"),
        ({"scheduler_scale": 0}, ValueError, "scheduler_scale must be positive"),
        ({"seed": 1.5}, TypeError, "seed must be an int, got float 1.5"),
        ({"seed": [1, 2]}, ValueError, "seed must have one for each prompt, got 2 for 1 prompts"),
        ({"negative_prompt": 3}, TypeError, "negative_prompt must be a str, got int 3"),
        ({"negative_prompt": ["a", "b"]}, ValueError, "negative_prompt must have one for each"),
        ({"prompt": "a \ud800 cat"}, ValueError, "prompt must be text that UTF-8 can hold"),
        ({"prompt": {"a": 1}}, TypeError, "a prompt must be a str, got dict"),
        ({"expand_prompt": "yes"}, TypeError, "expand_prompt must be True or False"),
        ({"callback": 3}, TypeError, "callback must be callable, got int 3"),
        ({"progress": True, "callback": 3}, TypeError, "callback must be callable, got int 3"),
        ({"memory_budget": 1e9}, TypeError, "memory budget must be an int"),
        ({"cache": "mag"}, ValueError, "cache mag requires a preset with calibrated ratios"),
        ({"steps": 2}, TypeError, "did you mean 'num_inference_steps'"),
        ({"guidance": 2}, TypeError, "did you mean 'guidance_scale'"),
        ({"shift": 2}, TypeError, "did you mean 'scheduler_scale'"),
        ({"generator": torch.Generator()}, TypeError, r"no generator; pass seed=.*initial_seed"),
        ({"output_type": "pil"}, TypeError, r"no output_type; leave it out.*\.pil\(\)"),
        ({"num_videos_per_prompt": 2}, TypeError, "pass a list with the prompt"),
        ({"callback_on_step_end": print}, TypeError, r"pass callback=.*\(stage, step, steps"),
    ],
)
def test_what_does_not_fit_is_named_before_any_work(model, monkeypatch, change, kind, words):
    monkeypatch.setattr(model.text, "encode", lambda *_: pytest.fail("work has begun"))
    arguments = {"prompt": PROMPT, **change}
    with pytest.raises(kind, match=words) as caught:
        model.generate(**arguments)
    assert "\n" not in str(caught.value)


def test_a_negative_prompt_and_a_seed_for_each_prompt(model):
    prompts = [PROMPT, "a blue square"]
    batch = model.generate(prompts, ["green", "a circle"], seed=[9, 4], **SMALL)
    for video, prompt, negative, seed in zip(
        batch, prompts, ["green", "a circle"], [9, 4], strict=True
    ):
        alone = model.generate(prompt, negative, seed=seed, **SMALL)
        assert video.settings == alone.settings
        torch.testing.assert_close(video.latents, alone.latents, rtol=0, atol=2e-5)
    same = model.generate(prompts, ["green", "green"], seed=[9, 4], **SMALL)
    assert not torch.allclose(same[1].latents, batch[1].latents, atol=1e-3)


def test_loading_takes_the_dtype_under_both_names(folder):
    loaded = pipeline.load(folder, device="cpu", torch_dtype=torch.bfloat16)
    assert loaded.dit.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got str 'float16'"):
        pipeline.load(folder, device="cpu", torch_dtype="float16")


def test_pictures_as_arrays_lists_and_addresses(tmp_path_factory):
    from dataclasses import replace

    made = pipeline.load(tiny_models.tiny_folder(tmp_path_factory.mktemp("i2v")), device="cpu")
    made.preset = replace(
        made.preset,
        name="tiny-i2v",
        task="i2v",
        sizes=((96, 96),),
    )
    array = numpy.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=numpy.uint8)
    settings = dict(seed=1, num_frames=5, num_inference_steps=1)
    video = made.generate(PROMPT, image=array, **settings)
    flipped = made.generate(PROMPT, image=array[:, ::-1], **settings)
    for image in (torch.from_numpy(array), Image.fromarray(array)):
        assert torch.equal(made.generate(PROMPT, image=image, **settings).latents, video.latents)
    assert not torch.equal(flipped.latents, video.latents)
    for image, kind, words in (
        ([array], TypeError, "image must be one picture, which all prompts share, got a list of 1"),
        ("https://example.org/a.png", ValueError, "image must be a file on this machine"),
        (array / 255, TypeError, "must be uint8"),
    ):
        with pytest.raises(kind, match=words):
            made.generate(PROMPT, image=image, **settings)


# Stored settings


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"height": 10**9}, "at most 16384"),
        ({"height": 128}, r"require floating latents \[1, 2, 16, 10, C\]"),
        ({"num_frames": 9}, r"\[1, 3, 8, 10, C\]"),
        ({"fps": 0}, "fps must lie in 1 .. 240, got 0"),
        ({"num_inference_steps": 10**9}, "at most 1000"),
        ({"seed": "7"}, "seed must be an int, got str '7'"),
        ({"prompt": None}, "a prompt must be a str"),
        ({"lora": "a:1"}, "lora must be a list of str"),
        ({"quantization": "int3"}, "quantization must be empty or one of int8, .*, got 'int3'"),
        ({"lora": ["a.safetensors:nan"]}, "lora must be a list of path:scale with finite scales"),
        ({"lora": [":1"]}, "lora must be a list of path:scale with finite scales"),
        ({"cache": "mag", "preset": "tiny"}, "cache mag requires a preset with calibrated ratios"),
        ({"surprise": 1}, "those that this version knows, got 'surprise' too"),
    ],
)
def test_latents_with_settings_that_do_not_fit_are_refused(saved, tmp_path, change, words):
    latents, settings = load_latents(saved)
    stored = json.dumps(json.loads(settings.to_json()) | change)
    save_file({"latents": latents}, tmp_path / "a.safetensors", {"kandinsky": stored})
    with pytest.raises(ValueError, match=words) as caught:
        load_latents(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
    assert "a.safetensors must hold latents" in str(caught.value)


def test_latents_of_an_unknown_preset_are_one_line(saved, tmp_path, caplog):
    """Somebody may have made a preset; everything else about the latents is checked."""
    latents, settings = load_latents(saved)
    assert not caplog.records
    stored = json.dumps(json.loads(settings.to_json()) | {"preset": "nope"})
    save_file({"latents": latents}, tmp_path / "a.safetensors", {"kandinsky": stored})
    for _ in range(2):
        assert load_latents(tmp_path / "a.safetensors")[1].preset == "nope"
    assert [one.getMessage() for one in caplog.records] == [
        "a.safetensors names the preset 'nope', which `kandinsky presets` does not list"
    ]


@pytest.mark.parametrize(
    "stored", ["[]", "3", "{", "null", '{"prompt": "a"}', "[" * 10**5, '{"": 1}', "nan"]
)
def test_settings_that_are_none_are_refused(saved, tmp_path, stored):
    latents, _ = load_latents(saved)
    save_file({"latents": latents}, tmp_path / "a.safetensors", {"kandinsky": stored})
    with pytest.raises(ValueError, match="must hold latents saved by kandinsky, but"):
        load_latents(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "latents",
    [
        torch.zeros(3, 2, 8, 10, 16),
        torch.zeros(2, 8, 10, 16),
        torch.zeros(1, 2, 8, 10, 16, dtype=torch.int32),
        torch.zeros(()),
    ],
)
def test_latents_of_another_size_are_refused(saved, tmp_path, latents):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    save_file({"latents": latents}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(ValueError, match="they belong to another model or other settings"):
        load_latents(tmp_path / "a.safetensors")


def test_latents_of_another_model_are_refused(model, saved, tmp_path):
    latents, settings = load_latents(saved)
    with safe_open(saved, framework="pt") as file:
        save_file(
            {"latents": latents[..., :4].contiguous()}, tmp_path / "a.safetensors", file.metadata()
        )
    with pytest.raises(ValueError, match=r"require floating latents \[1, 2, 8, 10, 16\]"):
        model.open(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="they belong to another model"):
        model.decode(latents[:, :1], settings)


def test_a_file_cannot_make_a_download(saved, tmp_path, monkeypatch, capsys):
    """A file may name any repository; only the user can ask for one."""
    import huggingface_hub

    asked = []

    def snapshot_download(repo, *, local_files_only, **_):
        asked.append((repo, local_files_only))
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    latents, settings = load_latents(saved)
    stored = json.dumps(json.loads(settings.to_json()) | {"model": "someone/else"})
    file = tmp_path / "a.latents.safetensors"
    save_file({"latents": latents}, file, {"kandinsky": stored})
    assert main(["decode", str(file), "-o", str(tmp_path / "a.gif"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "made with the model 'someone/else'" in error
    assert error.count("\n") == 1
    assert asked == [("someone/else", True)]
    arguments = ["decode", str(file), "-o", str(tmp_path / "a.gif"), "--device", "cpu"]
    assert main([*arguments, "--model", "someone/other"]) == 2
    assert asked[1] == ("someone/other", False)


def test_settings_of_a_file_are_those_that_made_it():
    settings = Settings("a", "b", 1, 64, 80, 5, 2, 3.0, 5.0, "dense", lora=("a:0.1",))
    assert Settings.parse(settings.to_json()) == settings
