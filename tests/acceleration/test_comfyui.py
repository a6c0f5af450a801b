# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's own network, accelerated: what it computed before, NABLA by an oracle in fp64, and
every way in which it steps back."""

import logging

import pytest
import torch
from torch import nn

from kandinsky_model import comfyui
from kandinsky_model.acceleration.comfyui import accelerated, released
from kandinsky_model.config import PRESETS, DiTConfig, NablaConfig
from kandinsky_model.dit.geometry import Grid

from ..compare import assert_faithful
from ..support.comfy_network import Kandinsky5, ModelPatcher
from ..support.plain_dit import plain_forward, random_state

CONFIG = DiTConfig(
    in_text_dim=40,
    in_text_dim2=24,
    time_dim=32,
    model_dim=128,
    ff_dim=256,
    num_text_blocks=1,
    num_visual_blocks=3,
    visual_cond=True,
)
SCALE = (1.0, 2.0, 2.0)
# ragged tiles, 2 x 2 x 5 of them: wider than the window, so that NABLA can drop some
GRID = Grid(2, 9, 33)
LOGGER = "kandinsky_model.acceleration.comfyui"


@pytest.fixture(scope="module")
def state():
    return random_state(CONFIG)


@pytest.fixture(scope="module")
def model(state):
    network = Kandinsky5(CONFIG, SCALE)
    network.load_state_dict(state)
    return ModelPatcher(network.eval().requires_grad_(False))


def inputs(grid=GRID, batch=1, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(batch, CONFIG.in_channels, grid.T, 2 * grid.Y, 2 * grid.X, generator=g)
    others = (
        torch.randn(batch, 7, CONFIG.in_text_dim, generator=g),
        torch.randn(batch, CONFIG.in_text_dim2, generator=g),
    )
    return x.to(dtype), torch.full((batch,), 637.0), *(one.to(dtype) for one in others)


def oracle(state, data, nabla=None):
    x, time, text, pooled = (one.double() for one in data)
    exact = {name: tensor.double() for name, tensor in state.items()}
    return (
        plain_forward(exact, CONFIG, x.permute(0, 2, 3, 4, 1), text, pooled, time, SCALE, nabla)[0]
        .permute(0, 4, 1, 2, 3)
        .contiguous()
    )


@pytest.fixture(scope="module")
def exact(state):
    return oracle(state, inputs())


@pytest.mark.parametrize(
    ("attention", "keep_mass"), [("dense", None), ("auto", None), ("nabla", 1.0)]
)
def test_dense_attention_is_as_exact_as_comfyuis(model, exact, attention, keep_mass):
    peer = model(*inputs())
    ours = accelerated(model, attention, keep_mass)(*inputs())
    assert_faithful(ours.contiguous(), exact, peer)
    assert not torch.equal(ours, peer)  # it did run


@pytest.mark.parametrize("keep_mass", [0.3, 0.6])
def test_nabla_is_that_of_the_oracle(model, state, exact, keep_mass):
    sparse = oracle(state, inputs(), NablaConfig(keep_mass))
    ours = accelerated(model, "nabla", keep_mass)(*inputs())
    assert (sparse - exact).norm() > 1e-3 * exact.norm()  # something was dropped
    assert (ours - sparse).norm() < 1e-5 * sparse.norm()


def test_several_samples_of_odd_sides_at_once(model):
    x, *others = inputs(Grid(2, 4, 9), batch=2)
    x = x[..., :-1, :-1]
    both = model(x, *others)
    ours = accelerated(model, "nabla", 1.0)(x, *others)
    torch.testing.assert_close(ours, both, rtol=0, atol=2e-5)


def test_pictures_have_no_axis_of_time(model):
    x, *others = inputs(Grid(1, 6, 7))
    torch.testing.assert_close(
        accelerated(model)(x[:, :, 0], *others), model(x[:, :, 0], *others), rtol=0, atol=2e-5
    )


def test_sixteen_bits_are_no_worse_than_comfyuis(state, exact):
    network = Kandinsky5(CONFIG, SCALE)
    network.load_state_dict(state)
    model = ModelPatcher(network.eval().bfloat16().requires_grad_(False))
    data = inputs(dtype=torch.bfloat16)
    truth = oracle({name: tensor.bfloat16() for name, tensor in state.items()}, data)
    peer = model(*data)
    for attention in ("dense", "nabla"):
        ours = accelerated(model, attention, 1.0)(*data)
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - truth).norm() <= 1.25 * (peer.double() - truth).norm()


def test_the_original_is_left_as_it_is(model):
    before = model(*inputs())
    names = {
        name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()
    }
    (ours,) = comfyui.NODE_CLASS_MAPPINGS["KandinskyKernelsAccelerate"]().run(model, "nabla", 0.3)
    options = {"patches_replace": {"dit": {}, "other": {1: 2}}}
    ours(*inputs(), **options)
    assert ours is not model
    assert ours.model.diffusion_model is model.model.diffusion_model
    assert model.wrappers == {}
    assert model.model_options == {"transformer_options": {}}
    assert options["patches_replace"]["dit"] == {}
    after = model.model.diffusion_model.state_dict()
    assert names.keys() == after.keys()
    assert all(torch.equal(names[name], after[name]) for name in names)
    assert torch.equal(model(*inputs()), before)


def test_applied_twice_the_last_one_counts(model):
    once = accelerated(model, "nabla", 0.3)
    twice = accelerated(accelerated(model, "dense"), "nabla", 0.3)
    assert torch.equal(once(*inputs()), twice(*inputs()))
    assert [len(some) for some in twice.wrappers["diffusion_model"].values()] == [1]


def test_parameters_are_read_inside_their_own_modules_only(state):
    """ComfyUI's low-memory mode has a module's weights in place only while the module runs."""
    network = Kandinsky5(CONFIG, SCALE)
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
    wanted = accelerated(ModelPatcher(network), "nabla", 0.3)(*inputs())
    for module in network.modules():
        own = dict(module.named_parameters(recurse=False))
        kept = {name: parameter.clone() for name, parameter in own.items()}

        def fetch(module, _, kept=kept, own=own):
            for name, parameter in own.items():
                parameter.copy_(kept[name])

        def drop(module, _, out, own=own):
            for parameter in own.values():
                parameter.fill_(torch.nan)

        if own:
            drop(module, None, None)
            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(drop)
    assert torch.equal(accelerated(ModelPatcher(network), "nabla", 0.3)(*inputs()), wanted)


def test_blocks_that_another_node_replaced_stay_replaced(model, caplog):
    calls = []
    block = model.model.diffusion_model.visual_transformer_blocks[1]

    def other(args, extra):
        with pytest.raises(TypeError, match="keyword"):  # as ComfyUI 0.33 calls it
            extra["original_block"](args)
        calls.append(args["transformer_options"]["block_index"])
        return {"x": block(args["x"], args["context"], args["time_embed"], args["freqs"])}

    ours = accelerated(model, "nabla", 1.0)
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(2):
            out = ours(*inputs(), patches_replace={"dit": {("double_block", 1): other}})
    torch.testing.assert_close(out, model(*inputs()), rtol=0, atol=2e-5)
    assert calls == [1, 1]
    assert caplog.messages == ["1 of 3 blocks stay as another node made them"]


def test_a_sparse_attention_of_comfyuis_own_is_left_alone(model, caplog):
    (replacement,) = accelerated(model, "nabla", 0.3).wrappers["diffusion_model"][
        "kandinsky_kernels"
    ]
    seen = {}
    replacement(
        type(
            "",
            (),
            {
                "class_obj": model.model.diffusion_model,
                "__call__": lambda self, *_, transformer_options: seen.update(transformer_options),
            },
        )(),
        *inputs(),
        transformer_options={},
    )
    with caplog.at_level(logging.WARNING, LOGGER):
        for block in seen["patches_replace"]["dit"].values():
            out = block(
                {"sparse_params": {"P": 0.8}},
                {"original_block": lambda args: args["sparse_params"]["P"]},
            )
            assert out == {"x": 0.8}
    assert caplog.messages == [
        "ComfyUI computes this by itself, because it uses a sparse attention of its own"
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda network, data: ([one.double() for one in data], network.double()),
            "activations are torch.float64",
        ),
        (
            lambda network, data: (data, setattr(network, "patch_size", (2, 2, 2))),
            "its patches are (2, 2, 2)",
        ),
        (
            lambda network, data: (
                data,
                delattr(network.visual_transformer_blocks[1].self_attention, "key_norm"),
            ),
            "no key_norm",
        ),
    ],
)
def test_what_it_cannot_do_is_left_to_comfyui_and_said_once(state, caplog, change, reason):
    network = Kandinsky5(CONFIG, SCALE)
    network.load_state_dict(state)
    model = ModelPatcher(network.eval().requires_grad_(False))
    ours = accelerated(model, "nabla", 0.3)
    seen = []
    data, _ = change(network, inputs())
    (wrapper,) = ours.wrappers["diffusion_model"]["kandinsky_kernels"]
    executor = type(
        "",
        (),
        {
            "class_obj": network,
            "__call__": lambda self, *_, transformer_options: seen.append(transformer_options),
        },
    )()
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(2):
            wrapper(executor, *data, transformer_options={"a": 1})
    assert seen == [{"a": 1}] * 2
    assert len(caplog.messages) == 1
    assert reason in caplog.messages[0]


def test_while_gradients_are_recorded_comfyui_computes(state, caplog):
    network = Kandinsky5(CONFIG, SCALE)
    network.load_state_dict(state)
    ours = accelerated(ModelPatcher(network), "nabla", 0.3)
    data = inputs(Grid(1, 4, 4))
    with caplog.at_level(logging.WARNING, LOGGER):
        network(*data, transformer_options={"wrappers": ours.wrappers}).square().mean().backward()
    assert caplog.messages == ["ComfyUI computes this by itself, because gradients are recorded"]
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_another_model_and_wrong_values_are_one_sentence(model):
    for call, message in (
        (
            lambda: accelerated(ModelPatcher(nn.Linear(1, 1))),
            "this node accelerates Kandinsky 5, but Linear has no",
        ),
        (lambda: accelerated(model, "flash"), "attention must be one of"),
        (lambda: accelerated(model, "nabla", 1.5), "keep_mass must lie in"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "preset", [preset for preset in PRESETS.values() if preset.repo], ids=lambda preset: preset.name
)
def test_auto_is_what_the_checkpoint_was_released_with(preset):
    height, width = preset.sizes[0]
    assert (
        released(
            preset.dit.model_dim, Grid((preset.frames - 1) // 4 + 1, height // 16, width // 16)
        )
        == preset.nabla
    )


def test_auto_takes_the_nearest_length_and_nothing_for_stills(state):
    lite = PRESETS["t2v-lite-sft-10s"].dit.model_dim
    assert [released(lite, Grid(T, 32, 48)) for T in (1, 20, 31, 45, 46, 80)] == [None] * 4 + [
        NablaConfig(0.9)
    ] * 2
    assert released(lite, Grid(61, 48, 80)) == NablaConfig(0.9)
    assert released(128, Grid(61, 32, 48)) is None
