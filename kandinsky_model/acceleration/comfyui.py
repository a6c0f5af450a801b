# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's own Kandinsky 5 network, its visual blocks computed with this package's operators.

Nothing of the model is changed. ComfyUI calls a wrapper around the network, and the wrapper hands
the network replacements for its visual blocks in `transformer_options`, where the network looks for
them. A replacement calls the block's own layers, so that weights which ComfyUI casts, streams,
quantises or patches with LoRAs arrive as before. What lies between the layers it computes itself:
norms, gates, rotation and, with NABLA, self-attention.

This is written for the network of ComfyUI's PR 10988: `visual_transformer_blocks` on tokens in
raster order, with rotation matrices [1, S, 1, D / 2, 2, 2].
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kandinsky_kernels import (
    Rotary,
    gated_add_norm,
    modulated_norm,
    norm_rope_means,
)

from ..config import PRESETS, NablaConfig
from ..dit import geometry, nabla
from .forward_swap import DTYPES, Foreign, has_tangents, recorded

WRAPPER = "diffusion_model"  # comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
KEY = "kandinsky_kernels"  # the name under which the wrapper is found again
ATTENTIONS = ("auto", "nabla", "dense")
# latent pixels of a frame from which on ComfyUI stretches the Pro model's rotation as for HD
HD_LATENT_PIXELS = 14080
KEEP_MASS = 0.9  # where no released checkpoint says how much of the attention to keep
# a value so large that a norm's eps does not show, and whose square is still finite in float16
PROBE = 64.0
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
    """A clone of ComfyUI's MODEL that samples with these operators; `model` stays as it is.

    attention: "dense" leaves self-attention to ComfyUI. "nabla" is the sparse attention of the 10 s
    and HD checkpoints. "auto" is what the checkpoints of this width were released with, at the
    length and size that is sampled. keep_mass: the share of the attention that NABLA keeps, None
    for the released one. Raises ValueError for another architecture or values that do not fit.
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
    # where the model is accelerated already, the new settings count
    clone.remove_wrappers_with_key(WRAPPER, KEY)
    clone.add_wrapper_with_key(WRAPPER, KEY, BlockReplacer(attention, keep_mass))
    return clone


def released(model_dim: int, grid: geometry.Grid) -> NablaConfig | None:
    """The NABLA with which checkpoints of this width were released, None for dense attention.

    Of these checkpoints those for the grid's size count, SD or HD, and of them the one whose length
    is nearest.
    """
    hd = 4 * grid.Y * grid.X >= HD_LATENT_PIXELS
    presets = [
        preset
        for preset in PRESETS.values()
        if preset.repo and preset.vae and preset.dit.model_dim == model_dim
    ]
    alike = [preset for preset in presets if (min(preset.sizes[0]) > 512) == hd] or presets
    nearest = sorted(alike, key=lambda preset: abs(preset.frames - 4 * grid.T))
    return nearest[0].nabla if nearest else None


class BlockReplacer:
    """The wrapper around a network. It keeps the token orders of the sizes that it has seen, and
    the lines that it has logged."""

    def __init__(self, attention: str, keep_mass: float | None):
        self.attention = attention
        self.keep_mass = keep_mass
        self._tilings: dict[tuple, Tiling] = {}
        self._said: set[str] = set()

    def __call__(
        self,
        executor,
        x: Tensor,
        *args,
        transformer_options: dict | None = None,
        **kwargs,
    ) -> Tensor:
        """As ComfyUI calls it. executor: the network or the next wrapper. x: [B, C, T, H, W], or
        [B, C, H, W] of pictures."""
        options = transformer_options or {}
        problem = self._problem(executor.class_obj, x)
        if problem:
            self._say(f"ComfyUI computes this by itself, because {problem}")
        else:
            options = self._with_blocks(executor.class_obj, x, options)
        return executor(x, *args, transformer_options=options, **kwargs)

    def _with_blocks(
        self,
        network: Foreign,
        x: Tensor,
        options: dict,
    ) -> dict:
        """`options` with replacements for the visual blocks that no other node has replaced."""
        tiling = self._tiling(network, x)
        known = options.get("patches_replace", {})
        blocks = {
            ("double_block", i): Replacement(block, tiling, self._say)
            for i, block in enumerate(network.visual_transformer_blocks)
        }
        others = known.get("dit", {})
        taken = blocks.keys() & others.keys()
        if taken:
            self._say(f"{len(taken)} of {len(blocks)} blocks stay as another node made them")
        return {**options, "patches_replace": {**known, "dit": {**blocks, **others}}}

    def _tiling(self, network: Foreign, x: Tensor) -> Tiling | None:
        """How NABLA sees the tokens of x, or None for dense attention."""
        if self.attention == "dense":
            return None
        T, height, width = (1, *x.shape[-2:]) if x.dim() == 4 else x.shape[-3:]
        grid = geometry.Grid(T, -(-height // 2), -(-width // 2))  # the network pads odd sides
        config = released(network.model_dim, grid)
        if config is None and self.attention == "auto":
            return None
        released_mass = KEEP_MASS if config is None else config.keep_mass
        config = NablaConfig(self.keep_mass or released_mass)
        if (grid, x.device) not in self._tilings:
            self._tilings[grid, x.device] = Tiling.of(grid, config, x.device)
        # angles are large, and belong to this pass alone
        return replace(self._tilings[grid, x.device], rotaries=[])

    @staticmethod
    def _problem(network: Foreign, x: Tensor) -> str | None:
        """Why the blocks cannot be replaced, or None."""
        if _missing(network):
            return f"its network has no {_missing(network)}"
        if tuple(network.patch_size) != (1, 2, 2):
            return f"its patches are {tuple(network.patch_size)} and not (1, 2, 2)"
        if x.dtype not in DTYPES:
            return f"its activations are {x.dtype}"
        if recorded(network, x):
            return "gradients are recorded"
        if has_tangents(network, x):
            return "forward-mode derivatives are computed"
        return None

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            _log.warning("%s", line)


@dataclass(frozen=True, eq=False)
class Tiling:
    """The order of the tokens of one size, tile by tile, and its blocks, on the device."""

    grid: geometry.Grid
    nabla: NablaConfig
    order: Tensor  # int64 [S], the raster index of the i-th token
    inverse: Tensor  # int64 [S], where the token of a raster index stands
    block_offsets: Tensor  # int32 [N + 1], of the blocks among the ordered tokens
    # the rotation matrices of the pass, which are the same for all blocks, and their angles
    rotaries: list[tuple[Tensor, Rotary]] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        grid: geometry.Grid,
        nabla: NablaConfig,
        device: torch.device,
    ) -> Tiling:
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
            columns = matrices[0, self.order, 0, :, :, 0].float()  # [S, D / 2, 2]
            cos = columns[..., 0].contiguous()  # [S, D / 2]
            sin = columns[..., 1].contiguous()  # [S, D / 2]
            self.rotaries[:] = [(matrices, Rotary.per_token(cos, sin))]
        return self.rotaries[0][1]


class Replacement:
    """Stands in for one visual block; the network calls it as it calls any replacement."""

    def __init__(
        self,
        block: Foreign,
        tiling: Tiling | None,
        say,
    ):
        self.block = block
        self.tiling = tiling
        self.say = say

    def __call__(self, args: dict, extra: dict) -> dict[str, Tensor]:
        """{"x": what the block makes of it}.

        args: x [B, S, C], context [B, L, C], time_embed [B, time], freqs, transformer_options.
        extra: the block's own forward, as `original_block`.
        """
        # of versions with the changes of PR 11371, whose tokens are in tiles already
        if args.get("sparse_params") is not None:
            self.say(
                "ComfyUI computes this by itself, because it uses a sparse attention of its own"
            )
            return {"x": extra["original_block"](args)}
        options = args.get("transformer_options") or {}
        return {
            "x": self.forward(
                args["x"], args["context"], args["time_embed"], args["freqs"], options
            )
        }

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        time: Tensor,
        freqs: Tensor,
        options: dict,
    ) -> Tensor:
        """The block [B, S, C] of tokens x [B, S, C]; the other arguments as in `__call__`."""
        block = self.block
        vectors = block.visual_modulation(time).chunk(9, -1)  # [B, C] each
        shift, scale, gate, shift_cross, scale_cross, gate_cross, shift_ff, scale_ff, gate_ff = (
            vectors
        )
        begin = modulated_norm(x, scale, shift)
        if self.tiling is None:
            branch = block.self_attention(begin, freqs, transformer_options=options)
        else:
            branch = self.attend(block.self_attention, begin, self.tiling, freqs)
        x, normed = gated_add_norm(x, branch, gate, scale_cross, shift_cross)
        branch = block.cross_attention(normed, context, transformer_options=options)
        x, normed = gated_add_norm(x, branch, gate_cross, scale_ff, shift_ff)
        return gated_add_norm(x, block.feed_forward(normed), gate_ff)[0]

    @staticmethod
    def attend(
        layer: Foreign,
        x: Tensor,
        tiling: Tiling,
        freqs: Tensor,
    ) -> Tensor:
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


def _with_means(norm: Foreign) -> nabla.NormWithMeans:
    """A ComfyUI RMSNorm, computed by our operator together with the rotation and block means."""
    return lambda x, rotary, offsets: norm_rope_means(x, _weight(norm, x), rotary, offsets)


def _weight(norm: Foreign, heads: Tensor) -> Tensor:
    """The weight [D] of an RMSNorm as its own forward applies it.

    The forward may fetch, cast or patch the weight first. So it is given a constant row, which is
    normed to 1, and returns the weight. heads: [B, S, H, D], whose dtype and device count.
    """
    return norm(heads.new_full((1, heads.shape[-1]), PROBE))[0]


def _missing(network: Foreign) -> str | None:
    """The first name that this module needs and the network lacks, or None."""
    for name in ("visual_transformer_blocks", "patch_size", "model_dim"):
        if not hasattr(network, name):
            return name
    for block in network.visual_transformer_blocks:
        for name in BLOCK_PARTS:
            if not hasattr(block, name):
                return name
        for name in ATTENTION_PARTS:
            if not hasattr(block.self_attention, name):
                return name
    return None
