# SPDX-License-Identifier: Apache-2.0
"""Prompt in, video or picture out, in four stages: read, encode, sample, decode."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints.load import load_any_vae, load_dit
from .checkpoints.locate import Sources, locate, without_downloads
from .checkpoints.lora import Adapters
from .config import KINDS, NABLA_FOR_DENSE, PARTS, PRESETS, Preset
from .devices.available import choose_device
from .devices.budget import Placement
from .devices.parallel import LostPeer, Ranks, from_first, needing_peers, share
from .dit.accounting import Job
from .dit.layout import Layout, make_layout
from .dit.quantized import mode_of
from .placement import STAGES, PartsOnDevice, Work, chunks, scheme_bytes
from .sampling.given import Given, Pictures, encode_pictures, read_pictures
from .sampling.progress import Callback, ProgressBar, check_callback
from .sampling.request import Reading, Request
from .sampling.result import Notify, Video, load_latents
from .sampling.run import Interrupted, Run
from .sampling.sampler import Sampling, noise, sample
from .sampling.settings import Settings, check_latents, complete, named, warn_untrained
from .sampling.step_cache import Remembering, make_cache
from .sampling.values import one_line, shown
from .text.embeddings import Conditioning
from .text.load import load_text

SEEDS = 2**31  # a seed that is not given is drawn from 0 .. SEEDS - 1

_log = logging.getLogger(__name__)


class Kandinsky5:
    """A model that makes videos or pictures.

    text: a text encoder, a module with `encode(prompts, kind, images) -> Conditioning`.
    dit: a `DiffusionTransformer3D`. vae: a `HunyuanVideoVAE` or an `ImageVAE`. Each of the three
    may be None where its stage is not needed.
    preset: the settings that `generate` uses where none are given. name: of the model, kept in the
    settings of its videos.

    `generate` runs the stages `read`, `encode` and `sample`; its videos call `decode` when their
    frames are asked for.
    """

    fallback_preset = "t2v-lite-sft-5s"

    def __init__(
        self,
        text: nn.Module | None,
        dit: nn.Module | None,
        vae: nn.Module | None,
        preset: Preset,
        name: str = "",
        device: torch.device | str = "cpu",
    ):
        self.text = text
        self.dit = dit
        self.vae = vae
        self.preset = preset
        self.name = name
        self.device = torch.device(device)
        self.lora = Adapters(dit)
        # A proxy, so that a model is freed as soon as nobody holds it.
        self.parts = PartsOnDevice(weakref.proxy(self))
        self.placement: Placement | None = None  # of the latest run
        # Whether all processes of torch.distributed's default group share every run.
        self.together = False

    def __repr__(self) -> str:
        parts = ", ".join(name for name in PARTS if getattr(self, name) is not None) or "no parts"
        kind = type(self).__name__
        return f"{kind}({self.name or self.preset.name!r}, {parts} for {self.device})"

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "tiny",
        device: str | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        parts: Sequence[str] = PARTS,
        text_cache: bool = True,
        quantize: str | None = None,
        **options: Any,
    ) -> Kandinsky5:
        """Load a preset, a local path or a hub repository `owner/name`.

        `checkpoints.locate` says which layouts are understood. Parts are loaded into the CPU's
        memory and move to the device when first used.

        device: None takes a CUDA device where there is one. dtype: of weights and activations; None
        means fp32, on CUDA bf16, while latents and schedule stay fp32; diffusers' name for it,
        `torch_dtype`, is taken too. parts: to load. text_cache: keep embedded prompts on disk.
        quantize: keep the transformer's large weights in 8 bits, in one of the `QUANTIZATIONS`.
        options: `text_quantize=`, "int8" or "int4" for the language model that reads prompts;
        `preset=`, whose settings to take; `vae=`, `text_encoder=` and `clip=`, files or folders.

        Raises ValueError or OSError for names, files and weights that do not fit, and RuntimeError
        for a device or package that is missing.
        """
        dtype = options.pop("torch_dtype", dtype)
        preset = options.pop("preset", None)
        text_quantize = options.pop("text_quantize", None)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {shown(dtype)}; pass torch.bfloat16")
        chosen = choose_device(device)
        sources = locate(model, revision, cls.fallback_preset, options, parts, preset)
        return cls.from_sources(sources, chosen, dtype, text_cache, quantize, text_quantize)

    @classmethod
    def from_sources(
        cls,
        sources: Sources,
        device: torch.device,
        dtype: torch.dtype | None = None,
        text_cache: bool = True,
        quantize: str | None = None,
        text_quantize: str | None = None,
    ) -> Kandinsky5:
        """`from_pretrained` for a model that was already located."""
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        preset = sources.preset
        dit = vae = text = None
        if sources.dit:
            dit = load_dit(sources.dit, dtype=dtype, quantize=quantize).prepare()
            preset = replace(preset, dit=dit.config)
        if sources.vae:
            vae = load_any_vae(sources.vae, dtype, sources.preset)
        if sources.text_encoder:
            text = load_text(sources, dtype, text_cache, text_quantize)
        return cls(text, dit, vae, preset, _lasting(sources.name), device)

    def enable_model_cpu_offload(self) -> None:
        """Keep every part on the CPU and move it to the device only while it works. A model whose
        device is the CPU stays as it is."""
        if self.device.type == "cpu":
            _log.warning(
                "offloading to the CPU changes nothing, because the model already runs there"
            )
            return
        self.parts.take_turns()

    def generate(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        seed: int | list[int] | None = None,
        callback: Callback | None = None,
        memory_budget: int | None = None,
        image=None,
        last_image=None,
        **settings,
    ) -> Video | list[Video]:
        """Sample a video, or with one frame a picture. A list of prompts gives a list, sampled in
        one batch.

        image: what image-to-video checkpoints begin with and image editing ones edit: a path, a PIL
        image, or a tensor or array uint8 [H, W, 3]. Without height and width the result takes the
        image's shape, as near as the checkpoint was trained for; with them, the middle of the image
        is cut to their shape. last_image: what a video ends with, cut to the same shape; no
        released checkpoint was trained for it.

        settings: num_frames (4k + 1), height, width (multiples of 16), num_inference_steps,
        guidance_scale (1: none), scheduler_scale, attention ("nabla" | "dense"), precision ("fp32"
        | "reference"), cache ("none" | "mag" | "first-block"), vae_policy ("global" | "official" |
        "preview"). Each defaults to what the model was released with. expand_prompt=True lets the
        language model rewrite each prompt first; settings keep both texts. progress=True shows a
        bar, in a terminal or a notebook.

        negative_prompt: one for all prompts or a list with one for each; None takes the model's
        own. seed: the i-th prompt uses seed + i, or a list has a seed for each; None draws one. The
        same seed, settings and batch give the same bits on one machine, with one number of threads
        and one instruction set; others of these, such as the prompt alone instead of in a batch,
        change rounding alone.
        callback: called with (stage, steps done, steps, latents) when "text" and "sampling" begin
        and after each step; an exception that it raises stops the run.
        memory_budget: bytes of the device that the run may use, weights included. None means what
        is free on a GPU, and no limit on a CPU. With less, weights come and go or are streamed
        layer by layer from pinned host memory, and more is computed piece by piece. That takes
        longer and changes nothing but rounding. The placement is logged before the work begins.

        Raises ValueError or TypeError before any work where something does not fit, RuntimeError
        when latents stop being finite, and Interrupted (a KeyboardInterrupt), with what `resume`
        needs, when the keyboard stops the sampling.

        Where processes run `together`, each of them calls this alike. The first process alone reads
        prompts and pictures; all of them sample and return.
        """
        if settings.pop("progress", False):
            with ProgressBar(callback) as bar:
                return self.generate(
                    prompt, negative_prompt, seed, bar, memory_budget, image, last_image, **settings
                )
        is_list = isinstance(prompt, (list, tuple))
        prompts: list = list(prompt) if is_list else [prompt]
        request = Request(
            prompts,
            negative_prompt,
            seed,
            image,
            last_image,
            settings.pop("expand_prompt", False),
            settings,
        )
        if self.together:
            data = from_first(lambda: self._begin(request, callback, memory_budget).to_bytes())
            videos = self.resume(Run.from_bytes(data), callback, memory_budget)
        else:
            run = self._begin(request, callback, memory_budget)
            videos = self._finish(run, self.placement, callback, memory_budget)
        return videos if is_list else videos[0]

    def _begin(self, request: Request, callback: Callback | None, memory_budget: int | None) -> Run:
        """The stages before sampling. Sets `placement`, of the whole run."""
        check_callback(callback)
        reading = self.read(request)
        self.placement = self.place(
            reading.settings,
            memory_budget,
            pictures=bool(reading.pictures),
            expand=reading.expand_prompt,
        )
        if callback:
            callback("text", 0, 1, None)
        return self.encode(reading, self.placement)

    def resume(
        self, run: Run, callback: Callback | None = None, memory_budget: int | None = None
    ) -> list[Video]:
        """Do the steps that are left of an interrupted run: `Interrupted.run`, or `Run.load` of a
        file. Arguments and errors as in `generate`.

        The result is what it would have been without the interruption, bit for bit where bits are
        the same for the same seed at all. Raises ValueError for a run of another network, or one
        that was made with other adapters or another quantization.
        """
        run.check(self.preset.dit)
        run.check_weights(self.lora.active(), self.lora.fingerprints(), mode_of(self.dit) or "")
        return self.sample(run, callback, memory_budget)

    def open(self, path: str | Path, memory_budget: int | None = None, **changes) -> Video:
        """The video whose latents `Video.save_latents` wrote, decoded by this model. changes:
        settings to replace, such as vae_policy."""
        latents, settings = load_latents(path)
        settings = replace(settings, **changes)
        check_latents(latents, settings, self.preset.dit.in_visual_dim)
        decode = partial(self.decode, memory_budget=memory_budget)
        return Video(latents, settings, decode)

    # Reading: what was asked for, checked before any work

    def read(self, request: Request) -> Reading:
        """The stage that reads pictures and completes settings. Raises ValueError, TypeError or
        OSError."""
        settings = named(request.settings)
        pictures, size = read_pictures(
            self.preset,
            request.image,
            request.last_image,
            (settings.get("height"), settings.get("width")),
        )
        if size is not None:
            settings["height"], settings["width"] = size
        for name in ("image", "last_image"):
            picture = getattr(request, name)
            if picture is not None:
                is_path = isinstance(picture, (str, Path))
                settings[name] = str(picture) if is_path else "given"
        made = self.complete_settings(
            request.prompts, request.negative_prompt, request.seed, settings
        )
        return Reading(made, pictures, request.expand_prompt)

    def complete_settings(
        self,
        prompts: Sequence[str],
        negative: str | Sequence[str] | None,
        seed: int | Sequence[int] | None,
        given: Mapping,
    ) -> list[Settings]:
        """Checked settings for each prompt, with warnings about what the model was not trained for.

        negative, seed: one for all prompts, or one for each. None takes the model's own negative
        prompt, and draws a seed. given: other settings by name. Raises ValueError or TypeError, see
        `sampling.settings.complete`.
        """
        if negative is None:
            makes_pictures = self.preset.task in KINDS
            negative = "" if makes_pictures else getattr(self.text, "default_negative", "")
        if seed is None:
            seed = random.randrange(SEEDS)
        given = {**given, "negative_prompt": negative}
        made = complete(self.preset, self.name, prompts, seed, given)
        warn_untrained(made[0], self.preset)
        self._warn_unknown_words(prompts)
        if self.together:  # raises where the processes cannot share the run
            guided = made[0].guided
            share(torch.distributed.get_world_size(), self.preset.dit.num_heads, guided)
        lora = self.lora.active()
        quantization = mode_of(self.dit) or ""
        return [replace(one, lora=lora, quantization=quantization) for one in made]

    def _warn_unknown_words(self, prompts: Sequence[str]) -> None:
        text: Any = self.text
        if not hasattr(text, "unknown_words"):
            return
        unknown = [word for prompt in prompts for word in text.unknown_words(prompt)]
        if unknown:
            _log.warning(
                "%s does not know %s; its words are %s",
                self.preset.name,
                ", ".join(unknown),
                ", ".join(text.config["words"]),
            )

    def place(
        self,
        settings: Sequence[Settings],
        memory_budget: int | None,
        stages: Collection[str] = STAGES,
        pictures: bool = False,
        expand: bool = False,
    ) -> Placement | None:
        """See `PartsOnDevice.choose`. The placement of more than one stage is logged."""
        first = settings[0]
        edits = self.preset.task == "i2i"
        job = Job(
            self.preset.dit,
            first.grid,
            getattr(self.dit or self.vae, "dtype", torch.float32),
            len(settings),
            first.num_inference_steps,
            first.guided,
            first.attention == "nabla",
            first.cache,
            self.preset.text_max_length * (2 if edits else 1),
            len(self.lora.scales),
            first.quantization,
            self.device.type == "cpu",
        )
        sees = pictures and (expand or edits)
        work = Work(job, first.vae_policy, stages, pictures, sees, expand)
        placement = self.parts.choose(work, memory_budget)
        if placement is not None and len(stages) > 1:
            for line in str(placement).splitlines():
                _log.info("%s", line)
        return placement

    # Encoding: prompts and pictures become what the transformer reads

    def encode(self, reading: Reading, placement: Placement | None = None) -> Run:
        """The stage that embeds prompts, encodes pictures and draws noise. placement: see
        `place`."""
        settings = reading.settings
        pictures = reading.pictures.resized(settings[0].height, settings[0].width)
        if reading.expand_prompt:
            settings = self.expand(settings, pictures.first, placement)
        cond, uncond = self.encode_text(settings, pictures.first, placement)
        given = self.encode_pictures(settings, pictures, placement)
        return Run(settings, self.noise(settings), cond, uncond, given)

    def expand(
        self, settings: list[Settings], picture: Tensor | None, placement: Placement | None = None
    ) -> list[Settings]:
        """The settings with an `expanded_prompt` that the text encoder's language model wrote.
        picture: uint8 [3, H, W] for it to see, or None."""
        with self.parts.working("text", placement, "text") as text:
            return [
                replace(one, expanded_prompt=text.expand(one.prompt, self.kind(one), picture))
                for one in settings
            ]

    @torch.no_grad()
    def encode_text(
        self, settings: list[Settings], picture: Tensor | None, placement: Placement | None = None
    ) -> tuple[Conditioning, Conditioning | None]:
        """The embedded prompts and negative prompts of B settings; None for the latter without
        guidance.

        picture: uint8 [3, H, W], which only the text encoder of an editing checkpoint sees.
        """
        kind = self.kind(settings[0])
        prompts = [self.lora.prompt(one.expanded_prompt or one.prompt) for one in settings]
        with self.parts.working("text", placement, "text") as text:

            def embed(prompts: list[str]) -> Conditioning:
                seen = {"images": [picture] * len(prompts)} if kind == "image_edit" else {}
                return text.encode(prompts, kind, **seen)

            cond = embed(prompts)
            if not settings[0].guided:
                return cond, None
            negatives = [one.negative_prompt for one in settings]
            if len(set(negatives)) == 1:
                return cond, embed(negatives[:1]).repeat(len(settings))
            return cond, embed(negatives)

    @torch.no_grad()
    def encode_pictures(
        self, settings: list[Settings], pictures: Pictures, placement: Placement | None = None
    ) -> Given:
        """The pictures, of the settings' size, as the latents that each video is built around."""
        if not pictures:
            return Given()
        limit = scheme_bytes(placement, "pictures")
        latent_frames = 0 if self.preset.task == "i2i" else settings[0].grid.T
        seeds = [one.seed for one in settings]
        with self.parts.working("vae", placement) as vae:
            return encode_pictures(pictures, vae, seeds, latent_frames, limit)

    def noise(self, settings: list[Settings]) -> Tensor:
        """What sampling begins with, fp32 [B, T, h, w, C]: the noise of each seed."""
        grid = settings[0].grid
        shape = (1, grid.T, 2 * grid.Y, 2 * grid.X, self.preset.dit.in_visual_dim)
        return torch.cat([noise(one.seed, shape) for one in settings])

    def kind(self, settings: Settings) -> str:
        """What the text encoder is told that the prompt is for: "video", "image" or
        "image_edit"."""
        return KINDS.get(self.preset.task) or ("video" if settings.num_frames > 1 else "image")

    # Sampling: noise becomes latents

    def sample(
        self, run: Run, callback: Callback | None = None, memory_budget: int | None = None
    ) -> list[Video]:
        """The stage that does the steps of a run, or those that are left of it. Arguments and
        errors as in `generate`."""
        placement = self.place(run.settings, memory_budget, ("sampling", "decoding"))
        return self._finish(run, placement, callback, memory_budget)

    def _finish(
        self,
        run: Run,
        placement: Placement | None,
        callback: Callback | None,
        memory_budget: int | None,
    ) -> list[Video]:
        self.placement = placement
        run = run.to(self.device)
        sampling = self._sampling(run)
        run = replace(run, memories={})  # they are the step cache's now
        reached = run.step, run.latents
        try:
            if callback:
                callback("sampling", run.step, sampling.steps, None)
            for index, latents in self._steps(run, sampling, placement):
                # One assignment, so that an interruption never parts a step from its latents.
                reached = index + 1, latents
                if callback:
                    callback("sampling", index + 1, sampling.steps, latents)
        except LostPeer as lost:
            lost.run = self._stopped(run, sampling, reached)
            raise
        except KeyboardInterrupt:
            raise Interrupted(self._stopped(run, sampling, reached)) from None
        decode = partial(self.decode, memory_budget=memory_budget)
        pairs = zip(reached[1].float().split(1), run.settings, strict=True)
        return [Video(one, settings, decode) for one, settings in pairs]

    def _sampling(self, run: Run) -> Sampling:
        """How to sample what is left of a run, with a step cache that can be interrupted. Processes
        that share a run do not remember: each has but a part of the memories."""
        first = run.settings[0]
        sampling = first.sampling(self.preset.name, run.step)
        cache = make_cache(first.cache, self.preset.name)
        if cache is None or self.together:
            return sampling
        return replace(sampling, cache=Remembering(cache, run.memories))

    def _stopped(self, run: Run, sampling: Sampling, reached: tuple[int, Tensor]) -> Run:
        """The run as it is after the steps that it reached."""
        step, latents = reached
        cache = sampling.cache
        memories = cache.memories() if isinstance(cache, Remembering) else {}
        adapters = self.lora.fingerprints()
        return replace(run, latents=latents, step=step, memories=memories, adapters=adapters)

    def _steps(
        self, run: Run, sampling: Sampling, placement: Placement | None
    ) -> Iterator[tuple[int, Tensor]]:
        layout = self._layout(run.settings[0], sampling.guided, placement)
        with needing_peers(), self.parts.working("dit", placement, "sampling") as dit:
            yield from sample(dit, run.latents, run.cond, layout, sampling, run.uncond, run.given)

    def _layout(self, settings: Settings, guided: bool, placement: Placement | None) -> Layout:
        preset = self.preset
        nabla = (preset.nabla or NABLA_FOR_DENSE) if settings.attention == "nabla" else None
        return make_layout(
            preset.dit,
            settings.grid,
            preset.scale_factor,
            nabla,
            self.device,
            chunks=chunks(placement),
            ranks=Ranks.of(preset.dit.num_heads, guided) if self.together else None,
        )

    # Decoding: latents become frames

    def decode(
        self,
        latents: Tensor,
        settings: Settings,
        memory_budget: int | None = None,
        notify: Notify | None = None,
    ) -> Iterator[Tensor]:
        """The stage that yields consecutive pieces of the video, uint8 [f, H, W, 3] on the CPU.

        latents: [1, T, h, w, C], scaled as the transformer reads them. Values are rounded to 8
        bits; precision "reference" cuts them off instead, as the official code does.
        memory_budget: as in `generate`. notify: as in `HunyuanVideoVAE.decode_frames`. The frames
        depend on neither. Raises ValueError for latents of another size than the settings say, and
        RuntimeError for latents that are not finite.
        """
        check_latents(latents, settings, self.preset.dit.in_visual_dim)
        if not torch.isfinite(latents).all():
            raise RuntimeError(
                "decoding requires finite latents, got NaN or infinity; sample them again"
            )
        placement = None
        if memory_budget is not None:
            placement = self.place([settings], memory_budget, ("decoding",))
        return self._pieces(latents, settings, placement, notify)

    @torch.no_grad()
    def _pieces(
        self,
        latents: Tensor,
        settings: Settings,
        placement: Placement | None,
        notify: Notify | None,
    ) -> Iterator[Tensor]:
        limit = scheme_bytes(placement, "decoding")
        with self.parts.working("vae", placement) as vae:
            scaled = latents.to(self.device, torch.float32) / vae.config.scaling_factor
            scaled = scaled.to(vae.dtype).permute(0, 4, 1, 2, 3)  # [1, C, T, h, w]
            pieces = vae.decode_frames(scaled, settings.vae_policy, None, limit, notify)
            for pixels in pieces:  # [1, 3, f, H, W]
                levels = pixels[0].float().clamp(-1, 1).add_(1).mul_(127.5)  # [3, f, H, W]
                if settings.precision != "reference":
                    levels.round_()
                frames = levels.to(torch.uint8).permute(1, 2, 3, 0)  # [f, H, W, 3]
                yield frames.contiguous().cpu()


