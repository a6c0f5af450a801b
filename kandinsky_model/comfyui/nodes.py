# SPDX-License-Identifier: Apache-2.0
"""The nodes that ComfyUI shows, as classes of its first convention: what goes in and comes out, and
whom to call.

Nothing here needs torch or ComfyUI to be imported: what a node runs is imported when it runs. Where
a number says "as released", 0 stands for what the checkpoint was published with. Every error is one
sentence, which ComfyUI shows on the node.
"""

from __future__ import annotations

from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from ..config import CACHES, PRESETS, QUANTIZATIONS

MODEL, TEXT = "KANDINSKY5", "KANDINSKY5_TEXT"
DTYPES = {"auto": None, "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
RELEASED = "as released"
BYTES_PER_GB = 10**9
LARGEST_SEED = 2**53 - 1  # what a browser can count to

_MEMORY = (
    "FLOAT",
    {
        "default": 0.0,
        "min": 0.0,
        "max": 1024.0,
        "step": 0.5,
        "tooltip": "GB of the device that this node may use, weights included; 0: what is free",
    },
)
_SEED = ("INT", {"default": 0, "min": 0, "max": LARGEST_SEED, "control_after_generate": True})


def _text(tooltip: str, multiline: bool = True) -> tuple:
    return ("STRING", {"default": "", "multiline": multiline, "tooltip": tooltip})


def _whole(tooltip: str, largest: int, step: int = 1) -> tuple:
    return (
        "INT",
        {
            "default": 0,
            "min": 0,
            "max": largest,
            "step": step,
            "tooltip": f"{tooltip}; 0: {RELEASED}",
        },
    )


def _number(tooltip: str, largest: float) -> tuple:
    return (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": largest,
            "step": 0.1,
            "tooltip": f"{tooltip}; 0: {RELEASED}",
        },
    )


def _choice(tooltip: str, *options: str) -> tuple:
    return (list(options), {"default": options[0], "tooltip": tooltip})


class Node:
    """What all nodes share. A subclass says INPUTS and OPTIONAL by name, RETURN_TYPES and
    RETURN_NAMES, and does `run`."""

    CATEGORY, FUNCTION = "Kandinsky 5", "run"
    TITLE = ""
    INPUTS: dict[str, tuple] = {}
    OPTIONAL: dict[str, tuple] = {}

    def __init_subclass__(cls):
        cls.DESCRIPTION = cls.__doc__  # what ComfyUI shows when the mouse rests on the node

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, tuple]]:
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
        "text_encoder": _text(
            "folder of Qwen2.5-VL, under models/text_encoders or anywhere; empty: beside the model",
            False,
        ),
        "text_encoder_2": _text("folder of CLIP ViT-L/14, likewise", False),
        "vae": _text(
            "folder of the VAE, under models/vae or anywhere; empty: beside the model", False
        ),
    }
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls):
        """The presets, then the files in ComfyUI's models/diffusion_models."""
        names = [*PRESETS, *_listed("diffusion_models")]
        choice = (
            names,
            {
                "default": "tiny",
                "tooltip": "a released checkpoint, fetched once, or "
                "a file in models/diffusion_models",
            },
        )
        return {"required": {**cls.INPUTS, "model": choice}, "optional": dict(cls.OPTIONAL)}

    def run(
        self, model: str, dtype: str = "auto", quantize: str = "none", path: str = "", **places: str
    ) -> tuple:
        import torch

        from ..pipeline import Kandinsky5
        from .staged import Loaded, StagedModel

        name = path.strip() or (model if model in PRESETS else _file("diffusion_models", model))
        folders = {
            place: _folder("vae" if place == "vae" else "text_encoders", given.strip())
            for place, given in places.items()
        }
        with _working():
            loaded = Kandinsky5.from_pretrained(
                name,
                _device(),
                DTYPES[dtype] and getattr(torch, DTYPES[dtype]),
                quantize=None if quantize == "none" else quantize,
                **{place: folder for place, folder in folders.items() if folder},
            )
        return (Loaded(StagedModel(loaded)),)


