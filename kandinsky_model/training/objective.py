# SPDX-License-Identifier: Apache-2.0
"""The loss: the mean square of the velocity's error at (1 - t) clean + t noise, as in sampling.

The velocity to fit is noise - clean, or in distillation that of the checkpoint as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import NABLA_FOR_DENSE, NablaConfig, Preset
from ..dit.geometry import Grid
from ..dit.layout import Layout, make_layout
from ..sampling.given import model_input, with_frames
from ..sampling.sampler import TIME_UNIT
from ..text.embeddings import Conditioning
from .adapters import switched_off
from .batches import Batch
from .config import TrainConfig
from .network import TrainNetwork


def trained_attention(config: TrainConfig, preset: Preset) -> NablaConfig | None:
    """The sparse attention to train with; None for dense attention."""
    sparse = preset.nabla is not None or config.distill == "dense"
    if config.attention is not None:
        sparse = config.attention == "nabla"
    return (preset.nabla or NABLA_FOR_DENSE) if sparse else None


class Objective:
    """The loss of batches under `network`.

    teacher: in distillation, the network as it was. It may be `network` itself, whose adapter is
    then switched off while it teaches.
    """

    def __init__(
        self,
        network: TrainNetwork,
        teacher: TrainNetwork,
        config: TrainConfig,
        preset: Preset,
    ):
        self.network = network
        self.teacher = teacher
        self.config = config
        self.preset = preset
        self.nabla = trained_attention(config, preset)
        self._layouts: dict[tuple, Layout] = {}

    def layout(self, shape: tuple[int, int, int], dense: bool = False) -> Layout:
        """For latents of (T, h, w): with the attention that is trained, or dense."""
        key = (shape, dense)
        if key not in self._layouts:
            T, h, w = shape
            self._layouts[key] = make_layout(
                self.preset.dit,
                Grid(T, h // 2, w // 2),
                self.preset.scale_factor,
                None if dense else self.nabla,
                self.network.device,
            )
        return self._layouts[key]

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each sample, fp32 [B]. Frames that are given do not count."""
        frames = batch.given.frames
        noisy = with_frames(batch.noisy, frames)  # [B, T, h, w, C]
        x = model_input(self.network.dit, noisy, batch.given)  # [B, T, h, w, in_channels]
        wanted = self._taught(x, batch) if self.config.distill else batch.noise - batch.clean
        _, T, h, w, _ = x.shape
        layout = self.layout((T, h, w))
        velocity = self._velocity(self.network, x, batch.times, batch.cond, layout)
        error = (velocity - wanted)[:, len(frames) :]
        return error.square().mean((1, 2, 3, 4))  # [B]

    @staticmethod
    def _velocity(
        network: TrainNetwork,
        x: Tensor,
        times: Tensor,
        text: Conditioning,
        layout: Layout,
    ) -> Tensor:
        """fp32 [B, T, h, w, C]."""
        time = TIME_UNIT * times
        return network(x, text.embeds, text.pooled, time, layout, text.lengths).float()

    @torch.no_grad()
    def _taught(self, x: Tensor, batch: Batch) -> Tensor:
        """The velocity of the teacher, with dense attention or with guidance."""
        _, T, h, w, _ = x.shape
        shape = (T, h, w)
        with switched_off(self.teacher.dit):
            if self.config.distill == "dense":
                layout = self.layout(shape, dense=True)
                return self._velocity(self.teacher, x, batch.times, batch.cond, layout)
            layout = self.layout(shape)
            assert batch.null is not None  # it was drawn for guidance
            cond, uncond = (
                self._velocity(self.teacher, x, batch.times, text, layout)
                for text in (batch.cond, batch.null)
            )
        return uncond + self.preset.guidance * (cond - uncond)
