# SPDX-License-Identifier: Apache-2.0
"""Interrupted runs: what is kept, that going on gives the bits of a run in one piece, and
refusals."""

import json
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kandinsky_model import pipeline
from kandinsky_model.__main__ import main
from kandinsky_model.sampling.result import load_latents
from kandinsky_model.sampling.run import Interrupted, Run
from kandinsky_model.sampling.step_cache import FirstBlockCache, MagCache

from ..support import tiny_models
from ..support.tiny_models import SMALL, SMALL_ARGS

PROMPT = "a red circle moving right"
STEPS = dict(SMALL, num_inference_steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder):
    return pipeline.load(folder, device="cpu")


def stop_after(count):
    """A callback that acts like Ctrl-C once so many steps are done."""

    def callback(stage, step, steps, latents):
        if stage == "sampling" and step == count:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_going_on_gives_the_same_bits(model, tmp_path, count):
    prompts = [PROMPT, "a blue square"]
    wanted = model.generate(prompts, "green", seed=3, **STEPS)
    with pytest.raises(Interrupted, match=f"after {count} of 4 steps") as caught:
        model.generate(
            prompts,
            "green",
            seed=3,
            callback=stop_after(count),
            **STEPS,
        )
    for run in (caught.value.run, Run.load(caught.value.run.save(tmp_path / "a.run.safetensors"))):
        model.text = None  # everything a prompt can say is in the run
        again = model.resume(run)
        assert [video.settings for video in again] == [video.settings for video in wanted]
        assert all(
            torch.equal(ours.latents, theirs.latents)
            for ours, theirs in zip(again, wanted, strict=True)
        )


def test_pictures_and_precision_are_kept(model, tmp_path):
    model.preset = replace(
        model.preset,
        task="i2v",
        sizes=((96, 96),),
    )
    image = torch.randint(256, (60, 100, 3), dtype=torch.uint8)
    settings = dict(
        image=image,
        last_image=255 - image,
        num_frames=25,
        num_inference_steps=3,
        precision="reference",
        cache="first-block",
    )
    wanted = model.generate(PROMPT, seed=1, **settings)
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, seed=1, callback=stop_after(1), **settings)
    run = Run.load(caught.value.run.save(tmp_path / "a.run.safetensors"))
    assert run.latents.dtype == torch.bfloat16
    assert set(run.given.frames) == {0, 6}
    (again,) = model.resume(run)
    assert again.settings == wanted.settings
    assert torch.equal(again.latents, wanted.latents)


class Stopping:
    """Raises like Ctrl-C in the n-th call of a block, that is in the middle of a step."""

    def __init__(self, block, call):
        self.left = call
        self.handle = block.register_forward_pre_hook(self.count)

    def count(self, *_):
        self.left -= 1
        if self.left == 0:
            self.handle.remove()
            raise KeyboardInterrupt


CACHES = {
    "mag": MagCache(((1.0, 1.01, 1.2, 1.01, 1.01, 1.0),) * 2, retention=0.0),
    "first-block": FirstBlockCache(threshold=0.6, most_skipped=2),
}


def take_cache(monkeypatch, name):
    """Let every run with a cache have this one."""
    for module in ("sampling.settings", "pipeline"):
        monkeypatch.setattr(
            f"kandinsky_model.{module}.make_cache",
            lambda chosen, _: None if chosen == "none" else CACHES[name],
        )


@pytest.mark.parametrize("cache", ["mag", "first-block"])
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("call", [1, 2, 3, 5, 6, 8])
def test_a_cache_goes_on_exactly(model, tmp_path, monkeypatch, cache, block, call):
    """Wherever the run is stopped: the memories of the cache are in the file, and the step that was
    interrupted is done again as it was decided."""
    take_cache(monkeypatch, cache)
    settings = dict(SMALL, num_inference_steps=6, seed=5, cache="first-block")
    whole = model.generate(PROMPT, **settings)
    hook = Stopping(model.dit.visual_transformer_blocks[block], call)
    try:
        video = model.generate(PROMPT, **settings)
    except Interrupted as stop:
        run = Run.load(stop.run.save(tmp_path / "a.run.safetensors"))
        assert 0 <= run.step < 6
        (video,) = model.resume(run)
    finally:
        hook.handle.remove()
    assert torch.equal(video.latents, whole.latents)
    plain = model.generate(PROMPT, **settings | {"cache": "none"})
    assert not torch.equal(plain.latents, whole.latents)  # something was reused


