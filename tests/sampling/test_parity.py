# SPDX-License-Identifier: Apache-2.0
"""Whole runs against diffusers' four pipelines: same weights, embeddings, noise and times; ten
steps with guidance, then decoded.

Where diffusers differs from the official code its own way is put right first: the grid of times,
the statistics of the first frames.
"""

from dataclasses import replace

import pytest
import torch

from kandinsky_model import pipeline
from kandinsky_model.config import NablaConfig, get_preset
from kandinsky_model.media.picture import read_image, resize
from kandinsky_model.sampling.given import latent_of
from kandinsky_model.sampling.sampler import noise, schedule
from kandinsky_model.text.embeddings import Conditioning
from kandinsky_model.vae.flux import ImageVAE

from ..support import tiny_models
from ..support.diffusers_dit import diffusers_of

STEPS = 10
GUIDANCE = 4.0
SCALE = 5.0
SEED = 3
NAMES = {
    "t2v": "Kandinsky5T2VPipeline",
    "i2v": "Kandinsky5I2VPipeline",
    "t2i": "Kandinsky5T2IPipeline",
    "i2i": "Kandinsky5I2IPipeline",
}
PRESETS = {
    "t2v": "t2v-lite-sft-5s",
    "i2v": "i2v-lite-5s",
    "t2i": "t2i-lite-sft",
    "i2i": "i2i-lite-sft",
}
NABLA = NablaConfig(0.5, (3, 1, 1))


def picture(height, width):
    """Smooth, as pictures are."""
    small = torch.rand(
        1,
        3,
        4,
        5,
        generator=torch.Generator().manual_seed(1),
    )
    large = torch.nn.functional.interpolate(small, (height, width), mode="bicubic").clamp(0, 1)
    return (large[0].permute(1, 2, 0) * 255).byte()


class Fixed:
    """Stands in for the text encoder: the prompt and the negative one each have their
    embeddings."""

    words, nothing = (
        Conditioning(
            torch.randn(1, length, 64, generator=torch.Generator().manual_seed(length)),
            torch.tensor([length]),
            torch.randn(1, 32, generator=torch.Generator().manual_seed(9 + length)),
        )
        for length in (9, 6)
    )

    def encode(self, prompts, kind, images=None):
        return self.words if prompts == ["x"] else self.nothing

    def to(self, *_):
        return self


def our_model(task, size, nabla):
    torch.manual_seed(2)
    dit = tiny_models.random_dit(64, 32, task != "t2i").eval().requires_grad_(False)
    video = task in ("t2v", "i2v")
    vae = (
        tiny_models.random_vae().eval().requires_grad_(False)
        if video
        else ImageVAE(tiny_models.random_image_vae().requires_grad_(False))
    )
    preset = replace(
        get_preset(PRESETS[task]),
        dit=dit.config,
        sizes=(size,),
        nabla=nabla,
    )
    return pipeline.Kandinsky5(Fixed(), dit.prepare(), vae, preset)


