# SPDX-License-Identifier: Apache-2.0
"""What operators require of their arguments: nothing else may reach memory, crash or run for ever.

A function here bears the name of an operator and takes its arguments. It raises one sentence, a
ValueError for shapes and values and a TypeError for dtypes, which is the compiled kernel's sentence
too where there is such a kernel. It is called once per call of the operator, by whatever runs: a
reference, a fake kernel or a launcher on a GPU; the C++ kernels have the same checks in C++. So
public functions check only what their operator is not given.

Shapes, dtypes and devices are known without waiting for a GPU. Values are read by references alone
(``values=True``), and only where there are any: not of fake tensors, nor while a graph is traced.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MOST_TOKENS = 64  # the longest block that attention takes
MOST_AXES = 3  # of a grid of tokens that the rotary kernels take
LARGEST = torch.finfo(torch.float32).max  # kernels compute in fp32


def spelled(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def one_place(optional: dict[str, Tensor | None] | None = None, **tensors: Tensor) -> None:
    """All tensors are there, dense and on one device, because kernels take their addresses.

    Those in ``optional`` may be None.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):  # PyTorch lets None pass for a tensor
            raise TypeError(f"{name} must be a tensor, got {tensor!r}.")
    given = dict(tensors)
    for name, x in (optional or {}).items():
        if x is not None:
            given[name] = x
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
    """The tensor has exactly this shape."""
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name} must have shape {list(wanted)}, got {list(tensor.shape)}.")


def dimensions(name: str, tensor: Tensor, letters: str) -> None:
    """The tensor has as many dimensions as ``letters`` names, as in "B, S, C"."""
    if tensor.dim() != len(letters.split(", ")):
        raise ValueError(f"{name} must have shape [{letters}], got {list(tensor.shape)}.")


def floats(name: str, tensor: Tensor) -> None:
    """The tensor has a float dtype that references compute with."""
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {spelled(tensor.dtype)}; "
            "cast it first."
        )


def dtype(name: str, tensor: Tensor, wanted: torch.dtype) -> None:
    """The tensor has exactly this dtype."""
    if tensor.dtype != wanted:
        raise TypeError(
            f"{name} must be {spelled(wanted)}, got {spelled(tensor.dtype)}; cast it first."
        )


def rows(**tensors: Tensor | None) -> None:
    """The last dimension is contiguous, because kernels read whole rows; other strides are free."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension; call .contiguous() first."
            )


def whole(name: str, tensor: Tensor) -> None:
    """The tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous; call .contiguous() first.")


