# SPDX-License-Identifier: Apache-2.0
"""Models that somebody else changed, before `accelerate` or after it: hooks, replaced parts,
wrapped blocks and forwards, derivatives of other kinds, copies and files.

Whatever the operators would compute otherwise than diffusers runs as diffusers wrote it, and the
log says so once.
"""

import copy
import functools
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from kandinsky_model import accelerate

from ..support import tiny_models
from ..support.accelerated import (
    RAGGED,
    ROUNDING,
    accelerated,
    exact,
    inputs,
    off,
    stock,
    told,
    velocity,
)

BLOCK = "visual_transformer_blocks.0"


class DoubledNorm(nn.LayerNorm):
    """A norm that somebody put in place of the one without weights."""

    def forward(self, x):
        return 2 * super().forward(x)


def replace_norm(model):
    block = model.get_submodule(BLOCK)
    block.feed_forward_norm = DoubledNorm(128, elementwise_affine=False)


def replace_rope(model):
    class Halved(type(model.visual_rope_embeddings)):
        def forward(self, shape, pos, scale_factor=(1.0, 1.0, 1.0)):
            return super().forward(shape, [axis // 2 for axis in pos], scale_factor)

    model.visual_rope_embeddings = Halved(model.config.axes_dims)


def replace_head_norm(model):
    model.get_submodule(BLOCK).self_attention.query_norm = nn.LayerNorm(64)


def replace_block(model):
    class Other(type(model.get_submodule(BLOCK))):
        def forward(self, visual_embed, text_embed, time_embed, rope, sparse_params):
            return visual_embed + rope.sum()

    model.get_submodule(BLOCK).__class__ = Other
    vars(model.get_submodule(BLOCK)).pop("forward", None)
    vars(model.get_submodule(BLOCK)).pop("_acceleration", None)


def hook_on(name):
    def change(model):
        module = model.get_submodule(name)
        module.register_forward_hook(lambda module, args, out: 2 * out)

    return change


def other_forward(model):
    norm = model.get_submodule(BLOCK).self_attention_norm
    norm.forward = lambda x: 3 * x


CHANGES = {
    "norm": (replace_norm, "a DoubledNorm stands in place of LayerNorm"),
    "rope": (replace_rope, "a Halved stands in place of"),
    "head norm": (replace_head_norm, "a LayerNorm stands in place of"),
    "block": (replace_block, "a Other stands in place of"),
    "hook on a norm": (hook_on(f"{BLOCK}.self_attention_norm"), "is on a LayerNorm"),
    "hook on a head norm": (hook_on(f"{BLOCK}.cross_attention.key_norm"), "is on a RMSNorm"),
    "hook on the rope": (hook_on("text_rope_embeddings"), "is on a Kandinsky5RoPE1D"),
    "hook on the last norm": (hook_on("out_layer.norm"), "is on a LayerNorm"),
    "another forward": (other_forward, "is on a LayerNorm"),
}


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_what_was_changed_runs_as_diffusers_wrote_it(change, reason, order, monkeypatch, caplog):
    theirs = stock(monkeypatch, stripped=False)
    plain = velocity(theirs)
    ours = copy.deepcopy(theirs)
    torch.manual_seed(1)
    change(theirs)
    wanted = velocity(theirs)
    assert off(wanted, plain) > 1e-3  # the change matters
    if order == "before":
        change(ours)
    handle = accelerate(ours)
    if order == "after":
        change(ours)
    with told(caplog) as messages:
        made = [velocity(ours) for _ in range(2)]
    assert all(torch.equal(one, wanted) for one in made)
    assert len(messages) == 1
    assert reason in messages[0]
    assert messages[0].partition(" ")[2] in str(handle)


def watch(module):
    seen = []
    module.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    return seen


@pytest.mark.parametrize("name", ["decoder.conv_norm_out", "decoder.up_blocks.0.resnets.0.conv1"])
def test_hooks_inside_the_vae_see_what_they_saw(name, caplog):
    pytest.importorskip("diffusers")
    theirs = tiny_models.diffusers_video_vae(tiny_models.random_vae())
    ours = copy.deepcopy(theirs)
    z = torch.randn(1, 16, 3, 5, 6)
    accelerate(ours)
    seen = [watch(vae.get_submodule(name)) for vae in (theirs, ours)]
    with torch.no_grad(), told(caplog) as messages:
        wanted = theirs.decode(z).sample
        made = ours.decode(z).sample
    assert off(made, wanted) <= 3 * ROUNDING
    ((args, out),), ((our_args, our_out),) = seen
    assert off(our_args[0], args[0]) <= 3 * ROUNDING
    assert off(our_out, out) <= 3 * ROUNDING
    assert len(messages) == 1
    assert "a hook or another forward is on a" in messages[0]


def test_a_replaced_processor_of_the_vae_is_called(caplog):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Louder(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return 1.5 * hidden_states

    theirs = tiny_models.diffusers_video_vae(tiny_models.random_vae())
    ours = copy.deepcopy(theirs)
    z = torch.randn(1, 16, 3, 5, 6)
    accelerate(ours)
    with torch.no_grad():
        plain = theirs.decode(z).sample
    for vae in (theirs, ours):
        vae.decoder.mid_block.attentions[0].processor = Louder()
    with torch.no_grad(), told(caplog) as messages:
        wanted = theirs.decode(z).sample
        made = ours.decode(z).sample
    assert off(made, wanted) <= 3 * ROUNDING < 1e-3 < off(wanted, plain)
    assert len(messages) == 1
    assert "attention processor has been replaced" in messages[0]


# Wrapped blocks and forwards


class CachedBlocks(nn.Module):
    """A stand-in for cache-dit's wrapper: it calls the blocks and looks at tokens alone."""

    def __init__(self, blocks):
        super().__init__()
        self.transformer_blocks = blocks
        self.calls = 0

    def forward(self, hidden_states, *args, **kwargs):
        self.calls += 1
        for block in self.transformer_blocks:
            hidden_states = block(hidden_states, *args, **kwargs)
        return hidden_states


def wrap_as_cache_dit_does(model):
    """Its forward keeps the one before in a closure, and puts the wrapper in place meanwhile."""
    wrapper = CachedBlocks(model.visual_transformer_blocks)
    original_forward = model.forward

    def new_forward(self, *args, **kwargs):
        blocks = self.visual_transformer_blocks
        self.visual_transformer_blocks = nn.ModuleList([wrapper])
        try:
            return original_forward(*args, **kwargs)
        finally:
            self.visual_transformer_blocks = blocks

    model.forward = functools.update_wrapper(functools.partial(new_forward, model), new_forward)
    return wrapper


@pytest.mark.parametrize("nabla", [False, True], ids=["dense", "nabla"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_wrapped_blocks_are_accelerated(order, nabla, monkeypatch):
    model = stock(monkeypatch)
    plain = velocity(model, nabla=nabla)
    if order == "before":
        wrapper = wrap_as_cache_dit_does(model)
    handle = accelerate(model)
    if order == "after":
        wrapper = wrap_as_cache_dit_does(model)
    made = velocity(model, nabla=nabla)
    assert off(made, exact(nabla=nabla)) <= 1e-5
    assert not torch.equal(made, plain)
    assert wrapper.calls == 1
    assert "calls its blocks through CachedBlocks" in str(handle)
    assert ("is called through a function of tests" in str(handle)) == (order == "before")
    handle.undo()
    assert torch.equal(velocity(model, nabla=nabla), plain)
    assert wrapper.calls == 2


@pytest.mark.parametrize("order", ["before", "after"])
def test_cache_dit(order, monkeypatch):
    """The real one, officially for Kandinsky 5, with passes skipped as without acceleration."""
    cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is not installed")
    from ..support.accelerated import pipeline, run

    made = []
    for fast in (False, True):
        pipe = pipeline("t2v", monkeypatch)
        if fast and order == "after":
            handle = accelerate(pipe, vae=False)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=0.5,
            max_warmup_steps=2,
        )
        cache_dit.enable_cache(pipe, cache_config=config)
        if fast and order == "before":
            handle = accelerate(pipe, vae=False)
        count = []
        pipe.transformer.visual_transformer_blocks[1].feed_forward.register_forward_hook(
            lambda *_, count=count: count.append(1)
        )
        made.append((run(pipe, steps=8), len(count)))
    (wanted, passes), (ours, ours_passes) = made
    assert ours_passes == passes < 16
    assert 0 < off(ours, wanted) <= 1e-5
    assert "calls its blocks through CachedBlocks" in str(handle)


# Derivatives of other kinds


def test_forward_mode_derivatives_are_diffusers(monkeypatch, caplog):
    model = stock(monkeypatch, stripped=False)
    ours = copy.deepcopy(model)
    accelerate(ours)
    data = inputs()
    tangent = torch.randn(data["hidden_states"].shape, generator=torch.Generator().manual_seed(5))
    results = []
    with told(caplog) as messages, torch.no_grad():
        for one in (model, ours):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(data["hidden_states"], tangent)
                # the fused attention of torch has no such derivative
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                    out = one(**{**data, "hidden_states": dual})
                results.append(forward_ad.unpack_dual(out).tangent)
    assert results[0].norm() > 0
    assert torch.equal(results[1], results[0])
    assert len(messages) == 1
    assert "forward-mode derivatives" in messages[0]


def test_second_derivatives_of_dense_passes_are_diffusers(monkeypatch):
    model = stock(monkeypatch, stripped=False)
    ours = copy.deepcopy(model)
    accelerate(ours)
    results = []
    for one in (model, ours):
        data = inputs()
        x = data["hidden_states"].requires_grad_()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (first,) = torch.autograd.grad(one(**data).square().mean(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append(second)
    assert results[0].norm() > 0
    assert torch.equal(results[1], results[0])


def test_gradient_checkpointing_with_nabla(monkeypatch):
    """The same gradients, and every block computed twice."""
    gradients = []
    counts = []
    for checkpointing in (False, True):
        model = accelerated(monkeypatch)
        if checkpointing:
            model.train()
            model.enable_gradient_checkpointing()
        parameter = model.get_submodule(f"{BLOCK}.feed_forward.in_layer").weight.requires_grad_()
        count = []
        model.get_submodule(BLOCK).feed_forward.register_forward_hook(
            lambda *_, count=count: count.append(1)
        )
        model(**inputs(RAGGED, nabla=True)).square().mean().backward()
        gradients.append(parameter.grad)
        counts.append(len(count))
    assert counts == [1, 2]
    assert gradients[0].norm() > 0
    assert off(gradients[1], gradients[0]) <= ROUNDING


# Sizes that diffusers takes


@pytest.mark.parametrize("nabla", [False, True], ids=["dense", "nabla"])
def test_one_text_serves_two_videos(nabla, monkeypatch):
    """What `num_videos_per_prompt=2` gives the transformer; and one time for both."""
    model = accelerated(monkeypatch)
    data = inputs(nabla=nabla, batch=2)
    for name in ("encoder_hidden_states", "pooled_projections"):
        data[name] = data[name][:1]
    one_time = {**data, "timestep": data["timestep"][:1]}
    with torch.no_grad():
        both = model(**data)
        same_time = model(**one_time)
        alone = [model(**{**one_time, "hidden_states": x}) for x in data["hidden_states"].split(1)]
    assert off(both, torch.cat(alone)) <= ROUNDING
    assert off(same_time, both) <= ROUNDING


def test_one_frequency_turns_every_pair(monkeypatch):
    """axes_dims (1, 1, 2), which diffusers' own pipeline tests use: a single angle broadcasts."""
    module = pytest.importorskip("diffusers.models.transformers.transformer_kandinsky")
    torch.manual_seed(0)
    model = module.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        in_text_dim=24,
        in_text_dim2=16,
        time_dim=16,
        out_visual_dim=4,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(1, 1, 2),
        visual_cond=True,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    model.requires_grad_(False).eval()
    wanted = velocity(model)
    handle = accelerate(model)
    # diffusers rounds rotated queries and keys to bf16
    assert 0 < off(velocity(model), wanted) <= 1e-2
    assert not handle.kept
    assert not handle.reports


# Classes, copies and files


def test_classes_make_stock_models(monkeypatch, tmp_path):
    model = accelerated(monkeypatch, stripped=False)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).requires_grad_(False)
    fresh = type(model).from_config(model.config)
    for one in (loaded, fresh):
        assert not any("forward" in vars(module) for module in one.modules())
    accelerate(model).undo()
    assert off(velocity(loaded), velocity(model)) <= 1e-2


def test_a_pickled_model_loads_as_stock(monkeypatch):
    """A file does not need this package to be opened, and can be accelerated again."""
    model = stock(monkeypatch, stripped=False)
    plain = velocity(model)
    accelerate(model)
    made = velocity(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    # the one place that unpickles: people do so with whole models, and this file is our own
    loaded = torch.serialization.load(file, weights_only=False)
    assert torch.equal(velocity(loaded), plain)
    with accelerate(loaded) as handle:
        assert handle.replaced
        assert torch.equal(velocity(loaded), made)
    assert torch.equal(velocity(loaded), plain)
    assert torch.equal(velocity(model), made)


def test_pipelines_are_made_from_accelerated_ones(monkeypatch):
    """`from_pipe` looks at the classes of parts."""
    diffusers = pytest.importorskip("diffusers")
    from ..support.accelerated import pipeline, run

    pipe = pipeline("t2v", monkeypatch)
    accelerate(pipe)
    wanted = run(pipe)
    other = diffusers.Kandinsky5T2VPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer
    assert torch.equal(run(other), wanted)
