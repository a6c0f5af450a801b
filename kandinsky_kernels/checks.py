# SPDX-License-Identifier: Apache-2.0
"""What operators refuse: arguments that would corrupt memory, crash or never end.

Each function takes the arguments of the operator of its name and raises one sentence, the same as
the compiled kernel's where that has one: a ValueError for shapes and values, a TypeError for
dtypes. References, fake kernels and GPU launchers call it. Sizes, dtypes and devices are known
without waiting for a GPU; values are looked at only by references (`values=True`), and only where
there are any.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_TOKENS = 64  # of a block that attention takes


def spelled(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def one_place(optional: dict[str, Tensor | None] | None = None, **tensors: Tensor) -> None:
    """All tensors must be there (but for `optional` ones), dense and on one device: kernels take
    their addresses."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # PyTorch lets None pass for a tensor
            raise TypeError(f"{name} must be a tensor, got {tensor!r}.")
    given = dict(tensors)
    given.update((name, x) for name, x in (optional or {}).items() if x is not None)
    (first, x), *rest = given.items()
    for name, tensor in rest:
        if tensor.device != x.device:
            raise ValueError(
                f"{', '.join(given)} must be on one device, got {first} on {x.device} and {name} "
                f"on {tensor.device}; move one of them."
            )
    for name, tensor in given.items():
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else spelled(tensor.layout)
            raise ValueError(f"{name} must be a dense tensor, got a {kind} one; call .to_dense().")


def shape(name: str, tensor: Tensor, *wanted: int) -> None:
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} must have shape {list(wanted)}, got {list(tensor.shape)}.")


def dimensions(name: str, tensor: Tensor, letters: str) -> None:
    """`letters` names the dimensions, as in "B, S, C"."""
    if tensor.dim() != len(letters.split(", ")):
        raise ValueError(f"{name} must have shape [{letters}], got {list(tensor.shape)}.")


def floats(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {spelled(tensor.dtype)}; "
            "cast it first."
        )


def dtype(name: str, tensor: Tensor, wanted: torch.dtype) -> None:
    if tensor.dtype != wanted:
        raise TypeError(
            f"{name} must be {spelled(wanted)}, got {spelled(tensor.dtype)}; cast it first."
        )


def rows(**tensors: Tensor | None) -> None:
    """The kernels read whole rows: the last dimension must be contiguous, other strides are
    free."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension; call .contiguous() first."
            )


def whole(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; call .contiguous() first.")


def _known(tensor: Tensor) -> bool:
    """Whether there are values to look at: not while a graph is traced, nor of fake tensors."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or is_fake(tensor))


def offsets(block_offsets: Tensor, tokens: int, most: int | None, values: bool) -> None:
    """block_offsets must be int32 [N + 1]; their values ascend from 0 to the number of tokens, in
    blocks of at most `most` tokens where that is given."""
    if block_offsets.dim() != 1 or not block_offsets.shape[0]:
        raise ValueError(f"block_offsets must have shape [N + 1], got {list(block_offsets.shape)}.")
    dtype("block_offsets", block_offsets, torch.int32)
    whole("block_offsets", block_offsets)
    if not values or not _known(block_offsets):
        return
    wide = block_offsets.long()  # the difference of two int32 numbers may not be one
    lengths = wide.diff()
    fit = (wide[0] == 0) & (wide[-1] == tokens) & (lengths > 0).all()
    if most is not None:
        fit = fit & (lengths <= most).all()
    if not fit:
        rule = "the number of tokens {} without empty blocks."
        rule = rule if most is None else f"S = {{}} in blocks of 1 to {most} tokens."
        raise ValueError(f"block_offsets must ascend from 0 to {rule.format(tokens)}")


# ---- norms


def _row_norm(x: Tensor, name: str, *vectors: tuple[str, Tensor | None]) -> None:
    """x must be [B, S, C], and every vector [B, C]."""
    dimensions(name, x, "B, S, C")
    floats(name, x)
    rows(**{name: x})
    for label, vector in vectors:
        if vector is not None:
            shape(label, vector, x.shape[0], x.shape[2])
            floats(label, vector)
            rows(**{label: vector})


def _like(name: str, tensor: Tensor, of: str, x: Tensor) -> None:
    shape(name, tensor, *x.shape)
    if tensor.dtype != x.dtype:
        raise TypeError(
            f"{name} must have the dtype of {of} {spelled(x.dtype)}, got "
            f"{spelled(tensor.dtype)}; cast one of them."
        )
    rows(**{name: tensor})


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, *_, values: bool = False) -> None:
    one_place(x=x, scale=scale, shift=shift)
    _row_norm(x, "x", ("scale", scale), ("shift", shift))


def gated_add_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    *_,
    values: bool = False,
) -> None:
    one_place({"scale": scale, "shift": shift}, x=x, branch=branch, gate=gate)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, got only one of them.")
    _row_norm(x, "x", ("gate", gate), ("scale", scale), ("shift", shift))
    _like("branch", branch, "x", x)


