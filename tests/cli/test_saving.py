# SPDX-License-Identifier: Apache-2.0
"""What was sampled survives full disks, forbidden folders and signals, and no command writes over
its inputs."""

import errno
import io
import os
import signal
import sys
import tempfile
import threading

import pytest
import torch

from kandinsky_model import __main__, pipeline
from kandinsky_model.checkpoints import locate as locations
from kandinsky_model.cli.interrupts import NUMBERS, Interrupts
from kandinsky_model.sampling import result
from kandinsky_model.sampling.result import Video, load_latents
from kandinsky_model.sampling.run import Run

GENERATE = "generate 'a red circle' -o a.mp4 --seed 5"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def temporary(tmp_path_factory, monkeypatch):
    """The temporary folder of this test alone."""
    folder = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def failing(real, error, folders):
    """`real`, a function (tensors, path, ...), that raises `error` for paths below `folders`."""

    def save(tensors, path, *rest):
        if any(folder in path.resolve().parents for folder in folders):
            raise error
        return real(tensors, path, *rest)

    return save


def kill_after_one_step(steps, number):
    yield next(steps)
    os.kill(os.getpid(), number)
    yield from steps


FAULTS = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EACCES, "Denied")]


@pytest.mark.parametrize("error", [*FAULTS, KeyboardInterrupt()], ids=repr)
def test_latents_go_to_the_temporary_folder(run, tmp_path, temporary, monkeypatch, error):
    monkeypatch.setattr(result, "save_file", failing(result.save_file, error, [tmp_path]))
    status, out, err = run(GENERATE)
    (saved,) = temporary.glob("*/a.latents.safetensors")
    assert load_latents(saved)[1].seed == 5
    if isinstance(error, KeyboardInterrupt):
        assert status == 130 and str(saved) in err
    else:
        assert status == 0 and str(saved) in out and (tmp_path / "a.mp4").exists()


def test_a_user_at_a_terminal_is_asked_where_to_write(run, tmp_path, temporary, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "taken").write_text("as it was")
    full = failing(result.save_file, FAULTS[0], [tmp_path, temporary])

    def save(tensors, path, *rest):
        return real(tensors, path, *rest) if "elsewhere" in str(path) else full(tensors, path)

    real = result.save_file
    monkeypatch.setattr(result, "save_file", save)
    answers = ["absent/folder/x", "taken", "~nobody-here/x", "x" * 300, "a\0b", "elsewhere"]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(answers) + "\n"))
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    status, out, _ = run(GENERATE)
    assert status == 0 and "latents in elsewhere/a.latents.safetensors" in out
    assert terminal.getvalue().count("another folder, or nothing:") == 6
    assert (tmp_path / "taken").read_text() == "as it was"
    assert not list(temporary.iterdir())


def test_without_any_place_it_is_one_sentence(run, tmp_path, temporary, monkeypatch):
    full = failing(result.save_file, FAULTS[0], [tmp_path, temporary])
    monkeypatch.setattr(result, "save_file", full)
    status, out, err = run(GENERATE)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "saving the latents requires a folder that can be written" in err
    assert not list(tmp_path.iterdir()) and not list(temporary.iterdir())


@pytest.mark.parametrize("number", NUMBERS)
def test_each_signal_keeps_the_run(run, tmp_path, monkeypatch, number):
    real = pipeline.sample
    monkeypatch.setattr(pipeline, "sample", lambda *args: kill_after_one_step(real(*args), number))
    before = signal.getsignal(number)
    status, out, err = run(GENERATE)
    assert (status, out) == (128 + number, "") and "kandinsky resume a.run.safetensors" in err
    assert Run.load(tmp_path / "a.run.safetensors").step == 1
    assert signal.getsignal(number) is before
    monkeypatch.setattr(pipeline, "sample", real)
    assert run("resume a.run.safetensors --device cpu")[0] == 0
    assert run("generate 'a red circle' -o b.mp4 --seed 5")[0] == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_a_second_signal_waits_for_the_run_file(run, tmp_path, monkeypatch):
    real, to_bytes = pipeline.sample, Run.to_bytes

    def interrupted(self):
        data = to_bytes(self)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return data

    monkeypatch.setattr(Run, "to_bytes", interrupted)
    monkeypatch.setattr(
        pipeline, "sample", lambda *args: kill_after_one_step(real(*args), signal.SIGINT)
    )
    status, _, err = run(GENERATE)
    assert status == 128 + signal.SIGTERM and "kandinsky resume a.run.safetensors" in err
    assert Run.load(tmp_path / "a.run.safetensors").step == 1


