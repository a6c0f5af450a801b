# SPDX-License-Identifier: Apache-2.0
"""Options from files, and the words of the command line that are not about one command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kandinsky_kernels
import kandinsky_model
from kandinsky_model.cli import config, grammar
from kandinsky_model.media.comment import read_comment
from kandinsky_model.sampling.result import load_latents

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("end", [".mp4", ".webm", ".gif", ".png", ".jpg", ".latents.safetensors"])
def test_again_with_the_settings_of_a_file(run, tmp_path, end):
    """The same file comes out, bit for bit."""
    output = ".mp4" if end == ".latents.safetensors" else end
    frames = "--frames 1" if end in (".png", ".jpg") else ""
    line = f"generate 'a \"red\" circle' -o a{output} --seed 7 --guidance 2.5 --negative=-blue"
    assert run(f"{line} {frames}")[0] == 0
    status, _, err = run(f"generate --config a{end} -o b{output} --device cpu", own=False)
    assert (status, err) == (0, "")
    for name in (output, ".latents.safetensors"):
        assert (tmp_path / f"a{name}").read_bytes() == (tmp_path / f"b{name}").read_bytes()
    assert load_latents(tmp_path / "b.latents.safetensors")[1].negative_prompt == "-blue"


def parsed(*words):
    return grammar.parse(["generate", *words])


def test_the_command_line_goes_before_a_file(tmp_path):
    yaml, js = tmp_path / "a.yaml", tmp_path / "a.json"
    yaml.write_text(
        "prompt: a red circle\nsize: [80, 64]\nsteps: 3\nseconds: 2.0\nseeds: [5]\n"
        "lora: [a:0.5, b]\nexpand: true\ntext-cache: false\nscheduler_scale: 4\nnegative: -blue\n"
    )
    js.write_text('{"prompt": "-x", "seed": 3, "size": "80x64", "memory": "1GB"}')
    args = parsed("--config", str(yaml))
    assert (args.prompt, args.size, args.steps, args.seconds) == ("a red circle", (80, 64), 3, 2.0)
    assert (args.seeds, args.lora, args.negative) == ([5], [("a", 0.5), ("b", 1.0)], "-blue")
    assert args.expand and not args.text_cache and args.scheduler_scale == 4
    args = parsed("a blue square", "--config", str(yaml), "--steps", "9", "--frames", "5")
    assert (args.prompt, args.steps, args.frames, args.seconds) == ("a blue square", 9, 5, None)
    args = parsed("--config", str(js))
    assert (args.prompt, args.seed, args.memory_budget) == ("-x", 3, 10**9)
    args = parsed("--config", str(js), "--seeds", "1,2", "--prompts", "many.txt")
    assert (args.seed, args.seeds, args.prompt) == (None, [1, 2], None)


def test_every_option_of_generate_can_stand_in_a_file():
    given = vars(parsed("x"))
    own = {"run", "chatty", "debug", "config"}
    names = {{"memory_budget": "memory"}.get(name, name) for name in given.keys() - own}
    assert names == set(config.KEYS)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.yaml", "stepz: 3", "got 'stepz'"),
        ("a.yaml", "- 3", "must hold options by name, got list"),
        ("a.yaml", "a: [", "must be valid YAML or JSON"),
        ("a.json", "{", "must be valid YAML or JSON"),
        ("a.json", '{"steps": "many"}', "invalid int value: 'many'"),
        ("a.mp4", "no video", "must be a video that PyAV can read"),
        ("a.png", "no picture", "must be a picture that Pillow can read"),
        ("a.yml", None, "a.yml"),
        ("a.gif", None, "a.gif must be a file"),
    ],
)
def test_files_that_hold_no_options_are_one_sentence(run, tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    status, out, err = run(f"generate x --config {name}")
    assert (status, out) == (2, "") and words in err and err.count("\n") == 1, err


def test_pictures_of_others_have_no_settings(run, tmp_path):
    from PIL import Image

    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    assert read_comment(tmp_path / "a.png") == ""
    status, _, err = run("generate x --config a.png")
    assert status == 2 and "must hold the settings that generate puts into its files" in err


def test_versions_agree(run):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    stated = re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1]
    versions = {kandinsky_kernels.__version__, kandinsky_model.__version__, stated}
    assert len(versions) == 1
    assert run("--version") == (0, f"kandinsky {versions.pop()}\n", "")


def child(code, **environment):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    code = "import sys, os; from kandinsky_model.__main__ import main\n"
    code += "assert 'torch' not in sys.modules\n"
    code += "try: main(['--version'])\nexcept SystemExit: print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: os.environ[name] for name in os.environ if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = str(ROOT)
    run = dict(env=environment, capture_output=True, text=True, check=True)
    assert subprocess.run([sys.executable, "-c", code], **run).stdout.endswith("passive\n")
    assert child(code, OMP_WAIT_POLICY="active").endswith("active\n")


def test_the_shell_completes_commands_and_options():
    pytest.importorskip("argcomplete")

    def completed(line):
        environment = {
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "COMP_TYPE": "9",
            "_ARGCOMPLETE_IFS": "\n",
        }
        code = "from kandinsky_model.__main__ import main; main()"
        return child(code, **environment).split()

    assert completed("kandinsky gene") == ["generate"]
    assert "--seeds" in completed("kandinsky generate --see")


@pytest.fixture
def no_hub(monkeypatch):
    """The hub is asked without its cache's switches, and answers nothing."""
    import huggingface_hub
    from huggingface_hub import constants

    class Session:
        def head(self, *_, **__):
            raise ConnectionError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    return Session


def test_doctor_asks_the_hub(run, no_hub, monkeypatch):
    assert "no answer from http" in run("doctor")[1]
    monkeypatch.setattr(no_hub, "head", lambda *_, **__: None)
    assert "online (http" in run("doctor")[1]


def test_doctor_names_a_switch_that_means_nothing(run, no_hub, monkeypatch):
    assert "KANDINSKY_KERNELS" not in run("doctor")[1]
    monkeypatch.setenv("KANDINSKY_KERNELS", "triton")
    assert "'triton' means nothing" in run("doctor")[1]


def test_doctor_as_json_is_the_report(run, no_hub):
    status, out, _ = run("doctor --json")
    facts = json.loads(out)
    assert status == 0 and set(facts) == {"versions", "devices", "operators", "files"}
    assert facts["operators"].keys() >= kandinsky_kernels.kernels().keys()
    assert facts["versions"]["torch"] in run("doctor")[1]
