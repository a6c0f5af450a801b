# SPDX-License-Identifier: Apache-2.0
"""Faults of the official code that must not come back here, one test each, in the order of the
specification's list."""

import argparse
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from kandinsky_model import config, pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.cli.grammar import parser
from kandinsky_model.config import PRESETS, get_preset
from kandinsky_model.sampling.given import normalize_first_frame
from kandinsky_model.sampling.result import load_latents
from kandinsky_model.sampling.sampler import Sampling
from kandinsky_model.sampling.settings import Settings
from kandinsky_model.sampling.step_cache import make_cache
from kandinsky_model.text.qwen_clip import EDIT_CROPS, OFFICIAL_EDIT_CROP, QwenClipEncoder
from kandinsky_model.vae.tiles import Tiling, starts

from ..support import tiny_models

PROMPT = "a red circle"
SMALL = dict(tiny_models.SMALL, guidance_scale=2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder):
    return pipeline.load(folder, device="cpu")


def test_01_the_configured_schedule_is_used(model):
    """Theirs is never read: the command line forces 5 and the library 10 for every checkpoint."""
    scales = {name: preset.scheduler_scale for name, preset in PRESETS.items()}
    assert all(scale == 3 for name, scale in scales.items() if "2i" in name)
    for name, scale in scales.items():
        if name.startswith("t2v"):
            assert scale == (10 if "10s" in name else 5), name
    assert scales["i2v-lite-5s"] == 10
    assert scales["i2v-pro-sft-5s"] == 10
    assert scales["i2v-pro-sft-5s-hd"] == 5
    model.preset = replace(model.preset, scheduler_scale=7.5)
    assert model.generate(PROMPT, seed=0, **SMALL).settings.scheduler_scale == 7.5


def test_02_the_command_line_passes_on_what_it_is_told(folder, tmp_path):
    """Theirs drops the negative prompt and cannot ask for a side of 1408."""
    arguments = ["generate", PROMPT, "--model", str(folder), *tiny_models.SMALL_ARGS]
    arguments += ["--device", "cpu", "--negative", "blue"]
    assert main([*arguments, "-o", str(tmp_path / "a.gif")]) == 0
    assert load_latents(tmp_path / "a.latents.safetensors")[1].negative_prompt == "blue"
    assert parser().parse_args(["generate", PROMPT, "--size", "1408x640"]).size == (1408, 640)


def test_03_every_checkpoint_names_its_own_file():
    """Their nocfg-10s configuration names the file of sft-10s."""
    for name, preset in PRESETS.items():
        if name.startswith("t2v"):
            kind, seconds = name.split("-")[2:4]
            assert f"_{kind}_{seconds}." in preset.filename
    files = [preset.filename for preset in PRESETS.values() if not preset.name.endswith("-hd")]
    assert len(set(files)) == len(files)


def test_04_defaults_exist_and_text_needs_no_padding(model):
    """Their image-to-video default points to no repository, and unpadded text crashes."""
    assert get_preset("i2v-lite-5s").repo == "kandinskylab/Kandinsky-5.0-I2V-Lite-5s"
    one = model.generate("red", seed=0, **SMALL)
    other = model.generate("a red circle moving right on blue background", seed=0, **SMALL)
    assert one.latents.isfinite().all()
    assert not torch.equal(one.latents, other.latents)


def test_05_a_first_frame_depends_on_the_seed_alone(model):
    """Theirs is drawn from the global generator."""
    model.preset = replace(model.preset, task="i2v", sizes=((64, 80),))
    image = torch.randint(256, (64, 80, 3), dtype=torch.uint8)
    torch.manual_seed(1)
    first = model.generate(PROMPT, seed=3, image=image, **SMALL).latents
    torch.manual_seed(2)
    assert torch.equal(model.generate(PROMPT, seed=3, image=image, **SMALL).latents, first)


SIZES = [(640, 1408), (1408, 640), (768, 1408), (640, 1536)]
SIZES += [(1024, 1024), (896, 1152), (416, 960), (512, 768)]


@pytest.mark.parametrize("size", SIZES)
def test_06_tiles_cover_the_frame_whatever_memory_is_free(size):
    """Theirs lose up to 24 columns, depending on what is free."""
    tiles = Tiling.for_frame(*size)
    for side, tile in zip(size, (tiles.height, tiles.width), strict=True):
        last = max(min(start, side - tile) for start in starts(side, tile, tile - tiles.overlap))
        assert last + tile >= side