@pytest.mark.parametrize("cache", ["mag", "first-block"])
def test_a_cache_skips_after_the_interruption_what_it_would_have_skipped(
    model, tmp_path, monkeypatch, cache
):
    take_cache(monkeypatch, cache)
    settings = dict(SMALL, num_inference_steps=6, seed=5, cache="first-block")
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, callback=stop_after(1), **settings)
    run = Run.load(caught.value.run.save(tmp_path / "a.run.safetensors"))
    names = {"change"} if cache == "mag" else {"change", "added", "decision"}
    assert {name.partition(".")[2] for name in run.memories} == names
    (exact,) = model.resume(run)
    (other,) = model.resume(replace(run, memories={}))  # as of older files: close, not exact
    assert torch.equal(exact.latents, model.generate(PROMPT, **settings).latents)
    assert not torch.equal(exact.latents, other.latents)
    assert (exact.latents - other.latents).norm() <= 0.1 * exact.latents.norm()


# Adapters


def lora_file(path, model, seed):
    g = torch.Generator().manual_seed(seed)
    layer = model.dit.visual_transformer_blocks[0].feed_forward.in_layer
    name = "visual_transformer_blocks.0.feed_forward.in_layer"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(4, layer.in_features, generator=g),
        f"{name}.lora_B.weight": torch.randn(layer.out_features, 4, generator=g),
    }
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3, 0.123456789012])
def test_resuming_elsewhere_with_any_scale_gives_the_same_bits(
    folder, tmp_path, monkeypatch, capsys, scale
):
    """The run names model and adapters by absolute paths, and scales with all their digits."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    copied = Path(shutil.copytree(folder, work / "model"))
    model = pipeline.load("model", device="cpu")
    lora_file(work / "a.safetensors", model, 1)
    model.lora.load("a.safetensors", scale=scale)
    wanted = model.generate(PROMPT, seed=5, **STEPS)
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, seed=5, callback=stop_after(2), **STEPS)
    caught.value.run.save(work / "a.run.safetensors")
    assert wanted.settings.model == str(copied)
    monkeypatch.chdir(tmp_path)
    assert main(["resume", "work/a.run.safetensors", "--device", "cpu"]) == 0, capsys.readouterr()
    latents, settings = load_latents("work/a.latents.safetensors")
    assert torch.equal(latents, wanted.latents)
    assert settings == wanted.settings


def test_moved_models_and_adapters_are_named_on_the_command_line(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "model")
    model = pipeline.load("model", device="cpu")
    lora_file(tmp_path / "a.safetensors", model, 1)
    model.lora.load("a.safetensors", scale=0.5)
    wanted = model.generate(PROMPT, seed=5, **STEPS)
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, seed=5, callback=stop_after(2), **STEPS)
    caught.value.run.save(tmp_path / "a.run.safetensors")
    (tmp_path / "model").rename(tmp_path / "here")
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    command = ["resume", "a.run.safetensors", "--device", "cpu"]
    assert main(command) == 2
    assert f"made with the model '{tmp_path}/model'" in capsys.readouterr().err
    command += ["--model", "here"]
    assert main(command) == 2
    assert "a LoRA is a .safetensors file" in capsys.readouterr().err
    assert main([*command, "--lora", "b.safetensors:0.25"]) == 2
    assert "load the same files with the same scales" in capsys.readouterr().err
    assert main([*command, "--lora", "b.safetensors:0.5"]) == 0
    assert torch.equal(load_latents("a.latents.safetensors")[0], wanted.latents)


def test_resuming_finishes_a_file_of_prompts(folder, tmp_path, monkeypatch, capsys):
    """Interrupted in the second of four prompts, and again in the third."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle\na blue square\na green circle\na circle\n")
    command = ["generate", "--prompts", "prompts.txt", "--model", str(folder), "--device", "cpu"]
    command += ["--seed", "3", *SMALL_ARGS]
    Path("whole").mkdir()
    assert main([*command, "-o", "whole/a.gif", "--strip", "whole/s.png"]) == 0
    real = pipeline.sample
    left = [1]  # samplings until an interruption

    def stopping(*args):
        left[0] -= 1
        return interrupted(real(*args)) if left[0] < 0 else real(*args)

    monkeypatch.setattr(pipeline, "sample", stopping)
    Path("parts").mkdir()
    assert main([*command, "-o", "parts/a.gif", "--strip", "parts/s.png"]) == 130
    left[0] = 1
    again = ["resume", "--device", "cpu"]
    assert main([*again, "parts/a_001.run.safetensors", "-o", "parts/a_001.gif"]) == 130
    left[0] = 9
    assert main([*again, "parts/a_002.run.safetensors", "-o", "parts/a_002.gif"]) == 0
    for i in range(4):
        name = f"a_{i:03}.latents.safetensors"
        one, settings = load_latents(f"whole/{name}")
        other, same = load_latents(f"parts/{name}")
        assert torch.equal(one, other)
        assert settings == same
    assert Path("parts/s_003.png").read_bytes() == Path("whole/s_003.png").read_bytes()