def modulated_norm_backward(
    x: Tensor, scale: Tensor, grad: Tensor, *_, values: bool = False
) -> None:
    one_place(x=x, scale=scale, grad=grad)
    _row_norm(x, "x", ("scale", scale))
    _like("grad", grad, "x", x)


def gated_add_norm_backward(
    y: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    grad_y: Tensor | None,
    grad_normed: Tensor,
    *_,
    values: bool = False,
) -> None:
    one_place(
        {"grad_y": grad_y}, y=y, branch=branch, gate=gate, scale=scale, grad_normed=grad_normed
    )
    _row_norm(y, "y", ("gate", gate), ("scale", scale))
    _like("branch", branch, "y", y)
    _like("grad_normed", grad_normed, "y", y)
    if grad_y is not None:
        _like("grad_y", grad_y, "y", y)


def _heads(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must have shape [B, S, H, D] with even D, got {list(x.shape)}.")
    floats("x", x)
    rows(x=x)
    shape("weight", weight, x.shape[-1])
    floats("weight", weight)
    rows(weight=weight)


def _angles(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    values: bool,
) -> None:
    """The tables of `kandinsky_kernels.Rotary`: all of them, or none."""
    if len({table is None for table in (cos, sin, positions)}) > 1:
        raise ValueError("cos, sin and positions must be given together, got only some of them.")
    if cos is None or sin is None or positions is None:
        return
    half = x.shape[-1] // 2
    P = cos.shape[0] if cos.dim() else 0
    for name, table in (("cos", cos), ("sin", sin)):
        shape(name, table, P, half)
        if table.dtype != torch.float64 or x.dtype != torch.float64:
            dtype(name, table, torch.float32)
        rows(**{name: table})
    if any(count < 0 for count in pairs) or sum(pairs) != half:
        raise ValueError(
            f"pairs must be numbers from 0 on with sum D / 2 = {half}, got {list(pairs)}."
        )
    shape("positions", positions, x.shape[1], len(pairs))
    dtype("positions", positions, torch.int32)
    whole("positions", positions)
    if values and _known(positions) and not ((positions >= 0) & (positions < P)).all():
        raise ValueError(f"positions must lie in the tables' rows 0 to {P - 1}.")


def norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    block_offsets: Tensor | None,
    *_,
    values: bool = False,
) -> None:
    tables = {"cos": cos, "sin": sin, "positions": positions, "block_offsets": block_offsets}
    one_place(tables, x=x, weight=weight)
    _heads(x, weight)
    _angles(x, cos, sin, positions, pairs, values)
    if block_offsets is not None:
        offsets(block_offsets, x.shape[1], None, values)


def norm_rope_backward(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    grad: Tensor,
    *_,
    values: bool = False,
) -> None:
    one_place({"cos": cos, "sin": sin, "positions": positions}, x=x, weight=weight, grad=grad)
    _heads(x, weight)
    _angles(x, cos, sin, positions, pairs, values)
    _like("grad", grad, "x", x)


def block_means(x: Tensor, block_offsets: Tensor, *, values: bool = False) -> None:
    one_place(x=x, block_offsets=block_offsets)
    dimensions("x", x, "B, S, H, D")
    floats("x", x)
    offsets(block_offsets, x.shape[1], None, values)


# ---- attention over blocks


def select_blocks(
    query_means: Tensor,
    key_means: Tensor,
    keep_mass: float,
    tiles: list[int],
    window: list[int],
    ties: str,
    *,
    values: bool = False,
) -> None:
    one_place(query_means=query_means, key_means=key_means)
    dimensions("query_means", query_means, "B, H, N, D")
    floats("query_means", query_means)
    shape("key_means", key_means, *query_means.shape)
    dtype("key_means", key_means, query_means.dtype)
    rows(query_means=query_means, key_means=key_means)
    if not 0.0 < keep_mass <= 1.0:
        raise ValueError(f"keep_mass must be in (0, 1], got {keep_mass}.")
    if ties not in ("all", "stable"):
        raise ValueError(f'ties must be "all" or "stable", got "{ties}".')
    if len(tiles) or len(window):
        _tiles(tiles, window, query_means.shape[2])


def _tiles(tiles: list[int], window: list[int], N: int) -> None:
    fit = len(tiles) == len(window) == 3 and min(*tiles, *window) >= 1
    if not fit or tiles[0] * tiles[1] * tiles[2] != N:
        raise ValueError(
            f"tiles must be three numbers from 1 on with product N = {N} and window three widths "
            f"from 1 on, got {list(tiles)} and {list(window)}."
        )


