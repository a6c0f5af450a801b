# SPDX-License-Identifier: Apache-2.0
"""Which preset a file is: never another network's, never a guess without a word, and always the one
that the user names."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints.configs import dit_config_json
from kandinsky_model.checkpoints.headers import CONFIG_NAME, WEIGHTS_NAME
from kandinsky_model.checkpoints.locate import locate
from kandinsky_model.checkpoints.presets import choose_preset, presets_of
from kandinsky_model.config import PRESETS, NablaConfig, get_preset

FALLBACK = "t2v-lite-sft-5s"
SHARED = "kandinsky5lite_t2v"


@pytest.fixture
def home(tmp_path):
    """A folder whose name, and those above it, say nothing: pytest's contain those of tests."""
    home = tmp_path / "a" / "b" / "c" / "d"
    home.mkdir(parents=True)
    return home


@pytest.fixture(scope="module")
def headers():
    """The tensors of released networks, as headers: of zeros bytes, so that files are small."""
    from kandinsky_model.checkpoints.load import empty_dit, shapes_of

    return {
        name: shapes_of(empty_dit(get_preset(name).dit))
        for name in ("t2v-lite-sft-5s", "t2v-pro-sft-5s", "t2i-lite-sft", "i2i-lite-sft")
    }


def write(path, shapes, metadata=None, prefix=""):
    """A sparse file that claims tensors of these shapes."""
    header = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[prefix + name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def chosen(path, caplog, fallback=FALLBACK):
    """The name of the preset that is chosen, and the notes about it."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "kandinsky_model.checkpoints.presets"):
        preset = choose_preset(path, str(path), fallback)
    notes = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    return preset.name, notes


@pytest.mark.parametrize(
    ("network", "name", "wanted"),
    [
        ("t2v-lite-sft-5s", "kandinsky5lite_t2v_nocfg_10s.safetensors", "t2v-lite-nocfg-10s"),
        ("t2v-lite-sft-5s", "KANDINSKY5LITE_T2V_NOCFG_10S.safetensors", "t2v-lite-nocfg-10s"),
        (
            "t2v-lite-sft-5s",
            "K5-Lite-T2V-Distilled-10s.safetensors",
            "t2v-lite-distilled16steps-10s",
        ),
        (
            "t2v-lite-sft-5s",
            "kandinsky5lite_t2v_distilled16steps_5s_fp8_e4m3fn_scaled (1).safetensors",
            "t2v-lite-distilled16steps-5s",
        ),
        ("t2v-lite-sft-5s", "Kandinsky5Lite_I2V_5s-bf16.safetensors", "i2v-lite-5s"),
        ("t2v-pro-sft-5s", "kandinsky5pro_i2v_sft_5s.safetensors", "i2v-pro-sft-5s"),
        ("t2v-pro-sft-5s", "k5_pro_t2v_pretrain_10sec.safetensors", "t2v-pro-pretrain-10s"),
        ("t2v-pro-sft-5s", "k5_pro_t2v_sft_10s_hd.safetensors", "t2v-pro-sft-10s-hd"),
        ("t2i-lite-sft", "anything.safetensors", "t2i-lite-sft"),
        ("i2i-lite-sft", "anything.safetensors", "i2i-lite-sft"),
        # A name that cannot be true of the network says nothing.
        ("t2i-lite-sft", "kandinsky5lite_t2v_sft_5s.safetensors", "t2i-lite-sft"),
        ("t2v-pro-sft-5s", "kandinsky5lite_t2v_sft_10s.safetensors", "t2v-pro-sft-10s"),
    ],
)
def test_sizes_and_names_decide_without_a_note(home, headers, caplog, network, name, wanted):
    assert chosen(write(home / name, headers[network]), caplog) == (wanted, [])


def test_where_several_fit_the_user_is_told_which_is_taken(home, headers, caplog):
    path = write(home / "model.safetensors", headers["t2v-lite-sft-5s"])
    name, (note,) = chosen(path, caplog)
    assert name == "t2v-lite-sft-5s"
    assert "t2v-lite-distilled16steps-5s" in note
    assert "i2v-lite-5s" in note
    assert "the settings of t2v-lite-sft-5s are taken, the first" in note
    assert "pro" not in note
    assert "--preset (preset=)" in note
    path = write(home / "t2v_5s.safetensors", headers["t2v-lite-sft-5s"])
    name, (note,) = chosen(path, caplog)
    assert "10s" not in note
    assert "distilled16steps-5s" in note
    name, (note,) = chosen(path, caplog, "t2v-lite-nocfg-5s")
    assert name == "t2v-lite-nocfg-5s"
    assert "the default of the class" in note


@pytest.mark.parametrize(
    "metadata",
    [
        {"modelspec.title": "Kandinsky 5.0 Lite T2V distilled 5s"},
        {"kandinsky_preset": "t2v-lite-distilled16steps-5s"},
        {"model_name": "K5 lite t2v DISTILL 5 s"},
    ],
)
def test_the_header_may_name_it(home, headers, caplog, metadata):
    shapes = headers["t2v-lite-sft-5s"]
    if "5 s" in str(metadata):
        metadata = {key: text.replace("5 s", "5_s") for key, text in metadata.items()}
    path = write(home / "renamed.safetensors", shapes, metadata)
    assert chosen(path, caplog) == ("t2v-lite-distilled16steps-5s", [])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_prefixed_files_are_known_by_their_sizes_too(home, headers, caplog, prefix):
    path = write(home / "renamed.safetensors", headers["t2i-lite-sft"], prefix=prefix)
    assert chosen(path, caplog) == ("t2i-lite-sft", [])


def diffusers_folder(root, headers, network, preset, nabla=None, index=None, shift=None):
    folder = root / "transformer"
    write(folder / WEIGHTS_NAME, headers[network])
    config = dit_config_json(get_preset(network).dit, nabla, None)
    (folder / CONFIG_NAME).write_text(json.dumps({**config, **preset}))
    if index:
        (root / "model_index.json").write_text(json.dumps({"_class_name": index}))
    if shift:
        (root / "scheduler").mkdir()
        (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"shift": shift}))
    return root


def test_a_folders_configurations_narrow_the_choice(home, headers, caplog):
    lite = "t2v-lite-sft-5s"
    made = diffusers_folder(home / "m1", headers, lite, {"kandinsky_preset": "t2v-lite-nocfg-10s"})
    assert chosen(made, caplog) == ("t2v-lite-nocfg-10s", [])
    made = diffusers_folder(home / "m2", headers, lite, {}, index="Kandinsky5I2VPipeline")
    assert chosen(made, caplog) == ("i2v-lite-5s", [])
    made = diffusers_folder(
        home / "m3", headers, lite, {}, NablaConfig(0.9), "Kandinsky5T2VPipeline"
    )
    name, (note,) = chosen(made, caplog)
    assert name == "t2v-lite-sft-10s"
    assert "5s" not in note
    made = diffusers_folder(
        home / "m4", headers, "t2v-pro-sft-5s", {}, NablaConfig(0.7), "Kandinsky5T2VPipeline"
    )
    assert chosen(made, caplog) == ("t2v-pro-sft-10s-hd", [])
    made = diffusers_folder(
        home / "m5", headers, "t2v-pro-sft-5s", {}, None, "Kandinsky5I2VPipeline", shift=10.0
    )
    assert chosen(made, caplog)[0] == "i2v-pro-sft-5s"


def test_the_folder_of_the_hubs_cache_names_it(home, headers, caplog):
    repo = "models--kandinskylab--Kandinsky-5.0-T2V-Lite-distilled16steps-10s"
    path = home / repo / "snapshots" / "0123" / "model" / "weights.safetensors"
    write(path, headers["t2v-lite-sft-5s"])
    assert chosen(path, caplog) == ("t2v-lite-distilled16steps-10s", [])


def test_a_hard_disk_is_no_high_definition(home, headers, caplog):
    path = write(home / "hd" / "kandinsky5pro_t2v_sft_5s.safetensors", headers["t2v-pro-sft-5s"])
    assert chosen(path, caplog)[0] == "t2v-pro-sft-5s"
    path = path.rename(path.with_name("k5_pro_t2v_sft_5s_hd.safetensors"))
    assert chosen(path, caplog)[0] == "t2v-pro-sft-5s-hd"


def test_sizes_of_no_checkpoint_are_said_to_be_that(home, caplog, headers):
    shapes = {
        name: tuple(128 if size == 1792 else size for size in shape)
        for name, shape in headers["t2v-lite-sft-5s"].items()
    }
    path = write(home / "a.safetensors", shapes)
    name, notes = chosen(path, caplog)
    assert name == FALLBACK
    assert "the sizes of no released checkpoint" in notes[0]
    assert chosen(home / "nothing", caplog) == (FALLBACK, [])


def test_the_user_names_it(home, headers):
    path = write(home / "model.safetensors", headers["t2v-lite-sft-5s"])
    for name in ("t2v-lite-distilled16steps-10s", "i2v-lite-5s"):
        assert locate(path, parts=("dit",), preset=name).preset == get_preset(name)
    with pytest.raises(ValueError, match="is not a t2v-pro-sft-5s; it may be one of t2v-lite-sft"):
        locate(path, parts=("dit",), preset="t2v-pro-sft-5s")
    with pytest.raises(ValueError, match="must be one of the 20 known ones, got 'lite'"):
        locate(path, parts=("dit",), preset="lite")


def test_the_command_takes_the_settings_that_are_named(tmp_path, capsys):
    """The bundled model, run with the steps of a distilled one."""
    from kandinsky_model.sampling.result import load_latents

    arguments = ["--frames", "1", "--size", "64x64", "--seed", "1", "--device", "cpu"]
    output = tmp_path / "a.png"
    named = ["--preset", "t2v-lite-distilled16steps-5s"]
    assert main(["generate", "a", "--model", "tiny", *named, *arguments, "-o", str(output)]) == 0
    settings = load_latents(tmp_path / "a.latents.safetensors")[1]
    assert settings.num_inference_steps == 16
    assert settings.guidance_scale == 1.0
    assert settings.preset == "t2v-lite-distilled16steps-5s", "for a run that is gone on with"


def test_every_published_name_is_known(home):
    for preset in PRESETS.values():
        if preset.repo:
            found, _ = presets_of(home / preset.filename, preset.filename, preset.dit)
            assert {one.filename for one in found} == {preset.filename}
            for suffix in ("", "-Diffusers"):
                repo = preset.repo + suffix
                found, _ = presets_of(home / "absent", repo, preset.dit)
                assert {one.filename for one in found} == {preset.filename}


def test_metadata_of_any_kind_does_no_harm(home, headers, caplog):
    path = home / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"title": "\0" * 1000 + "lite"})
    assert chosen(path, caplog)[0].startswith("t2v-lite")
