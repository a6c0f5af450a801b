# SPDX-License-Identifier: Apache-2.0
"""From latents to files: frames are written while decoding goes on, within a budget that changes
none of them."""

import logging
import re

import pytest
import torch

from kandinsky_model import pipeline
from kandinsky_model.media import video
from kandinsky_model.sampling.run import Interrupted, Run

from ..checkpoints.test_lora import write
from ..support import tiny_models
from ..support.live_memory import LiveMemory
from ..support.tiny_models import SMALL

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its weights lie as aligned as those that are moved: matrix products on a CPU round by that as
    well."""
    model = pipeline.load(tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny")), device="cpu")
    for part in (model.text, model.dit, model.vae):
        part.load_state_dict(
            {
                name: tensor.clone(memory_format=torch.preserve_format)
                for name, tensor in part.state_dict().items()
            },
            assign=True,
        )
        part.requires_grad_(False)
    model.dit.prepare()
    return model


def matrices_of(dit):
    layer = dit.visual_transformer_blocks[0].feed_forward.in_layer
    return {
        "visual_transformer_blocks.0.feed_forward.in_layer": (
            torch.randn(4, layer.in_features),
            torch.randn(layer.out_features, 4),
        )
    }


def least_budget(model, settings):
    """As the refusal of a smaller one names it; the parts of the model then take turns on the
    device."""
    with pytest.raises(ValueError, match=r"at least \d+ bytes .* got 1000: raise it") as caught:
        model.generate(
            PROMPT,
            memory_budget=1000,
            callback=lambda *_: pytest.fail("work has begun"),
            **settings,
        )
    return int(re.search(r"at least (\d+)", str(caught.value))[1])


def test_frames_go_to_the_file_while_decoding_goes_on(model, tmp_path, monkeypatch):
    settings = dict(
        height=160,
        width=160,
        num_frames=9,
        num_inference_steps=1,
        guidance_scale=1.0,
    )
    clip = model.generate(PROMPT, seed=5, **settings)
    events = []
    decode = model.vae.decode_frames
    reformat = video._checked

    def watched(*args):
        for piece in decode(*args):
            events.append("decoded")
            yield piece

    def written(pieces):
        for piece in reformat(pieces):
            events.append("written")
            yield piece

    monkeypatch.setattr(model.vae, "decode_frames", watched)
    monkeypatch.setattr(video, "_checked", written)
    clip.save(tmp_path / "a.mp4")
    assert events == ["decoded", "written"] * 5
    assert clip.frames.shape == (9, 160, 160, 3) and len(events) == 10, (
        "what was decoded once is not decoded again"
    )
    assert torch.equal(torch.cat(list(clip.decode())), clip.frames)


def test_a_memory_budget_changes_nothing_and_is_checked_before_the_work(model, tmp_path, caplog):
    """One budget for all stages: the least, one between, one for all parts together; and a second
    run within another budget."""
    settings = dict(seed=5, **SMALL | {"num_frames": 17})
    free = model.generate(PROMPT, **settings)
    told = []
    placements = []
    least = least_budget(model, settings)
    for budget in (least, 10**9, least):
        with caplog.at_level(logging.INFO, "kandinsky_model.pipeline"):
            video = model.generate(PROMPT, memory_budget=budget, **settings)
        placements.append([line for line in caplog.messages if " GB" in line])
        caplog.clear()
        assert torch.equal(video.latents, free.latents)
        assert video.settings == free.settings
        video.save(tmp_path / "a.mp4", notify=told.append)
        assert torch.equal(video.frames, free.frames)
    assert [[line.split(":")[0] for line in placement] for placement in placements] == [
        ["text", "sampling", "decoding"]
    ] * 3
    assert placements[0] == placements[2]
    assert "all weights stay" in placements[1][1]
    assert "scheme" in placements[0][2]
    schemes = [line.split()[3].rstrip(",") for line in told if line.startswith("decoding in")]
    assert schemes[1] == "KKKK" != schemes[0] == schemes[2]
    assert f"scheme {schemes[0]}" in placements[0][2]
    again = model.open(tmp_path / "a.latents.safetensors", memory_budget=least)
    assert torch.equal(again.frames, free.frames)
    for wrong, kind in ((1000, ValueError), ("10GB", TypeError)):
        for policy in ("official", "preview"):
            with pytest.raises(kind, match="memory budget"):
                model.generate(PROMPT, memory_budget=wrong, vae_policy=policy, **settings)
        with pytest.raises(kind, match="memory budget"):
            model.sample(Run([free.settings], free.latents, None, None, None), memory_budget=wrong)
        with pytest.raises(kind, match="memory budget"):
            list(model.decode(free.latents, free.settings, memory_budget=wrong))
    preview = model.generate(PROMPT, memory_budget=10**8, vae_policy="preview", **settings)
    assert torch.equal(
        preview.frames, model.generate(PROMPT, vae_policy="preview", **settings).frames
    )


def test_stopped_within_a_budget_the_model_goes_on_without_one(model):
    settings = dict(seed=5, **SMALL)
    free = model.generate(PROMPT, **settings)
    least = least_budget(model, settings)

    def stop(error, step):
        if step == 1:
            raise error

    for error in (ValueError("stop"), KeyboardInterrupt()):
        with pytest.raises((ValueError, Interrupted)) as caught:
            model.generate(
                PROMPT,
                callback=lambda _, step, *__, error=error: stop(error, step),
                memory_budget=least,
                **settings,
            )
        assert torch.equal(model.generate(PROMPT, **settings).latents, free.latents)
    for budget in (None, least):
        (video,) = model.resume(caught.value.run, memory_budget=budget)
        assert torch.equal(video.latents, free.latents)
        assert torch.equal(video.frames, free.frames)


def test_adapters_within_a_budget(model, tmp_path):
    settings = dict(seed=5, **SMALL)
    free = model.generate(PROMPT, **settings)
    least = least_budget(model, settings)
    path = write(tmp_path / "a.safetensors", matrices_of(model.dit))
    try:
        assert torch.equal(
            model.generate(PROMPT, memory_budget=least, **settings).latents, free.latents
        )
        model.lora.load(path)
        adapted = model.generate(PROMPT, memory_budget=least, **settings)
        assert not torch.equal(adapted.latents, free.latents)
        assert torch.equal(model.generate(PROMPT, **settings).latents, adapted.latents)
    finally:
        model.lora.remove()
    assert torch.equal(
        model.generate(PROMPT, memory_budget=least, **settings).latents, free.latents
    )


@pytest.mark.parametrize("policy", ["global", "official"])
def test_the_whole_run_keeps_within_the_least_budget(model, policy):
    settings = dict(
        seed=5,
        vae_policy=policy,
        **SMALL | {"num_frames": 33, "height": 128},
    )
    least = least_budget(model, settings)
    # brings the weights to where they stay
    model.generate(PROMPT, memory_budget=least, **settings).frames.sum()
    with LiveMemory() as memory:
        video = model.generate(PROMPT, memory_budget=least, **settings)
    stages = model.placement.stages
    assert (
        0.5 * stages["sampling"].peak_bytes
        <= memory.peak
        <= max(stages["text"].peak_bytes, stages["sampling"].peak_bytes)
    )
    with LiveMemory() as memory:
        for _ in video.decode():
            pass
    assert (
        0.5 * stages["decoding"].peak_bytes
        <= memory.peak + 4 * video.latents.numel()
        <= stages["decoding"].peak_bytes
        == least
    )
