# SPDX-License-Identifier: Apache-2.0
"""What every released checkpoint is made of and how it is meant to be sampled: numbers, and checks
of numbers.

A preset is one row of the published configurations. `scheduler_scale` is the value that the
published configuration asks for; where it says none, the documented default is used (5 s clips: 5,
10 s clips and standard-definition image-to-video: 10, images: 3).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from numbers import Integral, Real

_MOST_BLOCKS = 1000  # ten times the largest published network; more is a mistake
_MOST_CHANNELS = 2**20
_SEVERAL = {"patch_size", "axes_dims", "block_out_channels", "window"}  # fields of several sizes


def _check_sizes(config: object, least: int = 1, **most: int) -> None:
    """ValueError or TypeError unless each named field of `config`, or each of its items, is an int
    from `least` to `most`. A configuration comes from a file that may hold anything."""
    for name, limit in most.items():
        value = getattr(config, name)
        for size in value if name in _SEVERAL and isinstance(value, tuple) else (value,):
            if isinstance(size, bool) or not isinstance(size, Integral):
                raise TypeError(f"{name} must be made of whole numbers, got {value!r}; correct it")
            if not least <= int(size) <= limit:
                raise ValueError(
                    f"{name} must lie in {least}..{limit:,}, got {value!r}; correct it"
                )


def _check_triple(config: object, name: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, tuple) or len(value) != 3:
        raise ValueError(f"{name} must be three numbers (time, height, width), got {value!r}")


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of one diffusion transformer. Field names are those of the published `config.json`.

    axes_dims: how many of a head's dims turn with the position in time, height and width.
    visual_cond, instruct_type "channel": whether the input also holds a conditioning latent, for
    videos and for image editing. Raises ValueError or TypeError for sizes that no network can have.
    """

    in_visual_dim: int = 16
    in_text_dim: int = 3584
    in_text_dim2: int = 768
    time_dim: int = 512
    out_visual_dim: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    model_dim: int = 1792
    ff_dim: int = 7168
    num_text_blocks: int = 2
    num_visual_blocks: int = 32
    axes_dims: tuple[int, int, int] = (16, 24, 24)
    visual_cond: bool = False
    instruct_type: str | None = None

    def __post_init__(self):
        _check_triple(self, "patch_size")
        _check_triple(self, "axes_dims")
        widths = ("in_visual_dim", "in_text_dim", "in_text_dim2", "time_dim", "out_visual_dim")
        widths += ("patch_size", "model_dim", "ff_dim", "axes_dims")
        _check_sizes(self, **dict.fromkeys(widths, _MOST_CHANNELS))
        _check_sizes(self, num_visual_blocks=_MOST_BLOCKS)
        _check_sizes(self, least=0, num_text_blocks=_MOST_BLOCKS)
        if any(dim % 2 for dim in self.axes_dims):
            raise ValueError(
                "axes_dims must be even because rotation works on pairs, got "
                f"{self.axes_dims}; use even numbers"
            )
        if self.model_dim % self.head_dim:
            raise ValueError(
                "model_dim must be a multiple of the head dim sum(axes_dims) = "
                f"{self.head_dim}, got {self.model_dim}; change one of the two"
            )

    @property
    def in_channels(self) -> int:
        """Channels per latent pixel at the input: the latent's own, and with conditioning also
        those of the conditioning latent and one for its mask."""
        conditioned = self.visual_cond or self.instruct_type == "channel"
        return 2 * self.in_visual_dim + 1 if conditioned else self.in_visual_dim

    @property
    def head_dim(self) -> int:
        return sum(self.axes_dims)

    @property
    def num_heads(self) -> int:
        return self.model_dim // self.head_dim


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of one HunyuanVideo-style causal 3-D VAE.

    scaling_factor: encoder output is multiplied by it before the transformer sees it. Raises
    ValueError or TypeError for sizes that no network can have.
    """

    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression: int = 8
    temporal_compression: int = 4

    def __post_init__(self):
        levels = self.block_out_channels
        if not isinstance(levels, tuple) or not 1 <= len(levels) <= 8:
            raise ValueError(f"block_out_channels must be 1 to 8 numbers, got {levels!r}")
        widths = ("latent_channels", "block_out_channels", "norm_num_groups")
        factors = ("spatial_compression", "temporal_compression")
        _check_sizes(self, **dict.fromkeys(widths, _MOST_CHANNELS), layers_per_block=_MOST_BLOCKS)
        _check_sizes(self, **dict.fromkeys(factors, 1024))
        if any(channels % self.norm_num_groups for channels in levels):
            raise ValueError(
                f"block_out_channels must be multiples of norm_num_groups = {self.norm_num_groups}"
                f", got {levels}; change one of the two"
            )
        factor = self.scaling_factor
        if isinstance(factor, bool) or not isinstance(factor, Real):
            raise TypeError(f"scaling_factor must be a number, got {factor!r}; correct it")
        if not 0 < factor < math.inf:
            raise ValueError(f"scaling_factor must be positive and finite, got {factor}")


# Ways to store and multiply large weights in 8 bits: see dit/quantized.py.
QUANTIZATIONS = ("int8", "fp8", "int8-dynamic", "fp8-dynamic")
TEXT_QUANTIZATIONS = ("int8", "int4")  # of the text encoder's language model
ATTENTIONS = ("nabla", "dense")
# Ways to reuse what the blocks did at earlier steps: see sampling/step_cache.py.
CACHES = ("none", "mag", "first-block")


@dataclass(frozen=True)
class NablaConfig:
    """Adaptive block-sparse attention (NABLA): the probability mass to keep per row of blocks, and
    the full widths (T, Y, X) of the local window in tiles."""

    keep_mass: float
    window: tuple[int, int, int] = (11, 3, 3)

    def __post_init__(self):
        if isinstance(self.keep_mass, bool) or not isinstance(self.keep_mass, Real):
            raise TypeError(f"keep_mass must be a number in (0, 1], got {self.keep_mass!r}")
        _check_triple(self, "window")
        _check_sizes(self, window=_MOST_CHANNELS)
        if not 0.0 < self.keep_mass <= 1.0:
            raise ValueError(
                f"keep_mass must lie in (0, 1], got {self.keep_mass}; 1 keeps every block"
            )


@dataclass(frozen=True)
class Preset:
    """One checkpoint with the settings it was released for.

    vae: None for the image models, which use a 2-D VAE. nabla: None for dense attention. sizes:
    (height, width) in pixels, the default first; image-to-video follows the size of its image
    instead. frames: the default number of output frames. repo: empty for the bundled model.
    """

    name: str
    dit: DiTConfig
    vae: VAEConfig | None
    nabla: NablaConfig | None
    steps: int
    guidance: float
    scheduler_scale: float
    scale_factor: tuple[float, float, float]
    sizes: tuple[tuple[int, int], ...]
    frames: int
    task: str = "t2v"
    fps: int = 24
    repo: str = ""
    filename: str = ""
    text: str = "qwen+clip"
    text_max_length: int = 256


LITE_DIT = DiTConfig(visual_cond=True)
PRO_DIT = DiTConfig(
    time_dim=1024,
    model_dim=4096,
    ff_dim=16384,
    num_text_blocks=4,
    num_visual_blocks=60,
    axes_dims=(32, 48, 48),
    visual_cond=True,
)
IMAGE_DIT = DiTConfig(model_dim=2560, ff_dim=10240, num_visual_blocks=50, axes_dims=(32, 48, 48))
IMAGE_EDIT_DIT = DiTConfig(
    model_dim=2560,
    ff_dim=10240,
    num_visual_blocks=50,
    axes_dims=(32, 48, 48),
    instruct_type="channel",
)
HUNYUAN_VAE = VAEConfig()

TINY_DIT = DiTConfig(
    in_text_dim=64,
    in_text_dim2=64,
    time_dim=64,
    model_dim=256,
    ff_dim=1024,
    num_text_blocks=1,
    num_visual_blocks=4,
    visual_cond=True,
)
TINY_VAE = VAEConfig(
    block_out_channels=(16, 32, 48, 48), layers_per_block=1, norm_num_groups=1, scaling_factor=1.0
)

SIZES_SD = ((512, 768), (512, 512), (768, 512))
SIZES_HD = (
    (768, 1280),
    (1280, 768),
    (1024, 1024),
    (640, 1408),
    (1408, 640),
    (896, 1152),
    (1152, 896),
)
SIZES_IMAGE = (
    (1024, 1024),
    (640, 1408),
    (1408, 640),
    (768, 1280),
    (1280, 768),
    (896, 1152),
    (1152, 896),
)
SCALE_SD, SCALE_HD, SCALE_IMAGE = (1.0, 2.0, 2.0), (1.0, 3.16, 3.16), (1.0, 1.0, 1.0)
FRAMES = {"5s": 121, "10s": 241}
SCHEDULER_SCALE = {"5s": 5.0, "10s": 10.0}


def _lite(variant: str, length: str, steps: int = 50, guidance: float = 5.0) -> Preset:
    return Preset(
        name=f"t2v-lite-{variant}-{length}",
        dit=LITE_DIT,
        vae=HUNYUAN_VAE,
        nabla=NablaConfig(0.9) if length == "10s" else None,
        steps=steps,
        guidance=guidance,
        scheduler_scale=SCHEDULER_SCALE[length],
        scale_factor=SCALE_SD,
        sizes=SIZES_SD,
        frames=FRAMES[length],
        repo=f"kandinskylab/Kandinsky-5.0-T2V-Lite-{variant}-{length}",
        filename=f"kandinsky5lite_t2v_{variant}_{length}.safetensors",
    )


def _pro(
    task: str,
    length: str,
    keep_mass: float | None,
    scheduler_scale: float,
    hd: bool = False,
    variant: str = "sft",
) -> Preset:
    return Preset(
        name=f"{task}-pro-{variant}-{length}" + ("-hd" if hd else ""),
        dit=PRO_DIT,
        vae=HUNYUAN_VAE,
        nabla=None if keep_mass is None else NablaConfig(keep_mass),
        steps=50,
        guidance=5.0,
        scheduler_scale=scheduler_scale,
        scale_factor=SCALE_HD if hd else SCALE_SD,
        sizes=SIZES_HD if hd else SIZES_SD,
        frames=FRAMES[length],
        task=task,
        repo=f"kandinskylab/Kandinsky-5.0-{task.upper()}-Pro-{variant}-{length}",
        filename=f"kandinsky5pro_{task}_{variant}_{length}.safetensors",
    )


def _image(task: str, dit: DiTConfig) -> Preset:
    return Preset(
        name=f"{task}-lite-sft",
        dit=dit,
        vae=None,
        nabla=None,
        steps=50,
        guidance=3.5,
        scheduler_scale=3.0,
        scale_factor=SCALE_IMAGE,
        sizes=SIZES_IMAGE,
        frames=1,
        task=task,
        repo=f"kandinskylab/Kandinsky-5.0-{task.upper()}-Lite",
        filename=f"kandinsky5lite_{task}.safetensors",
        text_max_length=512,
    )


_ALL = (
    _lite("sft", "5s"),
    _lite("pretrain", "5s"),
    _lite("nocfg", "5s", guidance=1.0),
    _lite("distilled16steps", "5s", steps=16, guidance=1.0),
    # The published nocfg-10s configuration names the sft file by mistake; the released file is
    # kandinsky5lite_t2v_nocfg_10s.
    _lite("sft", "10s"),
    _lite("pretrain", "10s"),
    _lite("nocfg", "10s", guidance=1.0),
    _lite("distilled16steps", "10s", steps=16, guidance=1.0),
    Preset(
        name="i2v-lite-5s",
        dit=LITE_DIT,
        vae=HUNYUAN_VAE,
        nabla=None,
        steps=50,
        guidance=5.0,
        scheduler_scale=10.0,
        scale_factor=SCALE_SD,
        sizes=SIZES_SD,
        frames=121,
        task="i2v",
        repo="kandinskylab/Kandinsky-5.0-I2V-Lite-5s",
        filename="kandinsky5lite_i2v_5s.safetensors",
    ),
    _pro("t2v", "5s", None, 5.0),
    _pro("t2v", "5s", 0.8, 5.0, hd=True),
    _pro("t2v", "10s", 0.9, 10.0),
    _pro("t2v", "10s", 0.7, 10.0, hd=True),
    # Published without a configuration: the settings are those of the sft checkpoints.
    _pro("t2v", "5s", None, 5.0, variant="pretrain"),
    _pro("t2v", "10s", 0.9, 10.0, variant="pretrain"),
    _pro("i2v", "5s", None, 10.0),
    _pro("i2v", "5s", 0.8, 5.0, hd=True),
    _image("t2i", IMAGE_DIT),
    _image("i2i", IMAGE_EDIT_DIT),
    Preset(
        name="tiny",
        dit=TINY_DIT,
        vae=TINY_VAE,
        nabla=NablaConfig(0.9, (3, 1, 1)),
        steps=25,
        guidance=3.0,
        scheduler_scale=5.0,
        scale_factor=(1.0, 1.0, 1.0),
        sizes=((160, 160),),
        frames=17,
        text="tiny",
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


def get_preset(name: str) -> Preset:
    """The preset called `name`; ValueError with the nearest names if there is none."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.3) or sorted(PRESETS)
        raise ValueError(
            f"the preset must be one of the {len(PRESETS)} known ones, got {name!r}; "
            f"did you mean {', '.join(near)}?"
        )
    return PRESETS[name]


# What --attention nabla means for a checkpoint released with dense attention.
NABLA_FOR_DENSE = NablaConfig(0.9)

# Task -> which instruction the text encoder gets. Videos of one frame count as images too.
KINDS = {"t2i": "image", "i2i": "image_edit"}

PARTS = ("text", "dit", "vae")  # of a model, in the order in which a run needs them
