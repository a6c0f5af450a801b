# SPDX-License-Identifier: Apache-2.0
"""What the tests of acceleration share: tiny models of diffusers, what its pipelines pass to them,
and the distances between results."""

import contextlib
import functools
import logging

import pytest
import torch

from kandinsky_model import accelerate
from kandinsky_model.config import DiTConfig, NablaConfig
from kandinsky_model.dit.geometry import Grid

from . import tiny_models
from .diffusers_dit import diffusers_of
from .plain_dit import plain_forward, random_state

CONFIG = DiTConfig(
    in_visual_dim=4,
    out_visual_dim=4,
    in_text_dim=24,
    in_text_dim2=16,
    time_dim=32,
    model_dim=128,
    ff_dim=256,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(16, 24, 24),
    visual_cond=True,
)
NABLA = NablaConfig(0.6, (3, 1, 1))
SCALE = (1.0, 2.0, 2.0)
WHOLE = Grid(2, 16, 16)
RAGGED = Grid(2, 9, 12)
# between two fp32 results, and from one to fp64 (5.3e-6 seen, as stock)
ROUNDING = 2e-6
IN_FP32 = 1e-5
LOGGER = "kandinsky_model.acceleration"


class Weights:
    """What `diffusers_of` reads of a transformer of ours."""

    config = CONFIG

    def state_dict(self):
        return random_state(CONFIG)


def stock(monkeypatch, stripped=True):
    """Their transformer, with the block lists of NABLA honoured; stripped: without the bf16 cast of
    rotated queries and keys."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    assert module.Kandinsky5AttnProcessor.__module__ == module.__name__
    model = diffusers_of(Weights(), stripped, monkeypatch).requires_grad_(False)
    w_t, w_y, w_x = NABLA.window
    model.register_to_config(
        attention_type="nabla",
        attention_P=NABLA.keep_mass,
        attention_wT=w_t,
        attention_wH=w_y,
        attention_wW=w_x,
    )
    return model


def inputs(grid=WHOLE, nabla=False, batch=1, dtype=torch.float32, seed=1):
    """The arguments that a pipeline gives the transformer."""
    generator = torch.Generator().manual_seed(seed)
    make = dict(generator=generator)
    shape = (batch, grid.T, 2 * grid.Y, 2 * grid.X, CONFIG.in_channels)
    return dict(
        hidden_states=torch.randn(shape, **make).to(dtype),
        encoder_hidden_states=torch.randn(batch, 7, 24, **make).to(dtype),
        pooled_projections=torch.randn(batch, 16, **make).to(dtype),
        timestep=torch.full((batch,), 700.0),
        visual_rope_pos=[torch.arange(n) for n in (grid.T, grid.Y, grid.X)],
        text_rope_pos=torch.arange(7),
        scale_factor=SCALE,
        sparse_params=sparse_params(grid) if nabla else None,
        return_dict=False,
    )


def sparse_params(grid):
    from diffusers import Kandinsky5T2VPipeline

    near = Kandinsky5T2VPipeline.fast_sta_nabla(
        grid.T, grid.Y // 8, grid.X // 8, *NABLA.window, device="cpu"
    )
    w_t, w_y, w_x = NABLA.window
    return {
        "sta_mask": near[None, None],
        "attention_type": "nabla",
        "to_fractal": True,
        "P": NABLA.keep_mass,
        "wT": w_t,
        "wW": w_x,
        "wH": w_y,
        "add_sta": True,
        "visual_shape": (grid.T, grid.Y, grid.X),
        "method": "topcdf",
    }


@torch.no_grad()
def velocity(model, grid=WHOLE, nabla=False, **options):
    return model(**inputs(grid, nabla, **options))


@functools.cache
def exact(grid=WHOLE, nabla=False, **options):
    """The velocity in fp64, by the plain function."""
    data = inputs(grid, **options)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    x, text, pooled, time = (data[name].double() for name in names)
    state = {name: tensor.double() for name, tensor in random_state(CONFIG).items()}
    return plain_forward(state, CONFIG, x, text, pooled, time, SCALE, NABLA if nabla else None)[0]


def off(actual, wanted):
    """Relative distance."""
    return ((actual.double() - wanted.double()).norm() / wanted.double().norm()).item()


@contextlib.contextmanager
def told(caplog):
    """The lines that acceleration logs meanwhile, as a list."""
    messages = []
    before = len(caplog.records)
    with caplog.at_level(logging.WARNING, LOGGER):
        yield messages
    messages += [record.getMessage() for record in caplog.records[before:] if record.name == LOGGER]


def accelerated(monkeypatch, **options):
    model = stock(monkeypatch, **options)
    accelerate(model)
    return model


NAMES = {
    "t2v": "Kandinsky5T2VPipeline",
    "i2v": "Kandinsky5I2VPipeline",
    "t2i": "Kandinsky5T2IPipeline",
    "i2i": "Kandinsky5I2IPipeline",
}


def pipeline(task, monkeypatch, nabla=None, shift=5.0):
    """One of their pipelines without text encoders; see `run`."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(2)
    dit = diffusers_of(
        tiny_models.random_dit(64, 32, task != "t2i"), True, monkeypatch
    ).requires_grad_(False)
    if nabla:
        w_t, w_y, w_x = nabla.window
        dit.register_to_config(
            attention_type="nabla",
            attention_P=nabla.keep_mass,
            attention_wT=w_t,
            attention_wH=w_y,
            attention_wW=w_x,
        )
    vae = (
        tiny_models.diffusers_video_vae(tiny_models.random_vae())
        if task in ("t2v", "i2v")
        else tiny_models.random_image_vae()
    )
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = getattr(diffusers, NAMES[task])(
        transformer=dit,
        vae=vae.requires_grad_(False),
        **parts,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, size=(64, 96), steps=3, guidance=4.0, output="latent", **options):
    """What a pipeline makes of two fixed texts; videos of 9 frames, from images of 25, whose first
    ones take later ones' statistics."""
    generator = torch.Generator().manual_seed(4)
    arguments = {}
    for prefix, length in (("", 9), ("negative_", 6)):
        arguments |= {
            f"{prefix}prompt_embeds_qwen": torch.randn(1, length, 64, generator=generator),
            f"{prefix}prompt_embeds_clip": torch.randn(1, 32, generator=generator),
            f"{prefix}prompt_cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
        }
    name = type(pipe).__name__
    if "2V" in name:
        arguments["num_frames"] = 25 if "I2V" in name else 9
    if "I2" in name.removesuffix("Pipeline"):
        image = pytest.importorskip("PIL.Image")
        arguments["image"] = image.fromarray(
            (torch.rand(*size, 3, generator=generator) * 255).byte().numpy()
        )
    pipe.resolutions = [size[::-1]]
    return pipe(
        height=size[0],
        width=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator,
        output_type=output,
        return_dict=False,
        **arguments,
        **options,
    )[0]
