# SPDX-License-Identifier: Apache-2.0
"""Quantised weights on disk: saved and loaded, quantised while loading, and a whole checkpoint
tensor by tensor."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints import quantize as quantize_module
from kandinsky_model.checkpoints.configs import read_dit_config
from kandinsky_model.checkpoints.headers import WEIGHTS_NAME
from kandinsky_model.checkpoints.load import load_dit, save_dit
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.checkpoints.quantize import (
    HEADER_BYTES,
    PROGRESS_NAME,
    pack,
    quantize_file,
)
from kandinsky_model.checkpoints.verify import verify
from kandinsky_model.config import QUANTIZATIONS, get_preset
from kandinsky_model.dit.quantized import mode_of, quantization_report, quantize

from ..dit.test_quantized import is_large
from ..dit.test_transformer import CONFIG, NABLA, build


def same(ours, theirs, where=lambda name: True):
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert all(
        torch.equal(x, b[name]) and x.dtype == b[name].dtype for name, x in a.items() if where(name)
    )


@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_round_trip(mode, tmp_path):
    dit = quantize(build(), mode)
    save_dit(dit, tmp_path, NABLA)
    loaded = load_dit(tmp_path)
    assert mode_of(loaded) == mode
    assert loaded.config == CONFIG
    assert not loaded.training
    same(loaded, dit)
    assert loaded.prepare().visual_transformer_blocks[0].self_attention._is_joint()
    half = load_dit(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(
        half[name].dtype == x.dtype
        for name, x in dit.state_dict().items()
        if x.dtype != torch.float32 or "weight_scale" in name
    )
    assert half["visual_embeddings.in_layer.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["int8", "fp8-dynamic"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_quantised_while_loading(mode, dtype, tmp_path):
    """From the weights as stored, whatever the rest becomes."""
    save_dit(build(), tmp_path)
    same(
        load_dit(tmp_path, dtype=dtype, quantize=mode),
        quantize(load_dit(tmp_path), mode),
        lambda name: (
            dtype is None or "weight_scale" in name or is_large(name.removesuffix(".weight"))
        ),
    )


def test_stored_weights_compute_in_both_modes_of_their_dtype(tmp_path):
    save_dit(quantize(build(), "int8"), tmp_path)
    dynamic = load_dit(tmp_path, quantize="int8-dynamic")
    assert mode_of(dynamic) == "int8-dynamic"
    assert mode_of(load_dit(tmp_path, quantize="int8")) == "int8"
    with pytest.raises(
        ValueError,
        match="stored in int8 can compute in int8 and int8-dynamic, got fp8; load the original",
    ):
        load_dit(tmp_path, quantize="fp8")


def test_wrong_quantised_files(tmp_path):
    save_dit(quantize(build(), "int8"), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    state = {name: x.clone() for name, x in load_file(file).items()}  # the file is written over
    name = "visual_transformer_blocks.0.feed_forward.in_layer"
    cases = [
        (
            {k: x for k, x in state.items() if k != f"{name}.weight_scale"},
            "int8",
            rf"missing \(1\): {name}.weight_scale",
        ),
        (
            {**state, f"{name}.weight_scale": torch.ones(256)},
            "int8",
            r"wrong shape \(1\): "
            rf"{name}.weight_scale "
            r"\[256\] instead of .256, 1",
        ),
        (
            {k: x for k, x in state.items() if not k.endswith("weight_scale")},
            None,
            r"weights in torch.int8 must have a scale, but visual_\S+ in \S+ has none",
        ),
        (
            state,
            "fp8",
            r"so visual_\S+ must be torch.float8_e4m3fn, got torch.int8; quantise the "
            r"original again",
        ),
        (
            {**state, f"{name}.weight_scale": torch.ones(256, 1).half()},
            "int8",
            f"so {name}.weight_scale must be torch.float32",
        ),
        (state, "int4", "got 'int4'"),
    ]
    for tensors, mode, message in cases:
        save_file(tensors, file, None if mode is None else {"quantization": mode})
        with pytest.raises(ValueError, match=message):
            load_dit(tmp_path)


def test_diffusers_refuses_what_it_would_misread(tmp_path):
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    save_dit(quantize(build(), "int8"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        "quant_method": "kandinsky",
        "mode": "int8",
    }
    with pytest.raises(ValueError, match="kandinsky"):
        module.Kandinsky5Transformer3DModel.from_pretrained(tmp_path)


# A checkpoint, tensor by tensor


def split(dit, folder):
    """As `save_dit`, in two shards."""
    save_dit(dit, folder)
    state = load_file(folder / WEIGHTS_NAME)
    (folder / WEIGHTS_NAME).unlink()
    places = {
        name: f"{'text' if name.startswith('text') else 'rest'}.safetensors" for name in state
    }
    for place in ("text.safetensors", "rest.safetensors"):
        save_file({name: x for name, x in state.items() if places[name] == place}, folder / place)
    (folder / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize("mode", ["int8", "fp8-dynamic"])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 400_000], ids=["one file", "shards"])
def test_a_checkpoint_is_quantised_as_the_network_is(mode, shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr("kandinsky_model.checkpoints.quantize.SHARD_BYTES", shard_bytes)
    mixed = build(dtype=torch.bfloat16)
    mixed.visual_transformer_blocks[0].visual_modulation.float()
    save_dit(mixed, tmp_path / "full" / "transformer", NABLA)
    lines = quantize_file(
        tmp_path / "full" / "transformer", tmp_path / "small" / "transformer", mode
    )
    files = sorted((tmp_path / "small" / "transformer").glob("*.safetensors"))
    assert all(file.stat().st_size <= shard_bytes + HEADER_BYTES + 8 for file in files)
    assert (len(files) > 3) == (shard_bytes < 10**9)
    assert not list(tmp_path.rglob("*.part"))
    loaded = load_dit(tmp_path / "small")
    whole = quantize(load_dit(tmp_path / "full"), mode)
    assert mode_of(loaded) == mode
    assert read_dit_config(tmp_path / "small" / "transformer") == (
        CONFIG,
        NABLA,
    )
    same(loaded, whole)
    report = quantization_report(load_dit(tmp_path / "full"), whole)
    assert lines[:-1] == report
    sizes = [
        sum(file.stat().st_size for file in (tmp_path / place).rglob("*.safetensors")) / 1e9
        for place in ("full", "small")
    ]
    count = f"{len(files)} files" if len(files) > 1 else "1 file"
    assert lines[-1] == f"{sizes[0]:.3f} GB became {sizes[1]:.3f} GB in {count}"


def test_the_index_is_that_of_diffusers(tmp_path, monkeypatch):
    monkeypatch.setattr("kandinsky_model.checkpoints.quantize.SHARD_BYTES", 10**6)
    split(build(), tmp_path / "full")
    quantize_file(tmp_path / "full", tmp_path / "small", "int8")
    index = json.loads((tmp_path / "small" / f"{WEIGHTS_NAME}.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    assert files == [f"{stem}-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 1
    total = 0
    for name in files:
        tensors = load_file(tmp_path / "small" / name)
        total += sum(x.nbytes for x in tensors.values())
        assert all(index["weight_map"][key] == name for key in tensors)
        with safe_open(tmp_path / "small" / name, "pt") as file:
            assert file.metadata() == {"format": "pt", "quantization": "int8"}
    assert index["metadata"] == {"total_size": total}
    assert list(index["weight_map"]) == sorted(load_dit(tmp_path / "small").state_dict())
    first = tmp_path / "small" / files[0]
    # copies, because the tensors of a file may lie in the file that is written over
    save_file({name: x.clone() for name, x in load_file(first).items()}, first)
    with pytest.raises(
        ValueError, match="quantised alike, but small has None, int8; do not mix them"
    ):
        load_dit(tmp_path / "small")


def test_an_official_file_tells_its_attention_by_its_name(tmp_path):
    preset = get_preset("t2v-lite-sft-10s")
    save_file(build().state_dict(), tmp_path / preset.filename)
    quantize_file(tmp_path / preset.filename, tmp_path / "small", "int8")
    assert read_dit_config(tmp_path / "small") == (CONFIG, preset.nabla)


def test_the_command(tmp_path, capsys):
    """The bundled model, quantised on disk, draws with its other parts beside it."""
    place = tmp_path / "model"
    shutil.copytree(TINY, place, ignore=shutil.ignore_patterns("transformer"))
    assert main(["quantize", "tiny", str(place / "transformer"), "--mode", "int8"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "relative rms error of the weights"
    assert out[-2].startswith("worst: visual_")
    assert "GB in 1 file" in out[-1]
    lines = verify(place / "transformer")
    count = sum(x.numel() for x in load_dit(TINY).parameters())
    assert f" {count:,} parameters, " in lines[0]
    assert "I8 in 32" in lines[0]
    assert lines[1:3] == ["quantised: int8", "presets: tiny"]
    assert main(["quantize", str(place), str(tmp_path / "again"), "--mode", "fp8"]) == 2
    assert "is in int8 already; take the original" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert main(["quantize", "tiny", str(place), "--mode", "fp8"]) == 2
    assert "new or empty folder" in capsys.readouterr().err
    assert (
        main(
            [
                "generate",
                "a star",
                "--model",
                str(place),
                "--frames",
                "1",
                "--steps",
                "1",
                "--device",
                "cpu",
                "-o",
                str(tmp_path / "a.png"),
            ]
        )
        == 0
    )


def test_what_cannot_be_quantised_leaves_nothing_that_loads(tmp_path):
    dit = build()
    dit.get_submodule("visual_transformer_blocks.2.feed_forward.out_layer").weight.data[0, 0] = (
        torch.nan
    )
    save_dit(dit, tmp_path / "full")
    with pytest.raises(
        ValueError, match="NaN or infinity in visual_transformer_blocks.2.feed_forward.out_layer"
    ):
        quantize_file(tmp_path / "full", tmp_path / "small", "int8")
    with pytest.raises(FileNotFoundError):
        load_dit(tmp_path / "small")
    save_file(
        {name: x for name, x in build().state_dict().items() if "to_key" not in name},
        tmp_path / "full" / WEIGHTS_NAME,
    )
    with pytest.raises(ValueError, match="missing"):
        quantize_file(tmp_path / "full", tmp_path / "none", "int8")
    assert not (tmp_path / "none").exists()


# Interrupted, and gone on with


def packed_by(monkeypatch, most=10**9, error=KeyboardInterrupt):
    """Counts the layers that are quantised, and fails after so many."""
    made = []

    def counted(layer, *args):
        if len(made) == most:
            raise error("stopped")
        made.append(layer)
        return pack(layer, *args)

    monkeypatch.setattr("kandinsky_model.checkpoints.quantize.pack", counted)
    return made


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_command_leaves_no_folder_and_goes_on(tmp_path, monkeypatch, error):
    monkeypatch.setattr("kandinsky_model.checkpoints.quantize.SHARD_BYTES", 300_000)
    save_dit(build(), tmp_path / "full", NABLA)
    whole = quantize_file(tmp_path / "full", tmp_path / "whole", "int8")
    with monkeypatch.context() as patch:
        first = packed_by(patch, 15, error)
        with pytest.raises(error):
            quantize_file(tmp_path / "full", tmp_path / "small", "int8")
    assert not (tmp_path / "small").exists()
    with monkeypatch.context() as patch:
        second = packed_by(patch)
        lines = quantize_file(tmp_path / "full", tmp_path / "small", "int8")
    assert 0 < len(second) < 24, "what was whole is not done again"
    assert set(first) | set(second) == set(first + second)
    assert lines == whole
    same(load_dit(tmp_path / "small"), load_dit(tmp_path / "whole"))
    names = [sorted(path.name for path in (tmp_path / f).iterdir()) for f in ("small", "whole")]
    assert names[0] == names[1]
    assert not any(name.startswith(".") for name in names[0])
    assert {path.name for path in tmp_path.iterdir()} == {"full", "small", "whole"}


@pytest.mark.parametrize("change", ["mode", "source", "shard", "progress"])
def test_what_was_begun_from_something_else_is_not_gone_on_with(tmp_path, monkeypatch, change):
    monkeypatch.setattr("kandinsky_model.checkpoints.quantize.SHARD_BYTES", 300_000)
    save_dit(build(), tmp_path / "full", NABLA)
    with monkeypatch.context() as patch:
        packed_by(patch, 15)
        with pytest.raises(KeyboardInterrupt):
            quantize_file(tmp_path / "full", tmp_path / "small", "int8")
    partial = tmp_path / ".small.quantizing"
    if change == "source":
        dit = build()
        dit.visual_transformer_blocks[0].feed_forward.in_layer.weight.data.mul_(2)
        save_dit(dit, tmp_path / "full", NABLA)
    if change == "shard":
        shard = sorted(partial.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-7])
    if change == "progress":
        (partial / PROGRESS_NAME).write_text('{"identity": [], "shards": 7}')
    mode = "fp8" if change == "mode" else "int8"
    made = packed_by(monkeypatch)
    quantize_file(tmp_path / "full", tmp_path / "small", mode)
    assert len(made) == 24
    same(load_dit(tmp_path / "small"), quantize(load_dit(tmp_path / "full"), mode))


def test_a_folder_that_exists_and_is_empty_is_filled(tmp_path):
    save_dit(build(), tmp_path / "full")
    (tmp_path / "small").mkdir()
    quantize_file(tmp_path / "full", tmp_path / "small", "int8")
    assert mode_of(load_dit(tmp_path / "small")) == "int8"


KILLED = """
import os, signal, sys
from kandinsky_model.checkpoints import quantize
quantize.SHARD_BYTES = 300_000
pack, made = quantize.pack, []
def kill(*args):
    made.append(args)
    if len(made) == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return pack(*args)
