# SPDX-License-Identifier: Apache-2.0
"""The nodes that ComfyUI shows, as classes of its first convention: what goes in and comes out, and
which stage of the model they call.

Importing this imports neither torch nor ComfyUI: what a node runs is imported when it runs. Where a
number says "as released", 0 stands for what the checkpoint was published with. Every error is one
sentence, which ComfyUI shows on the node.
"""

from __future__ import annotations

from typing import Any

from ..config import CACHES, PRESETS, QUANTIZATIONS, TEXT_QUANTIZATIONS
from .folders import device, file_of, listed, tokenizers

MODEL = "KANDINSKY5"
TEXT = "KANDINSKY5_TEXT"
DTYPES = {"auto": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
RELEASED = "as released"
NO_FILE = "none"
WITH_MODEL = "with the model"
# Each widget of a part -> ComfyUI's folder of its files, the part, and what it is.
PART_WIDGETS = {
    "text_encoder": ("text_encoders", "text_encoder", "Qwen2.5-VL-7B"),
    "clip": ("text_encoders", "text_encoder_2", "CLIP ViT-L/14"),
    "vae": ("vae", "vae", "the VAE of HunyuanVideo, or for pictures of FLUX.1"),
}
BYTES_PER_GB = 10**9
LARGEST_SEED = 2**64 - 1

# names of the sampler's widgets -> names of `Kandinsky5.generate`
SETTINGS = {"frames": "num_frames", "steps": "num_inference_steps", "guidance": "guidance_scale"}

Input = tuple  # (type or list of choices, options), as ComfyUI defines an input


def _socket(kind: str, tooltip: str) -> Input:
    return (kind, {"tooltip": tooltip})


def _text(tooltip: str, multiline: bool = True) -> Input:
    return ("STRING", {"default": "", "multiline": multiline, "tooltip": tooltip})


def _number(
    kind: str,
    tooltip: str,
    largest: float,
    step: float,
    **options,
) -> Input:
    """A number, by default 0."""
    limits = {"default": 0, "min": 0, "max": largest, "step": step}
    return (kind, {**limits, "tooltip": tooltip, **options})


def _whole(tooltip: str, largest: int, step: int = 1) -> Input:
    return _number("INT", f"{tooltip}; 0: {RELEASED}", largest, step)


def _choice(tooltip: str, *options: str) -> Input:
    return (list(options), {"default": options[0], "tooltip": tooltip})


def _switch(tooltip: str) -> Input:
    return ("BOOLEAN", {"default": False, "tooltip": tooltip})


_MODEL = _socket(MODEL, "from a node that loads a model or adds a LoRA")
_WIDTH = _whole("pixels, a multiple of 16; together with the height", 4096, 16)
_HEIGHT = _whole("pixels, a multiple of 16; together with the width", 4096, 16)
_MEMORY = _number(
    "FLOAT",
    "GB of the device that this node may use, weights included; 0: what is free",
    1024.0,
    0.5,
)


class Node:
    """What all nodes share. A subclass says INPUTS and OPTIONAL by name, RETURN_TYPES, RETURN_NAMES
    and OUTPUT_TOOLTIPS, and does `run`."""

    CATEGORY = "Kandinsky 5"
    FUNCTION = "run"
    TITLE = ""
    INPUTS: dict[str, Input] = {}
    OPTIONAL: dict[str, Input] = {}
    RETURN_TYPES: tuple[str, ...] = ()
    RETURN_NAMES: tuple[str, ...] = ()
    OUTPUT_TOOLTIPS: tuple[str, ...] = ()

    def __init_subclass__(cls):
        cls.DESCRIPTION = cls.__doc__  # what ComfyUI shows when the mouse rests on the node

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Input]]:
        return {"required": dict(cls.INPUTS), "optional": dict(cls.OPTIONAL)}


