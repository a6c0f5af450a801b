# SPDX-License-Identifier: Apache-2.0
"""`Kandinsky5.generate` taken apart: one call per stage, in the forms that ComfyUI hands from node
to node.

IMAGE is float [B, H, W, C] in 0..1, on the CPU. LATENT is {"samples": [B, C, T, H/8, W/8]}, for
pictures [B, C, H/8, W/8], as the VAE gives and takes it: unscaled, so that ComfyUI's own nodes can
decode, save and load it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from ..media.picture import resize
from ..pipeline import Callback, Kandinsky5
from ..sampling.given import Given
from ..sampling.run import Run
from ..sampling.settings import complete
from ..text.embeddings import Conditioning


@dataclass(frozen=True, eq=False)
class Text:
    """An embedded prompt, and the negative one where the checkpoint uses guidance or one was
    written."""

    prompt: str
    negative_prompt: str
    cond: Conditioning
    uncond: Conditioning | None


@dataclass(frozen=True, eq=False)
class Loaded:
    """What the nodes' KANDINSKY5 wires carry: a model, and the (path, scale) of the LoRAs that are
    to act in this branch of the graph."""

    model: StagedModel
    adapters: tuple[tuple[str, float], ...] = ()

    def use(self) -> StagedModel:
        """The model, with exactly these LoRAs active. Raises what `Adapters.load` raises."""
        for path, scale in self.adapters:
            if path not in self.model.lora.loaded:
                self.model.lora.load(path, path, scale)
        self.model.lora.set(dict(self.adapters))
        return self.model


class StagedModel(Kandinsky5):
    """`Kandinsky5` whose stages are called one at a time. memory_budget: of each stage, as in
    `generate`."""

    def read(
        self,
        prompt: str,
        negative_prompt: str = "",
        image: Tensor | None = None,
        still: bool = False,
        memory_budget: int | None = None,
    ) -> Text:
        """Embed a prompt. negative_prompt: empty for the model's own. image: IMAGE, what an editing
        checkpoint is to see. still: of one frame, which the text encoder of a video model is told.
        Raises what `generate` raises."""
        plans = self._settings(
            prompt, negative_prompt or None, 0, {"num_frames": 1 if still else None}
        )
        if self._kind(plans[0]) == "image_edit" and image is None:
            raise ValueError(
                f"{self.preset.name} reads the picture along with the prompt, got "
                "none; connect the encoded image's picture"
            )
        if self._kind(plans[0]) != "image_edit":
            image = None  # the other text encoders see none
        placement = self._plan(plans, memory_budget, ("text",), pictures=image is not None)
        guided = bool(negative_prompt) or self.preset.guidance != 1.0
        # any but 1: it is the sampler that is told how much
        plans = [replace(plans[0], guidance_scale=2.0 if guided else 1.0)]
        cond, uncond = self._encode(plans, None if image is None else _levels(image), placement)
        return Text(prompt, plans[0].negative_prompt, cond, uncond)

    def expand(
        self,
        prompt: str,
        image: Tensor | None = None,
        still: bool = False,
        memory_budget: int | None = None,
    ) -> str:
        """The prompt as the text encoder's language model writes it in detail. Raises ValueError
        for a model without one."""
        plans = self._settings(prompt, "", 0, {"num_frames": 1 if still else None})
        placement = self._plan(
            plans, memory_budget, ("text",), pictures=image is not None, expand=True
        )
        return self._expanded(plans, None if image is None else _levels(image), placement)[
            0
        ].expanded_prompt

    def encode(
        self,
        image: Tensor,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        memory_budget: int | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """LATENT of an IMAGE's first picture, cut and resized to `size` (height, width), and the
        IMAGE that was encoded.

        size: None for the nearest to the image's that the checkpoint was trained for. seed: of the
        posterior's noise.
        """
        settings = {} if size is None else {"height": size[0], "width": size[1]}
        picture, _ = self._pictures(_levels(image).permute(1, 2, 0), None, settings)
        plans = complete(
            self.preset, self.name, ["a picture"], seed, {**settings, "negative_prompt": ""}
        )
        picture = resize(picture, plans[0].height, plans[0].width)
        given = self._given(
            [picture, None], plans, self._plan(plans, memory_budget, ("pictures",), pictures=True)
        )
        latents = given.frames[0] if given.source is None else given.source
        return self.to_comfy(latents), picture.permute(1, 2, 0)[None].float() / 255

    def sample(
        self,
        text: Text,
        seed: int,
        count: int,
        first: dict | None = None,
        last: dict | None = None,
        callback: Callback | None = None,
        **settings,
    ) -> dict[str, Tensor]:
        """LATENT of `count` results, the i-th with seed + i. first, last: LATENTs of what the video
        begins and ends with, or first of the picture to edit; they settle the size. settings: those
        of `generate`, and memory_budget."""
        budget, given = (
            settings.pop("memory_budget", None),
            [None if one is None else self.from_comfy(one) for one in (first, last)],
        )
        for latents in given:
            if latents is not None:
                settings |= {"height": 8 * latents.shape[2], "width": 8 * latents.shape[3]}
        self._check_given(first, last)
        plans = self._settings([text.prompt] * count, text.negative_prompt, seed, settings)
        if plans[0].guidance_scale != 1.0 and text.uncond is None:
            raise ValueError(
                f"guidance {plans[0].guidance_scale:g} requires a negative prompt, "
                f"but {self.name} was released without one; "
                "write it, or set guidance to 1"
            )
        cond, uncond = (
            one and _repeated(one, count)
            for one in (text.cond, text.uncond if plans[0].guidance_scale != 1.0 else None)
        )
        frames = {
            index: latents
            for index, latents in ((0, given[0]), (plans[0].grid.T - 1, given[1]))
            if latents is not None
        }
        known = Given(source=given[0]) if self.preset.task == "i2i" else Given(frames)
        videos = self.resume(Run(plans, self._noise(plans), cond, uncond, known), callback, budget)
        return self.to_comfy(torch.cat([video.latents for video in videos]))

    def frames(
        self,
        latent: dict[str, Tensor],
        vae_policy: str | None = None,
        memory_budget: int | None = None,
        notify: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """IMAGE [B * F, H, W, 3] of a LATENT. notify: called with (frames done, of) after each
        piece; an exception stops."""
        latents, done = self.from_comfy(latent), 0
        B, T, Y, X, _ = latents.shape
        size = {"num_frames": 4 * (T - 1) + 1, "height": 8 * Y, "width": 8 * X}
        settings = complete(
            self.preset,
            self.name,
            ["a latent"],
            0,
            {**size, "negative_prompt": "", "vae_policy": vae_policy},
        )[0]
        frames = torch.empty(B * settings.num_frames, settings.height, settings.width, 3)
        for piece in chain.from_iterable(
            self.decode(one, settings, memory_budget) for one in latents.split(1)
        ):
            torch.div(piece, 255, out=frames[done : done + len(piece)])
            done += len(piece)
            if notify:
                notify(done, len(frames))
        return frames

    def to_comfy(self, latents: Tensor) -> dict[str, Tensor]:
        """LATENT of scaled latents [B, T, Y, X, C]."""
        samples = latents.float().cpu().permute(0, 4, 1, 2, 3) / self._scaling  # [B, C, T, Y, X]
        return {"samples": samples[:, :, 0] if self.preset.vae is None else samples}

    def from_comfy(self, latent: dict[str, Tensor]) -> Tensor:
        """Scaled latents fp32 [B, T, Y, X, C] of a LATENT. Raises ValueError for one of another
        model."""
        samples, channels = latent["samples"], self.preset.dit.in_visual_dim
        samples = samples[:, :, None] if samples.dim() == 4 else samples
        if samples.dim() != 5 or samples.shape[1] != channels:
            raise ValueError(
                f"a latent of {self.preset.name} has samples [B, {channels}, T, H, "
                f"W], got {list(samples.shape)}; "
                "it comes from another model"
            )
        return (samples.float() * self._scaling).permute(0, 2, 3, 4, 1).contiguous()

    @property
    def _scaling(self) -> float:
        return self.vae.config.scaling_factor

    def check_given(self, first: dict | None, last: dict | None) -> None:
        task, name = self.preset.task, self.preset.name
        if last is not None and task != "i2v":
            raise ValueError(
                f"{name} makes no videos from images, so it takes no last frame; disconnect it"
            )
        if (first is not None or last is not None) != (task in ("i2v", "i2i")):
            raise ValueError(
                f"{name} begins with an image, got none; connect an encoded one"
                if task in ("i2v", "i2i")
                else f"{name} takes no image, got one; disconnect it, or load an i2v or "
                "i2i checkpoint"
            )


def _levels(image: Tensor) -> Tensor:
    """uint8 [3, H, W] of an IMAGE's first picture; what is transparent becomes white."""
    if not isinstance(image, Tensor) or image.dim() != 4 or image.shape[-1] not in (3, 4):
        given = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"an IMAGE is a float tensor [B, H, W, 3 or 4], got {given}; connect another"
        )
    pixels = image[0].cpu().float().clamp(0, 1)
    if pixels.shape[-1] == 4:
        pixels = pixels[..., :3] * pixels[..., 3:] + (1 - pixels[..., 3:])
    return pixels.mul(255).round().to(torch.uint8).permute(2, 0, 1)


def _repeated(one: Conditioning, count: int) -> Conditioning:
    return Conditioning(
        one.embeds.repeat(count, 1, 1), one.lengths.repeat(count), one.pooled.repeat(count, 1)
    )