class LoadLora(Node):
    """The model with one LoRA more. The model that came in stays as it is."""

    TITLE = "Kandinsky 5: LoRA"
    INPUTS = {
        "model": (MODEL,),
        "path": _text(
            "a .safetensors file or a folder with one, in models/loras or anywhere", False
        ),
        "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
    }
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    def run(self, model, path: str, strength: float = 1.0) -> tuple:
        from dataclasses import replace

        with_one_more = replace(
            model, adapters=(*model.adapters, (_file("loras", path.strip()), strength))
        )
        with _working():
            with_one_more.use()  # says now what does not fit
        return (with_one_more,)


class ExpandPrompt(Node):
    """The prompt as the text encoder's language model writes it in detail."""

    TITLE = "Kandinsky 5: expand prompt"
    INPUTS = {
        "model": (MODEL,),
        "prompt": _text("what to draw"),
        "still": ("BOOLEAN", {"default": False, "tooltip": "for one frame"}),
        "memory_gb": _MEMORY,
    }
    OPTIONAL = {"image": ("IMAGE",)}
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("prompt",)

    def run(
        self, model, prompt: str, still: bool = False, memory_gb: float = 0.0, image=None
    ) -> tuple:
        with _working():
            return (model.use().expand(prompt, image, still, _budget(memory_gb)),)


class EncodeText(Node):
    """The prompt, and the negative one where the checkpoint uses guidance or one is written, as the
    transformer reads them."""

    TITLE = "Kandinsky 5: encode text"
    INPUTS = {
        "model": (MODEL,),
        "prompt": _text("what to draw"),
        "negative_prompt": _text("what to steer away from; empty: the model's own"),
        "still": ("BOOLEAN", {"default": False, "tooltip": "for one frame of a video model"}),
        "memory_gb": _MEMORY,
    }
    OPTIONAL = {
        "image": (
            "IMAGE",
            {"tooltip": "for image editing: the picture that the image encoder gives back"},
        )
    }
    RETURN_TYPES, RETURN_NAMES = (TEXT,), ("text",)

    def run(
        self,
        model,
        prompt: str,
        negative_prompt: str = "",
        still: bool = False,
        memory_gb: float = 0.0,
        image=None,
    ) -> tuple:
        with _working():
            return (
                model.use().encode_text(prompt, negative_prompt, image, still, _budget(memory_gb)),
            )


class EncodeImage(Node):
    """What a video begins or ends with, or the picture to edit, cut and resized to what the
    checkpoint was trained for."""

    TITLE = "Kandinsky 5: encode image"
    INPUTS = {
        "model": (MODEL,),
        "image": ("IMAGE",),
        "width": _whole("pixels, a multiple of 16", 4096, 16),
        "height": _whole("pixels, a multiple of 16", 4096, 16),
        "seed": _SEED,
        "memory_gb": _MEMORY,
    }
    RETURN_TYPES, RETURN_NAMES = (
        ("LATENT", "IMAGE", "INT", "INT"),
        ("latent", "image", "width", "height"),
    )

    def run(
        self, model, image, width: int = 0, height: int = 0, seed: int = 0, memory_gb: float = 0.0
    ) -> tuple:
        if bool(width) != bool(height):
            raise ValueError(
                f"width and height must be given together, got {width}x{height}; set "
                "both, or both to 0"
            )
        with _working():
            latent, seen = model.use().encode_image(
                image, (height, width) if width else None, seed, _budget(memory_gb)
            )
        return latent, seen, seen.shape[2], seen.shape[1]


class Sample(Node):
    """From noise to latents. The size is that of a connected image."""

    TITLE = "Kandinsky 5: sample"
    INPUTS = {
        "model": (MODEL,),
        "text": (TEXT,),
        "width": _whole("pixels, a multiple of 16", 4096, 16),
        "height": _whole("pixels, a multiple of 16", 4096, 16),
        "frames": _whole("4k + 1, at 24 per second", 1025),
        "steps": _whole("of sampling", 1000),
        "guidance": _number("1 means none, and halves the work", 100.0),
        "scheduler_scale": _number("above 1, more of the steps go to the noisy end", 100.0),
        "seed": _SEED,
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
        "image_latent": ("LATENT", {"tooltip": "the first frame, or the picture to edit"}),
        "last_latent": (
            "LATENT",
            {"tooltip": "the last frame, of an image-to-video checkpoint (untrained)"},
        ),
    }
    RETURN_TYPES, RETURN_NAMES = ("LATENT",), ("latent",)

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
        names = {
            "frames": "num_frames",
            "steps": "num_inference_steps",
            "guidance": "guidance_scale",
        }
        budget = _budget(settings.pop("memory_gb", 0.0))
        given = {
            names.get(name, name): None if value in (0, RELEASED) else value
            for name, value in settings.items()
        }
        progress = _Progress()

        def stepped(stage, step, steps, latents):
            if stage == "sampling":
                progress(step, steps)

        with _working():
            return (
                model.use().sample(
                    text,
                    seed,
                    batch_size,
                    image_latent,
                    last_latent,
                    stepped,
                    memory_budget=budget,
                    **given,
                ),
            )


