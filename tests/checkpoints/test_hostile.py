# SPDX-License-Identifier: Apache-2.0
"""Files and configurations that claim anything at all are refused in one sentence, at once: before
a network of the claimed size is built and before a read that never ends."""

import json
import os
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky_model.__main__ import main
from kandinsky_model.checkpoints.headers import CONFIG_NAME, INDEX_NAMES, WEIGHTS_NAME
from kandinsky_model.checkpoints.load import load_dit, load_vae
from kandinsky_model.checkpoints.verify import verify
from kandinsky_model.config import VAEConfig
from kandinsky_model.text.tiny import TinyTextEncoder

from ..support.tiny_models import tiny_folder

SECONDS = 60.0  # each refusal takes milliseconds; before, minutes were not enough


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path)


def refusal(call, *args):
    """The one sentence of a call that is refused soon."""
    start = time.perf_counter()
    with pytest.raises((ValueError, OSError)) as caught:
        call(*args)
    assert time.perf_counter() - start < SECONDS
    text = str(caught.value)
    assert text.isprintable()
    return text


def change_config(part, **values):
    path = part / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BILLION = 10**9


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_visual_blocks": BILLION}, "num_visual_blocks must lie in 1..1,000, got 1000000000"),
        ({"num_text_blocks": 900}, "wrong (1): num_text_blocks 900 instead of 1"),
        ({"model_dim": 2**20}, "model_dim 1048576 instead of"),
        ({"model_dim": 2**70}, "model_dim must lie in"),
        ({"ff_dim": "many"}, "ff_dim must be made of whole numbers, got 'many'"),
        ({"ff_dim": -1}, "ff_dim must lie in"),
        ({"ff_dim": [7, 7]}, "ff_dim must be made of whole numbers"),
        ({"ff_dim": True}, "whole numbers"),
        ({"ff_dim": 1.5}, "whole numbers"),
        ({"axes_dims": []}, "axes_dims must be three numbers"),
        ({"axes_dims": [0, 0, 0]}, "axes_dims must lie in"),
        ({"axes_dims": 64}, "axes_dims must be three numbers"),
        ({"axes_dims": [16, 24, [24]]}, "axes_dims must be made of whole numbers"),
        ({"patch_size": [0, 2, 2]}, "patch_size must lie in"),
        ({"attention_type": "nabla", "attention_P": None}, "missing (1): attention_P"),
        (
            {
                "attention_type": "nabla",
                "attention_P": "most",
                "attention_wT": 1,
                "attention_wH": 1,
                "attention_wW": 1,
            },
            "keep_mass must be a number",
        ),
    ],
)
def test_a_configuration_is_compared_with_the_weights(folder, values, words):
    change_config(folder / "transformer", **values)
    for call in (load_dit, verify):
        assert words in refusal(call, folder / "transformer")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"layers_per_block": BILLION}, "layers_per_block must lie in 1..1,000"),
        ({"layers_per_block": 999}, "layers_per_block 999 instead of 1"),
        ({"block_out_channels": [2**20] * 8}, "block_out_channels"),
        ({"block_out_channels": []}, "block_out_channels must be 1 to 8 numbers"),
        ({"norm_num_groups": 0}, "norm_num_groups must lie in"),
        ({"latent_channels": [16, 16]}, "latent_channels must be made of whole numbers"),
        ({"norm_num_groups": 7}, "multiples of norm_num_groups = 7"),
        ({"scaling_factor": 0}, "scaling_factor must be positive"),
        ({"scaling_factor": "1"}, "scaling_factor must be a number"),
    ],
)
def test_so_is_that_of_a_vae(folder, values, words):
    change_config(folder / "vae", **values)
    for call in (load_vae, verify):
        assert words in refusal(call, folder / "vae")