def test_jobs_of_a_file_cannot_choose_a_folder(folder, stopped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, run = stopped
    arguments = {"prompt": "a circle", "seed": 1, **SMALL}
    job = {"output": "../../b.gif", "strip": None, "arguments": arguments}
    replace(run, rest=(job,)).save("a.run.safetensors")
    command = ["resume", "a.run.safetensors", "-o", "a.gif", "--device", "cpu"]
    assert main([*command, "--model", str(folder)]) == 0
    assert (tmp_path / "b.gif").exists()
    for broken in ({}, [], {**job, "output": 3}, {**job, "arguments": {}}):
        replace(run, rest=(broken,)).save("b.run.safetensors")
        with pytest.raises(ValueError, match="jobs that were to follow"):
            Run.load("b.run.safetensors")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--lora", "none.safetensors"], "a LoRA is a .safetensors file or a folder"),
        (["--cache", "mag"], "requires a preset with calibrated ratios"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_loaded(
    folder, monkeypatch, capsys, option, words
):
    monkeypatch.setattr(
        pipeline.Kandinsky5, "from_sources", lambda *_, **__: pytest.fail("loading has begun")
    )
    arguments = ["generate", PROMPT, "--model", str(folder), "--device", "cpu", *SMALL_ARGS]
    assert main([*arguments, *option]) == 2
    assert words in capsys.readouterr().err


def test_other_adapters_are_refused(folder, tmp_path):
    model = pipeline.load(folder, device="cpu")
    first = lora_file(tmp_path / "a.safetensors", model, 1)
    model.lora.load(first, scale=0.5)
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, seed=5, callback=stop_after(2), **STEPS)
    run = Run.load(caught.value.run.save(tmp_path / "a.run.safetensors"))
    model.lora.set({"a": 0.25})
    with pytest.raises(ValueError, match="was made with the adapters .*a.safetensors:0.5, got"):
        model.resume(run)
    model.lora.remove()
    with pytest.raises(ValueError, match="got none; load the same files"):
        model.resume(run)
    lora_file(first, model, 2)  # another file of the same name
    model.lora.load(first, scale=0.5)
    with pytest.raises(ValueError, match="load the same files with the same scales"):
        model.resume(run)
    model.lora.remove()
    moved = lora_file(tmp_path / "moved.safetensors", model, 1)  # the same file of another name
    model.lora.load(moved, scale=0.5)
    model.resume(run)
    with pytest.raises(ValueError, match="made with int8 weights, got unquantised ones"):
        settings = [replace(one, quantization="int8") for one in run.settings]
        model.resume(replace(run, settings=settings))


# Files


def about(run):
    return {"step": run.step, "settings": [asdict(one) for one in run.settings]}


def job(**arguments):
    """One of the jobs that were to follow."""
    return {"output": "b.mp4", "strip": None, "arguments": {"prompt": PROMPT} | arguments}


@pytest.fixture(scope="module")
def stopped(folder, tmp_path_factory):
    """A file of an interrupted run, and the run."""
    model = pipeline.load(folder, device="cpu")
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, seed=5, callback=stop_after(1), **STEPS)
    path = tmp_path_factory.mktemp("stopped") / "a.run.safetensors"
    return caught.value.run.save(path), caught.value.run


