# SPDX-License-Identifier: Apache-2.0
"""From latents to files: frames are written while decoding goes on, within a budget that changes none of them."""
import re

import pytest
import tiny_models
import torch

from kandinsky_model import pipeline
from kandinsky_model import video as files

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pipeline.load(tiny_models.tiny_folder(tmp_path_factory.mktemp("tiny")), device="cpu")


def test_frames_go_to_the_file_while_decoding_goes_on(model, tmp_path, monkeypatch):
    settings = dict(height=160, width=160, num_frames=9, num_inference_steps=1, guidance_scale=1.0)
    video, events = model.generate(PROMPT, seed=5, **settings), []
    decode, reformat = model.vae.decode_frames, files._checked

    def watched(*args):
        for piece in decode(*args):
            events.append("decoded")
            yield piece

    def written(pieces):
        for piece in reformat(pieces):
            events.append("written")
            yield piece

    monkeypatch.setattr(model.vae, "decode_frames", watched)
    monkeypatch.setattr(files, "_checked", written)
    video.save(tmp_path / "a.mp4")
    assert events == ["decoded", "written"] * 5
    assert video.frames.shape == (9, 160, 160, 3) and len(events) == 10, "what was decoded once is not decoded again"
    assert torch.equal(torch.cat(list(video.decode())), video.frames)


def test_a_memory_budget_changes_no_frame_and_is_checked_before_sampling(model, tmp_path, monkeypatch):
    settings = dict(height=96, width=96, num_frames=9, num_inference_steps=1, guidance_scale=1.0)
    free, told = model.generate(PROMPT, seed=5, **settings), []
    with pytest.raises(ValueError, match=r"at least \d+ bytes .* got 1000: raise it") as caught:
        model.generate(PROMPT, seed=5, memory_budget=1000, callback=lambda *_: pytest.fail("work has begun"), **settings)
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    tight = model.generate(PROMPT, seed=5, memory_budget=least, **settings)
    tight.save(tmp_path / "a.mp4", notify=told.append)
    assert "KKKK" not in told[0] and f"{least / 1e9:.3g} GB predicted" in told[0]
    assert torch.equal(tight.frames, free.frames) and tight.settings == free.settings
    again = model.open(tmp_path / "a.latents.safetensors", memory_budget=least)
    assert torch.equal(again.frames, free.frames)
    with pytest.raises(ValueError, match="at least"):
        model.generate(PROMPT, memory_budget=1000, vae_policy="official", **settings)
    preview = model.generate(PROMPT, seed=5, memory_budget=1000, vae_policy="preview", **settings)
    assert preview.frames.shape == free.frames.shape and preview.settings.vae_policy == "preview"
