# SPDX-License-Identifier: Apache-2.0
"""`kandinsky verify` and `kandinsky download`: what a file is, and where the parts of a preset
are."""

import hashlib

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints import locate as locate_module
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.checkpoints.verify import _presets, verify
from kandinsky_model.config import get_preset

from ..support import tiny_models

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_bundled_model(capsys):
    file = TINY / "transformer" / WEIGHTS
    assert main(["verify", str(TINY)]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = sum(x.numel() for x in load_file(file).values())
    assert lines[0].startswith("transformer, complete: ")
    assert f" {count:,} parameters, " in lines[0]
    assert lines[1:] == [
        "presets: tiny",
        f"{WEIGHTS}: sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}",
    ]
    assert verify(TINY / "vae")[0].startswith("VAE, complete: ")
    assert len(verify(TINY / "vae")) == 2


def test_names_decide_between_presets_of_one_network(tmp_path):
    lite = get_preset("t2v-lite-nocfg-10s")
    pro = get_preset("t2v-pro-sft-5s")
    assert _presets(lite.dit, tmp_path / lite.filename, tmp_path) == ["t2v-lite-nocfg-10s"]
    # two presets, one file
    assert _presets(pro.dit, tmp_path / pro.filename, tmp_path) == [
        "t2v-pro-sft-5s",
        "t2v-pro-sft-5s-hd",
    ]
    renamed = _presets(lite.dit, tmp_path / "mine.safetensors", tmp_path)
    assert len(renamed) == 9
    assert "i2v-lite-5s" in renamed
    assert not any("pro" in name for name in renamed)
    assert _presets(pro.dit, tmp_path / lite.filename, tmp_path) == [
        n for n in _presets(pro.dit, tmp_path, tmp_path) if "pro" in n
    ]


def test_dtypes_are_counted(tmp_path):
    folder = tiny_models.tiny_folder(tmp_path) / "transformer"
    state = load_file(folder / WEIGHTS)
    name = "visual_embeddings.in_layer.weight"
    save_file({**state, name: state[name].bfloat16()}, folder / WEIGHTS)
    assert f"F32 in {len(state) - 1}, BF16 in 1" in verify(folder)[0]
    assert "none; its sizes" in verify(folder)[1]


def test_refusals(tmp_path):
    folder = tiny_models.tiny_folder(tmp_path) / "transformer"
    state = load_file(folder / WEIGHTS)
    dropped = sorted(state)[3]
    save_file({name: x for name, x in state.items() if name != dropped}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=rf"missing \(1\): {dropped}"):
        verify(folder)
    (folder / WEIGHTS).write_bytes((TINY / "transformer" / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(ValueError, match="complete safetensors"):
        verify(folder)
    save_file({"a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(
        ValueError, match="transformer or its video VAE, got 1 tensors such as a.lora_A.weight"
    ):
        verify(tmp_path / "lora.safetensors")
    assert main(["verify", str(tmp_path / "nothing")]) == 2


def test_download_tells_where_the_parts_are(monkeypatch, tmp_path, capsys):
    asked = []

    def fetch(repo, patterns, revision=None):
        asked.append((repo, revision))
        (tmp_path / repo / ("vae" if "Hunyuan" in repo else "model")).mkdir(parents=True)
        return tmp_path / repo

    monkeypatch.setattr(locate_module, "download", fetch)
    assert main(["download", "t2v-lite-sft-10s", "--revision", "abc"]) == 0
    assert asked[0] == ("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s", "abc")
    assert len(asked) == 4
    out = capsys.readouterr().out
    assert "kandinsky5lite_t2v_sft_10s.safetensors" in out
    assert "Qwen2.5-VL-7B-Instruct" in out
    assert out.count("\n") == 4