class LoadModel(Node):
    """A checkpoint with its text encoders and VAE. They are read from disk now, and go to the
    device while they work."""

    TITLE = "Kandinsky 5: load model"
    INPUTS = {
        "model": ("COMBO", {}),
        "dtype": _choice("of weights and activations; auto: bf16 on a GPU, else fp32", *DTYPES),
        "quantize": _choice(
            "keep the transformer's large weights in 8 bits", "none", *QUANTIZATIONS
        ),
    }
    OPTIONAL = {
        "path": _text(
            "a folder, a .safetensors file or a hub repository instead of the model above", False
        ),
        **dict.fromkeys(PART_WIDGETS, ("COMBO", {})),
        "text_quantize": _choice(
            "keep the language model that reads prompts in 8 or 4 bits; int4 needs bitsandbytes",
            "none",
            *TEXT_QUANTIZATIONS,
        ),
    }
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("the model, for all other nodes of Kandinsky 5",)

    @classmethod
    def INPUT_TYPES(cls):
        """The presets and the transformers in ComfyUI's models/diffusion_models, and the other
        parts in the folders of theirs."""
        names = [*PRESETS, *listed("diffusion_models", "dit")]
        tooltip = "a released checkpoint, fetched once, or a file in models/diffusion_models"
        choice = (names, {"default": "tiny", "tooltip": tooltip})
        parts = {
            widget: _choice(
                f"a file of {what} in models/{kind}; {WITH_MODEL}: what lies beside it, or is "
                "fetched once",
                WITH_MODEL,
                *listed(kind, part),
            )
            for widget, (kind, part, what) in PART_WIDGETS.items()
        }
        return {"required": {**cls.INPUTS, "model": choice}, "optional": {**cls.OPTIONAL, **parts}}

    def run(
        self,
        model: str,
        dtype: str = "auto",
        quantize: str = "none",
        path: str = "",
        text_quantize: str = "none",
        **chosen: str,
    ) -> tuple:
        import torch

        from ..pipeline import Kandinsky5
        from .running import working
        from .staged import Loaded, StagedModel

        name = path.strip() or (model if model in PRESETS else file_of("diffusion_models", model))
        options: dict[str, Any] = {
            widget: file_of(PART_WIDGETS[widget][0], file)
            for widget, file in chosen.items()
            if file not in ("", WITH_MODEL)
        }
        own = tokenizers()
        if "text_encoder" in options and "tokenizer" in own:
            options["tokenizer"] = own["tokenizer"]
        if "clip" in options and "tokenizer_2" in own:
            options["tokenizer_2"] = own["tokenizer_2"]
        dtype_name = DTYPES[dtype]
        with working():
            loaded = Kandinsky5.from_pretrained(
                name,
                device(),
                None if dtype_name is None else getattr(torch, dtype_name),
                quantize=None if quantize == "none" else quantize,
                text_quantize=None if text_quantize == "none" else text_quantize,
                **options,
            )
        return (Loaded(StagedModel(loaded)),)


class LoadLora(Node):
    """The model with one LoRA more. The model that came in stays as it is."""

    TITLE = "Kandinsky 5: LoRA"
    INPUTS = {
        "model": _MODEL,
        "lora": ("COMBO", {}),
        "strength": (
            "FLOAT",
            {
                "default": 1.0,
                "min": -10.0,
                "max": 10.0,
                "step": 0.05,
                "tooltip": "how much of the LoRA is added; 1: as it was trained, 0: nothing",
            },
        ),
    }
    OPTIONAL = {
        "path": _text("a .safetensors file or a folder with one, instead of the LoRA above", False)
    }
    RETURN_TYPES = (MODEL,)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("the model with the LoRA, for the nodes after this one",)

    @classmethod
    def INPUT_TYPES(cls):
        """The files in ComfyUI's models/loras."""
        choice = _choice("a file in models/loras", NO_FILE, *listed("loras", "lora"))
        return {"required": {**cls.INPUTS, "lora": choice}, "optional": dict(cls.OPTIONAL)}

    def run(
        self,
        model,
        lora: str = NO_FILE,
        strength: float = 1.0,
        path: str = "",
    ) -> tuple:
        from dataclasses import replace

        from .running import working

        name = path.strip() or lora
        if name == NO_FILE:
            return (model,)
        adapters = (*model.adapters, (file_of("loras", name), strength))
        with_one_more = replace(model, adapters=adapters)
        with working():
            with_one_more.use()  # says now what does not fit
        return (with_one_more,)


