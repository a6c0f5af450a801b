# SPDX-License-Identifier: Apache-2.0
"""Prompt in, video or picture out: finds the parts of a model, places them, and runs text, sampling
and decoding in that order."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints.load import load_any_vae, load_dit
from .checkpoints.locate import PARTS, Sources, locate
from .checkpoints.lora import Adapters
from .config import KINDS, NABLA_FOR_DENSE, Preset
from .devices.available import choose_device, free_bytes
from .devices.budget import Placement, Weights, choose_ways
from .devices.host import tensors_of
from .devices.offload import LateOffload, Offload
from .devices.parallel import Ranks, from_first, share
from .dit.accounting import Job
from .dit.layout import Chunks, make_layout
from .dit.quantized import mode_of
from .media.picture import crop, read_image, resize
from .placement import ways_to_run
from .sampling.given import Given, fitting_size, latent_of
from .sampling.result import Notify, Video, load_latents
from .sampling.run import Interrupted, Run
from .sampling.sampler import Sampling, noise, sample
from .sampling.settings import Settings, complete
from .sampling.step_cache import make_cache
from .text.embeddings import Conditioning
from .text.load import load_text
from .vae.hunyuan import HunyuanVideoVAE

SEEDS = 2**31
STAGES = ("text", "pictures", "sampling", "decoding")
_log = logging.getLogger(__name__)
Callback = Callable[[str, int, int, Tensor | None], None]


class Kandinsky5:
    """A model that makes videos or pictures, and what it needs around it.

    text: an encoder with `encode(prompts, kind, images) -> TextEmbeddings`; dit:
    DiffusionTransformer3D; vae: HunyuanVideoVAE or ImageVAE; a part that is not needed may be None.
    preset: the settings that `generate` uses where it is told nothing.
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
        self.text, self.dit, self.vae, self.preset, self.name = text, dit, vae, preset, name
        self.device, self._offload = torch.device(device), False
        # parts whose weights live in host memory
        self._hosted: dict[str, Offload | LateOffload] = {}
        self.placement: Placement | None = None
        self.lora = Adapters(dit)
        # whether all processes of torch.distributed's default group share every run
        self.together = False

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
        preset: str | None = None,
        **places: str | Path,
    ) -> Kandinsky5:
        """Load a preset, a local path or a hub repository `owner/name`; `locate` says which layouts
        are understood.

        Parts are loaded into the CPU's memory and move to the device when first used, so that
        offloading can still be chosen.
        device: None takes a CUDA device where there is one. dtype: of weights and activations; None
        means fp32, on CUDA bf16 (latents and schedule stay fp32). parts: load only these.
        text_cache: keep embedded prompts on disk, so that large text encoders are read for new ones
        only. quantize: keep the transformer's large weights in 8 bits, in one of the
        `QUANTIZATIONS`; None means as they are stored. preset: whose settings to take; None finds
        out which checkpoint this is. places: `vae=`, `text_encoder=`,
        `text_encoder_2=` folders of an official checkpoint whose parts do not lie together. Raises
        ValueError or OSError for names, files and weights that do not fit, RuntimeError for a
        device or package that is missing.
        """
        device = choose_device(device)
        return cls.from_sources(
            locate(model, revision, cls.fallback_preset, places, parts, preset),
            device,
            dtype,
            text_cache,
            quantize,
        )

    @classmethod
    def from_sources(
        cls,
        sources: Sources,
        device: torch.device,
        dtype: torch.dtype | None = None,
        text_cache: bool = True,
        quantize: str | None = None,
    ) -> Kandinsky5:
        """`from_pretrained` once it is known where everything lies."""
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        dit = (
            load_dit(sources.dit, dtype=dtype, quantize=quantize).prepare() if sources.dit else None
        )
        vae = load_any_vae(sources.vae, dtype) if sources.vae else None
        text = load_text(sources, dtype, text_cache) if sources.text_encoder else None
        preset = replace(sources.preset, dit=dit.config) if dit is not None else sources.preset
        return cls(text, dit, vae, preset, sources.name, device)

    def enable_model_cpu_offload(self) -> None:
        """Keep every part on the CPU and move it to the device only while it works. On the CPU
        itself nothing happens."""
        if self.device.type == "cpu":
            _log.warning(
                "offloading to the CPU changes nothing, because the model already runs there"
            )
            return
        self._offload = True
        for part in (self.text, self.dit, self.vae):
            if part is not None:
                part.to("cpu")

    def generate(
        self,
        prompt: str | list[str],
        negative_prompt: str | None = None,
        seed: int | None = None,
        callback: Callback | None = None,
        memory_budget: int | None = None,
        image=None,
        last_image=None,
        **settings,
    ) -> Video | list[Video]:
        """Sample a video (of one frame: a picture) from a prompt, or a list of them, in one batch,
        from a list of prompts.

        image: what image-to-video checkpoints begin with and image editing ones edit: a path, a PIL
        image or uint8 [H, W, 3]. Without height and width the result has its shape, as near as the
        checkpoint was trained for; with them, its middle of their shape is taken. last_image: what
        a video ends with, cut to the same shape; no released checkpoint was trained for that.

        settings: num_frames (4k + 1), height, width (multiples of 16), num_inference_steps,
        guidance_scale (1: none), scheduler_scale, attention ("nabla" | "dense"), precision ("fp32"
        | "reference"), cache ("none" | "mag" | "first-block"), vae_policy ("global" | "official" |
        "preview"); each defaults to what the model was released with. expand_prompt=True lets the
        text encoder's language model rewrite each prompt in detail first; settings keep both.
        negative_prompt: None takes the model's own. seed: None draws one; the i-th prompt uses seed
        + i, and a single prompt with that seed gives the same video. callback(stage, step, steps,
        latents) is called when the stages "text" and "sampling" begin and after each step; an
        exception raised in it stops the run. memory_budget: bytes of the device that the run may
        use, weights included; None: on a GPU what is free, on a CPU no limit. With less, weights
        come and go, or are streamed layer by layer from pinned host memory, and more is done piece
        by piece: it takes longer, and changes nothing but rounding. The plan for it is logged
        before the work begins. Raises ValueError and TypeError before any work when something does
        not fit, RuntimeError when latents stop being finite, Interrupted (a KeyboardInterrupt) with
        what `resume` needs when sampling is stopped by the keyboard.

        With `together` every process calls this alike: the first one alone reads prompts and
        pictures, all of them sample and return.
        """
        expand, asked = (
            settings.pop("expand_prompt", False),
            (prompt, negative_prompt, seed, image, last_image),
        )
        if self.together:
            run = Run.from_bytes(
                from_first(
                    lambda: self._prepare(
                        asked, settings, callback, memory_budget, expand
                    ).to_bytes()
                )
            )
            videos = self.resume(run, callback, memory_budget)
        else:
            run = self._prepare(asked, settings, callback, memory_budget, expand)
            videos = self._run(run, self.placement, callback, memory_budget)
        return videos if isinstance(prompt, (list, tuple)) else videos[0]

    def _prepare(
        self,
        asked: tuple,
        settings: dict,
        callback: Callback | None,
        memory_budget: int | None,
        expand: bool,
    ) -> Run:
        """What `generate` was asked for, read and embedded."""
        prompt, negative_prompt, seed, image, last_image = asked
        pictures = self._pictures(image, last_image, settings)
        plans = self._settings(prompt, negative_prompt, seed, settings)
        self.placement = plan = self._plan(
            plans, memory_budget, pictures=pictures != [None, None], expand=expand
        )
        if callback:
            callback("text", 0, 1, None)
        pictures = [
            None if one is None else resize(one, plans[0].height, plans[0].width)
            for one in pictures
        ]
        plans = self._expanded(plans, pictures[0], plan) if expand else plans
        cond, uncond = self._encode(plans, pictures[0], plan)
        return Run(plans, self._noise(plans), cond, uncond, self._given(pictures, plans, plan))

    def resume(
        self, run: Run, callback: Callback | None = None, memory_budget: int | None = None
    ) -> list[Video]:
        """Do the steps that are left of a run: `Interrupted.run`, or `Run.load` of a file.
        Arguments and errors as in `generate`."""
        return self._run(
            run,
            self._plan(run.settings, memory_budget, ("sampling", "decoding")),
            callback,
            memory_budget,
        )

    def _run(
        self, run: Run, plan: Placement | None, callback: Callback | None, memory_budget: int | None
    ) -> list[Video]:
        first, tell, run, self.placement = (
            run.settings[0],
            callback or (lambda *_: None),
            run.to(self.device),
            plan,
        )
        latents, step = run.latents, run.step
        try:
            tell("sampling", step, first.num_inference_steps, None)
            for done, latents in self._sample(run, plan):
                step = done + 1
                tell("sampling", step, first.num_inference_steps, latents)
        except KeyboardInterrupt:
            raise Interrupted(replace(run, latents=latents, step=step)) from None
        latents, decode = latents.float(), partial(self.decode, memory_budget=memory_budget)
        return [
            Video(latents[i : i + 1], settings, decode) for i, settings in enumerate(run.settings)
        ]

    def open(self, path: str | Path, memory_budget: int | None = None, **changes) -> Video:
        """The video whose latents `save_latents` wrote, decoded by this model; `changes`: settings
        to replace, such as vae_policy."""
        latents, settings = load_latents(path)
        return Video(
            latents, replace(settings, **changes), partial(self.decode, memory_budget=memory_budget)
        )

    def decode(
        self,
        latents: Tensor,
        settings: Settings,
        memory_budget: int | None = None,
        notify: Notify | None = None,
    ) -> Iterator[Tensor]:
        """Consecutive pieces of the video, uint8 [f, H, W, 3] on the CPU, from scaled latents [1,
        T, H/8, W/8, 16].

        Values are rounded to 8 bits; precision "reference" cuts them off instead, as the official
        code does. memory_budget: as in `generate`. notify: as in `HunyuanVideoVAE.decode_frames`.
        The frames depend on neither.
        """
        if not torch.isfinite(latents).all():
            raise RuntimeError(
                "decoding requires finite latents, got NaN or infinity; sample them again"
            )
        plan = (
            None if memory_budget is None else self._plan([settings], memory_budget, ("decoding",))
        )
        return self._decode(latents, settings, plan, notify)

    @torch.no_grad()
    def _decode(
        self, latents: Tensor, settings: Settings, plan: Placement | None, notify: Notify | None
    ) -> Iterator[Tensor]:
        scheme_bytes = plan and plan.stages["decoding"].scheme_bytes
        with self._placed("vae", plan) as vae:
            scaled = (latents.to(self.device, torch.float32) / vae.config.scaling_factor).to(
                vae.dtype
            )
            pieces = vae.decode_frames(
                scaled.permute(0, 4, 1, 2, 3), settings.vae_policy, None, scheme_bytes, notify
            )
            for pixels in pieces:  # [1, 3, f, H, W]
                levels = pixels[0].float().clamp(-1, 1).add_(1).mul_(127.5)
                levels = levels if settings.precision == "reference" else levels.round_()
                yield levels.to(torch.uint8).permute(1, 2, 3, 0).contiguous().cpu()  # [f, H, W, 3]

    def _plan(
        self,
        settings: list[Settings],
        budget: int | None,
        stages: Sequence[str] = STAGES,
        pictures: bool = False,
        expand: bool = False,
    ) -> Placement | None:
        """How to keep within a budget, for those of the stages that there are; None where there is
        none to keep within.

        Raises ValueError or TypeError where it cannot be done: better known before the first stage
        than in the last.
        """
        networks = {name: part for name in PARTS if (part := getattr(self, name)) is not None}
        if budget is None and not self._offload:
            own = sum(
                x.numel() * x.itemsize
                for x in tensors_of(networks.values())
                if x.device.type == self.device.type
            )
            budget = free_bytes(self.device, own)
        if budget is None:
            return None
        first, vae = settings[0], self.vae if isinstance(self.vae, HunyuanVideoVAE) else None
        job = Job(
            self.preset.dit,
            first.grid,
            getattr(self.dit or self.vae, "dtype", torch.float32),
            len(settings),
            first.num_inference_steps,
            _sampling(first, self.preset.name).guided,
            first.attention == "nabla",
            first.cache,
            self.preset.text_max_length * (2 if self.preset.task == "i2i" else 1),
            len(self.lora.scales),
            first.quantization,
            self.device.type == "cpu",
        )
        seen = dict(vision=pictures and (expand or self.preset.task == "i2i"), head=expand)
        weights = {
            name: part.weigh(**seen) if hasattr(part, "weigh") else Weights.of(part)
            for name, part in networks.items()
        }
        ways = ways_to_run(weights, job, vae, first.vae_policy, pictures)
        plan = choose_ways(
            {name: ways[name] for name in ways if name in stages},
            sum(one.total for one in weights.values()),
            budget,
        )
        for line in str(plan).splitlines() if len(stages) > 1 else ():
            _log.info("%s", line)
        return plan

    def _settings(
        self, prompt: str | list[str], negative: str | None, seed: int | None, given: dict
    ) -> list[Settings]:
        """One checked Settings for each prompt, with warnings about what the checkpoint was not
        trained for."""
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        if negative is None:
            negative = (
                "" if self.preset.task in KINDS else getattr(self.text, "default_negative", "")
            )
        seed = random.randrange(SEEDS) if seed is None else seed
        plans = complete(
            self.preset, self.name, prompts, seed, {**given, "negative_prompt": negative}
        )
        size, sizes = (plans[0].height, plans[0].width), self.preset.sizes
        if self.preset.task != "i2v" and size not in sizes:
            _log.warning(
                "%s was trained for %s (width x height); %dx%d may look worse",
                self.preset.name,
                ", ".join(f"{w}x{h}" for h, w in sizes),
                size[1],
                size[0],
            )
        strangers = [
            word
            for text in prompts
            for word in getattr(self.text, "unknown_words", lambda _: [])(text)
        ]
        if strangers:
            _log.warning(
                "%s does not know %s; its words are %s",
                self.preset.name,
                ", ".join(strangers),
                ", ".join(self.text.config["words"]),
            )
        if self.together:  # says now who cannot share a run
            share(
                torch.distributed.get_world_size(),
                self.preset.dit.num_heads,
                _sampling(plans[0], self.preset.name).guided,
            )
        return [
            replace(plan, lora=self.lora.active(), quantization=mode_of(self.dit) or "")
            for plan in plans
        ]

    def _pictures(self, image, last_image, settings: dict) -> list[Tensor | None]:
        """First and last picture, uint8 [3, h, w], cut to the shape that was asked for, or with
        that of the result put into `settings`."""
        task, sources = self.preset.task, {"image": image, "last_image": last_image}
        given = {name: read_image(source) for name, source in sources.items() if source is not None}
        if bool(given) != (task in ("i2v", "i2i")):
            wanted = (
                "takes no image, got one; use an i2v or i2i preset"
                if given
                else "begins with an image, got none; pass image"
            )
            raise ValueError(f"{self.preset.name} {wanted}")
        if last_image is not None and task != "i2v":
            raise ValueError(
                f"{self.preset.name} makes no videos, so it takes no last image; use an i2v preset"
            )
        if not given:
            return [None, None]
        settings.update(
            (name, str(sources[name]) if isinstance(sources[name], (str, Path)) else "given")
            for name in given
        )
        if settings.get("height") and settings.get("width"):
            shape = settings["height"], settings["width"]
        else:
            shape = next(iter(given.values())).shape[1:]
            settings["height"], settings["width"] = size = fitting_size(*shape, self.preset)
            # nothing of a first frame is cut off; rounded sides deform it a little
            shape = shape if task == "i2v" else size
        return [None if name not in given else crop(given[name], *shape) for name in sources]

    @torch.no_grad()
    def _given(
        self, pictures: list[Tensor | None], plans: list[Settings], plan: Placement | None
    ) -> Given:
        """The clean latents that the videos are built around, for each of them."""
        if pictures == [None, None]:
            return Given()
        most = plan and plan.stages["pictures"].scheme_bytes
        with self._placed("vae", plan) as vae:
            first, last = (
                one
                if one is None
                else torch.cat([latent_of(one, vae, each.seed, most) for each in plans])
                for one in pictures
            )
        if self.preset.task == "i2i":
            return Given(source=first)
        frames = {0: first, plans[0].grid.T - 1: last}  # each [B, 1, h, w, C]
        return Given({index: frame for index, frame in frames.items() if frame is not None})

    def _noise(self, plans: list[Settings]) -> Tensor:
        grid = plans[0].grid
        shape = (1, grid.T, 2 * grid.Y, 2 * grid.X, self.preset.dit.in_visual_dim)
        return torch.cat([noise(plan.seed, shape) for plan in plans])  # [B, T, 2Y, 2X, 16]

    def _kind(self, plan: Settings) -> str:
        return KINDS.get(self.preset.task) or ("video" if plan.num_frames > 1 else "image")

    def _expanded(
        self, plans: list[Settings], picture: Tensor | None, placement: Placement | None
    ) -> list[Settings]:
        with self._placed("text", placement, "text") as text:
            return [
                replace(plan, expanded_prompt=text.expand(plan.prompt, self._kind(plan), picture))
                for plan in plans
            ]

    @torch.no_grad()
    def _encode(
        self, plans: list[Settings], picture: Tensor | None, placement: Placement | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """The embedded prompts, and the negative one where it is needed; an editing checkpoint's
        text encoder sees the picture too."""
        kind = self._kind(plans[0])
        seen = {"images": [picture]} if kind == "image_edit" else {}
        with self._placed("text", placement, "text") as text:

            def encode(prompts: list[str]):
                return text.encode(
                    prompts,
                    kind,
                    **{name: pictures * len(prompts) for name, pictures in seen.items()},
                )

            cond = encode([self.lora.prompt(plan.expanded_prompt or plan.prompt) for plan in plans])
            uncond = (
                encode([plans[0].negative_prompt])
                if _sampling(plans[0], self.preset.name).guided
                else None
            )
        if uncond is not None:  # one negative prompt for the whole batch
            B = len(plans)
            uncond = Conditioning(
                uncond.embeds.repeat(B, 1, 1), uncond.lengths.repeat(B), uncond.pooled.repeat(B, 1)
            )
        return Conditioning(cond.embeds, cond.lengths, cond.pooled), uncond

    def _sample(self, run: Run, placement: Placement | None) -> Iterator[tuple[int, Tensor]]:
        first, preset = run.settings[0], self.preset
        nabla = (preset.nabla or NABLA_FOR_DENSE) if first.attention == "nabla" else None
        ranks = (
            Ranks.of(preset.dit.num_heads, _sampling(first, preset.name).guided)
            if self.together
            else None
        )
        chunks = placement.stages["sampling"].chunks if placement else Chunks()
        plan = make_layout(
            preset.dit,
            first.grid,
            preset.scale_factor,
            nabla,
            self.device,
            chunks=chunks,
            ranks=ranks,
        )
        with self._placed("dit", placement, "sampling") as dit:
            yield from sample(
                dit,
                run.latents,
                run.cond,
                plan,
                _sampling(first, preset.name, run.step),
                run.uncond,
                run.given,
            )

    @contextmanager
    def _placed(
        self, name: str, plan: Placement | None, stage: str | None = None
    ) -> Iterator[nn.Module]:
        """The part called `name`, on the device while the body runs: alone and as the plan says for
        `stage`, or, without a plan and with one for all parts together, from then on."""
        part = getattr(self, name)
        if part is None:
            raise RuntimeError(
                f"this requires the model's {name} part, which was not loaded; "
                f"load it with parts={PARTS}"
            )
        if plan is None or plan.together:
            self._hosted.pop(name, None)
            part.to(self.device)
            try:
                yield part
            finally:
                if self._offload:
                    part.to("cpu")
            return
        # what stayed on the device after another plan
        for other in set(PARTS) - {name, *self._hosted}:
            if self.device.type != "cpu" and getattr(self, other) is not None:
                getattr(self, other).to("cpu")
        if name not in self._hosted:
            self._hosted[name] = (LateOffload if hasattr(part, "placing") else Offload)(
                part, self.device
            )
        with self._hosted[name].on_device(plan.stages[stage].resident if stage else 0):
            yield part


class Kandinsky5VideoLite(Kandinsky5):
    """`Kandinsky5` whose settings, where a checkpoint does not say, are those of the 5 s Lite
    model."""


class Kandinsky5VideoPro(Kandinsky5):
    """`Kandinsky5` whose settings, where a checkpoint does not say, are those of the 5 s Pro
    model."""

    fallback_preset = "t2v-pro-sft-5s"


class Kandinsky5ImageLite(Kandinsky5):
    """`Kandinsky5` whose settings, where a checkpoint does not say, are those of the text-to-image
    model."""

    fallback_preset = "t2i-lite-sft"


load = Kandinsky5.from_pretrained


def _sampling(settings: Settings, preset: str, start: int = 0) -> Sampling:
    return Sampling(
        settings.num_inference_steps,
        settings.scheduler_scale,
        settings.guidance_scale,
        settings.precision,
        make_cache(settings.cache, preset),
        start,
    )
