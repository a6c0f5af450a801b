# SPDX-License-Identifier: Apache-2.0
"""No command writes over one of its inputs, by any of the options that name an output."""

import shutil

import pytest

from kandinsky_model.cli.grammar import COMMANDS, parser

from ..support.train_folders import clips

# command lines that would write over what they read, in a folder with a model and a picture
REFUSED = {
    "inspect": [
        "inspect x -o . --image density.png",
        "inspect x -o . --image blocks_003.png",
        "inspect x -o . --lora numbers.json",
        "inspect x -o . --lora mass.png:0.5",
    ],
    "train": [
        "train clips -o model --full --model model",
        "train clips -o model --full --model model/transformer",
        "train clips -o . --model training/model",
        "train clips -o . --model lora.safetensors",
        "train samples -o .",
        "train samples/clips -o .",
    ],
    "check-tiny": [
        "check-tiny model --json model/transformer/config.json",
        "check-tiny model --json model/training.json",
        "check-tiny model --lora lora.safetensors --json lora.safetensors",
        "check-tiny model --json link.json",
    ],
    "generate": [
        "generate x -o b.mp4 --vae b.run.safetensors",
        "generate x -o b.mp4 --lora b.latents.safetensors",
        "generate x -o b.mp4 --strip density.png --image density.png",
    ],
}
# what the other commands that write do instead
ELSEWHERE = {
    "decode": "test_saving.py",
    "resume": "test_saving.py",
    "quantize": "takes a new or empty folder",
    "draw-clips": "takes a new or empty folder",
    "train-tiny": "reads nothing but what it is told to go on with",
    "comfyui": "takes a folder that it wrote, or none",
    "download": "writes into the hub library's cache",
}
SILENT = {"presets", "verify", "doctor"}  # commands that write no file
OUTPUTS = {"output", "folder", "strip", "json"}  # arguments that name what is written


@pytest.fixture
def inputs(folder, tmp_path):
    """What the command lines read; every file has a content of its own."""
    model = shutil.copytree(folder, tmp_path / "model")
    shutil.copytree(model, tmp_path / "training" / "model")
    (model / "training.json").write_text('{"stages": []}')
    names = ["lora.safetensors", "b.run.safetensors", "b.latents.safetensors", "numbers.json"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "link.json").symlink_to(model / "vae" / "config.json")
    made = clips(tmp_path / "samples" / "clips", count=1)
    shutil.copytree(made, tmp_path / "clips")
    for name in ("density.png", "blocks_003.png", "mass.png"):
        picture(tmp_path / name)
    return tmp_path


def picture(path):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(path)


@pytest.mark.parametrize("line", [line for lines in REFUSED.values() for line in lines])
def test_no_command_writes_over_its_inputs(run, inputs, line):
    before = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    status, out, err = run(line)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "the output must not be one of the inputs" in err, err
    after = {path: path.read_bytes() for path in inputs.rglob("*") if path.is_file()}
    assert after == before


def test_the_table_knows_every_command():
    assert REFUSED.keys() | ELSEWHERE.keys() | SILENT == {one.name for one in COMMANDS}


def test_commands_that_write_no_file_have_no_argument_for_one():
    commands = next(action.choices for action in parser()._actions if action.choices)
    for name in SILENT:
        for action in commands[name]._actions:
            assert action.dest not in OUTPUTS or action.const is True, (name, action.dest)


def test_a_report_beside_a_model_can_be_written_again(run, inputs, monkeypatch):
    """It is no part of the model, though it lies in its folder."""
    import kandinsky_model.tiny.check as check

    def checked(*_):
        return {"prompts": 1, "samples": []} | dict.fromkeys(
            ("color", "background", "color_and_background", "shape", "motion", "all"), 1.0
        )

    monkeypatch.setattr(check, "check_tiny", checked)
    for _ in range(2):
        status, out, err = run("check-tiny model --json model/report.json --count 1")
        assert status == 0 and out.endswith("model/report.json\n"), err