class ExpandPrompt(Node):
    """The prompt as the text encoder's language model writes it in detail."""

    TITLE = "Kandinsky 5: expand prompt"
    INPUTS = {
        "model": _MODEL,
        "prompt": _text("what to draw"),
        "still": _switch("for one frame"),
        "memory_gb": _MEMORY,
    }
    OPTIONAL = {"image": _socket("IMAGE", "a picture that the language model sees, too")}
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("prompt",)
    OUTPUT_TOOLTIPS = ("the detailed prompt, for the node that encodes text",)

    def run(
        self,
        model,
        prompt: str,
        still: bool = False,
        memory_gb: float = 0.0,
        image=None,
    ) -> tuple:
        from .running import working

        with working():
            return (model.use().expand(prompt, image, still, _budget(memory_gb)),)


class EncodeText(Node):
    """The prompt, and the negative one where the checkpoint uses guidance or one is written, as the
    transformer reads them."""

    TITLE = "Kandinsky 5: encode text"
    INPUTS = {
        "model": _MODEL,
        "prompt": _text("what to draw"),
        "negative_prompt": _text("what to steer away from; empty: the model's own"),
        "still": _switch("for one frame of a video model"),
        "memory_gb": _MEMORY,
    }
    OPTIONAL = {
        "image": _socket("IMAGE", "for image editing: the picture that the image encoder gives")
    }
    RETURN_TYPES = (TEXT,)
    RETURN_NAMES = ("text",)
    OUTPUT_TOOLTIPS = ("the embedded prompts, for the sampler",)

    def run(
        self,
        model,
        prompt: str,
        negative_prompt: str = "",
        still: bool = False,
        memory_gb: float = 0.0,
        image=None,
    ) -> tuple:
        from .running import working

        budget = _budget(memory_gb)
        with working():
            return (model.use().encode_text(prompt, negative_prompt, image, still, budget),)


class EncodeImage(Node):
    """What a video begins or ends with, or the picture to edit, cut and resized to what the
    checkpoint was trained for."""

    TITLE = "Kandinsky 5: encode image"
    INPUTS = {
        "model": _MODEL,
        "image": _socket("IMAGE", "the picture; of several the first"),
        "width": _WIDTH,
        "height": _HEIGHT,
        # Does not change by itself, so another seed for the sampler encodes nothing again.
        # ComfyUI's page changes every input of this name after a run unless told not to.
        "seed": _number(
            "INT",
            "of the noise in the encoded picture",
            LARGEST_SEED,
            1,
            control_after_generate=False,
        ),
        "memory_gb": _MEMORY,
    }
    RETURN_TYPES = ("LATENT", "IMAGE", "INT", "INT")
    RETURN_NAMES = ("latent", "image", "width", "height")
    OUTPUT_TOOLTIPS = (
        "the encoded picture, for the sampler",
        "the picture as it was encoded, for the text encoder of image editing",
        "of the encoded picture, in pixels",
        "of the encoded picture, in pixels",
    )

    def run(
        self,
        model,
        image,
        width: int = 0,
        height: int = 0,
        seed: int = 0,
        memory_gb: float = 0.0,
    ) -> tuple:
        from .running import working

        _check_size(width, height)
        size = (height, width) if width else None
        with working():
            latent, seen = model.use().encode_image(image, size, seed, _budget(memory_gb))
        return latent, seen, seen.shape[2], seen.shape[1]