def their_pipeline(task, model, monkeypatch):
    import diffusers

    vae = model.vae.vae if task in ("t2i", "i2i") else tiny_models.diffusers_video_vae(model.vae)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SCALE)
    grid = torch.linspace(1, 0, STEPS + 1)[:-1].numpy()
    set_timesteps = scheduler.set_timesteps
    monkeypatch.setattr(
        scheduler, "set_timesteps", lambda count, device: set_timesteps(sigmas=grid, device=device)
    )
    dit = diffusers_of(model.dit, True, monkeypatch)
    if model.preset.nabla:
        w_t, w_y, w_x = model.preset.nabla.window
        dit.register_to_config(
            attention_type="nabla",
            attention_P=model.preset.nabla.keep_mass,
            attention_wT=w_t,
            attention_wH=w_y,
            attention_wW=w_x,
        )
    pipe = getattr(diffusers, NAMES[task])(
        transformer=dit,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.resolutions = [model.preset.sizes[0][::-1]]
    monkeypatch.setattr(
        type(pipe), "adaptive_mean_std_normalization", staticmethod(per_frame), raising=False
    )
    monkeypatch.setattr(
        type(pipe), "_get_scale_factor", lambda *_: model.preset.scale_factor, raising=False
    )
    return pipe


def per_frame(source, reference):
    """As the official code: every frame by its own statistics, not all four by theirs together."""
    frames = []
    for frame in source.unbind(1):
        mean = frame.mean()
        std = frame.std()
        wanted = (
            reference.mean().clamp(mean - 0.05, mean + 0.1),
            reference.std().clamp(std - 0.1, std + 0.25),
        )
        frames.append((frame - mean) / std * wanted[1] + wanted[0])
    return torch.stack(frames, 1)


def their_input(task, model, size, frames, image):
    """Noise, and the channels that their pipelines put beside it, the encoded picture among
    them."""
    shape = (1, (frames - 1) // 4 + 1, size[0] // 8, size[1] // 8, 16)
    x = noise(SEED, shape)
    if task == "t2i":
        return x
    condition = torch.zeros(shape)
    mask = torch.zeros(*shape[:-1], 1)
    if task in ("i2v", "i2i"):
        with torch.no_grad():
            clean = latent_of(resize(read_image(image), *size), model.vae, SEED)
        if task == "i2v":
            x[:, :1] = clean
            mask[:, 0] = 1
        else:
            condition = clean
            mask = torch.ones(*shape[:-1], 1)
    return torch.cat([x, condition, mask], -1)


CASES = {
    "text to video": ("t2v", (64, 96), 9, None),
    "text to video, nabla": ("t2v", (128, 256), 9, NABLA),
    "still": ("t2v", (64, 96), 1, None),
    "image to video": ("i2v", (64, 96), 25, None),
    "text to image": ("t2i", (96, 64), 1, None),
    "image editing": ("i2i", (96, 64), 1, None),
}


@pytest.mark.parametrize(("task", "size", "frames", "nabla"), CASES.values(), ids=CASES)
def test_equals_diffusers(task, size, frames, nabla, monkeypatch):
    pytest.importorskip("diffusers")
    model = our_model(task, size, nabla)
    image = picture(*size) if task in ("i2v", "i2i") else None
    settings = dict(
        height=size[0],
        width=size[1],
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        scheduler_scale=SCALE,
    )
    made = model.generate("x", seed=SEED, image=image, **settings)
    pipe = their_pipeline(task, model, monkeypatch)
    arguments = dict(
        height=size[0], width=size[1], num_inference_steps=STEPS, guidance_scale=GUIDANCE
    )
    for prefix, one in (("", Fixed.words), ("negative_", Fixed.nothing)):
        arguments |= {
            f"{prefix}prompt_embeds_qwen": one.embeds,
            f"{prefix}prompt_embeds_clip": one.pooled,
            f"{prefix}prompt_cu_seqlens": torch.tensor([0, one.embeds.shape[1]], dtype=torch.int32),
        }
    if image is not None:
        from PIL import Image

        arguments["image"] = Image.fromarray(image.numpy())
    if task in ("t2v", "i2v"):
        arguments["num_frames"] = frames
    start = their_input(task, model, size, frames, image)
    theirs = pipe(
        **arguments,
        latents=start.clone(),
        output_type="latent",
        return_dict=False,
    )[0]
    error = ((made.latents - theirs).norm() / theirs.norm()).item()
    pixels = pipe(
        **arguments,
        latents=start.clone(),
        output_type="np",
        return_dict=False,
    )[0]
    pixels = torch.from_numpy(pixels).reshape(made.frames.shape)
    off = (made.frames / 255 - pixels).abs().max().item()
    print(f"latents: rel_l2 {error:.2g}; frames: {255 * off:.3g} levels")
    assert error <= 1e-4 and off <= 0.51 / 255  # ours are rounded to 8 bits
    assert (pipe.scheduler.sigmas - schedule(STEPS, SCALE)).abs().max() < 1e-6
