# SPDX-License-Identifier: Apache-2.0
"""An Apple GPU played by the CPU: torch's device "mps", as far as it can be had without one.

Inside of `played()` tensors can be made on "mps" and moved to and from it. They compute on the
CPU, but what Apple's backend lacks is refused: numbers in fp64, and operands on two devices. Our
operators run what the dispatcher has for the device. Apple's own arithmetic, its limits of memory
and operators that it lacks are not shown by this.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kandinsky_kernels import _ops

APPLE = torch.device("mps", 0)
KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.MPS)
# operators that take operands from two devices
MIXING = ("copy_", "index", "index_put_", "_index_put_impl_", "_to_copy")
# what PyTorch says where it needs Apple's backend before any operator runs
UNABLE = (
    "not linked with support for mps",
    "not supported for tensor subclasses",
    "An unexpected device type",
)


class AppleTensor(torch.Tensor):
    """A tensor that says it lies on an Apple GPU, and keeps its values in `inner` on the CPU."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        if inner.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=APPLE,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Apple().__torch_dispatch__(func, types, args, kwargs)


def is_apple(device) -> bool:
    return device is not None and torch.device(device).type == "mps"


def inner(values):
    """The same arguments with the tensors that compute for those on an Apple GPU."""
    return tree_map(lambda x: x.inner if isinstance(x, AppleTensor) else x, values)


def outer(values, known=()):
    """Results on an Apple GPU. known: its tensors, which an operator in place returns."""
    made = {id(tensor.inner): tensor for tensor in known if isinstance(tensor, AppleTensor)}

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return made[id(x)] if id(x) in made else AppleTensor(x)

    return tree_map(wrap, values)


class Apple(TorchDispatchMode):
    """Runs every operator on the CPU and puts its results where they would lie."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [isinstance(x, AppleTensor) for x in tensors]
        if func.namespace == _ops.ops.name and any(there):
            with Moves(), self:
                return func.redispatch(KEYS, *args, **kwargs)
        if any(there) and name not in MIXING:
            strangers = [x for x, apple in zip(tensors, there, strict=True) if not apple]
            if any(x.dim() for x in strangers):
                raise RuntimeError(f"{name}: tensors must be on the same device, not mps and cpu")
        asked = kwargs.get("device")
        home = is_apple(asked) if asked is not None else any(there)
        if not home:
            return func(*inner(args), **inner(kwargs))
        if kwargs.get("dtype") == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        return outer(func(*inner(args), **inner(kwargs)), tensors)


class Moves(TorchFunctionMode):
    """Moves to an Apple GPU, and all else that PyTorch refuses before any operator runs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            return move(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and is_apple(kwargs.get("device")):
            return AppleTensor(func(*args, **{**kwargs, "device": "cpu"}))
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:
            if not any(text in str(error) for text in UNABLE):
                raise
        return outer(func(*inner(args), **inner(kwargs)))


def move(x, *args, **kwargs):
    """`Tensor.to`, where the goal may be an Apple GPU."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype)
    wanted = {name: value for name, value in kwargs.items() if name != "copy"}
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **wanted)
    dtype = dtype or x.dtype
    if not is_apple(device):
        return x.to(*args, **kwargs)
    if isinstance(x, AppleTensor):
        return x if dtype == x.dtype else AppleTensor(x.inner.to(dtype))
    return AppleTensor(x.detach().to(dtype).clone())


@contextlib.contextmanager
def played() -> Iterator[None]:
    # a module's parameters are replaced as they move: a tensor of the CPU cannot turn into another
    future = torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)
    try:
        with torch.no_grad(), Moves(), Apple():
            yield
    finally:
        future.set_overwrite_module_params_on_conversion(before)