class Sample(Node):
    """From noise to latents. The size is that of a connected image."""

    TITLE = "Kandinsky 5: sample"
    INPUTS = {
        "model": _MODEL,
        "text": _socket(TEXT, "from the node that encodes text"),
        "width": _WIDTH,
        "height": _HEIGHT,
        "frames": _whole("4k + 1, at 24 per second", 1025),
        "steps": _whole("of sampling", 1000),
        "guidance": _number(
            "FLOAT", f"1 means none, and halves the work; 0: {RELEASED}", 100.0, 0.1
        ),
        "scheduler_scale": _number(
            "FLOAT", f"above 1, more of the steps go to the noisy end; 0: {RELEASED}", 100.0, 0.1
        ),
        "seed": _number(
            "INT",
            "of the noise that sampling begins with",
            LARGEST_SEED,
            1,
            control_after_generate=True,
        ),
        "batch_size": (
            "INT",
            {"default": 1, "min": 1, "max": 64, "tooltip": "results, the i-th with seed + i"},
        ),
        "attention": _choice(
            "what the checkpoint was trained with, or another", RELEASED, "nabla", "dense"
        ),
        "cache": _choice(
            "reuse what the blocks did at earlier steps, which changes the result; mag: MagCache",
            *CACHES,
        ),
        "precision": _choice(
            "of the latents; reference rounds as the official code does", "fp32", "reference"
        ),
        "memory_gb": _MEMORY,
    }
    OPTIONAL = {
        "image_latent": _socket("LATENT", "the first frame, or the picture to edit"),
        "last_latent": _socket(
            "LATENT", "the last frame, of an image-to-video checkpoint (untrained)"
        ),
    }
    RETURN_TYPES = ("LATENT",)
    RETURN_NAMES = ("latent",)
    OUTPUT_TOOLTIPS = ("the sampled latents, for a node that decodes or saves them",)

    def run(
        self,
        model,
        text,
        seed: int = 0,
        batch_size: int = 1,
        image_latent=None,
        last_latent=None,
        **settings,
    ) -> tuple:
        from .running import Bar, Previews, working

        budget = _budget(settings.pop("memory_gb", 0.0))
        _check_size(settings.get("width", 0), settings.get("height", 0))
        given = {
            SETTINGS.get(name, name): None if value in (0, RELEASED) else value
            for name, value in settings.items()
        }
        bar = Bar()
        with working():
            staged = model.use()
            previews = Previews(staged.model)

            def stepped(done: int, steps: int, clean) -> None:
                bar(done, steps, None if clean is None else previews(clean))

            latent = staged.sample(
                text,
                seed,
                batch_size,
                image_latent,
                last_latent,
                stepped,
                memory_budget=budget,
                **given,
            )
        return (latent,)


class Decode(Node):
    """Frames of latents: one after another, those of several results too."""

    TITLE = "Kandinsky 5: decode"
    INPUTS = {
        "model": _MODEL,
        "latent": _socket("LATENT", "what the sampler or a node that loads latents gives"),
        "vae_policy": _choice(
            "one piece, the published pipeline's tiles, or colours only; "
            "auto: one piece while the clip is small",
            "auto",
            "global",
            "official",
            "preview",
        ),
        "memory_gb": _MEMORY,
    }
    RETURN_TYPES = ("IMAGE",)
    RETURN_NAMES = ("images",)
    OUTPUT_TOOLTIPS = ("the frames, for nodes that save or show them",)

    def run(
        self,
        model,
        latent,
        vae_policy: str = "auto",
        memory_gb: float = 0.0,
    ) -> tuple:
        from .running import Bar, working

        policy = None if vae_policy == "auto" else vae_policy
        with working():
            return (model.use().decode(latent, policy, _budget(memory_gb), Bar()),)


class Accelerate(Node):
    """ComfyUI's own Kandinsky 5 model with this package's operators in its blocks, NABLA's sparse
    attention among them."""

    TITLE = "Accelerate Kandinsky 5"
    INPUTS = {
        "model": _socket("MODEL", "a Kandinsky 5 model from ComfyUI's own loader"),
        "attention": _choice(
            "auto: what the checkpoints of this width were released with at the length and size "
            "at hand",
            "auto",
            "nabla",
            "dense",
        ),
        "keep_mass": _number(
            "FLOAT",
            f"share of the attention that NABLA keeps, the paper's P; 0: {RELEASED}",
            1.0,
            0.05,
        ),
    }
    RETURN_TYPES = ("MODEL",)
    RETURN_NAMES = ("model",)
    OUTPUT_TOOLTIPS = ("the accelerated model, for ComfyUI's own samplers",)

    def run(
        self,
        model,
        attention: str = "auto",
        keep_mass: float = 0.0,
    ) -> tuple:
        from ..acceleration.comfyui import accelerated

        return (accelerated(model, attention, keep_mass or None),)


NODES = {
    f"KandinskyKernels{node.__name__}": node
    for node in (
        LoadModel,
        LoadLora,
        ExpandPrompt,
        EncodeText,
        EncodeImage,
        Sample,
        Decode,
        Accelerate,
    )
}


def _budget(memory_gb: float) -> int | None:
    return round(memory_gb * BYTES_PER_GB) or None


def _check_size(width: int, height: int) -> None:
    if bool(width) != bool(height):
        raise ValueError(
            f"width and height must be given together, got {width}x{height}; set both, or both to 0"
        )