class Decode(Node):
    """Frames of latents: one after another, those of several results too."""

    TITLE = "Kandinsky 5: decode"
    INPUTS = {
        "model": (MODEL,),
        "latent": ("LATENT",),
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
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)

    def run(self, model, latent, vae_policy: str = "auto", memory_gb: float = 0.0) -> tuple:
        with _working():
            policy = None if vae_policy == "auto" else vae_policy
            return (model.use().decode(latent, policy, _budget(memory_gb), _Progress()),)


class Accelerate(Node):
    """ComfyUI's own Kandinsky 5 model with this package's operators in its blocks, NABLA's sparse
    attention among them."""

    TITLE = "Accelerate Kandinsky 5"
    INPUTS = {
        "model": ("MODEL",),
        "attention": _choice(
            "auto: what the checkpoints of this width were released with "
            "at the length and size at hand",
            "auto",
            "nabla",
            "dense",
        ),
        "keep_mass": (
            "FLOAT",
            {
                "default": 0.0,
                "min": 0.0,
                "max": 1.0,
                "step": 0.05,
                "tooltip": f"share of the attention that NABLA keeps, the paper's P; 0: {RELEASED}",
            },
        ),
    }
    RETURN_TYPES, RETURN_NAMES = ("MODEL",), ("model",)

    def run(self, model, attention: str = "auto", keep_mass: float = 0.0) -> tuple:
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


class _Progress:
    """ComfyUI's bar for the node that runs, moved by calls (done, of); each of them is where a stop
    asked for in ComfyUI happens."""

    def __init__(self):
        self._bar = None

    def __call__(self, done: int, of: int) -> None:
        _stop_if_asked()
        utils = _comfy("comfy.utils")
        if utils is not None:
            self._bar = self._bar or utils.ProgressBar(of)
            self._bar.update_absolute(done, of)


def _comfy(module: str):
    """A module of ComfyUI, or None where it does not run."""
    try:
        return import_module(module)
    except ImportError:
        return None


def _stop_if_asked() -> None:
    management = _comfy("comfy.model_management")
    if management is not None:
        management.throw_exception_if_processing_interrupted()


@contextmanager
def _working():
    """ComfyUI's models leave the device, which the budgets count as free, and tensors are ordinary
    ones: its inference mode would make weights that no later, ordinary code may touch."""
    import torch

    _stop_if_asked()
    management = _comfy("comfy.model_management")
    if management is not None and management.get_torch_device().type != "cpu":
        management.unload_all_models()
        management.soft_empty_cache()
    with torch.inference_mode(False), torch.no_grad():
        yield


def _device() -> str | None:
    management = _comfy("comfy.model_management")
    return None if management is None else str(management.get_torch_device())


def _budget(memory_gb: float) -> int | None:
    return round(memory_gb * BYTES_PER_GB) or None


def _listed(kind: str) -> list[str]:
    """The .safetensors files in a folder of ComfyUI's models, by the names it shows."""
    folders = _comfy("folder_paths")
    return (
        []
        if folders is None
        else [name for name in folders.get_filename_list(kind) if name.endswith(".safetensors")]
    )


def _file(kind: str, name: str) -> str:
    """Where the file of this name lies in ComfyUI's models; the name itself where it is none of
    them."""
    folders = _comfy("folder_paths")
    return (folders and folders.get_full_path(kind, name)) or name


def _folder(kind: str, name: str) -> str:
    """Likewise of a folder."""
    folders = _comfy("folder_paths")
    roots = folders.get_folder_paths(kind) if folders and name else []
    return next((str(Path(root, name)) for root in roots if Path(root, name).is_dir()), name)
