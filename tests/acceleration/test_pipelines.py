# SPDX-License-Identifier: Apache-2.0
"""`accelerate` on whole pipelines of diffusers, and what the corrections of their pipelines are
worth."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from kandinsky_model import accelerate
from kandinsky_model.config import NablaConfig
from kandinsky_model.sampling.sampler import schedule

from ..support.accelerated import NAMES, off, pipeline, run

NABLA = NablaConfig(0.5, (3, 1, 1))


@pytest.mark.parametrize("task", NAMES)
def test_pipelines_give_what_they_gave(task, monkeypatch):
    pipe = pipeline(task, monkeypatch)
    wanted = run(pipe), run(pipe, output="np")
    with accelerate(pipe) as handle:
        made = run(pipe), run(pipe, output="np")
        assert off(made[0], wanted[0]) <= 1e-5
        assert not torch.equal(made[0], wanted[0])
        assert np.abs(made[1] - wanted[1]).max() <= 1e-4
        assert handle.replaced["Kandinsky5TransformerDecoderBlock"] == 2
        assert not handle.reports
        if "2v" in task:
            assert handle.replaced["HunyuanVideoDecoder3D"] == 1
            assert not handle.kept
        else:
            assert list(handle.kept) == ["vae, AutoencoderKL"]
    assert torch.equal(run(pipe), wanted[0])


def test_nabla_in_a_pipeline_at_any_size(monkeypatch):
    """At 128 x 256 it equals diffusers' with honoured block lists; at 80 x 144 diffusers' cannot
    run."""
    pipe = pipeline("t2v", monkeypatch, NABLA)
    wanted = run(pipe, (128, 256))
    with pytest.raises(RuntimeError):
        run(pipe, (80, 144))
    dense = run(pipeline_without_nabla(pipe), (128, 256))
    accelerate(pipe, vae=False)
    assert off(run(pipe, (128, 256)), wanted) <= 1e-5 < 1e-3 < off(dense, wanted)
    assert run(pipe, (80, 144)).isfinite().all()


def pipeline_without_nabla(pipe):
    other = copy.copy(pipe)
    other.transformer = copy.deepcopy(pipe.transformer)
    other.transformer.register_to_config(attention_type="regular")
    return other


def test_the_vae_can_be_left_alone(monkeypatch):
    handle = accelerate(pipeline("t2v", monkeypatch), vae=False)
    assert handle.kept == {"vae, AutoencoderKLHunyuanVideo": "vae=False was asked for"}
    assert "GroupNorm" not in handle.replaced


def in_bf16(pipe):
    """As from_pretrained(torch_dtype=torch.bfloat16) would load its transformer."""
    for name, parameter in pipe.transformer.named_parameters():
        if not any(part in name for part in pipe.transformer._keep_in_fp32_modules):
            parameter.data = parameter.to(torch.bfloat16)
    return pipe


def test_exact_time_brings_bf16_nearer_to_fp32(monkeypatch):
    """Measured: 10 steps of a tiny bf16 model; distance of the latents to the fp32 run."""
    pipe = pipeline("t2v", monkeypatch)
    C = pipe.transformer.config.in_visual_dim
    # torch 2.11 draws other numbers in bf16 than in fp32; after the noise come image and mask
    noise = torch.randn(1, 3, 8, 12, C), torch.zeros(1, 3, 8, 12, C + 1)

    def made():
        return run(pipe, steps=10, latents=torch.cat(noise, -1))

    with accelerate(pipe, vae=False, exact_time=True) as handle:
        assert handle.corrected == ["exact_time"]
        assert "corrected exact_time" in str(handle)
        wanted = made()
    with accelerate(pipe, vae=False):
        assert torch.equal(made(), wanted)  # fp32 loses nothing
    in_bf16(pipe)
    with accelerate(pipe, vae=False):
        rounded = off(made(), wanted)
    with accelerate(pipe, vae=False, exact_time=True):
        exact = off(made(), wanted)
        seen = []
        pipe.transformer.time_embeddings.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].clone())
        )
        made()
        assert torch.equal(torch.cat(seen[::2]), pipe.scheduler.timesteps)
        assert torch.equal(torch.cat(seen[1::2]), pipe.scheduler.timesteps)
        # another time than the scheduler's stays what it is
        stray = torch.full((1,), 123.0, dtype=torch.bfloat16)
        with pytest.raises(TypeError):
            pipe.transformer(timestep=stray)
    print(f"timestep in bf16: rel_l2 {rounded:.2g}, exact: {exact:.2g}")
    assert exact <= 0.5 * rounded
    assert not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize(
    ("steps", "shift", "distance"), [(50, 10.0, 0.079), (50, 5.0, 0.068), (16, 5.0, 0.226)]
)
def test_official_sigmas(steps, shift, distance, monkeypatch, tmp_path):
    """Measured: the largest difference between the two grids, of which 1 is the whole way."""
    pipe = pipeline("t2v", monkeypatch, shift=shift)
    scheduler = pipe.scheduler
    official = schedule(steps, shift)
    stock_class = type(scheduler)

    def sigmas():
        scheduler.set_timesteps(steps, device="cpu")
        return scheduler.sigmas

    theirs = sigmas()
    with accelerate(pipe, vae=False, official_sigmas=True):
        assert (sigmas() - official).abs().max() < 1e-6
        scheduler.set_timesteps(sigmas=[0.9, 0.3])  # what is asked for explicitly is given
        assert len(scheduler.timesteps) == 2
        scheduler.save_pretrained(tmp_path)
        assert type(stock_class.from_pretrained(tmp_path)) is stock_class
    assert (theirs - official).abs().max().item() == pytest.approx(distance, abs=1e-3)
    assert torch.equal(sigmas(), theirs)
    assert type(scheduler) is stock_class


def test_cache_contexts_keep_the_passes_apart(monkeypatch):
    """Measured: MagCache over 12 steps of a tiny model; distance of the latents to the run without
    it."""
    diffusers = pytest.importorskip("diffusers")
    pipe = pipeline("t2v", monkeypatch)
    wanted = run(pipe, steps=12)
    distances = {}
    counts = {}
    for apart in (False, True):
        steps = 12 if apart else 24  # one memory sees every pass
        config = diffusers.MagCacheConfig(
            threshold=0.2,
            max_skip_steps=2,
            retention_ratio=0.2,
            num_inference_steps=steps,
            mag_ratios=[0.98] * steps,
        )
        pipe.transformer.enable_cache(config)
        with accelerate(pipe, vae=False, cache_contexts=apart):
            passes = []
            hook = pipe.transformer.visual_transformer_blocks[1].feed_forward.register_forward_hook(
                lambda *_, p=passes: p.append(1)
            )
            distances[apart] = off(run(pipe, steps=12), wanted)
            # nothing is left of the last run
            assert off(run(pipe, steps=12), wanted) == distances[apart]
            hook.remove()
        pipe.transformer.disable_cache()
        counts[apart] = len(passes) // 2
    print(
        f"MagCache: rel_l2 {distances[False]:.2g} in {counts[False]} passes, apart: "
        f"{distances[True]:.2g} in {counts[True]}"
    )
    assert max(counts.values()) < 24
    assert distances[True] <= 0.5 * distances[False]


def test_corrections_are_of_pipelines(monkeypatch):
    pipe = pipeline("t2v", monkeypatch)
    with pytest.raises(
        ValueError, match="exact_time and cache_contexts must be asked of a pipeline"
    ):
        accelerate(pipe.transformer, exact_time=True, cache_contexts=True)
    assert "forward" not in vars(pipe.transformer)


class Texts:
    """Qwen's processor, of which pipelines without pictures use the tokenizer only."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text=None, images=None, videos=None, **options):
        return self.tokenizer(text, **options)