def stored(text):
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("kandinsky_run", lambda _, run: stored("[]"), "no JSON object"),
        ("kandinsky_run", lambda _, run: stored("{"), "no JSON"),
        ("kandinsky_run", lambda _, run: stored('{"settings": []}'), "step must be an int"),
        (
            "kandinsky_run",
            lambda _, run: stored('{"settings": [], "step": 0}'),
            "must have settings, got none",
        ),
        (
            "kandinsky_run",
            lambda _, run: stored('{"settings": [3], "step": 0}'),
            "settings must be a JSON object, got int",
        ),
        (
            "kandinsky_run",
            lambda _, run: stored(json.dumps(about(run) | {"step": 5})),
            "after 0 to 4 of them, got 5",
        ),
        (
            "kandinsky_run",
            lambda _, run: stored(json.dumps(about(run) | {"step": "1"})),
            "step must be an int",
        ),
        (
            "kandinsky_run",
            lambda _, run: stored(json.dumps({"step": 1, "settings": about(run)["settings"] * 2})),
            r"requires latents of float \[2, 2, 8, 10, any\]",
        ),
        (
            "kandinsky_run",
            lambda _, run: stored(json.dumps(about(run) | {"surprise": 1})),
            "must be those of this version, got 'surprise' too",
        ),
        (
            "kandinsky_run",
            lambda _, run: stored(json.dumps(about(run) | {"rest": [job(surprise=1)]})),
            "a job that was to follow cannot be done: settings must be among",
        ),
        (
            "kandinsky_run",
            lambda _, run: stored(json.dumps(about(run) | {"rest": [job(height=17)]})),
            "multiples of 16, got",
        ),
        (
            "kandinsky_run",
            lambda _, run: stored(json.dumps(about(run) | {"rest": [job(image=3)]})),
            "image must be a str, got int 3",
        ),
        ("surprise", lambda x, run: torch.zeros(1), "it has a tensor that no run has, 'surprise'"),
        (
            "memory.0.change",
            lambda x, run: torch.zeros(1, 40, 32),
            "without a step cache remembers nothing",
        ),
        ("kandinsky_run", lambda _, run: torch.ones(2, 3), "no JSON"),
        ("latents", lambda x, run: None, "it has no tensor latents"),
        ("latents", lambda x, run: x[:, :1].clone(), "requires latents of float"),
        ("latents", lambda x, run: x.long(), "requires latents of float"),
        ("cond.embeds", lambda x, run: None, "it has no tensor cond.embeds"),
        ("cond.embeds", lambda x, run: x[0].clone(), "requires cond.embeds"),
        ("cond.lengths", lambda x, run: x + 99, "lengths of texts lie in"),
        ("cond.lengths", lambda x, run: x.float(), "requires cond.lengths of int64"),
        ("uncond.embeds", lambda x, run: None, "has an embedded negative prompt, got none"),
        ("frame.x", lambda x, run: torch.zeros(1), "a given frame has a number, got 'x'"),
        ("frame.7", lambda x, run: torch.zeros(1), "one of the 2 latent frames, got number 7"),
        ("frame.0", lambda x, run: torch.zeros(1), "given frame 0 must have latents"),
        ("memory.0.change", lambda x, run: torch.zeros(1), "requires 0.change of float"),
        ("memory.0.decision", lambda x, run: torch.zeros(1), "requires 0.decision of int64"),
    ],
)
def test_a_damaged_run_is_one_sentence_about_the_file(stopped, tmp_path, name, change, words):
    path, run = stopped
    tensors = load_file(path)
    changed = change(tensors.get(name), run)
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed
    save_file(tensors, tmp_path / "b.run.safetensors")
    with pytest.raises(ValueError, match=words) as caught:
        Run.load(tmp_path / "b.run.safetensors")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(
        f"{tmp_path}/b.run.safetensors must hold an interrupted run"
    )


