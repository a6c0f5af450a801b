# SPDX-License-Identifier: Apache-2.0
"""Prompt in, video out: finds the parts of a model, places them, and runs text, sampling and decoding in that order."""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .caching import make_cache
from .clip import Notify, Settings, Video, check_prompt, check_size, default_policy, load_latents
from .config import NablaConfig, Preset
from .image import crop, first_frame, fitting_size, read_image
from .locate import PARTS, Sources, for_video, locate
from .lora import Adapters
from .plan import make_plan
from .sampler import Conditioning, Sampling, noise, sample
from .tiles import TilePlan
from .vae import decode_plan
from .weights import load_dit, load_vae

NABLA_FOR_DENSE = NablaConfig(0.9)  # what --attention nabla means for a checkpoint released with dense attention
SEEDS = 2**31
_log = logging.getLogger(__name__)
Callback = Callable[[str, int, int, Tensor | None], None]


class Kandinsky5:
    """A text-to-video model and what it needs around it.

    text: an encoder with `encode(list of str, kind) -> TextEmbeddings`; dit: DiffusionTransformer3D; vae: HunyuanVideoVAE; a part that is
    not needed may be None. preset: the settings that `generate` uses where it is told nothing.
    """

    fallback_preset = "t2v-lite-sft-5s"

    def __init__(self, text: nn.Module | None, dit: nn.Module | None, vae: nn.Module | None, preset: Preset, name: str = "",
                 device: torch.device | str = "cpu"):
        self.text, self.dit, self.vae, self.preset, self.name = text, dit, vae, for_video(preset), name
        self.device, self._offload = torch.device(device), False
        self.lora = Adapters(dit)

    @classmethod
    def from_pretrained(cls, model: str | Path = "tiny", device: str | None = None, dtype: torch.dtype | None = None,
                        revision: str | None = None, parts: Sequence[str] = PARTS, quantize: str | None = None,
                        **places: str | Path) -> Kandinsky5:
        """Load a preset, a local path or a hub repository `owner/name`; `locate` says which layouts are understood.

        Parts are loaded into the CPU's memory and move to the device when first used, so that offloading can still be chosen.
        device: None takes a CUDA device where there is one. dtype: of weights and activations; None means fp32, on CUDA bf16 (latents
        and schedule stay fp32). parts: load only these. quantize: keep the transformer's large weights in 8 bits, in one of the
        `QUANTIZATIONS`; None means as they are stored. places: `vae=`, `text_encoder=`, `text_encoder_2=` folders of an official
        checkpoint whose parts do not lie together.
        Raises ValueError or OSError for names, files and weights that do not fit, RuntimeError for a device or package that is missing.
        """
        device = choose_device(device)
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        sources = locate(model, revision, cls.fallback_preset, places, parts)
        dit = load_dit(sources.dit, dtype=dtype, quantize=quantize).prepare() if sources.dit else None
        vae = load_vae(sources.vae, dtype=dtype) if sources.vae else None
        text = _load_text(sources, dtype) if sources.text_encoder else None
        preset = replace(sources.preset, dit=dit.config) if dit is not None else sources.preset
        return cls(text, dit, vae, preset, sources.name, device)

    def enable_model_cpu_offload(self) -> None:
        """Keep every part on the CPU and move it to the device only while it works. On the CPU itself nothing happens."""
        if self.device.type == "cpu":
            _log.warning("offloading to the CPU changes nothing, because the model already runs there")
            return
        self._offload = True
        for part in (self.text, self.dit, self.vae):
            if part is not None:
                part.to("cpu")

    def generate(self, prompt: str | list[str], negative_prompt: str | None = None, seed: int | None = None,
                 callback: Callback | None = None, memory_budget: int | None = None, image=None, **settings) -> Video | list[Video]:
        """Sample a video from a prompt, or a list of videos, in one batch, from a list of prompts.

        image: what image-to-video checkpoints begin with: a path, a PIL image or uint8 [H, W, 3]. Without height and width the video has
        its shape and the area the checkpoint was trained for; with them, its middle of their shape is taken.

        settings: num_frames (4k + 1), height, width (multiples of 16), num_inference_steps, guidance_scale (1: none), scheduler_scale,
        attention ("nabla" | "dense"), precision ("fp32" | "reference"), cache ("none" | "mag" | "first-block"), vae_policy ("global" |
        "official" | "preview"); each defaults to what the model was released with. negative_prompt: None takes the model's own. seed:
        None draws one; the i-th prompt uses seed + i, and a single prompt with that seed gives the same video. callback(stage, step,
        steps, latents) is called when the stages "text" and "sampling" begin and after each step; an exception raised in it stops the
        run. memory_budget: bytes that decoding may use; less takes longer and gives the same frames.
        Raises ValueError and TypeError before any work when something does not fit, RuntimeError when latents stop being finite.
        """
        image = self._image(image, settings)
        plans = self._settings(prompt, negative_prompt, seed, settings)
        self._check_budget(plans[0], memory_budget)
        first, tell = plans[0], callback or (lambda *_: None)
        tell("text", 0, 1, None)
        cond, uncond = self._encode(plans)
        tell("sampling", 0, first.num_inference_steps, None)
        for step, latents in self._sample(plans, cond, uncond, self._first_frames(image, plans)):
            tell("sampling", step + 1, first.num_inference_steps, latents)
        latents = latents.float()
        decode = partial(self.decode, memory_budget=memory_budget)
        videos = [Video(latents[i : i + 1], plan, decode) for i, plan in enumerate(plans)]
        return videos if isinstance(prompt, (list, tuple)) else videos[0]

    def open(self, path: str | Path, memory_budget: int | None = None, **changes) -> Video:
        """The video whose latents `save_latents` wrote, decoded by this model; `changes`: settings to replace, such as vae_policy."""
        latents, settings = load_latents(path)
        return Video(latents, replace(settings, **changes), partial(self.decode, memory_budget=memory_budget))

    def decode(self, latents: Tensor, settings: Settings, memory_budget: int | None = None,
               notify: Notify | None = None) -> Iterator[Tensor]:
        """Consecutive pieces of the video, uint8 [f, H, W, 3] on the CPU, from scaled latents [1, T, H/8, W/8, 16].

        Values are rounded to 8 bits; precision "reference" cuts them off instead, as the official code does. memory_budget, notify: as
        in `HunyuanVideoVAE.decode_frames`; the frames depend on neither.
        """
        if not torch.isfinite(latents).all():
            raise RuntimeError("decoding requires finite latents, got NaN or infinity; sample them again")
        return self._decode(latents, settings, memory_budget, notify)

    @torch.no_grad()
    def _decode(self, latents: Tensor, settings: Settings, memory_budget: int | None, notify: Notify | None) -> Iterator[Tensor]:
        with self._placed("vae") as vae:
            weight = vae.post_quant_conv.weight
            scaled = (latents.to(self.device, torch.float32) / vae.config.scaling_factor).to(weight.dtype)
            pieces = vae.decode_frames(scaled.permute(0, 4, 1, 2, 3), settings.vae_policy, None, memory_budget, notify)
            for pixels in pieces:  # [1, 3, f, H, W]
                levels = (pixels[0].float().clamp(-1, 1) + 1) * 127.5
                levels = levels if settings.precision == "reference" else levels.round()
                yield levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()  # [f, H, W, 3]

    def _check_budget(self, settings: Settings, memory_budget: int | None) -> None:
        """ValueError or TypeError where decoding cannot fit `memory_budget`: better known before sampling than after."""
        if memory_budget is None or self.vae is None or settings.vae_policy == "preview":
            return
        grid, size = settings.grid, (settings.height, settings.width)
        latents = torch.empty(1, self.vae.config.latent_channels, grid.T, 2 * grid.Y, 2 * grid.X, device="meta")
        if settings.vae_policy == "official":
            latents = TilePlan.for_frame(*size).largest(latents)
        decode_plan(self.vae.config, latents.shape, self.vae.post_quant_conv.weight.dtype, memory_budget)

    def _settings(self, prompt, negative_prompt, seed, given: dict) -> list[Settings]:
        """One checked Settings for each prompt."""
        known = [field.name for field in fields(Settings) if field.name not in ("prompt", "negative_prompt", "seed", "fps", "model")]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1) or known
                raise TypeError(f"settings must be among {', '.join(known)}, got {name!r}; did you mean {near[0]!r}?")
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        for text in prompts or [""]:
            check_prompt(text)
        preset, given = self.preset, {name: value for name, value in given.items() if value is not None}
        values = dict(
            height=preset.sizes[0][0], width=preset.sizes[0][1], num_frames=preset.frames, num_inference_steps=preset.steps,
            guidance_scale=preset.guidance, scheduler_scale=preset.scheduler_scale, attention="nabla" if preset.nabla else "dense",
            fps=preset.fps, model=self.name) | given
        check_size(values["height"], values["width"])
        values.setdefault("vae_policy", default_policy(values["num_frames"], values["height"], values["width"]))
        if preset.task == "t2v" and (values["height"], values["width"]) not in preset.sizes:
            _log.warning("%s was trained for %s (width x height); %dx%d may look worse", preset.name,
                         ", ".join(f"{w}x{h}" for h, w in preset.sizes), values["width"], values["height"])
        make_cache(values.get("cache", "none"), preset.name)  # says now what it would say after the text
        strangers = [word for text in prompts for word in getattr(self.text, "unknown_words", lambda _: [])(text)]
        if strangers:
            _log.warning("%s does not know %s; its words are %s", preset.name, ", ".join(strangers), ", ".join(self.text.config["words"]))
        if negative_prompt is None:
            negative_prompt = getattr(self.text, "default_negative", "")
        seed = random.randrange(SEEDS) if seed is None else seed
        return [Settings(text, negative_prompt, seed + i, **values) for i, text in enumerate(prompts)]

    def _image(self, source, settings: dict) -> Tensor | None:
        """The picture as uint8 [3, H, W], cut to the shape that was asked for, or with that of the video put into `settings`."""
        if (source is not None) != (self.preset.task == "i2v"):
            wanted = "begins with an image, got none; pass image" if source is None else "takes no image, got one; use an i2v preset"
            raise ValueError(f"{self.preset.name} {wanted}")
        if source is None:
            return None
        image = read_image(source)
        settings["image"] = str(source) if isinstance(source, (str, Path)) else "given"
        if settings.get("height") and settings.get("width"):
            return crop(image, settings["height"], settings["width"])
        settings["height"], settings["width"] = fitting_size(*image.shape[1:], self.preset)
        return image

    @torch.no_grad()
    def _first_frames(self, image: Tensor | None, plans: list[Settings]) -> Tensor | None:
        """The clean latents [B, 1, h, w, C] that the videos begin with."""
        if image is None:
            return None
        with self._placed("vae") as vae:
            return torch.cat([first_frame(image, vae, plan.height, plan.width, plan.seed) for plan in plans]).to(self.device)

    @torch.no_grad()
    def _encode(self, plans: list[Settings]) -> tuple[Conditioning, Conditioning | None]:
        guided = _sampling(plans[0], self.preset.name).guided
        with self._placed("text") as text:
            kind = "video" if plans[0].num_frames > 1 else "image"
            cond = text.encode([self.lora.prompt(plan.prompt) for plan in plans], kind)
            uncond = text.encode([plans[0].negative_prompt], kind) if guided else None
        if uncond is not None:  # one negative prompt for the whole batch
            B = len(plans)
            uncond = Conditioning(uncond.embeds.expand(B, -1, -1), uncond.lengths.expand(B), uncond.pooled.expand(B, -1))
        return Conditioning(cond.embeds, cond.lengths, cond.pooled), uncond

    def _sample(self, plans: list[Settings], cond: Conditioning, uncond: Conditioning | None,
                given: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        first, preset = plans[0], self.preset
        grid = first.grid
        nabla = (preset.nabla or NABLA_FOR_DENSE) if first.attention == "nabla" else None
        shape = (1, grid.T, 2 * grid.Y, 2 * grid.X, preset.dit.in_visual_dim)
        initial = torch.cat([noise(plan.seed, shape, self.device) for plan in plans])  # [B, T, 2Y, 2X, 16]
        plan = make_plan(preset.dit, grid, preset.scale_factor, nabla, self.device)
        with self._placed("dit") as dit:
            yield from sample(dit, initial, cond, plan, _sampling(first, preset.name), uncond, given)

    @contextmanager
    def _placed(self, name: str) -> Iterator[nn.Module]:
        """The part called `name`, on the device while the body runs, and, unless offloading, from then on."""
        part = getattr(self, name)
        if part is None:
            raise RuntimeError(f"this requires the model's {name} part, which was not loaded; load it with parts={PARTS}")
        part.to(self.device)
        try:
            yield part
        finally:
            if self._offload:
                part.to("cpu")


class Kandinsky5VideoLite(Kandinsky5):
    """`Kandinsky5` whose settings, where a checkpoint does not say, are those of the 5 s Lite model."""


class Kandinsky5VideoPro(Kandinsky5):
    """`Kandinsky5` whose settings, where a checkpoint does not say, are those of the 5 s Pro model."""

    fallback_preset = "t2v-pro-sft-5s"


load = Kandinsky5.from_pretrained


def choose_device(name: str | None) -> torch.device:
    """The device called `name`, or for None the first CUDA device, or the CPU; RuntimeError when torch cannot use it here."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # AssertionError, RuntimeError and NotImplementedError, all of many lines
        raise RuntimeError(f"the device must be usable by torch {torch.__version__} here, but {name!r} is not "
                           f"({str(error).strip().splitlines()[0].rstrip('.')}); use cpu") from None
    return device


def _load_text(sources: Sources, dtype: torch.dtype) -> nn.Module:
    if sources.text_encoder_2 is None:
        from .text import TinyTextEncoder

        return TinyTextEncoder.load(sources.text_encoder)
    from .text_qwen import QwenClipEncoder

    return QwenClipEncoder.load(sources, dtype)


def _sampling(settings: Settings, preset: str) -> Sampling:
    return Sampling(settings.num_inference_steps, settings.scheduler_scale, settings.guidance_scale, settings.precision,
                    make_cache(settings.cache, preset))