def test_07_pictures_are_scaled_as_the_checkpoints_were_trained():
    """By FLUX.1's factor without its shift; theirs uses the video VAE's factor in ComfyUI."""
    from kandinsky_model.vae.flux import ImageVAE

    vae = ImageVAE(tiny_models.random_image_vae())
    assert vae.config.scaling_factor == 0.3611
    assert vae.vae.config.shift_factor == 0.1159
    assert not hasattr(vae.config, "shift_factor")


def test_08_edits_crop_as_trained_by_default_and_exactly_on_request():
    """Theirs drops three tokens of the prompt, which the checkpoint has learned with;
    `tests/sampling/test_pictures.py` has pictures of every mode."""
    assert EDIT_CROPS[0] == "official"
    assert OFFICIAL_EDIT_CROP == 55
    encoder = QwenClipEncoder(None)
    assert encoder.crop("image_edit") == 55
    encoder.edit_crop = "guess"
    with pytest.raises(ValueError, match="official or exact, got 'guess'"):
        encoder.crop("image_edit")


def test_09_a_step_cache_follows_the_run_and_forgets_it(model):
    """Theirs counts by the configured number of steps and stays out of step after an
    interruption."""
    cache = make_cache("mag", "t2v-lite-sft-5s")
    assert [len(cache.schedule(steps, 0)) for steps in (7, 50, 80)] == [7, 50, 80]
    settings = dict(SMALL, num_inference_steps=6, cache="first-block")
    wanted = model.generate(PROMPT, seed=0, **settings).latents

    def stop(stage, step, *_):
        if step == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.generate(PROMPT, seed=0, callback=stop, **settings)
    assert torch.equal(model.generate(PROMPT, seed=0, **settings).latents, wanted)


def test_10_a_trigger_needs_no_expansion(model):
    model.lora.loaded = {"a": argparse.Namespace(trigger="zoom", path="a")}
    model.lora.scales = {"a": 1.0}
    assert model.lora.prompt(PROMPT) == f"zoom {PROMPT}"


def test_11_latents_are_fp32_unless_asked_otherwise(model):
    assert Sampling().precision == "fp32"
    assert Settings.precision == "fp32"
    assert model.generate(PROMPT, seed=0, **SMALL).settings.precision == "fp32"


def test_12_one_latent_frame_has_nothing_to_be_normalised_by():
    """Theirs returns a tuple there and stops."""
    x = torch.randn(1, 1, 4, 4, 16)
    assert torch.equal(normalize_first_frame(x), x)


def test_14_there_are_no_settings_without_an_effect():
    """Theirs reads causal, local, glob, window, method and add_sta and uses none of them."""
    assert {field.name for field in fields(config.NablaConfig)} == {"keep_mass", "window"}
    folder = Path(config.__file__).parent
    for field in fields(config.Preset):
        uses = sum(f".{field.name}" in file.read_text() for file in folder.rglob("*.py"))
        assert uses, field.name


def test_15_what_is_offloaded_stays_offloaded(model, monkeypatch):
    """Theirs moves the text encoder back to the GPU after a run."""
    moves = []
    for name in ("text", "dit", "vae"):
        part = getattr(model, name)
        monkeypatch.setattr(
            part,
            "to",
            lambda device, *_, name=name, part=part: moves.append((name, str(device))) or part,
        )
    model.parts.one_at_a_time = True
    model.device = torch.device("cpu:0")
    assert model.generate(PROMPT, seed=0, **SMALL).frames is not None
    assert {name: device for name, device in moves if device in ("cpu", "cpu:0")} == dict.fromkeys(
        ("text", "dit", "vae"), "cpu"
    )


def test_16_nothing_is_encoded_that_is_not_read(model, monkeypatch):
    """Theirs encodes the negative prompt without guidance, and computes logits that nothing reads;
    `tests/text/test_parts.py` holds that no head is loaded."""
    prompts = []
    encode = model.text.encode

    def watch(texts, kind):
        prompts.extend(texts)
        return encode(texts, kind)

    monkeypatch.setattr(model.text, "encode", watch)
    model.generate(PROMPT, seed=0, **dict(SMALL, guidance_scale=1.0))
    assert prompts == [PROMPT]


IMPORT = """
import torch

def state():
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.initial_seed(),
    )

before = state()
import sys
import kandinsky_kernels
import kandinsky_model
from kandinsky_model import cli, pipeline
assert before == state()
assert "torch._dynamo" not in sys.modules or not torch._dynamo.config.suppress_errors
assert not torch.cuda.is_initialized()
"""


def test_17_importing_changes_nothing_global():
    """Theirs turns on TF32, cuDNN's benchmark mode and the hiding of compilation errors."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
