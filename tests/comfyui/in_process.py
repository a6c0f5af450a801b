# SPDX-License-Identifier: Apache-2.0
"""Acceleration of ComfyUI's own Kandinsky 5 network, in a process that imports ComfyUI.

The network has random weights and is loaded as ComfyUI loads a file, so that its own nodes can
patch it. `run_in_comfyui` calls this.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from kandinsky_model.acceleration.comfyui import accelerated
from kandinsky_model.config import NablaConfig
from tests.acceleration import test_comfyui as small
from tests.support.plain_dit import random_state

# of the published checkpoints, which ComfyUI assumes
CONFIG = replace(
    small.CONFIG,
    in_visual_dim=16,
    out_visual_dim=16,
    in_text_dim=3584,
    in_text_dim2=768,
    visual_cond=True,
)
ROUNDING = 1e-5  # between two whole samplings


def distance(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.double() - wanted).norm() / wanted.norm()).item()


def check_acceleration(comfyui: Path, holds: Callable[..., None]) -> None:
    """One pass against an oracle in fp64, then whole samplings under the patches of other nodes."""
    sys.path.insert(0, str(comfyui))
    sys.argv[1:] = ["--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    check_pass(holds)
    check_patches(holds)


def check_pass(holds) -> None:
    import comfy.ldm.kandinsky5.model
    import comfy.model_patcher
    import comfy.ops

    config = small.CONFIG
    state = random_state(config)
    network = comfy.ldm.kandinsky5.model.Kandinsky5(
        in_text_dim=config.in_text_dim,
        in_text_dim2=config.in_text_dim2,
        time_dim=config.time_dim,
        model_dim=config.model_dim,
        ff_dim=config.ff_dim,
        visual_embed_dim=4 * config.in_channels,
        num_text_blocks=config.num_text_blocks,
        num_visual_blocks=config.num_visual_blocks,
        axes_dims=config.axes_dims,
        rope_scale_factor=small.SCALE,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.manual_cast,
    )
    network.load_state_dict(state)
    network.eval().requires_grad_(False)
    holder = torch.nn.Module()
    holder.diffusion_model = network
    model = comfy.model_patcher.ModelPatcher(holder, torch.device("cpu"), torch.device("cpu"))

    def velocity(patcher):
        with torch.inference_mode():
            return network(*small.inputs(), transformer_options={"wrappers": patcher.wrappers})

    exact = small.oracle(state, small.inputs())
    stock = distance(velocity(model), exact)
    ours = distance(velocity(accelerated(model, "dense")), exact)
    holds(f"dense: {ours:.1e} from fp64, ComfyUI itself {stock:.1e}", ours <= 2 * stock)
    sparse = small.oracle(state, small.inputs(), NablaConfig(0.3))
    ours = distance(velocity(accelerated(model, "nabla", 0.3)), sparse)
    apart = distance(sparse, exact)
    holds(f"NABLA: {ours:.1e} from fp64, which is {apart:.1e} from dense", ours < 1e-4 < apart)


def patches(generator: torch.Generator) -> dict[str, Callable]:
    """What ComfyUI's own nodes do to a MODEL, by their names."""
    import comfy.sd
    from comfy_extras import nodes_easycache, nodes_model_advanced, nodes_rope, nodes_slg

    block = "diffusion_model.visual_transformer_blocks.0"
    lora = {}
    for layer, outputs in (("self_attention.to_query", 128), ("feed_forward.in_layer", 256)):
        for side, shape in (("A", (4, 128)), ("B", (outputs, 4))):
            weight = 0.1 * torch.randn(shape, generator=generator)
            lora[f"{block}.{layer}.lora_{side}.weight"] = weight
    easy, lazy = nodes_easycache.EasyCacheNode, nodes_easycache.LazyCacheNode
    skip, rope = nodes_slg.SkipLayerGuidanceDiT, nodes_rope.ScaleROPE
    shift = nodes_model_advanced.ModelSamplingSD3()
    return {
        "no patch": lambda model: model,
        "ModelSamplingSD3": lambda model: shift.patch(model, 5.0)[0],
        "EasyCache": lambda model: easy.execute(model, 0.9, 0.1, 0.95, False).result[0],
        "LazyCache": lambda model: lazy.execute(model, 0.9, 0.1, 0.95, False).result[0],
        "SkipLayerGuidanceDiT": lambda m: skip.execute(m, 2.0, 0.0, 1.0, "1", "", 0.0).result[0],
        "ScaleROPE": lambda m: rope.execute(m, 1.5, 0.0, 1.2, 0.0, 1.0, 0.0).result[0],
        "a LoRA": lambda model: comfy.sd.load_lora_for_models(model, None, lora, 0.7, 0)[0],
    }


def check_patches(holds) -> None:
    import comfy.sample
    import comfy.sd

    model = comfy.sd.load_diffusion_model_state_dict(
        random_state(CONFIG), model_options={"dtype": torch.float32}
    )
    generator = torch.Generator().manual_seed(3)

    def conditioning():
        pooled = torch.randn(1, 768, generator=generator)
        return [[torch.randn(1, 7, 3584, generator=generator), {"pooled_output": pooled}]]

    positive, negative = conditioning(), conditioning()
    latent = torch.zeros(1, 16, 3, 16, 16)
    noise = torch.randn(latent.shape, generator=generator)

    def sampled(patched):
        how = (8, 3.0, "euler", "simple", positive, negative, latent)
        return comfy.sample.sample(patched, noise, *how, seed=1, disable_pbar=True)

    plain = sampled(model)
    for name, patch in patches(generator).items():
        # ComfyUI's EasyCache does not decide alike in its first run and in the next ones
        stock = [sampled(patch(model)) for _ in range(2)]
        apart = min(distance(one, plain) for one in stock)

        def off(patched, stock=stock):
            actual = sampled(patched)
            return min(distance(actual, one) for one in stock)

        for attention in (("dense",), ("nabla", 1.0)):
            after = off(patch(accelerated(model, *attention)))
            before = off(accelerated(patch(model), *attention))
            holds(
                f"{name}, which moves the result by {apart:.1e}: {attention[0]} is within "
                f"{max(after, before):.1e} of it, in either order",
                max(after, before) < ROUNDING and (apart > ROUNDING or name == "no patch"),
            )