def test_configurations_that_are_no_objects(folder, capsys):
    for content in ("[]", "null", "7", '"a"', "{", "[" * 10**5):
        (folder / "transformer" / CONFIG_NAME).write_text(content)
        assert CONFIG_NAME in refusal(load_dit, folder / "transformer")
        assert main(["generate", "a", "--model", str(folder), "-o", "a.png"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("kandinsky: ")
        assert error.count("\n") == 1
        assert "Error:" not in error, "a foreign exception"


def renamed(folder, change):
    """The transformer's tensors under other names, in one file without a configuration."""
    path = folder / "transformer" / WEIGHTS_NAME
    state = load_file(path)
    os.remove(folder / "transformer" / CONFIG_NAME)
    save_file(change(state), path)
    return path


def test_a_block_with_a_huge_number(folder):
    name = "visual_transformer_blocks.999999.x"
    path = renamed(folder, lambda state: {**state, name: torch.zeros(1)})
    for call in (load_dit, verify):
        assert "there is a visual_transformer_blocks.999999" in refusal(call, path)


def test_a_million_blocks(folder):
    """Their names alone are the size of a header; the network is never built."""
    more = {f"visual_transformer_blocks.{i}.x": torch.zeros(0) for i in range(20_000)}
    path = renamed(folder, lambda state: {**state, **more})
    assert "num_visual_blocks must lie in 1..1,000, got 20000" in refusal(load_dit, path)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_matrices_of_other_ranks(folder, shape):
    name = "visual_embeddings.in_layer.weight"
    path = renamed(folder, lambda state: {**state, name: torch.zeros(shape)})
    assert "must hold matrices where a Kandinsky 5 transformer has them" in refusal(load_dit, path)


def test_control_characters_in_names_do_not_reach_the_terminal(folder):
    path = renamed(
        folder, lambda state: {**state, "\x1b[2J\nkandinsky: all is well": torch.zeros(1)}
    )
    assert "\\x1b[2J\\nkandinsky: all is well" in refusal(load_dit, path)
    path = renamed_again(path, {"n" * 5000: torch.zeros(1)})
    assert len(refusal(load_dit, path)) < 1000


def renamed_again(path, more):
    state = {name: x for name, x in load_file(path).items() if name.isprintable()}
    save_file({**state, **more}, path)
    return path


def header(entries, size=4):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {**ENTRY, "shape": [-1]}},
        {"a": {**ENTRY, "shape": ["1"]}},
        {"a": {**ENTRY, "shape": [True]}},
        {"a": {**ENTRY, "shape": [2**80]}},
        {"a": {**ENTRY, "shape": 1}},
        {"a": {**ENTRY, "dtype": 7}},
        {"a": {**ENTRY, "data_offsets": []}},
        {"a": {**ENTRY, "data_offsets": "04"}},
        {"a": None},
    ],
)
def test_headers_of_any_content(tmp_path, entries):
    path = tmp_path / "a.safetensors"
    path.write_bytes(header(entries))
    assert "must be a" in refusal(load_dit, path)


def test_a_header_of_a_terabyte(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 2**39) + b"{")
    os.truncate(path, 2**40)
    assert "must be a safetensors file" in refusal(load_dit, path)


def test_what_never_ends_is_not_opened(folder, tmp_path):
    weights = folder / "transformer" / WEIGHTS_NAME
    weights.unlink()
    os.mkfifo(weights)
    for path in (weights, folder / "transformer"):
        assert "but is a FIFO" in refusal(load_dit, path)
        assert "but is a FIFO" in refusal(verify, path)
    assert "but is a device" in refusal(load_dit, "/dev/zero")


@pytest.mark.parametrize("name", [CONFIG_NAME, "model.safetensors"])
def test_a_text_encoder_of_fifos_is_not_opened(folder, name):
    (folder / "text_encoder" / name).unlink()
    os.mkfifo(folder / "text_encoder" / name)
    assert "but is a FIFO" in refusal(TinyTextEncoder.load, folder / "text_encoder")


def test_links_to_themselves_and_failing_disks_are_told(folder):
    weights = folder / "transformer" / WEIGHTS_NAME
    weights.unlink()
    weights.symlink_to(weights)
    told = refusal(load_dit, folder / "transformer")
    assert "must be a file that can be read, got 'Too many" in told
    weights.unlink()
    weights.symlink_to("/proc/self/mem")  # a regular file, of which no byte can be read
    assert "must be a file that can be read, got 'Input/output" in refusal(load_dit, weights)


@pytest.mark.parametrize(
    "line",
    [
        "generate --prompts /dev/zero",
        "generate --config zero.yaml",
        "generate x --image /dev/zero",
        "generate x --image fifo.png",
        "generate --config fifo.mp4",
    ],
)
def test_inputs_of_a_command_end(tmp_path, monkeypatch, capsys, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    for name in ("fifo.png", "fifo.mp4"):
        os.mkfifo(tmp_path / name)
    assert main([*line.split(), "-o", "a.gif"]) == 2
    err = capsys.readouterr().err
    assert "but goes on" in err or "must be a regular file" in err


def test_no_name_steers_the_terminal(folder, capsys):
    index = {"weight_map": {"a": "x\x1b[2J\nkandinsky: all is well"}}
    (folder / "transformer" / INDEX_NAMES[0]).write_text(json.dumps(index))
    assert main(["verify", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err[:-1].isprintable() and "the index lists x\\x1b[2J\\nkandinsky" in err


@pytest.mark.parametrize(
    "content",
    [
        {"weight_map": ["a"]},
        {"weight_map": {"a": 7}},
        {"weight_map": {"a": "../secret.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {}},
        {},
    ],
)
def test_an_index_names_only_files_beside_it(tmp_path, content):
    (tmp_path / INDEX_NAMES[0]).write_text(json.dumps(content))
    assert "must name a file beside it" in refusal(load_dit, tmp_path)


def test_released_sizes_are_within_the_limits():
    assert VAEConfig().block_out_channels == (128, 256, 512, 512)