def test_mutated_runs_are_read_or_refused(stopped, tmp_path):
    """A few hundred files with bytes changed, cut off or added: a run, or one sentence."""
    path, _ = stopped
    data = path.read_bytes()
    rng = random.Random(5)
    header = 8 + int.from_bytes(data[:8], "little")
    for trial in range(300):
        mutated = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            mutated[rng.randrange(header if trial % 2 else len(data))] = rng.randrange(256)
        if trial % 10 == 0:
            del mutated[rng.randrange(len(data)) :]
        file = tmp_path / "c.safetensors"
        file.write_bytes(mutated)
        try:
            Run.load(file)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)


def test_a_run_of_another_network_is_refused(model, stopped):
    _, run = stopped
    narrow = replace(run.cond, embeds=run.cond.embeds[..., :8])
    with pytest.raises(ValueError, match=r"requires cond.embeds of float \[1, any, 32\]"):
        model.resume(replace(run, cond=narrow))
    with pytest.raises(ValueError, match=r"requires latents of float \[1, 2, 8, 10, 16\]"):
        model.resume(replace(run, latents=run.latents[..., :4]))


def test_other_exceptions_pass_as_they_are(model):
    def fail(stage, *_):
        raise ZeroDivisionError(stage)

    with pytest.raises(ZeroDivisionError, match="text"):
        model.generate(PROMPT, callback=fail, **STEPS)


def test_a_file_is_whole_or_absent(model, tmp_path, monkeypatch):
    with pytest.raises(Interrupted) as caught:
        model.generate(PROMPT, callback=stop_after(1), **STEPS)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space left"):
        caught.value.run.save(tmp_path / "a.run.safetensors")
    assert not list(tmp_path.iterdir())
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="must hold an interrupted run"):
        Run.load(tmp_path / "x.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        Run.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("mode", ["", "int8"])
def test_command_line(folder, tmp_path, monkeypatch, capsys, mode):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "generate",
        PROMPT,
        *SMALL_ARGS,
        "--model",
        str(folder),
        "--device",
        "cpu",
        "--seed",
        "5",
    ]
    arguments += ["--quantize", mode] if mode else []
    assert main([*arguments, "-o", "whole.mp4"]) == 0
    real = pipeline.sample
    monkeypatch.setattr(pipeline, "sample", lambda *args: interrupted(real(*args)))
    capsys.readouterr()
    assert main([*arguments, "-o", "a.mp4"]) == 130
    out, err = capsys.readouterr()
    assert (out, err) == (
        "",
        "kandinsky: interrupted after 1 of 2 steps; go on with: kandinsky "
        "resume a.run.safetensors\n",
    )
    monkeypatch.setattr(pipeline, "sample", real)
    assert main(["resume", "a.run.safetensors", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("a.mp4\nseed 5, 5 frames of 80x64")
    (one, settings), (other, same) = (
        load_latents(f"{name}.latents.safetensors") for name in ("whole", "a")
    )
    assert torch.equal(one, other)
    assert settings == same
    assert settings.quantization == mode
    assert main(["resume", "whole.latents.safetensors"]) == 2
    assert "must hold an interrupted run" in capsys.readouterr().err


def interrupted(steps):
    yield next(steps)
    raise KeyboardInterrupt