def test_the_readme_can_be_copied(text_parts, monkeypatch, capsys):
    """Its five lines, run with a tiny pipeline in place of the one they would download, and at a
    size to match."""
    diffusers = pytest.importorskip("diffusers")
    pipe = pipeline("t2v", monkeypatch)
    (qwen, tokenizer, clip, clip_tokenizer) = text_parts
    pipe.register_modules(
        text_encoder=qwen,
        tokenizer=Texts(tokenizer),
        text_encoder_2=clip,
        tokenizer_2=clip_tokenizer,
    )
    pipe.prompt_template = "<|im_start|>user\n{}<|im_end|>"
    pipe.prompt_template_encode_start_idx = 1

    class Tiny(type(pipe)):
        def __call__(self, prompt, **options):
            assert options == dict(height=512, width=768, num_frames=241)
            return super().__call__(
                prompt, height=64, width=80, num_frames=5, num_inference_steps=2
            )

        def to(self, device):
            return self

    pipe.__class__ = Tiny
    monkeypatch.setattr(
        diffusers.Kandinsky5T2VPipeline, "from_pretrained", lambda name, torch_dtype: pipe
    )
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    code = (
        readme.partition("## Use it from diffusers")[2]
        .partition("```python\n")[2]
        .partition("```")[0]
    )
    scope = {}
    exec(code, scope)
    assert len(code.strip().splitlines()) == 5
    assert len(scope["frames"]) == 5
    assert "replaced 2 x Kandinsky5TransformerDecoderBlock" in capsys.readouterr().out


def test_the_first_image_is_put_in_once(monkeypatch):
    """diffusers up to 0.37 copies it into the channels of visual conditioning, too; the correction
    takes the copy out, and changes nothing where there is none."""
    pipe = pipeline("i2v", monkeypatch)
    stock_method = type(pipe).prepare_latents
    with accelerate(pipe, vae=False, image_once=True):
        wanted = run(pipe)

    def with_copy(self, *args, **kwargs):
        latents = stock_method(self, *args, **kwargs)
        channels = self.transformer.config.in_visual_dim
        latents[:, :1, :, :, channels : 2 * channels] = latents[:, :1, :, :, :channels]
        return latents

    monkeypatch.setattr(type(pipe), "prepare_latents", with_copy)
    twice = run(pipe)
    with accelerate(pipe, vae=False, image_once=True) as handle:
        assert handle.corrected == ["image_once"]
        once = run(pipe)
    assert off(once, wanted) <= 1e-5 < 1e-3 < off(twice, wanted)
    assert torch.equal(run(pipe), twice)


def test_the_picture_to_edit_stays_in(monkeypatch):
    pipe = pipeline("i2i", monkeypatch)
    wanted = run(pipe)
    with accelerate(pipe, image_once=True):
        assert off(run(pipe), wanted) <= 1e-5
