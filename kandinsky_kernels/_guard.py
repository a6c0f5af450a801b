# SPDX-License-Identifier: Apache-2.0
"""Before a GPU kernel is first used on a card it must agree with its reference on a small case;
otherwise the fallback runs instead.

A case is tried once per process and binary: per operator, constants, dtypes and kinds of sizes.
Agreement is remembered on disk, per version of everything that could change it.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# Steps of the largest value that an agreeing kernel may be off. What is kept in fp64 was computed
# in fp32, with 2^29 times the step.
ROUNDINGS = {torch.float64: 64 << 29, torch.float32: 64, torch.float16: 4, torch.bfloat16: 4}

_log = logging.getLogger(__name__)
_verdicts: dict[tuple, str | None] = {}  # None: agrees


def signature(args: tuple) -> tuple:
    """What a decision about a call can depend on, as the key of a dictionary: all but the values
    inside of tensors."""
    return tuple(
        (arg.dtype, arg.device, arg.shape, arg.stride(), arg.data_ptr() % 16)
        if isinstance(arg, Tensor)
        else tuple(arg)
        if isinstance(arg, list)
        else arg
        for arg in args
    )


def specialisation(args: tuple) -> tuple:
    """What of a call makes Triton compile another binary: dtypes, kinds of sizes and strides (one,
    a multiple of 16, any other; 64 bits from 2^31 on), alignment, and what else is no number with a
    fraction."""

    def kind(size: int) -> str:
        if size == 1:
            return "1"
        letter = "d" if size % 16 == 0 else "n"
        return letter.upper() if size >= 1 << 31 else letter

    def of(arg):
        if isinstance(arg, Tensor):
            kinds = "".join(map(kind, (*arg.shape, *arg.stride())))
            return str(arg.dtype).removeprefix("torch."), kinds, arg.data_ptr() % 16
        if isinstance(arg, float):
            return "float"  # never specialised
        return tuple(arg) if isinstance(arg, list | tuple) else arg

    return tuple(of(arg) for arg in args)


def trusted(
    name: str,
    launch: Callable,
    reference: Callable,
    trial: Callable[..., tuple],
    args: tuple,
    constants: dict | None = None,
) -> bool:
    """Whether ``launch``, with the constants of the caller's binary, agrees with ``reference`` on
    trial(*args)."""
    x = args[0]
    constants = constants or {}
    key = (name, tuple(constants.items()), x.shape[-1], specialisation(args), x.device)
    if key not in _verdicts:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return True  # a trial cannot be captured: the warm-up before the capture has made it
        _verdicts[key] = _judge(key, launch, reference, lambda: trial(*args), constants)
    return _verdicts[key] is None


def failure(name: str) -> str | None:
    """Why ``name`` has fallen back in this process, or None."""
    return next(
        (verdict for (op, *_), verdict in _verdicts.items() if op == name and verdict), None
    )


def _judge(
    key: tuple, launch: Callable, reference: Callable, trial: Callable[[], tuple], constants: dict
) -> str | None:
    name, *kind, device = key
    try:
        known = _remembered()
        entry = f"{name} {kind} {_card(device)} {_version()}"
        if entry in known:
            return None
        case = trial()
        exact = reference(*(_double(value) for value in case))
        verdict = disagreement(launch(*case, **constants), exact)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernel
    except Exception as error:  # compilers and drivers raise all kinds
        message = (str(error).strip().splitlines() or ["no message"])[0]
        verdict = f"it failed with {type(error).__name__}: {message}"
    if verdict is None:
        _remember([*known, entry])
        return None
    verdict = f"its GPU kernel does not agree with the reference on {_card(device)} ({verdict})"
    _log.warning(
        "%s falls back to PyTorch's operators, because %s; please report this", name, verdict
    )
    return verdict


def disagreement(outputs, exact) -> str | None:
    """How ``outputs`` (a tensor or several) differ from the fp64 ``exact`` by more than `ROUNDINGS`
    allows, integers at all; or None."""
    pairs = zip(outputs, exact, strict=True) if isinstance(outputs, tuple) else [(outputs, exact)]
    for index, (actual, wanted) in enumerate(pairs):
        if actual.shape != wanted.shape:
            return f"output {index} has shape {list(actual.shape)} instead of {list(wanted.shape)}"
        if not wanted.numel():
            continue
        off = (actual.double() - wanted).abs().max().item()
        allowed = 0.0
        if actual.is_floating_point():
            step = torch.finfo(actual.dtype).eps * wanted.abs().max().item()
            allowed = ROUNDINGS[actual.dtype] * step
        if not off <= allowed:  # so that NaN disagrees
            return f"output {index} is off by {off:.3g} where {allowed:.3g} is allowed"
    return None


def _double(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _card(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"


@cache
def _version() -> str:
    """What could change a kernel's result: its source, the compiled library, torch, Triton and
    the driver's CUDA."""
    import triton

    here = Path(__file__).parent
    sources = sorted([*here.rglob("*.py"), *here.glob("*.so")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    return (
        f"{digest} torch {torch.__version__} triton {triton.__version__} cuda {torch.version.cuda}"
    )


def _file() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache_home) / "kandinsky_kernels" / "checked.json"


def _remembered() -> list[str]:
    try:
        known = json.loads(_file().read_text())
    except (OSError, ValueError):
        return []
    return known if isinstance(known, list) else []


def _remember(entries: list[str]) -> None:
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        fresh = _file().with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(entries))
        fresh.replace(_file())
    except OSError as error:  # a home that cannot be written costs a few milliseconds per process
        _log.info("cannot remember checked kernels: %s", error)
