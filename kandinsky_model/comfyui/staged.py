# SPDX-License-Identifier: Apache-2.0
"""The stages of a `Kandinsky5`, one call each, in the forms that ComfyUI hands from node to node.

IMAGE is float [B, H, W, C] in 0..1, on the CPU. LATENT is {"samples": [B, C, T, h, w]}, for
pictures [B, C, h, w], with h = H / 8 and w = W / 8. It is unscaled, as the VAE gives and takes it,
so that ComfyUI's own nodes can decode, save and load it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..pipeline import Kandinsky5
from ..sampling.given import TASKS_WITH_PICTURES, Given
from ..sampling.request import Request
from ..sampling.run import Run
from ..sampling.sampler import schedule
from ..sampling.settings import Settings, complete
from ..text.embeddings import Conditioning
from .running import PERCENT, OperatorWatch

# (steps done, steps, the latents [B, T, h, w, C] that sampling heads for, or None)
Stepped = Callable[[int, int, Tensor | None], None]
ANY_GUIDANCE = 2.0  # not 1: the sampler's node is told how much


@dataclass(frozen=True, eq=False)
class Text:
    """An embedded prompt, and the negative prompt where the checkpoint uses guidance or one was
    written."""

    prompt: str
    negative_prompt: str
    cond: Conditioning
    uncond: Conditioning | None


@dataclass(frozen=True, eq=False)
class Loaded:
    """What KANDINSKY5 wires carry: a model, and the (path, scale) of the LoRAs that are to act in
    this branch of the graph."""

    staged: StagedModel
    adapters: tuple[tuple[str, float], ...] = ()

    @property
    def model(self) -> Kandinsky5:
        return self.staged.model

    def use(self) -> StagedModel:
        """The model, with exactly these LoRAs active. Raises what `Adapters.load` raises."""
        lora = self.model.lora
        for path, scale in self.adapters:
            if path not in lora.loaded:
                lora.load(path, path, scale)
        lora.set(dict(self.adapters))
        return self.staged


class StagedModel:
    """A model whose stages are called one at a time, each with a memory budget of its own in
    bytes, as in `Kandinsky5.generate`."""

    def __init__(self, model: Kandinsky5):
        self.model = model

    def encode_text(
        self,
        prompt: str,
        negative_prompt: str = "",
        image: Tensor | None = None,
        still: bool = False,
        memory_budget: int | None = None,
    ) -> Text:
        """Embed a prompt.

        negative_prompt: empty for the model's own. image: IMAGE, which an editing checkpoint sees.
        still: for a single frame, which the text encoder of a video model is told. Raises what
        `Kandinsky5.generate` raises.
        """
        model = self.model
        settings = self._settings(prompt, negative_prompt or None, still)
        picture = None
        if model.kind(settings) == "image_edit":  # no other text encoder sees a picture
            if image is None:
                raise ValueError(
                    f"{model.preset.name} reads the picture along with the prompt, got none; "
                    "connect the encoded image's picture"
                )
            picture = _levels(image)
        placement = model.place([settings], memory_budget, ("text",), pictures=picture is not None)
        guided = bool(negative_prompt) or model.preset.guidance != 1.0
        settings = replace(settings, guidance_scale=ANY_GUIDANCE if guided else 1.0)
        cond, uncond = model.encode_text([settings], picture, placement)
        return Text(prompt, settings.negative_prompt, cond, uncond)

    def expand(
        self,
        prompt: str,
        image: Tensor | None = None,
        still: bool = False,
        memory_budget: int | None = None,
    ) -> str:
        """The prompt as the text encoder's language model writes it in detail. Raises ValueError
        for a model without one."""
        settings = [self._settings(prompt, "", still)]
        picture = None if image is None else _levels(image)
        placement = self.model.place(
            settings, memory_budget, ("text",), pictures=picture is not None, expand=True
        )
        (expanded,) = self.model.expand(settings, picture, placement)
        return expanded.expanded_prompt

    def encode_image(
        self,
        image: Tensor,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        memory_budget: int | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """LATENT of an IMAGE's first picture, cut and resized, and the IMAGE that was encoded.

        size: (height, width); None for the nearest to the image's that the checkpoint was trained
        for. seed: of the posterior's noise.
        """
        height, width = size or (None, None)
        request = Request(
            ["a picture"],
            negative_prompt="",
            seed=seed,
            image=_levels(image).permute(1, 2, 0),
            settings={"height": height, "width": width},
        )
        reading = self.model.read(request)
        settings = reading.settings
        pictures = reading.pictures.resized(settings[0].height, settings[0].width)
        placement = self.model.place(settings, memory_budget, ("pictures",), pictures=True)
        given = self.model.encode_pictures(settings, pictures, placement)
        latents = given.frames[0] if given.source is None else given.source
        assert pictures.first is not None  # the request had one
        seen = pictures.first.permute(1, 2, 0)[None].float() / 255  # [1, H, W, 3]
        return self.to_comfy(latents), seen

    def sample(
        self,
        text: Text,
        seed: int,
        count: int,
        first: dict | None = None,
        last: dict | None = None,
        stepped: Stepped | None = None,
        **settings,
    ) -> dict[str, Tensor]:
        """LATENT of `count` results, the i-th with seed + i.

        first, last: LATENTs of what the video begins and ends with, or first of the picture to
        edit. They settle the size. stepped: is told each step; an exception that it raises stops.
        settings: those of `Kandinsky5.generate`, and memory_budget.
        """
        model = self.model
        budget = settings.pop("memory_budget", None)
        first_latents, last_latents = (
            None if one is None else self.from_comfy(one) for one in (first, last)
        )
        for latents in (first_latents, last_latents):
            if latents is not None:
                settings |= {"height": 8 * latents.shape[2], "width": 8 * latents.shape[3]}
        self.check_given(first, last)
        made = model.complete_settings([text.prompt] * count, text.negative_prompt, seed, settings)
        guidance = made[0].guidance_scale
        uncond = None
        if guidance != 1.0:
            if text.uncond is None:
                raise ValueError(
                    f"guidance {guidance:g} requires a negative prompt, but {model.name} was "
                    "released without one; write it, or set guidance to 1"
                )
            uncond = text.uncond.repeat(count)
        given = Given(source=first_latents)
        if model.preset.task != "i2i":
            frames = {0: first_latents, made[0].grid.T - 1: last_latents}
            given = Given({i: latents for i, latents in frames.items() if latents is not None})
        run = Run(made, model.noise(made), text.cond.repeat(count), uncond, given)
        videos = model.sample(run, stepped and _Heading(run, stepped), budget)
        return self.to_comfy(torch.cat([video.latents for video in videos]))

    def decode(
        self,
        latent: dict[str, Tensor],
        vae_policy: str | None = None,
        memory_budget: int | None = None,
        notify: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """IMAGE [B * F, H, W, 3] of a LATENT.

        notify: called with (percent done, 100) all the while, also before the first piece; an
        exception that it raises stops.
        """
        model = self.model
        latents = self.from_comfy(latent)
        B, T, h, w, _ = latents.shape
        given = {
            "num_frames": 4 * (T - 1) + 1,
            "height": 8 * h,
            "width": 8 * w,
            "negative_prompt": "",
            "vae_policy": vae_policy,
        }
        settings = complete(model.preset, model.name, ["a latent"], 0, given)[0]
        frames = torch.empty(B * settings.num_frames, settings.height, settings.width, 3)
        pieces = (model.decode(one, settings, memory_budget) for one in latents.split(1))
        progress = _Progress(self._normed_values(latents, settings.vae_policy), len(frames), notify)
        with OperatorWatch(progress.normed):
            done = 0
            for piece in chain.from_iterable(pieces):  # [f, H, W, 3]
                torch.div(piece, 255, out=frames[done : done + len(piece)])
                done += len(piece)
                progress.decoded(done)
        return frames

    def _normed_values(self, latents: Tensor, policy: str) -> int:
        """How many values norms read while latents [B, T, h, w, C] are decoded; 0 where that is not
        known."""
        vae: Any = self.model.vae
        if not hasattr(vae, "normed_values"):
            return 0
        return vae.normed_values(latents.permute(0, 4, 1, 2, 3).shape, policy)

    def to_comfy(self, latents: Tensor) -> dict[str, Tensor]:
        """LATENT of scaled latents [B, T, h, w, C]."""
        samples = latents.float().cpu().permute(0, 4, 1, 2, 3) / self._scaling  # [B, C, T, h, w]
        return {"samples": samples[:, :, 0] if self.model.preset.vae is None else samples}

    def from_comfy(self, latent: dict[str, Tensor]) -> Tensor:
        """Scaled latents fp32 [B, T, h, w, C] of a LATENT. Raises ValueError for one of another
        model."""
        samples = latent["samples"]
        channels = self.model.preset.dit.in_visual_dim
        if samples.dim() == 4:
            samples = samples[:, :, None]  # [B, C, 1, h, w]
        if samples.dim() != 5 or samples.shape[1] != channels:
            raise ValueError(
                f"a latent of {self.model.preset.name} has samples [B, {channels}, T, H, W], got "
                f"{list(samples.shape)}; it comes from another model"
            )
        scaled = samples.float() * self._scaling
        return scaled.permute(0, 2, 3, 4, 1).contiguous()  # [B, T, h, w, C]

    def check_given(self, first: dict | None, last: dict | None) -> None:
        """Raise ValueError where the checkpoint does not go with the LATENTs that are connected."""
        task = self.model.preset.task
        name = self.model.preset.name
        wanted = task in TASKS_WITH_PICTURES
        if last is not None and task != "i2v":
            raise ValueError(
                f"{name} makes no videos from images, so it takes no last frame; disconnect it"
            )
        given = first is not None or last is not None
        if wanted and not given:
            raise ValueError(f"{name} begins with an image, got none; connect an encoded one")
        if given and not wanted:
            raise ValueError(
                f"{name} takes no image, got one; disconnect it, or load an i2v or i2i checkpoint"
            )

    def _settings(
        self,
        prompt: str,
        negative_prompt: str | None,
        still: bool,
    ) -> Settings:
        given = {"num_frames": 1 if still else None}
        (settings,) = self.model.complete_settings([prompt], negative_prompt, 0, given)
        return settings

    @property
    def _scaling(self) -> float:
        vae: Any = self.model.vae
        return vae.config.scaling_factor


class _Heading:
    """A callback of `Kandinsky5.sample` that passes on the clean latents which each step heads for:
    from two successive latents follows the velocity, and from that where it leads at time 0."""

    def __init__(self, run: Run, stepped: Stepped):
        settings = run.settings[0]
        times = schedule(settings.num_inference_steps, settings.scheduler_scale)
        self._times: list[float] = times.tolist()
        self._latents = run.latents
        self._stepped = stepped

    def __call__(
        self,
        stage: str,
        done: int,
        steps: int,
        latents: Tensor | None,
    ) -> None:
        if stage != "sampling":
            return
        clean = None
        if latents is not None:
            before = self._times[done - 1]
            now = self._times[done]
            velocity = (latents.float() - self._latents.to(latents.device).float()) / (now - before)
            clean = latents - now * velocity
            self._latents = latents
        self._stepped(done, steps, clean)


class _Progress:
    """How far decoding has come, in percent: by the values that norms have read, and by frames.

    total: of the values, 0 where it is not known. frames: to decode.
    """

    def __init__(
        self,
        total: int,
        frames: int,
        notify: Callable[[int, int], None] | None,
    ):
        self._total = total
        self._frames = frames
        self._notify = notify
        self._percent = 0

    def normed(self, values: int) -> None:
        if self._total:
            self._tell(min(PERCENT * values // self._total, PERCENT - 1))
        else:
            self._tell(0)

    def decoded(self, frames: int) -> None:
        self._tell(PERCENT * frames // self._frames)

    def _tell(self, percent: int) -> None:
        self._percent = max(self._percent, percent)
        if self._notify:
            self._notify(self._percent, PERCENT)


def _levels(image: Tensor) -> Tensor:
    """uint8 [3, H, W] of an IMAGE's first picture; what is transparent becomes white."""
    if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[-1] not in (3, 4):
        given = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"an IMAGE is a float tensor [B, H, W, 3 or 4], got {given}; connect another"
        )
    pixels = image[0].cpu().float().clamp(0, 1)  # [H, W, 3 or 4]
    if pixels.shape[-1] == 4:
        opacity = pixels[..., 3:]
        pixels = pixels[..., :3] * opacity + (1 - opacity)
    return pixels.mul(255).round().to(torch.uint8).permute(2, 0, 1)