def test_a_signal_waits_for_the_latents(run, tmp_path, monkeypatch):
    save_latents = Video.save_latents

    def interrupted(self, path):
        os.kill(os.getpid(), signal.SIGINT)
        return save_latents(self, path)

    monkeypatch.setattr(Video, "save_latents", interrupted)
    status, out, err = run(GENERATE)
    assert (status, out) == (130, "")
    assert err.endswith("interrupted; go on with: kandinsky decode a.latents.safetensors\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.latents.safetensors"]


def test_a_second_signal_belongs_to_the_first(run, monkeypatch):
    """Such as Ctrl-C pressed twice: it neither ends the clean-up nor is a traceback."""
    cleaned = []

    def locate(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            cleaned.append(True)

    def complain(*told_of, **options):
        os.kill(os.getpid(), signal.SIGHUP)
        return told(*told_of, **options)

    told = __main__._complain
    monkeypatch.setattr(locations, "locate", locate)
    monkeypatch.setattr(__main__, "_complain", complain)
    assert run(GENERATE) == (128 + signal.SIGTERM, "", "kandinsky: interrupted\n")
    assert cleaned


def test_an_interruption_that_a_library_makes_an_error_of(run, monkeypatch):
    def locate(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise TypeError("could not determine the shape") from None

    monkeypatch.setattr(locations, "locate", locate)
    status, out, err = run(GENERATE)
    assert (status, out) == (130, "")
    assert err == "kandinsky: interrupted; could not determine the shape\n"


def test_a_signal_before_any_work(run, monkeypatch):
    monkeypatch.setattr(__main__, "parse", lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert run(GENERATE) == (130, "", "kandinsky: interrupted\n")


def test_signals_that_the_parent_ignores_stay_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts().handled():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_cannot_receive_signals():
    failures = []

    def work():
        try:
            with Interrupts().handled():
                pass
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


# Outputs that are inputs, or one another


@pytest.mark.parametrize("names", ["a.png b/../a.png", "a.png a_002.png"])
def test_a_strip_does_not_take_the_place_of_a_frame(run, tmp_path, names):
    (tmp_path / "b").mkdir()
    output, strip = names.split()
    status, out, err = run(f"generate x -o {output} --strip {strip}")
    assert (status, out) == (2, "") and "the strip must not be the output" in err
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def picture(path):
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(path)


@pytest.mark.parametrize("link", [None, os.symlink, os.link], ids=["itself", "symlink", "link"])
@pytest.mark.parametrize(
    "command",
    [
        "generate x -o in.png --frames 1 --image in.png",
        "generate x -o a.mp4 --strip in.png --image in.png",
        "generate x -o in.png --image in_001.png",
        "generate x -o in.png --frames 1 --last-image in.png",
        "generate --prompts=in.png -o in.png",
    ],
)
def test_generate_does_not_write_over_its_inputs(run, tmp_path, command, link):
    for name in ("in.png", "in_001.png"):
        picture(tmp_path / name)
    contents = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if "prompts" in command:
        (tmp_path / "in_000.png").write_text("a red circle\n")
        command = command.replace("--prompts=in.png", "--prompts=in_000.png")
    elif link:
        link(tmp_path / "in.png", tmp_path / "out.png")
        command = command.replace("-o in.png", "-o out.png").replace("strip in", "strip out")
        if "in_001" in command:
            link(tmp_path / "in_001.png", tmp_path / "out_001.png")
            command = command.replace("--image in_001", "--image out_001")
    status, out, err = run(command)
    assert (status, out) == (2, "") and "must not be one of the inputs" in err, err
    assert all(path.read_bytes() == data for path, data in contents.items())


def test_decode_and_resume_do_not_write_over_their_inputs(run, tmp_path, monkeypatch):
    real = pipeline.sample
    monkeypatch.setattr(
        pipeline, "sample", lambda *args: kill_after_one_step(real(*args), signal.SIGINT)
    )
    assert run(GENERATE)[0] == 130
    monkeypatch.setattr(pipeline, "sample", real)
    assert run(GENERATE)[0] == 0
    for name, source in (("clip.mp4", "a.latents"), ("run.mp4", "a.run")):
        (tmp_path / name).write_bytes((tmp_path / f"{source}.safetensors").read_bytes())
    data = (tmp_path / "clip.mp4").read_bytes()
    for line in ("decode clip.mp4", "decode clip.mp4 -o clip.mp4", "resume run.mp4 -o run.mp4"):
        status, out, err = run(f"{line} --device cpu")
        assert (status, out) == (2, "") and "must not be one of the inputs" in err, (line, err)
    (tmp_path / "b.latents.safetensors").symlink_to(tmp_path / "a.run.safetensors")
    assert run("resume a.run.safetensors -o b.mp4 --device cpu")[0] == 2
    assert (tmp_path / "clip.mp4").read_bytes() == data
    assert torch.isfinite(Run.load(tmp_path / "run.mp4").latents).all()


# What is refused before a model is loaded


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "caf\udce9"], "the prompt must be UTF-8, but its character 4"),
        (["generate", "x", "--negative", "\udcff"], "the negative prompt must be UTF-8"),
        (["generate", "--prompts=latin.txt"], "line 2 of latin.txt is not"),
        (
            ["generate", "x", "--lora", "absent.safetensors"],
            "absent.safetensors with 0; name",
        ),
        (["generate", "x", "--image", "absent.png"], "absent.png"),
        (["generate", "x", "--cache", "mag"], "mag"),
        (["generate", "x", "--seeds", "1,2", "--seed", "3"], "leave one of them out"),
        (["generate", "x", "--seeds", "0"], "a number of them from 1 on"),
        (["generate", "x", "--seeds", "1,-2"], "the seed must lie in"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    run, tmp_path, monkeypatch, arguments, words
):
    (tmp_path / "latin.txt").write_bytes("a red circle\ncafé\n".encode("latin-1"))

    def loaded(*_, **__):
        pytest.fail("loaded before the check")

    monkeypatch.setattr(pipeline.Kandinsky5, "from_sources", loaded)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and words in err and err.count("\n") == 1, err


def test_seeds_and_prompts_make_a_file_each(run, tmp_path, monkeypatch):
    status, out, _ = run("generate 'a red circle' -o a.gif --seeds 7,5")
    assert status == 0 and out.splitlines()[::2] == ["a_000.gif", "a_001.gif"]
    stdin = io.TextIOWrapper(io.BytesIO("\ufeffa red circle\n\na blue square\n".encode()))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run("generate --prompts=- -o b.gif --seeds 2 --seed 5")[0] == 0
    made = [load_latents(path)[1] for path in sorted(tmp_path.glob("b_*.latents.safetensors"))]
    assert [(one.prompt, one.seed) for one in made] == [
        ("a red circle", 5),
        ("a red circle", 6),
        ("a blue square", 5),
        ("a blue square", 6),
    ]
    assert (tmp_path / "a_001.gif").read_bytes() == (tmp_path / "b_000.gif").read_bytes()