def known(tensor: Tensor) -> bool:
    """Whether the tensor has values that can be read now."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or is_fake(tensor))


def offsets(block_offsets: Tensor, tokens: int, most: int | None, values: bool) -> None:
    """block_offsets is int32 [N + 1] and ascends from 0 to the number of tokens.

    ``most``, where given, is the largest number of tokens in a block.
    """
    if block_offsets.dim() != 1 or not block_offsets.shape[0]:
        raise ValueError(f"block_offsets must have shape [N + 1], got {list(block_offsets.shape)}.")
    dtype("block_offsets", block_offsets, torch.int32)
    whole("block_offsets", block_offsets)
    if not values or not known(block_offsets):
        return
    wide = block_offsets.long()  # the difference of two int32 numbers can overflow
    lengths = wide.diff()
    fit = (lengths > 0).all()
    fit = fit & (wide[0] == 0) & (wide[-1] == tokens)
    if most is not None:
        fit = fit & (lengths <= most).all()
    if fit:
        return
    rule = f"the number of tokens {tokens} without empty blocks"
    if most is not None:
        rule = f"S = {tokens} in blocks of 1 to {most} tokens"
    raise ValueError(f"block_offsets must ascend from 0 to {rule}.")


# ---- numbers that are no tensors


def epsilon(eps: float) -> None:
    """What a norm adds to a variance is not negative, and finite in fp32."""
    if not 0.0 <= eps <= LARGEST:
        raise ValueError(f"eps must be from 0 on and finite in float32, got {eps}; 1e-6 is usual.")


def logit_scale(scale: float) -> None:
    """The factor of logits is finite in fp32."""
    if not -LARGEST <= scale <= LARGEST:
        raise ValueError(
            f"scale must be finite in float32, got {scale}; leave it out for 1 / sqrt(D)."
        )


def logit_bound(bound: float) -> None:
    """A bound on magnitudes is not negative, and not NaN; infinity where none is known."""
    if not bound >= 0.0:
        raise ValueError(
            f"logit_bound must be a number from 0 on, got {bound}; leave it out when none is known."
        )


# ---- norms


def _row_norm(x: Tensor, name: str, *vectors: tuple[str, Tensor | None]) -> None:
    """x is [B, S, C], and every vector [B, C]."""
    dimensions(name, x, "B, S, C")
    floats(name, x)
    rows(**{name: x})
    for label, vector in vectors:
        if vector is not None:
            shape(label, vector, x.shape[0], x.shape[2])
            floats(label, vector)
            rows(**{label: vector})


def _like(name: str, tensor: Tensor, of: str, x: Tensor) -> None:
    """The tensor has the shape and dtype of x, which the caller knows by the name ``of``."""
    shape(name, tensor, *x.shape)
    if tensor.dtype != x.dtype:
        raise TypeError(
            f"{name} must have the dtype of {of} {spelled(x.dtype)}, got "
            f"{spelled(tensor.dtype)}; cast one of them."
        )
    rows(**{name: tensor})


def modulated_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, *, values: bool = False
) -> None:
    one_place(x=x, scale=scale, shift=shift)
    _row_norm(x, "x", ("scale", scale), ("shift", shift))
    epsilon(eps)


def gated_add_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    *,
    values: bool = False,
) -> None:
    one_place({"scale": scale, "shift": shift}, x=x, branch=branch, gate=gate)
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift must be given together, got only one of them.")
    _row_norm(x, "x", ("gate", gate), ("scale", scale), ("shift", shift))
    _like("branch", branch, "x", x)
    epsilon(eps)


def modulated_norm_backward(
    x: Tensor, scale: Tensor, grad: Tensor, eps: float, *, values: bool = False
) -> None:
    one_place(x=x, scale=scale, grad=grad)
    _row_norm(x, "x", ("scale", scale))
    _like("grad", grad, "x", x)
    epsilon(eps)


def gated_add_norm_backward(
    y: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    grad_y: Tensor | None,
    grad_normed: Tensor,
    eps: float,
    *,
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
    epsilon(eps)


def _heads(x: Tensor, weight: Tensor) -> None:
    """x is [B, S, H, D] with an even D, and weight [D]."""
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
    """The tables of `kandinsky_kernels.Rotary` are given, all of them or none."""
    absent = [table is None for table in (cos, sin, positions)]
    if any(absent) and not all(absent):
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
    if not values or not known(positions):
        return
    inside = (positions >= 0) & (positions < P)
    if not inside.all():
        raise ValueError(f"positions must lie in the tables' rows 0 to {P - 1}.")


def axes(pairs: tuple[int, ...]) -> None:
    """A Rotary has as many axes as the rotary kernels take."""
    if not 1 <= len(pairs) <= MOST_AXES:
        raise ValueError(
            f"pairs must be 1 to {MOST_AXES} numbers, one for each axis, got {list(pairs)}."
        )


def norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    block_offsets: Tensor | None,
    eps: float,
    *,
    values: bool = False,
) -> None:
    tables = {"cos": cos, "sin": sin, "positions": positions, "block_offsets": block_offsets}
    one_place(tables, x=x, weight=weight)
    _heads(x, weight)
    _angles(x, cos, sin, positions, pairs, values)
    if block_offsets is not None:
        offsets(block_offsets, x.shape[1], None, values)
    epsilon(eps)


def norm_rope_backward(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    pairs: list[int],
    grad: Tensor,
    eps: float,
    *,
    values: bool = False,
) -> None:
    tables = {"cos": cos, "sin": sin, "positions": positions}
    one_place(tables, x=x, weight=weight, grad=grad)
    _heads(x, weight)
    _angles(x, cos, sin, positions, pairs, values)
    _like("grad", grad, "x", x)
    epsilon(eps)


def block_means(x: Tensor, block_offsets: Tensor, *, values: bool = False) -> None:
    one_place(x=x, block_offsets=block_offsets)
    dimensions("x", x, "B, S, H, D")
    floats("x", x)
    offsets(block_offsets, x.shape[1], None, values)


# ---- attention over blocks


def words(blocks: int) -> int:
    """Words of 32 bits that hold a bit for each block."""
    return (blocks + 31) // 32


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


def tiles_and_window(tiles: Sequence[int] | None, window: Sequence[int] | None) -> None:
    """Both are given or neither, and they are whole numbers."""
    if (tiles is None) != (window is None):
        raise ValueError("tiles and window must be given together, got only one of them.")
    for name, numbers in (("tiles", tiles), ("window", window)):
        for number in numbers or ():
            if not isinstance(number, int | torch.SymInt):
                kind = type(number).__name__
                raise TypeError(f"{name} must be whole numbers, got {kind} {number!r}; cast it.")


def _tiles(tiles: list[int], window: list[int], N: int) -> None:
    """The grid has N blocks."""
    fit = len(tiles) == len(window) == 3
    fit = fit and min(*tiles, *window) >= 1
    if not fit or math.prod(tiles) != N:
        raise ValueError(
            f"tiles must be three numbers from 1 on with product N = {N} and window three widths "
            f"from 1 on, got {list(tiles)} and {list(window)}."
        )


def _attention(selection: Tensor, block_offsets: Tensor, values: bool, **alike: Tensor) -> None:
    """The first tensor of ``alike`` is [B, S, H, D], and the others are like it."""
    (name, query), *rest = alike.items()
    dimensions(name, query, "B, S, H, D")
    floats(name, query)
    B, S, H = query.shape[:3]
    offsets(block_offsets, S, MOST_TOKENS, values)
    for other, tensor in rest:
        shape(other, tensor, *query.shape)
        dtype(other, tensor, query.dtype)
    N = block_offsets.shape[0] - 1
    shape("selection", selection, B, H, N, words(N))
    dtype("selection", selection, torch.int32)


def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selection: Tensor,
    block_offsets: Tensor,
    scale: float,
    bound: float = math.inf,
    *,
    values: bool = False,
) -> None:
    one_place(query=query, key=key, value=value, selection=selection, block_offsets=block_offsets)
    _attention(selection, block_offsets, values, query=query, key=key, value=value)
    rows(query=query, key=key, value=value)
    logit_scale(scale)
    logit_bound(bound)


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
    scale: float,
    *,
    values: bool = False,
) -> None:
    alike = {"query": query, "key": key, "value": value, "out": out, "grad_out": grad_out}
    one_place(
        {"grad_lse": grad_lse}, **alike, lse=lse, selection=selection, block_offsets=block_offsets
    )
    _attention(selection, block_offsets, values, **alike)
    B, S, H = query.shape[:3]
    for name, tensor in (("lse", lse), ("grad_lse", grad_lse)):
        if tensor is not None:
            shape(name, tensor, B, H, S)
            dtype(name, tensor, torch.promote_types(query.dtype, torch.float32))
    rows(query=query, key=key, value=value)
    logit_scale(scale)


# ---- video VAE


def group_moments(x: Tensor, groups: int, *, values: bool = False) -> None:
    one_place(x=x)
    dimensions("x", x, "B, T, Y, X, C")
    floats("x", x)
    rows(x=x)
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"groups must divide the {x.shape[-1]} channels of x, got {groups}.")


def group_affine(moments: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    if moments.dim() != 4 or moments.shape[-1] != 2 or not moments.shape[1]:
        raise ValueError(
            "moments must have shape [B, T, G, 2] with a frame at least, got "
            f"{list(moments.shape)}; make them with group_moments."
        )
    if isinstance(weight, Tensor) and weight.device.type == "mps" and isinstance(moments, Tensor):
        one_place(weight=weight, bias=bias)  # moments, which are in fp64, lie on the CPU
    else:
        one_place(moments=moments, weight=weight, bias=bias)
    for name, tensor in (("moments", moments), ("weight", weight), ("bias", bias)):
        floats(name, tensor)
    G = moments.shape[2]
    if not G or weight.dim() != 1 or weight.shape != bias.shape or weight.shape[0] % G:
        raise ValueError(
            f"weight and bias must share one shape [C] with C a multiple of {G} groups, got "
            f"{list(weight.shape)} and {list(bias.shape)}."
        )
    epsilon(eps)


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
        raise ValueError(f"x must have a pixel to repeat, got {list(x.shape)}; give pad=False.")
    if front is not None:
        if not pad:
            raise ValueError("front must come with pad.")
        shape("front", front, B, 2, Y + 2, X + 2, C)
        dtype("front", front, x.dtype)
        rows(front=front)


def frame_causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first_frame: int,
    scale: float,
    *,
    values: bool = False,
) -> None:
    one_place(query=query, key=key, value=value)
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query and key must have shape [B, T, P, D], got {list(query.shape)} and "
            f"{list(key.shape)}."
        )
    B, T = query.shape[:2]
    D = query.shape[-1]
    frames, keys = key.shape[1:3]
    shape("key", key, B, frames, keys, D)
    shape("value", value, B, frames, keys, D)
    if not keys:
        raise ValueError(f"key must have a token in every frame, got {list(key.shape)}.")
    if first_frame < 0 or frames < first_frame + T:
        raise ValueError(
            "key must have the frames of query and first_frame >= 0 earlier ones, got "
            f"{frames} frames for {T} and {first_frame}."
        )
    floats("query", query)
    dtype("key", key, query.dtype)
    dtype("value", value, query.dtype)
    rows(query=query, key=key, value=value)
    logit_scale(scale)


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
    C = x_padded.shape[-1]
    sizes = x_padded.shape[1:4]
    fits = weight.dim() == 5 and weight.shape[1] == C
    fits = fits and all(1 <= k <= n for n, k in zip(sizes, weight.shape[2:], strict=True))
    if not fits:
        raise ValueError(
            f"weight must have shape [C', C, kT, kY, kX] with C = {C} and fit into x_padded, got "
            f"{list(weight.shape)} for {list(x_padded.shape)}."
        )
    if len(stride) != 3 or min(stride) < 1:
        raise ValueError(f"stride must be three numbers from 1 on, got {stride}.")
    floats("weight", weight)
    if bias is not None:
        shape("bias", bias, weight.shape[0])
        floats("bias", bias)
