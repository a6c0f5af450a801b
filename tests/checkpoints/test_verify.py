# SPDX-License-Identifier: Apache-2.0
"""`kandinsky verify` and `kandinsky download`: what a file is, and where the parts of a preset
are."""

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.checkpoints.verify import verify

from ..support import tiny_models

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_bundled_model(capsys):
    file = TINY / "transformer" / WEIGHTS
    assert main(["verify", str(TINY)]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = sum(x.numel() for x in load_file(file).values())
    assert lines[0].startswith("transformer/: transformer, complete: ")
    assert f" {count:,} parameters, " in lines[0]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert lines[1:3] == ["presets: tiny", f"{WEIGHTS}: sha256 {digest}"]
    assert lines[3].startswith("vae/: VAE, complete: ")
    assert lines[5].startswith("text_encoder/: ")
    assert len(lines) == 7
    assert verify(TINY / "text_encoder")[0] == lines[5].removeprefix("text_encoder/: ")
    assert verify(TINY / "vae")[0].startswith("VAE, complete: ")
    assert len(verify(TINY / "vae")) == 2


def test_every_part_is_checked(tmp_path):
    """Damage in one part is found from the model's folder, and says where it is."""
    for part in ("transformer", "vae", "text_encoder"):
        folder = tmp_path / part
        shutil.copytree(TINY, folder)
        (weights,) = (folder / part).glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-1])
        with pytest.raises(ValueError, match=f"{part}/{weights.name} must be a complete"):
            verify(folder)
    shutil.copytree(TINY, tmp_path / "json")
    (tmp_path / "json" / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="model_index.json must be valid JSON"):
        verify(tmp_path / "json")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_checked_where_that_is_asked_for(tmp_path, capsys, value, dtype):
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model" / "vae" / WEIGHTS
    state = {name: x.to(dtype) for name, x in load_file(path).items()}
    assert "values: all finite" in verify(tmp_path / "model", values=True)
    state["post_quant_conv.bias"][1] = value
    save_file(state, path)
    assert main(["verify", str(tmp_path / "model")]) == 0
    assert main(["verify", "--values", str(tmp_path / "model")]) == 2
    assert "but post_quant_conv.bias in" in capsys.readouterr().err


def test_values_in_8_bits(tmp_path):
    bad = torch.zeros(4).to(torch.float8_e4m3fn)
    bad.view(torch.uint8)[2] = 0x7F  # NaN
    folder = tiny_models.tiny_folder(tmp_path) / "vae"
    state = load_file(folder / WEIGHTS)
    name = "post_quant_conv.bias"
    save_file({**state, name: bad[: state[name].numel()]}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="post_quant_conv.bias|wrong shape"):
        verify(folder, values=True)


def test_bytes_are_compared_with_those_that_the_hub_published(tmp_path):
    """In the hub library's cache, and in a folder that it downloaded to."""
    whole = (TINY / "transformer" / WEIGHTS).read_bytes()
    digest = hashlib.sha256(whole).hexdigest()
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1" / "transformer"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.copy(TINY / "transformer" / "config.json", snapshot)
    (blobs / digest).write_bytes(whole)
    (snapshot / WEIGHTS).symlink_to(blobs / digest)
    said = f"{WEIGHTS}: sha256 {digest}, as published on the hub"
    assert verify(snapshot)[-1] == said
    local = tmp_path / "local"
    notes = local / ".cache" / "huggingface" / "download" / "transformer"
    notes.mkdir(parents=True)
    shutil.copytree(TINY / "transformer", local / "transformer")
    (notes / f"{WEIGHTS}.metadata").write_text(f"commit\n{digest}\n1700000000.0\n")
    assert verify(local / "transformer")[-1] == said
    assert said in verify(local)
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    (blobs / digest).write_bytes(flipped)
    (local / "transformer" / WEIGHTS).write_bytes(flipped)
    for folder in (snapshot, local / "transformer"):
        with pytest.raises(ValueError, match=f"published .sha256 {digest}.* download it again"):
            verify(folder)


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
    with pytest.raises(ValueError, match="a VAE or a text encoder, but is a LoRA"):
        verify(tmp_path / "lora.safetensors")
    assert main(["verify", str(tmp_path / "nothing")]) == 2


def test_download_tells_where_the_parts_are(monkeypatch, tmp_path, capsys):
    asked = []

    def fetch(repo, patterns, revision=None):
        asked.append((repo, revision))
        (tmp_path / repo / ("vae" if "Hunyuan" in repo else "model")).mkdir(parents=True)
        return tmp_path / repo

    monkeypatch.setattr("kandinsky_model.checkpoints.locate.download", fetch)
    assert main(["download", "t2v-lite-sft-10s", "--revision", "abc"]) == 0
    assert asked[0] == ("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-10s", "abc")
    assert len(asked) == 4
    out = capsys.readouterr().out
    assert "kandinsky5lite_t2v_sft_10s.safetensors" in out
    assert "Qwen2.5-VL-7B-Instruct" in out
    assert out.count("\n") == 4
