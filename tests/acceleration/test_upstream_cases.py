# SPDX-License-Identifier: Apache-2.0
"""What diffusers' own tests do with its Kandinsky 5 pipelines, written anew for accelerated ones.

`run_upstream_tests.py` runs their tests themselves, where there is a checkout. Here each case is
run by a stock pipeline and by an accelerated one, and both must give the same.
"""

import copy

import pytest
import torch

from kandinsky_model import accelerate

from ..support.accelerated import NAMES, off, pipeline, run

CLOSE = 1e-5


def plain(pipe):
    return run(pipe)


def two_videos_of_one_prompt(pipe):
    return run(pipe, num_videos_per_prompt=2)


def two_prompts(pipe):
    """As a pipeline gives them: embeds of one length."""
    texts = {
        "prompt_embeds_qwen": torch.randn(2, 9, 64),
        "prompt_embeds_clip": torch.randn(2, 32),
        "prompt_cu_seqlens": torch.tensor([0, 9, 18], dtype=torch.int32),
        "negative_prompt_embeds_qwen": torch.randn(2, 6, 64),
        "negative_prompt_embeds_clip": torch.randn(2, 32),
        "negative_prompt_cu_seqlens": torch.tensor([0, 6, 12], dtype=torch.int32),
    }
    return pipe(
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(4),
        output_type="latent",
        return_dict=False,
        **texts,
    )[0]


def without_guidance(pipe):
    return run(pipe, guidance=1.0)


def a_callback_that_changes_latents(pipe):
    def halve(pipe, step, time, tensors):
        return {"latents": tensors["latents"] / 2}

    return run(pipe, callback_on_step_end=halve)


def latents_that_are_given(pipe):
    shape = (1, 3, 8, 12, pipe.transformer.visual_embeddings.in_layer.in_features // 4)
    return run(pipe, latents=torch.randn(shape, generator=torch.Generator().manual_seed(6)))


def decoded_in_slices_and_tiles(pipe):
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    return torch.from_numpy(run(pipe, output="np"))


def weights_in_fp8(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return run(pipe)


def stock_processors_set_again(pipe):
    transformer = pipe.transformer
    kinds = {type(processor) for processor in transformer.attn_processors.values()}
    transformer.set_attn_processor(kinds.pop()())
    return run(pipe)


def a_pipeline_of_its_components(pipe):
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    return run(other)


def a_copy_of_the_transformer(pipe):
    pipe.transformer = copy.deepcopy(pipe.transformer)
    return run(pipe)


CASES = (
    two_videos_of_one_prompt,
    two_prompts,
    without_guidance,
    a_callback_that_changes_latents,
    latents_that_are_given,
    decoded_in_slices_and_tiles,
    weights_in_fp8,
    stock_processors_set_again,
    a_pipeline_of_its_components,
    a_copy_of_the_transformer,
)


def name(case):
    return case.__name__


@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_case_gives_what_it_gave(case, monkeypatch):
    results = []
    for fast in (False, True):
        pipe = pipeline("t2v", monkeypatch)
        if fast:
            handle = accelerate(pipe)
        torch.manual_seed(9)
        results.append(case(pipe))
    assert not handle.kept
    assert not handle.reports
    assert 0 < off(results[1], results[0]) <= CLOSE


@pytest.mark.parametrize("task", [task for task in NAMES if task != "t2v"])
@pytest.mark.parametrize("case", [plain, without_guidance, a_pipeline_of_its_components], ids=name)
def test_other_pipelines_give_what_they_gave(case, task, monkeypatch):
    results = []
    for fast in (False, True):
        pipe = pipeline(task, monkeypatch)
        if fast:
            handle = accelerate(pipe)
        results.append(case(pipe))
    assert not handle.reports
    assert 0 < off(results[1], results[0]) <= CLOSE
