# SPDX-License-Identifier: Apache-2.0
"""What the user of ComfyUI sees and does while a node works: the bar, the Stop button, previews,
and seeds as large as ComfyUI's."""

import itertools
from dataclasses import replace

import pytest
import torch

from kandinsky_model import comfyui
from kandinsky_model.comfyui import running

from ..support.node_calls import PROMPT, SIZE, call, image


def test_the_bar_moves_and_the_stop_button_stops(model, comfy):
    text = call("EncodeText", model=model, prompt=PROMPT)
    comfy.bars.clear()
    call("Sample", model=model, text=text, **SIZE)
    (bar,) = comfy.bars
    assert bar.seen == [(0, 2), (1, 2), (2, 2)]
    comfy.bars.clear()
    comfy.stop_when = lambda: comfy.bars  # as soon as the bar has appeared
    with pytest.raises(comfy.Stopped):
        call("Sample", model=model, text=text, **SIZE)
    assert len(comfy.bars[0].seen) == 1


@pytest.mark.parametrize(
    ("policy", "frames"),
    [
        ("global", 9),
        ("official", 25),
        ("preview", 9),
    ],
    ids=str,
)
def test_the_bar_moves_during_all_of_decoding(model, comfy, monkeypatch, policy, frames):
    """Before the first piece, too: until all statistics are known, which is nearly all the work."""
    monkeypatch.setattr(running, "INTERVAL", 0.0)  # look before every operator
    T = (frames + 3) // 4
    latent = {"samples": torch.randn(1, 16, T, 6, 8)}
    call("Decode", model=model, latent=latent, vae_policy=policy)
    (bar,) = comfy.bars
    percents = [done for done, of in bar.seen]
    assert percents == sorted(percents)
    assert bar.seen[-1] == (100, 100)
    if policy != "preview":
        early = sorted(set(percents))[:-1]
        assert early[-1] >= 90
        steps = [after - before for before, after in itertools.pairwise(early)]
        assert max(steps) <= 25


def test_the_stop_button_works_during_all_of_decoding(model, comfy, monkeypatch):
    monkeypatch.setattr(running, "INTERVAL", 0.0)
    latent = {"samples": torch.randn(1, 16, 3, 6, 8)}

    def percent_done():
        done, _ = comfy.bars[0].seen[-1]
        return done

    for percent in (1, 50, 90):
        comfy.bars.clear()
        comfy.stop_when = lambda percent=percent: comfy.bars and percent_done() >= percent
        with pytest.raises(comfy.Stopped):
            call("Decode", model=model, latent=latent)
        assert percent_done() >= percent
        assert percent_done() < 100
    comfy.stop_when = lambda: False
    video = call("Decode", model=model, latent=latent)
    assert video.isfinite().all()


def test_the_stop_button_works_while_texts_and_pictures_are_encoded(
    model, from_image, comfy, monkeypatch
):
    monkeypatch.setattr(running, "INTERVAL", 0.0)
    for name, inputs in (
        ("EncodeText", {"model": model, "prompt": PROMPT + " slowly"}),
        ("EncodeImage", {"model": from_image, "image": image()}),
    ):
        comfy.asked = 0
        comfy.stop_when = lambda: comfy.asked > 5  # after the node has begun
        with pytest.raises(comfy.Stopped):
            call(name, **inputs)


def test_previews_show_where_sampling_heads(model, comfy):
    """The latents of each preview are an estimate of the result, and the last one is the result."""
    text = call("EncodeText", model=model, prompt=PROMPT)
    comfy.bars.clear()
    comfy.previews = True
    model.model.preset = replace(model.model.preset, repo="somewhere/else")
    latent = call("Sample", model=model, text=text, seed=7, **SIZE)
    model.model.preset = replace(model.model.preset, repo="")
    previews = filter(None, comfy.bars[0].previews)
    shown = [latents for _, latents, _ in previews]
    assert len(shown) == 2
    assert comfy.formats == ["HunyuanVideo"]
    factor = model.model.vae.config.scaling_factor
    scaled = latent["samples"] * factor
    torch.testing.assert_close(shown[-1], scaled, rtol=0, atol=1e-5)
    distance = (shown[0] - scaled).norm()
    assert distance > 0
    assert distance < scaled.norm()  # nearer than nothing at all
    # the bundled model has colours of its own
    call("Sample", model=model, text=text, seed=7, **SIZE)
    kind, picture, largest = comfy.bars[1].previews[-1]
    assert kind == "JPEG"
    assert picture.size == (64, 48)
    assert largest == 512


def test_seeds_reach_as_far_as_comfyuis(model):
    text = call("EncodeText", model=model, prompt=PROMPT)

    def latents_of(seed):
        latent = call("Sample", model=model, text=text, seed=seed, **SIZE)
        return latent["samples"]

    largest = 2**64 - 1
    latents = latents_of(largest)
    assert torch.equal(latents, latents_of(largest))
    assert not torch.equal(latents, latents_of(largest - 1))
    node = comfyui.NODE_CLASS_MAPPINGS["KandinskyKernelsSample"]
    widgets = node.INPUT_TYPES()["required"]
    _, options = widgets["seed"]
    assert options["max"] == largest
