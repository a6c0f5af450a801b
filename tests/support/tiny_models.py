# SPDX-License-Identifier: Apache-2.0
"""Whole models of random weights on disk, small enough to generate in a blink, in every layout that
can be loaded."""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

from kandinsky_model.checkpoints.load import save_dit, save_vae
from kandinsky_model.config import DiTConfig, NablaConfig, VAEConfig
from kandinsky_model.dit.transformer import DiffusionTransformer3D
from kandinsky_model.text.tiny import TinyTextEncoder
from kandinsky_model.text.vision import Preprocessor
from kandinsky_model.vae.hunyuan import HunyuanVideoVAE

WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "moving",
    "right",
    "left",
    "still",
    "on",
    "background",
]
SMALL = dict(height=64, width=80, num_frames=5, num_inference_steps=2)
SMALL_ARGS = ["--size", "80x64", "--frames", "5", "--steps", "2"]
NABLA = NablaConfig(0.6, (3, 1, 1))
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def random_dit(text_dim: int, pooled_dim: int, visual_cond: bool = True) -> DiffusionTransformer3D:
    """Modulations are not zero, so that no branch is dead."""
    dit = DiffusionTransformer3D(
        DiTConfig(
            in_text_dim=text_dim,
            in_text_dim2=pooled_dim,
            time_dim=32,
            model_dim=64,
            ff_dim=128,
            num_text_blocks=1,
            num_visual_blocks=2,
            visual_cond=visual_cond,
        )
    )
    for name, parameter in dit.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return dit


def random_vae() -> HunyuanVideoVAE:
    return HunyuanVideoVAE(
        VAEConfig(block_out_channels=(8, 8, 16, 16), layers_per_block=1, norm_num_groups=4)
    )


def diffusers_video_vae(vae: HunyuanVideoVAE):
    """diffusers' class with the weights of ours, whole videos at a time."""
    from diffusers import AutoencoderKLHunyuanVideo

    config = vae.config
    with torch.device("meta"):  # no time is spent on weights that are about to be replaced
        other = AutoencoderKLHunyuanVideo(
            latent_channels=config.latent_channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            scaling_factor=config.scaling_factor,
        )
    other.use_framewise_encoding = other.use_framewise_decoding = False
    other.load_state_dict(
        {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, assign=True
    )
    return other.eval().requires_grad_(False)


def random_image_vae():
    """diffusers' class with FLUX.1's settings, its shift of latents included."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8, 8, 16, 16],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def tiny_folder(root: Path) -> Path:
    """The layout of the bundled model."""
    torch.manual_seed(0)
    save_dit(random_dit(32, 16), root / "transformer", NABLA)
    save_vae(random_vae(), root / "vae")
    TinyTextEncoder(WORDS, dim=32, pooled_dim=16).save(root / "text_encoder")
    return root


def byte_tokenizer(kind: type, tokens: list[str]):
    """A tokenizer that merges nothing, from files: its other ways to be made differ between
    versions of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(
            json.dumps({text: i for i, text in enumerate(tokens)})
        )
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return kind.from_pretrained(folder)


def text_parts():
    """Qwen2.5-VL, its tokenizer, CLIP's text model and its tokenizer, tiny and random; both
    tokenizers know single bytes only."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2Tokenizer,
    )

    torch.manual_seed(1)
    symbols = sorted(ByteLevel.alphabet())
    tokenizer = byte_tokenizer(Qwen2Tokenizer, [*symbols, *SPECIAL])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    clip_tokenizer = byte_tokenizer(
        CLIPTokenizer,
        [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"],
    )
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    qwen = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=len(tokenizer) + 8,
                rope_theta=1e6,
                bos_token_id=None,
                eos_token_id=256,
                pad_token_id=256,
                rope_scaling=dict(mrope_section=[2, 2, 4], rope_type="default", type="default"),
            ),
            vision_config=dict(
                depth=2,
                hidden_size=32,
                intermediate_size=32,
                num_heads=2,
                out_hidden_size=64,
                fullatt_block_indexes=[1],
            ),
            **{key: tokenizer.convert_tokens_to_ids(text) for key, text in names.items()},
        )
    )
    # ids without a token are not generated: transformers before 5 cannot decode them
    qwen.lm_head.weight.data[len(tokenizer) :] = 0
    clip = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=len(clip_tokenizer),
            bos_token_id=len(clip_tokenizer) - 2,
            eos_token_id=len(clip_tokenizer) - 1,
        )
    )
    return qwen.eval(), tokenizer, clip.eval(), clip_tokenizer


def encoder_parts(parts) -> SimpleNamespace:
    """What `text_parts.Parts` would read, of the four `text_parts`."""
    qwen, tokenizer, clip, clip_tokenizer = parts
    return SimpleNamespace(
        language=qwen.model.language_model,
        vision=qwen.model.visual,
        head=qwen.lm_head,
        tokenizer=tokenizer,
        preprocessor=Preprocessor(),
        clip=clip,
        clip_tokenizer=clip_tokenizer,
    )


def diffusers_folder(root: Path, parts, task: str = "t2v") -> Path:
    """The layout of the `-Diffusers` repositories, with a schedule of its own."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    for part, folder in zip(
        parts, ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"), strict=True
    ):
        part.save_pretrained(root / folder)
    torch.manual_seed(2)
    save_dit(
        random_dit(64, 32, task != "t2i"), root / "transformer", NABLA if task == "t2v" else None
    )
    if task == "t2v":
        save_vae(random_vae(), root / "vae")
    else:
        random_image_vae().save_pretrained(root / "vae")
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(root / "scheduler")
    return root
