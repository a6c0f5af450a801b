# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's own Kandinsky 5 network, its visual blocks computed with this package's operators.

Nothing of the model is touched: a wrapper, which ComfyUI calls around the network, hands it
replacements for the visual blocks in `transformer_options`, where the network looks for such. A
replacement calls the block's own layers (so weights that ComfyUI casts, streams, quantises or
patches with LoRAs arrive as ever) and does what lies between them: norms, gates, rotation and, with
NABLA, self-attention. The network as of ComfyUI's PR 10988: `visual_transformer_blocks` on tokens
in raster order, [1, S, 1, D / 2, 2, 2] rotation matrices.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from kandinsky_kernels import (
    Rotary,
    gated_add_norm,
    modulated_norm,
    norm_rope_means,
)

from ..config import PRESETS, NablaConfig
from ..dit import geometry, nabla

# comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, and whose wrapper it is
WRAPPER, KEY = "diffusion_model", "kandinsky_kernels"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATTENTIONS = ("auto", "nabla", "dense")
# of a frame: from here on ComfyUI stretches the rotation of the Pro model as for HD
HD_LATENT_PIXELS = 14080
KEEP_MASS = 0.9  # where nothing says how much of the attention to keep
PROBE = 64.0  # large enough for a norm's eps not to show, small enough for its square to be a half
BLOCK_PARTS = ("visual_modulation", "self_attention", "cross_attention", "feed_forward")
ATTENTION_PARTS = (
    "to_query",
    "to_key",
    "to_value",
    "query_norm",
    "key_norm",
    "out_layer",
    "head_dim",
)

_log = logging.getLogger(__name__)


def accelerated(model, attention: str = "auto", keep_mass: float | None = None):
    """A clone of ComfyUI's MODEL that samples with these operators; the model given stays as it is.

    attention: "dense" leaves self-attention to ComfyUI, "nabla" is the sparse attention of the 10 s
    and HD checkpoints, "auto" what the checkpoints of this width were released with at the length
    and size sampled. keep_mass: None for the released one. Raises ValueError for another
    architecture or values that do not fit.
    """
    if attention not in ATTENTIONS:
        raise ValueError(
            f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}; "
            "choose one of them"
        )
    if keep_mass is not None:
        NablaConfig(keep_mass)  # raises where it is no share
    network = model.get_model_object("diffusion_model")
    missing = _missing(network)
    if missing:
        raise ValueError(
            f"this node accelerates Kandinsky 5, but {type(network).__name__} has no "
            f"{missing}; connect a Kandinsky 5 model"
        )
    clone = model.clone()
    # of an accelerated model: this node's settings count
    clone.remove_wrappers_with_key(WRAPPER, KEY)
    clone.add_wrapper_with_key(WRAPPER, KEY, Acceleration(attention, keep_mass))
    return clone


def released(model_dim: int, grid: geometry.Grid) -> NablaConfig | None:
    """How the checkpoints of this width attend at a size: those for SD or HD, and of them those of
    the nearest length."""
    hd = 4 * grid.Y * grid.X >= HD_LATENT_PIXELS
    presets = [
        preset
        for preset in PRESETS.values()
        if preset.repo and preset.vae and preset.dit.model_dim == model_dim
    ]
    alike = [preset for preset in presets if (min(preset.sizes[0]) > 512) == hd] or presets
    nearest = sorted(alike, key=lambda preset: abs(preset.frames - 4 * grid.T))
    return nearest[0].nabla if nearest else None