quantize.pack = kill
quantize.quantize_file(sys.argv[1], sys.argv[2], "int8")
"""


def test_a_killed_command_is_repeated(tmp_path, capsys):
    save_dit(build(), tmp_path / "full", NABLA)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "full"), str(tmp_path / "small")]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "small").exists()
    assert main(["quantize", str(tmp_path / "full"), str(tmp_path / "small")]) == 0
    same(load_dit(tmp_path / "small"), quantize(load_dit(tmp_path / "full"), "int8"))
    assert {path.name for path in tmp_path.iterdir()} == {"full", "small"}


@pytest.mark.parametrize("place", ["folder", "link", "file"])
def test_what_is_not_a_half_finished_result_stays(tmp_path, place):
    save_dit(build(), tmp_path / "full")
    partial = tmp_path / ".small.quantizing"
    if place == "folder":
        partial.mkdir()
        (partial / "notes.txt").write_text("mine")
    elif place == "link":
        (tmp_path / "elsewhere").mkdir()
        partial.symlink_to(tmp_path / "elsewhere")
    else:
        partial.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="but something else lies there"):
        quantize_file(tmp_path / "full", tmp_path / "small", "int8")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_cannot_lie_where_its_result_is_made(tmp_path):
    save_dit(build(), tmp_path / ".small.quantizing")
    with pytest.raises(ValueError, match="the model lies there"):
        quantize_file(tmp_path / ".small.quantizing", tmp_path / "small", "int8")
    load_dit(tmp_path / ".small.quantizing")


def test_one_process_at_a_time_writes_a_folder(tmp_path, monkeypatch):
    save_dit(build(), tmp_path / "full")

    def begin(*args):
        with pytest.raises(RuntimeError, match="another is writing"):
            quantize_file(tmp_path / "full", tmp_path / "small", "int8")
        begun.append(args)
        return real(*args)

    begun, real = [], quantize_module._begin
    monkeypatch.setattr(quantize_module, "_begin", begin)
    quantize_file(tmp_path / "full", tmp_path / "small", "int8")
    assert len(begun) == 1
    same(load_dit(tmp_path / "small"), quantize(load_dit(tmp_path / "full"), "int8"))