def _attention(selection: Tensor, block_offsets: Tensor, values: bool, **alike: Tensor) -> None:
    """The first of `alike` must be [B, S, H, D]; the others like it."""
    (name, query), *rest = alike.items()
    dimensions(name, query, "B, S, H, D")
    floats(name, query)
    B, S, H, _ = query.shape
    offsets(block_offsets, S, MOST_TOKENS, values)
    for other, tensor in rest:
        shape(other, tensor, *query.shape)
        dtype(other, tensor, query.dtype)
    N = block_offsets.shape[0] - 1
    shape("selection", selection, B, H, N, (N + 31) // 32)
    dtype("selection", selection, torch.int32)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    *_,
    values: bool = False,
) -> None:
    one_place(query=query, key=key, value=value, selection=selection, block_offsets=block_offsets)
    _attention(selection, block_offsets, values, query=query, key=key, value=value)
    rows(query=query, key=key, value=value)


def block_sparse_attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    *_,
    values: bool = False,
) -> None:
    alike = {"query": query, "key": key, "value": value, "out": out, "grad_out": grad_out}
    one_place(
        {"grad_lse": grad_lse}, **alike, lse=lse, selection=selection, block_offsets=block_offsets
    )
    _attention(selection, block_offsets, values, **alike)
    B, S, H, _ = query.shape
    for name, tensor in (("lse", lse), ("grad_lse", grad_lse)):
        if tensor is not None:
            shape(name, tensor, B, H, S)
            dtype(name, tensor, torch.promote_types(query.dtype, torch.float32))
    rows(query=query, key=key, value=value)


# ---- packed selections


def unpack_selection(selection: Tensor, blocks: int) -> None:
    """The words must be as many as `blocks` bits need."""
    fit = selection.dim() > 0 and blocks >= 0 and selection.shape[-1] == (blocks + 31) // 32
    if not fit:
        raise ValueError(
            f"selection must have ceil(N / 32) words for N = {blocks} blocks in its last "
            f"dimension, got {list(selection.shape)}."
        )
    dtype("selection", selection, torch.int32)


def pack_selection(keep: Tensor) -> None:
    if not keep.dim():
        raise ValueError("keep must have shape [..., N], got []; add the missing dimension.")
    if keep.dtype != torch.bool:
        raise TypeError(
            f"keep must be bool, got {spelled(keep.dtype)}; compare it with something first."
        )


# ---- video VAE


def group_moments(x: Tensor, groups: int, *, values: bool = False) -> None:
    one_place(x=x)
    dimensions("x", x, "B, T, Y, X, C")
    floats("x", x)
    rows(x=x)
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups must divide the {x.shape[-1]} channels of x, got {groups}.")


def group_norm_silu(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    front: Tensor | None,
    pad: bool,
    *_,
    values: bool = False,
) -> None:
    one_place({"front": front}, x=x, scale=scale, shift=shift)
    dimensions("x", x, "B, T, Y, X, C")
    floats("x", x)
    rows(x=x)
    B, T, Y, X, C = x.shape
    for name, vector in (("scale", scale), ("shift", shift)):
        shape(name, vector, B, C)
        floats(name, vector)
        rows(**{name: vector})
    if pad and not (Y > 0 and X > 0 and (front is not None or T > 0)):
        raise ValueError(f"x must have a pixel to repeat, got {list(x.shape)}.")
    if front is not None:
        if not pad:
            raise ValueError("front must come with pad.")
        shape("front", front, B, 2, Y + 2, X + 2, C)
        dtype("front", front, x.dtype)
        rows(front=front)


def frame_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, first_frame: int, *_, values: bool = False
) -> None:
    one_place(query=query, key=key, value=value)
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query and key must have shape [B, T, P, D], got {list(query.shape)} and "
            f"{list(key.shape)}."
        )
    B, T, _, D = query.shape
    frames, keys = key.shape[1:3]
    shape("key", key, B, frames, keys, D)
    shape("value", value, B, frames, keys, D)
    if not keys > 0 or first_frame < 0 or frames < first_frame + T:
        raise ValueError(
            "key must have the frames of query and first_frame >= 0 earlier ones, got "
            f"{frames} frames for {T} and {first_frame}."
        )
    floats("query", query)
    dtype("key", key, query.dtype)
    dtype("value", value, query.dtype)
    rows(query=query, key=key, value=value)


def causal_conv3d(
    x_padded: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    *,
    values: bool = False,
) -> None:
    one_place({"bias": bias}, x_padded=x_padded, weight=weight)
    dimensions("x_padded", x_padded, "B, T, Y, X, C")
    floats("x_padded", x_padded)
    rows(x_padded=x_padded)
    taps, sizes = weight.shape[2:], x_padded.shape[1:4]
    if (
        weight.dim() != 5
        or weight.shape[1] != x_padded.shape[-1]
        or not all(1 <= k <= n for n, k in zip(sizes, taps, strict=True))
    ):
        raise ValueError(
            "weight must have shape [C', C, kT, kY, kX] with C = "
            f"{x_padded.shape[-1]} and fit into x_padded, "
            f"got {list(weight.shape)} for {list(x_padded.shape)}."
        )
    if len(stride) != 3 or min(stride) < 1:
        raise ValueError(f"stride must be three numbers from 1 on, got {stride}.")
    floats("weight", weight)
    if bias is not None:
        shape("bias", bias, weight.shape[0])
        floats("bias", bias)
