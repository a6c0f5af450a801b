# SPDX-License-Identifier: Apache-2.0
"""The command line: what it writes and prints, and that every failure is one sentence and exit
status 2."""

import io
import json
import logging
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import kandinsky_kernels
from kandinsky_model import pipeline
from kandinsky_model.__main__ import _OneLine, main
from kandinsky_model.checkpoints.locate import TINY
from kandinsky_model.cli.grammar import parser
from kandinsky_model.cli.models import preset_rows
from kandinsky_model.media import video
from kandinsky_model.sampling import settings
from kandinsky_model.tiny.judge import judge

from ..support import tiny_models
from .conftest import PROMPT


def frames_of(path):
    import av

    with av.open(str(path)) as container:
        comment = container.metadata.get("comment")
        return torch.stack(
            [
                torch.from_numpy(frame.to_ndarray(format="rgb24"))
                for frame in container.decode(video=0)
            ]
        ), comment


def test_generate_writes_mp4_and_latents_and_prints_both(run, tmp_path):
    status, out, err = run("generate", PROMPT, "-o", "a.mp4", "--seed", "7", "--negative", "blue")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == "a.mp4" and "seed 7" in out and "a.latents.safetensors" in out
    frames, comment = frames_of(tmp_path / "a.mp4")
    settings = json.loads(comment)
    assert frames.shape == (5, 64, 80, 3)
    wanted = {
        "prompt": PROMPT,
        "negative_prompt": "blue",
        "seed": 7,
        "num_inference_steps": 2,
        "vae_policy": "global",
    }
    assert wanted.items() <= settings.items()
    latents, stored = pipeline.load_latents(tmp_path / "a.latents.safetensors")
    assert latents.shape == (1, 2, 8, 10, 16) and stored.to_json() == comment


def test_decode_repeats_the_file_bit_for_bit(run, tmp_path):
    assert run("generate", PROMPT, "-o", "a.mp4")[0] == 0
    status, out, err = run("decode", "a.latents.safetensors", "-o", "b.mp4")
    assert (status, err) == (0, "") and out.startswith("b.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "a.mp4").unlink()
    assert run("decode", "a.latents.safetensors")[0] == 0 and (tmp_path / "a.mp4").exists()
    out = run("decode a.latents.safetensors -o c.gif --vae-policy official")[1]
    assert out.count("official decoding") == 1


def test_the_same_seed_gives_the_same_files(run, tmp_path):
    for name in "abcdefgh":  # one in two was another file, by the order of what its header says
        assert run(f"generate 'a red circle' -o {name}.mp4 --seed 7")[0] == 0
    for end in (".mp4", ".latents.safetensors"):
        assert len({(tmp_path / f"{name}{end}").read_bytes() for name in "abcdefgh"}) == 1


def test_a_memory_budget_repeats_the_file_and_preview_is_another(run, tmp_path, caplog):
    assert run("generate", PROMPT, "-o", "a.mp4", "--memory", "1.5 GiB")[0] == 0
    assert [line.split(":")[0] for line in caplog.messages if " of 1.61 GB" in line] == [
        "text",
        "sampling",
        "decoding",
    ]
    decode = "decode a.latents.safetensors"
    least = re.search(r"at least (\d+)", run(f"{decode} -o b.mp4 --memory 2mb")[2])[1]
    status, _, err = run(f"{decode} -o b.mp4 --memory-budget {least}")
    assert (status, err) == (0, "")
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    status, out, _ = run(f"{decode} -o c.mp4 --vae-policy preview")
    assert status == 0 and "preview decoding" in out
    frames, comment = frames_of(tmp_path / "c.mp4")
    assert frames.shape == (5, 64, 80, 3) and json.loads(comment)["vae_policy"] == "preview"
    status, _, err = run(f"{decode} -o d.mp4 --memory-budget 1kb")
    assert status == 2 and err.count("\n") == 1 and not (tmp_path / "d.mp4").exists()
    assert "requires a memory budget of at least" in err


def test_without_a_seed_one_is_printed_that_repeats_the_file(run, tmp_path):
    out = run("generate", PROMPT, "-o", "a.gif")[1]
    seed = out.split("seed ")[1].split(",")[0]
    assert run("generate", PROMPT, "-o", "b.gif", "--seed", seed)[0] == 0
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


def test_png_and_strip(run, tmp_path):
    status, out, _ = run("generate", PROMPT, "-o", "a.png", "--frames", "1", "--strip", "s.png")
    assert (
        status == 0 and out.splitlines()[:2] == ["a.png", "s.png"] and (tmp_path / "s.png").exists()
    )
    status, out, _ = run("generate", PROMPT, "-o", "b.png")
    assert out.splitlines()[:5] == [f"b_00{i}.png" for i in range(5)]


def test_seconds_are_rounded_to_whole_latent_frames(run):
    small = "--size 32x32 --steps 1 --guidance 1"
    status, _, err = run(f"generate x --seconds 1 --frames 5 {small}")
    assert status == 2 and "not allowed with argument" in err
    assert run(f"generate x {small} --seconds 0.7 --device cpu", own=False)[0] == 0
    assert pipeline.load_latents("out.latents.safetensors")[1].num_frames == 17


def test_bundled_model_is_the_default(run, tmp_path):
    if not TINY.is_dir():
        pytest.skip("the bundled model is not in this checkout")
    line = "generate 'a red circle' --steps 1 --frames 5 --device cpu --seed 1"
    assert run(line, own=False)[0] == 0
    frames, comment = frames_of(tmp_path / "out.mp4")
    assert frames.shape == (5, 160, 160, 3) and json.loads(comment)["model"] == "tiny"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", ""], "the prompt must say something"),
        (["generate", "x", "--size", "250x100"], "the nearest is 256x96"),
        (["generate", "x", "--size", "250"], "WIDTHxHEIGHT"),
        (["generate", "x", "--frames", "18"], "the nearest is 17 or 21"),
        (["generate", "x", "--frames", "many"], "invalid int value"),
        (["generate", "x", "--steps", "0"], "at least 1"),
        (["generate", "x", "--guidance", "nan"], "finite"),
        (["generate", "x", "--seed", "-3"], "the seed must lie in"),
        (["generate", "x", "--attention", "flash"], "invalid choice"),
        (["generate", "x", "--vae-policy", "fast"], "invalid choice"),
        (["generate", "x", "--memory-budget", "lots"], "write for example 10GB"),
        (["generate", "x", "--memory-budget", "1kb"], "a memory budget of at least"),
        (["generate", "x", "--model", "t2v-lite-sft-6s"], "did you mean t2v-lite-sft-5s"),
        (["generate", "x", "-o", "a.avi"], "must end in .mp4 or .webm or .gif or .png or .jpg"),
        (["generate", "x", "-o", "absent/a.mp4"], "existing directory"),
        (["generate", "x", "-o", "."], "must end in"),
        (["generate", "x", "--prompts", "a.txt"], "a prompt or a file of prompts, got both"),
        (["generate", "x", "--strip", "s.gif"], "must end in .png"),
        (["generate", "x", "--device", "pancake"], "use cpu"),
        (["decode", "absent.safetensors"], "absent.safetensors"),
        (["decode", __file__], "must be a safetensors file, but is a text file"),
        (["explode"], "invalid choice"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(run, tmp_path, arguments, words):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert (
        err.startswith("kandinsky: ")
        and words in err
        and err.count("\n") == 1
        and err.endswith("\n")
    ), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "wrong", "absent"])