class Acceleration:
    """The wrapper. It keeps the orders of the sizes seen, and what it has complained of already."""

    def __init__(self, attention: str, keep_mass: float | None):
        self.attention, self.keep_mass = attention, keep_mass
        self._tilings: dict[tuple, Tiling] = {}
        self._said: set[str] = set()

    def __call__(
        self, executor, x: Tensor, *args, transformer_options: dict | None = None, **kwargs
    ) -> Tensor:
        """As ComfyUI calls it: x [B, C, T, H, W] or, for pictures, [B, C, H, W]; `executor` is the
        network or the next wrapper."""
        options, network = transformer_options or {}, executor.class_obj
        problem = self._problem(network, x)
        if problem:
            self._say(f"ComfyUI computes this by itself, because {problem}")
        else:
            options = self._with_blocks(network, x, options)
        return executor(x, *args, transformer_options=options, **kwargs)

    def _with_blocks(self, network: nn.Module, x: Tensor, options: dict) -> dict:
        """`options` with replacements for the visual blocks that no other node has replaced."""
        tiling, known = self._tiling(network, x), options.get("patches_replace", {})
        blocks = {
            ("double_block", i): Replacement(block, tiling, self._say)
            for i, block in enumerate(network.visual_transformer_blocks)
        }
        others = known.get("dit", {})
        if blocks.keys() & others.keys():
            self._say(
                f"{len(blocks.keys() & others.keys())} of {len(blocks)} blocks stay as "
                "another node made them"
            )
        return {**options, "patches_replace": {**known, "dit": {**blocks, **others}}}

    def _tiling(self, network: nn.Module, x: Tensor) -> Tiling | None:
        """How NABLA sees the tokens of x, or None for dense attention."""
        T, height, width = (1, *x.shape[-2:]) if x.dim() == 4 else x.shape[-3:]
        grid = geometry.Grid(T, -(-height // 2), -(-width // 2))
        nabla = None if self.attention == "dense" else released(network.model_dim, grid)
        if self.attention == "nabla" or nabla is not None:
            nabla = NablaConfig(self.keep_mass or (nabla.keep_mass if nabla else KEEP_MASS))
            if (grid, x.device) not in self._tilings:
                self._tilings[grid, x.device] = Tiling.of(grid, nabla, x.device)
            # which are large, and this pass's alone
            return replace(self._tilings[grid, x.device], rotaries=[])
        return None

    @staticmethod
    def _problem(network: nn.Module, x: Tensor) -> str | None:
        """Why the blocks cannot be replaced, or None."""
        if _missing(network):
            return f"its network has no {_missing(network)}"
        if tuple(network.patch_size) != (1, 2, 2):
            return f"its patches are {tuple(network.patch_size)} and not (1, 2, 2)"
        if x.dtype not in DTYPES:
            return f"its activations are {x.dtype}"
        if torch.is_grad_enabled() and any(
            parameter.requires_grad for parameter in network.parameters()
        ):
            return "gradients are recorded"
        return None

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            _log.warning("%s", line)


@dataclass(frozen=True, eq=False)
class Tiling:
    """The tile order of one size and its blocks, on the device."""

    grid: geometry.Grid
    nabla: NablaConfig
    order: Tensor  # int64 [S], the raster index of the i-th token
    inverse: Tensor
    block_offsets: Tensor  # int32 [N + 1]
    # of the rotation matrices last seen, the same for all blocks
    rotaries: list[tuple[Tensor, Rotary]] = field(default_factory=list)

    @classmethod
    def of(cls, grid: geometry.Grid, nabla: NablaConfig, device: torch.device) -> Tiling:
        order = geometry.tile_order(grid)
        return cls(
            grid,
            nabla,
            order.to(device),
            geometry.inverse_order(order).to(device),
            geometry.block_offsets(grid).to(device),
        )

    def rotary(self, matrices: Tensor) -> Rotary:
        """The angles of [1, S, 1, D / 2, 2, 2] rotation matrices, in the order of tiles."""
        if not self.rotaries or self.rotaries[0][0] is not matrices:
            # [S, D / 2]
            cos, sin = (matrices[0, self.order, 0, :, row, 0].float() for row in (0, 1))
            self.rotaries[:] = [(matrices, Rotary.per_token(cos, sin))]
        return self.rotaries[0][1]


class Replacement:
    """One visual block, called as ComfyUI's network calls what another puts in its place."""

    def __init__(self, block: nn.Module, tiling: Tiling | None, say):
        self.block, self.tiling, self.say = block, tiling, say

    def __call__(self, args: dict, extra: dict) -> dict[str, Tensor]:
        """args: x [B, S, C], context [B, L, C], time_embed [B, time], freqs, transformer_options.
        {"x": what the block makes of it}."""
        # of versions with the changes of PR 11371, which have brought the tokens into tiles
        if args.get("sparse_params") is not None:
            self.say(
                "ComfyUI computes this by itself, because it uses a sparse attention of its own"
            )
            return {"x": extra["original_block"](args)}
        return {
            "x": self.forward(
                args["x"],
                args["context"],
                args["time_embed"],
                args["freqs"],
                args.get("transformer_options") or {},
            )
        }

    def forward(
        self, x: Tensor, context: Tensor, time: Tensor, freqs: Tensor, options: dict
    ) -> Tensor:
        block, vectors = self.block, self.block.visual_modulation(time).chunk(9, -1)  # [B, C] each
        shift, scale, gate, shift_cross, scale_cross, gate_cross, shift_ff, scale_ff, gate_ff = (
            vectors
        )
        normed = modulated_norm(x, scale, shift)
        if self.tiling is None:
            attended = block.self_attention(normed, freqs, transformer_options=options)
        else:
            attended = self.attend(block.self_attention, normed, self.tiling, freqs)
        x, normed = gated_add_norm(x, attended, gate, scale_cross, shift_cross)
        x, normed = gated_add_norm(
            x,
            block.cross_attention(normed, context, transformer_options=options),
            gate_cross,
            scale_ff,
            shift_ff,
        )
        return gated_add_norm(x, block.feed_forward(normed), gate_ff)[0]

    @staticmethod
    def attend(layer: nn.Module, x: Tensor, tiling: Tiling, freqs: Tensor) -> Tensor:
        """NABLA of x [B, S, C], tokens in raster order, over itself."""
        x = x[:, tiling.order]  # [B, S, C], tile by tile
        recipe = nabla.Nabla(
            tiling.rotary(freqs),
            tiling.block_offsets,
            tiling.grid.tiles,
            tiling.nabla.keep_mass,
            tiling.nabla.window,
        )

        def project() -> tuple[Tensor, Tensor, Tensor]:
            heads = (-1, layer.head_dim)
            query = layer.to_query(x).unflatten(-1, heads)  # [B, S, H, D]
            key = layer.to_key(x).unflatten(-1, heads)  # [B, S, H, D]
            value = layer.to_value(x).unflatten(-1, heads)  # [B, S, H, D]
            return query, key, value

        query_norm = _with_means(layer.query_norm)
        key_norm = _with_means(layer.key_norm)
        out = nabla.attend(project, query_norm, key_norm, recipe).flatten(-2)  # [B, S, C]
        return layer.out_layer(out[:, tiling.inverse])


def _with_means(norm: nn.Module) -> nabla.NormWithMeans:
    """A ComfyUI RMSNorm, computed by our operator together with the rotation and block means."""
    return lambda x, rotary, offsets: norm_rope_means(x, _weight(norm, x), rotary, offsets)


def _weight(norm: nn.Module, heads: Tensor) -> Tensor:
    """The weight [D] of an RMSNorm as its own forward applies it, which may fetch, cast or patch it
    first: a constant row is normed to 1.

    heads: [B, S, H, D] that it is for.
    """
    return norm(heads.new_full((1, heads.shape[-1]), PROBE))[0]


def _missing(network: nn.Module) -> str | None:
    """The first of the names used here that a network lacks."""
    for name in ("visual_transformer_blocks", "patch_size", "model_dim"):
        if not hasattr(network, name):
            return name
    for block in network.visual_transformer_blocks:
        absent = [name for name in BLOCK_PARTS if not hasattr(block, name)]
        absent += (
            []
            if absent
            else [name for name in ATTENTION_PARTS if not hasattr(block.self_attention, name)]
        )
        if absent:
            return absent[0]
    return None
