# SPDX-License-Identifier: Apache-2.0
"""Prompt in, frames out, on random weights: determinism, batches, order of work, every layout, the
real text encoders in miniature."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kandinsky_model import pipeline
from kandinsky_model.checkpoints.locate import locate
from kandinsky_model.config import get_preset
from kandinsky_model.devices.available import choose_device
from kandinsky_model.sampling.sampler import schedule
from kandinsky_model.sampling.settings import default_policy
from kandinsky_model.text.templates import official_negative, official_template

from ..support import tiny_models
from ..support.tiny_models import NABLA, SMALL

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return pipeline.load(folder, device="cpu")


# Generation


def test_same_seed_same_video_other_seed_another(model):
    first, second, third = (model.generate(PROMPT, seed=seed, **SMALL) for seed in (3, 3, 4))
    assert torch.equal(first.latents, second.latents)
    assert torch.equal(first.frames, second.frames)
    assert not torch.allclose(first.latents, third.latents, atol=0.1)
    assert first.frames.dtype == torch.uint8
    assert first.frames.shape == (5, 64, 80, 3)
    assert first.latents.dtype == torch.float32
    assert first.latents.shape == (1, 2, 8, 10, 16)


def test_no_seed_draws_one_that_repeats_the_video(model):
    video = model.generate(PROMPT, **SMALL)
    assert 0 <= video.seed < 2**31
    assert video.seed != model.generate(PROMPT, **SMALL).seed
    assert torch.equal(model.generate(PROMPT, seed=video.seed, **SMALL).latents, video.latents)


def test_a_batch_equals_its_prompts_one_by_one(model):
    prompts = [PROMPT, "green", "a blue square still on background"]  # of different lengths
    batch = model.generate(prompts, "blue", seed=10, **SMALL)
    for i, video in enumerate(batch):
        alone = model.generate(prompts[i], "blue", seed=10 + i, **SMALL)
        assert video.seed == 10 + i
        assert video.settings == alone.settings
        torch.testing.assert_close(video.latents, alone.latents, rtol=0, atol=2e-5)
    assert model.generate([PROMPT], seed=0, **SMALL)[0].seed == 0


@pytest.mark.parametrize(
    "change",
    [
        {"attention": "dense"},
        {"guidance_scale": 1.0},
        {"scheduler_scale": 9.0},
        {"num_inference_steps": 3},
        {"precision": "reference"},
    ],
)
def test_every_setting_matters(model, change):
    # ragged tiles, enough of them for NABLA to drop some
    size = dict(height=192, width=144, num_frames=9, num_inference_steps=2)
    base = model.generate(PROMPT, seed=1, **size)
    changed = model.generate(PROMPT, seed=1, **size | change)
    assert not torch.equal(base.latents, changed.latents)
    assert {name: getattr(changed.settings, name) for name in change} == change


def test_negative_prompt_matters_only_with_guidance(model):
    one, other = (
        model.generate(PROMPT, negative, seed=1, **SMALL).latents for negative in ("blue", "green")
    )
    assert not torch.equal(one, other)
    one, other = (
        model.generate(PROMPT, negative, seed=1, guidance_scale=1.0, **SMALL).latents
        for negative in ("blue", "green")
    )
    assert torch.equal(one, other)


def test_defaults_are_the_presets(model):
    video = model.generate(PROMPT, seed=0, num_inference_steps=1, guidance_scale=1.0)
    tiny = get_preset("tiny")
    assert (video.settings.height, video.settings.width) == tiny.sizes[0]
    assert video.settings.num_frames == tiny.frames
    assert (video.settings.scheduler_scale, video.settings.attention, video.settings.fps) == (
        tiny.scheduler_scale,
        "nabla",
        24,
    )


def test_what_the_model_was_not_trained_for_is_noted(model, caplog):
    model.generate("a red cat", seed=0, **SMALL)
    assert "does not know cat; its words are a, red" in caplog.text
    assert ("tiny was trained for 160x160") in caplog.text
    caplog.clear()
    model.generate("a red circle", seed=0, num_inference_steps=1, guidance_scale=1.0)
    assert not caplog.text


def test_callback_sees_every_stage_and_can_stop(model):
    events = []
    video = model.generate(
        PROMPT,
        seed=0,
        callback=lambda *event: events.append(event),
        **SMALL,
    )
    assert [event[:3] for event in events] == [
        ("text", 0, 1),
        ("sampling", 0, 2),
        ("sampling", 1, 2),
        ("sampling", 2, 2),
    ]
    assert torch.equal(events[-1][3], video.latents)

    def stop(stage, step, steps, latents):
        if step == 1:
            raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        model.generate(PROMPT, callback=stop, **SMALL)


def test_nan_is_reported_with_its_step(model):
    weight = model.dit.out_layer.out_layer.weight
    kept = weight.clone()
    try:
        weight.view(-1)[5] = float("nan")
        with pytest.raises(RuntimeError, match="step 1 of 2"):
            model.generate(PROMPT, **SMALL)
    finally:
        weight.copy_(kept)
    with pytest.raises(RuntimeError, match="finite"):
        model.decode(
            torch.full((1, 2, 8, 10, 16), float("inf")), model.generate(PROMPT, **SMALL).settings
        )


@pytest.mark.parametrize(
    ("prompt", "settings", "kind", "words"),
    [
        ("", {}, ValueError, "prompt must say something"),
        (["a", " "], {}, ValueError, "prompt must say something"),
        ([], {}, ValueError, "prompt must say something"),
        (3.0, {}, TypeError, "prompt"),
        ("a", {"height": 100}, ValueError, "nearest is 160x96"),
        ("a", {"num_frames": 20}, ValueError, "nearest is 17 or 21"),
        ("a", {"num_frames": 0}, ValueError, "nearest is 1$"),
        ("a", {"num_inference_steps": 0}, ValueError, "at least 1"),
        ("a", {"guidance_scale": float("nan")}, ValueError, "finite"),
        ("a", {"attention": "flash"}, ValueError, "nabla or dense"),
        ("a", {"vae_policy": "none"}, ValueError, "global or official"),
        ("a", {"seed": -1}, ValueError, "seed"),
        ("a", {"frames": 5}, TypeError, "did you mean 'num_frames'"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    model, monkeypatch, prompt, settings, kind, words
):
    monkeypatch.setattr(model.text, "encode", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(kind, match=words) as caught:
        model.generate(prompt, **settings)
    assert "\n" not in str(caught.value)


# Latents and decoding


def test_saved_latents_decode_to_the_same_bits(model, tmp_path):
    video = model.generate(PROMPT, seed=5, **SMALL)
    video.save(tmp_path / "a.mp4")
    again = model.open(tmp_path / "a.latents.safetensors")
    assert again.settings == video.settings
    assert torch.equal(again.frames, video.frames)
    with safe_open(tmp_path / "a.latents.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["kandinsky"])["seed"] == 5


def test_a_failing_decode_loses_nothing(model, tmp_path, monkeypatch):
    video = model.generate(PROMPT, seed=5, **SMALL)

    def fail(*_):
        assert (tmp_path / "a.latents.safetensors").exists(), "the latents go first"
        raise MemoryError

    monkeypatch.setattr(model.vae, "decode_frames", fail)
    with pytest.raises(MemoryError):
        video.save(tmp_path / "a.mp4")
    latents, settings = pipeline.load_latents(tmp_path / "a.latents.safetensors")
    assert torch.equal(latents, video.latents)
    assert settings == video.settings
    assert not (tmp_path / "a.mp4").exists()


def test_decoding_goes_through_the_named_policy_and_scale(model, tmp_path):
    video = model.generate(
        PROMPT, seed=5, height=32, width=48, num_frames=21, num_inference_steps=1
    )
    video.save_latents(tmp_path / "a.safetensors")
    official = model.open(tmp_path / "a.safetensors", vae_policy="official")
    assert official.settings.vae_policy == "official"
    assert video.settings.vae_policy == "global"
    assert not torch.equal(official.frames, video.frames)
    unscaled = (video.latents / model.vae.config.scaling_factor).permute(0, 4, 1, 2, 3)
    # as the pipeline does: with gradients recorded the VAE takes another way, which rounds
    # differently
    with torch.no_grad():
        wanted = ((model.vae.decode(unscaled, "official")[0].clamp(-1, 1) + 1) * 127.5).permute(
            1, 2, 3, 0
        )
    assert torch.equal(official.frames, wanted.round().byte())
    assert torch.equal(
        model.open(tmp_path / "a.safetensors", vae_policy="official", precision="reference").frames,
        wanted.byte(),
    )


def test_the_default_policy_depends_on_size_alone():
    assert [
        default_policy(*size)
        for size in ((17, 256, 256), (5, 512, 768), (121, 256, 256), (121, 512, 768))
    ] == ["global", "global", "global", "official"]


def test_foreign_files_are_no_latents(model, folder, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="latents saved by kandinsky"):
        model.open(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        model.open(tmp_path / "absent.safetensors")


# Placement


def test_offload_moves_one_part_at_a_time(folder, monkeypatch, caplog):
    model = pipeline.load(folder, device="cpu")
    with caplog.at_level(logging.WARNING):
        model.enable_model_cpu_offload()
    assert "changes nothing" in caplog.text
    assert not model.parts.one_at_a_time
    before = model.generate(PROMPT, seed=0, **SMALL).frames
    moves = []
    for name in ("text", "dit", "vae"):
        monkeypatch.setattr(
            getattr(model, name), "to", lambda device, name=name: moves.append((name, str(device)))
        )
    model.parts.one_at_a_time = True
    model.device = torch.device("cpu:0")
    assert torch.equal(model.generate(PROMPT, seed=0, **SMALL).frames, before)
    assert moves == [
        (name, device) for name in ("text", "dit", "vae") for device in ("cpu:0", "cpu")
    ]


def test_an_unusable_device_is_one_sentence():
    for name in ("cuda:7", "pancake"):
        with pytest.raises(RuntimeError, match=f"'{name}'.*use cpu") as caught:
            choose_device(name)
        assert "\n" not in str(caught.value)


# Finding a model


def test_official_file_and_folder_load_with_the_settings_of_their_name(folder, tmp_path):
    for name, part in (
        ("vae", "vae"),
        ("text_encoder", "text_encoder"),
        ("text_encoder2", "text_encoder"),
    ):
        shutil.copytree(folder / part, tmp_path / "weights" / name)
    (tmp_path / "weights" / "model").mkdir()
    file = tmp_path / "weights" / "model" / "kandinsky5lite_t2v_nocfg_10s.safetensors"
    shutil.copy(folder / "transformer" / "diffusion_pytorch_model.safetensors", file)
    for path in (file, tmp_path / "weights"):
        found = locate(path)
        assert found.dit == file
        assert found.text_encoder_2 == tmp_path / "weights" / "text_encoder2"
    assert locate(file).preset == get_preset("t2v-lite-nocfg-10s")
    loaded = pipeline.load(file, device="cpu", parts=("dit", "vae"))
    assert loaded.text is None
    assert loaded.preset.dit.model_dim == 64
    assert loaded.preset.guidance == 1.0
    with pytest.raises(RuntimeError, match="text part, which was not loaded"):
        loaded.generate(PROMPT, **SMALL)
    assert locate(file, places={"vae": folder}).vae == folder
    shutil.rmtree(tmp_path / "weights" / "vae")
    with pytest.raises(FileNotFoundError, match="no vae at"):
        locate(file)
    assert locate(file, parts=("dit", "text")).vae is None


def test_a_folders_own_configuration_wins(diffusers_folder):
    found = locate(diffusers_folder, fallback="t2v-pro-sft-5s")
    assert (found.preset.nabla, found.preset.scheduler_scale, found.preset.steps) == (
        NABLA,
        7.0,
        50,
    )
    assert found.preset.dit.model_dim == 64
    assert found.preset.text == "qwen+clip"


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("t2v-lite-sft-5", ValueError, "did you mean t2v-lite-sft-5s"),
        ("no/such/path", ValueError, "existing path"),
        ("weights/x.safetensors", ValueError, "existing path"),
    ],
)
def test_unknown_models_are_refused(name, kind, words):
    with pytest.raises(kind, match=words) as caught:
        pipeline.load(name)
    assert "\n" not in str(caught.value)


def test_repository_from_the_hub_cache_offline(folder, tmp_path):
    """The cache's own layout, made by hand; a process of its own, because the hub library reads its
    environment once."""
    revision = "0123456789" * 4
    repo = tmp_path / "hub" / "models--someone--tiny-video"
    shutil.copytree(folder, repo / "snapshots" / revision)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(revision)
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [
        sys.executable,
        "-m",
        "kandinsky_model",
        "generate",
        PROMPT,
        "--seed",
        "1",
        *tiny_models.SMALL_ARGS,
        "--device",
        "cpu",
    ]

    def run(model, name):
        return subprocess.run(
            [*command, "--model", model, "-o", str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
        )

    done = run("someone/tiny-video", "a.gif")
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path / "a.gif")), done.stderr
    lost = run("someone/else", "b.gif")
    assert lost.returncode == 2
    assert lost.stderr.count("\n") == 1
    assert "neither in the hub cache" in lost.stderr


# Text


def test_the_diffusers_folder_generates_with_the_real_template(diffusers_folder):
    model = pipeline.load(diffusers_folder, device="cpu")
    assert model.text.template("video") == official_template()
    video = model.generate("a cat, running", seed=1, **SMALL)
    assert video.settings.negative_prompt == official_negative() != ""
    assert video.frames.shape == (5, 64, 80, 3)


def test_a_single_frame_is_asked_for_as_an_image(folder, monkeypatch):
    model = pipeline.load(folder, device="cpu")
    kinds = []
    encode = model.text.encode
    monkeypatch.setattr(
        model.text, "encode", lambda prompts, kind: kinds.append(kind) or encode(prompts, kind)
    )
    for frames in (1, 5):
        model.generate(PROMPT, seed=1, **{**SMALL, "num_frames": frames})
    assert kinds == ["image", "image", "video", "video"]


def test_schedule_reaches_the_sampler(model, monkeypatch):
    """The settings' own scale and steps are what the sampler walks."""
    seen = []
    real = pipeline.sample
    monkeypatch.setattr(pipeline, "sample", lambda *args: seen.append(args[4]) or real(*args))
    model.generate(PROMPT, seed=0, scheduler_scale=9.0, **SMALL)
    assert (seen[0].steps, seen[0].scheduler_scale) == (2, 9.0)
    assert torch.equal(schedule(seen[0].steps, seen[0].scheduler_scale), schedule(2, 9.0))