class Kandinsky5VideoLite(Kandinsky5):
    """`Kandinsky5` with the settings of the 5 s Lite model, for checkpoints that name none."""


class Kandinsky5VideoPro(Kandinsky5):
    """`Kandinsky5` with the settings of the 5 s Pro model, for checkpoints that name none."""

    fallback_preset = "t2v-pro-sft-5s"


class Kandinsky5ImageLite(Kandinsky5):
    """`Kandinsky5` with the settings of the text-to-image model, for checkpoints that name none."""

    fallback_preset = "t2i-lite-sft"


load = Kandinsky5.from_pretrained


def load_again(settings: Settings, **options) -> Kandinsky5:
    """The model that a file's settings name, from this machine alone.

    A file may name any model, so nothing is downloaded for it. options: of
    `Kandinsky5.from_pretrained`. Raises ValueError where the model is not here.
    """
    try:
        with without_downloads():
            return load(settings.model, **options)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"the file was made with the model {settings.model or 'of no name'!r}, which cannot be "
            f"loaded from this machine ({one_line(error)}); name the model to take or to download"
        ) from None


def _lasting(name: str) -> str:
    """A model's name as files keep it: a path is absolute, to be found from another folder."""
    path = Path(name).expanduser()
    return str(path.absolute()) if name not in PRESETS and path.exists() else name