def test_damaged_weights_are_one_sentence(run, tmp_path, damage):
    model = tiny_models.tiny_folder(tmp_path / "model")
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "wrong":
        file.write_bytes(
            (model / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
        )
    else:
        file.unlink()
    status, out, err = run("generate", "x", model=str(model))
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert {
        "cut": "complete safetensors",
        "wrong": "encoder.conv_in.conv.weight",
        "absent": "must hold .safetensors",
    }[damage] in err


def test_missing_codec_is_known_before_the_model_is_loaded(run, monkeypatch):
    import av

    def absent(name, mode):
        raise ValueError(name)

    monkeypatch.setattr(av.codec, "Codec", absent)
    monkeypatch.setattr(
        pipeline.Kandinsky5, "from_sources", lambda *_, **__: pytest.fail("loaded before the check")
    )
    status, _, err = run("generate", "x", "-o", "a.mp4")
    assert status == 2 and "H.264 encoder" in err and err.count("\n") == 1


def test_nan_is_one_sentence(run, tmp_path):
    model = tiny_models.tiny_folder(tmp_path / "model")
    dit = pipeline.load_dit(model)
    dit.out_layer.out_layer.bias[0] = float("nan")
    pipeline_weights = model / "transformer"
    tiny_models.save_dit(dit, pipeline_weights, tiny_models.NABLA)
    status, _, err = run("generate", "x", model=str(model))
    assert status == 2 and "step 1 of 2" in err and err.count("\n") == 1


def test_an_interrupt_keeps_the_finished_latents(run, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(video, "save", interrupt)
    status, out, err = run("generate", PROMPT, "-o", "a.mp4")
    told = "kandinsky: interrupted; go on with: kandinsky decode a.latents.safetensors\n"
    assert (status, out, err) == (130, "", told)
    assert [path.name for path in tmp_path.iterdir()] == ["a.latents.safetensors"]


def test_foreign_errors_are_one_sentence_and_debug_shows_them(run, monkeypatch):
    def break_down(*_):
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(settings, "check_settings", lambda *_, **__: break_down())
    status, _, err = run("generate", "x")
    assert status == 2 and err.count("\n") == 1 and err.startswith("kandinsky: KeyError")
    with pytest.raises(KeyError):
        main(["generate", "x", "--debug"])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_names_stages_and_speed_on_a_terminal_only(run, monkeypatch):
    assert run("generate", PROMPT)[2] == ""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run("generate", PROMPT)[0] == 0
    shown = terminal.getvalue()
    positions = [
        shown.find(stage) for stage in ("text", "sampling", "decoding", "decoding in scheme KKKK")
    ]
    assert -1 not in positions and positions == sorted(positions)
    assert "2/2" in shown and "s/step" in shown and "left" in shown


def test_doctor_reports_every_operator_and_the_surroundings(run):
    status, out, _ = run("doctor")
    assert status == 0
    for op, row in kandinsky_kernels.kernels().items():
        for device, what in row.items():
            assert any(
                op in line and device in line and what in line for line in out.splitlines()
            ), op
    for word in (
        torch.__version__,
        "diffusers",
        "encoder libx264",
        "bundled model",
        "hub",
        "CUDA C++ kernels",
        "cores",
    ):
        assert word in out


def test_presets_lists_every_one(run):
    from kandinsky_model.config import PRESETS

    status, out, _ = run("presets")
    *rows, sd, hd = out.splitlines()[1:]
    assert status == 0 and [line.split()[0] for line in rows] == list(PRESETS)
    assert sd.startswith("SD: 768x512, ") and hd.startswith("HD: 1280x768, ") and "1408x640" in hd


def test_the_readme_has_the_table_of_presets():
    readme = (Path(__file__).parents[2] / "kandinsky_model/README.md").read_text(encoding="utf-8")
    for row in preset_rows():
        assert "| " + " | ".join(row.values()) + " |" in readme.replace("`", ""), row["preset"]


def test_commands_of_the_readme_exist():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(kandinsky .*)$|`(kandinsky [^`]+)`", readme, re.MULTILINE)
    assert len(commands) > 5
    for line, inline in commands:
        assert parser().parse_args(shlex.split(line or inline, comments=True)[1:]).run


def test_drawn_clips_can_be_trained_on(run, tmp_path):
    status, out, err = run("draw-clips", "clips", "--count", "2")
    assert (status, err) == (0, "") and "2 clips" in out
    assert {path.name for path in (tmp_path / "clips").iterdir()} == {
        f"clip000{i}{end}" for i in (0, 1) for end in (".mp4", ".txt")
    }
    verdict = judge(frames_of(tmp_path / "clips" / "clip0001.mp4")[0])
    caption = (tmp_path / "clips" / "clip0001.txt").read_text()
    assert all(word in caption for word in (verdict.color, verdict.shape, verdict.background))
    assert run("draw-clips", "clips")[0] == 2


def test_train_and_check_hand_their_arguments_on(run, monkeypatch, tmp_path):
    import kandinsky_model.tiny.check
    import kandinsky_model.tiny.recipe
    from kandinsky_model.tiny.scenes import held_out

    calls = []
    shares = dict.fromkeys(
        ("color", "background", "color_and_background", "shape", "motion", "all"), 0.5
    )
    monkeypatch.setattr(
        kandinsky_model.tiny.recipe, "train_tiny", lambda *a, **k: calls.append((a, k)) or a[0]
    )
    monkeypatch.setattr(
        kandinsky_model.tiny.check,
        "check_tiny",
        lambda *a: calls.append(a) or {"prompts": 3, **shares},
    )
    assert run("train-tiny", "-o", "here", "--seed", "4") == (0, "here\n", "")
    status, out, _ = run("check-tiny", "here", "--count", "3", "--json", "r.json")
    assert (
        status == 0
        and out.count("50.0%") == 6
        and json.loads((tmp_path / "r.json").read_text())["prompts"] == 3
    )
    # more than there are: they come again
    assert run("check-tiny", "here", "--count", "50", "--lora", "some")[0] == 0
    assert calls == [
        (("here",), {"seed": 4, "resume": False, "device": "cpu"}),
        ("here", 0, None, None, held_out()[:3], None, None),
        ("here", 0, None, None, held_out() + held_out()[:2], None, "some"),
    ]


def test_no_log_line_steers_the_terminal():
    record = logging.LogRecord("x", 30, "", 0, "skipped %s", ("a\x1b[2J\nb.mp4",), None)
    assert _OneLine("note: %(message)s").format(record) == "note: skipped a\\x1b[2J\\nb.mp4"
