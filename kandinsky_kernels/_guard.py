# SPDX-License-Identifier: Apache-2.0
"""Before a GPU kernel is first used on a card it must agree with its reference on a small case, or
the reference runs instead.

Once per process, operator, dtype and width; agreement is remembered on disk per version of
everything that could change it.
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


def trusted(
    name: str,
    launch: Callable,
    reference: Callable,
    trial: Callable[..., tuple],
    args: tuple,
    kind: tuple = (),
) -> bool:
    """Whether ``launch`` agrees with ``reference`` on trial(*args); decided once per op, kind,
    dtype, last dimension and device."""
    x = args[0]
    key = (name, kind, x.dtype, x.shape[-1], x.device)
    if key not in _verdicts:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return True  # a trial cannot be captured: the warm-up before the capture has made it
        _verdicts[key] = _judge(name, launch, reference, trial(*args), kind)
    return _verdicts[key] is None


def failure(name: str) -> str | None:
    """Why ``name`` has fallen back to its reference in this process, or None."""
    return next(
        (verdict for (op, *_), verdict in _verdicts.items() if op == name and verdict), None
    )


def _judge(
    name: str, launch: Callable, reference: Callable, case: tuple, kind: tuple
) -> str | None:
    x = case[0]
    known, entry = (
        _remembered(),
        (f"{name} {kind} {x.dtype} {x.shape[-1]} {_card(x.device)} {_version()}"),
    )
    if entry in known:
        return None
    try:
        verdict = disagreement(launch(*case), reference(*(_double(value) for value in case)))
    except Exception as error:  # compilers and drivers raise all kinds
        verdict = (
            f"it failed with {type(error).__name__}: "
            f"{(str(error).strip().splitlines() or ['no message'])[0]}"
        )
    if verdict is None:
        _remember([*known, entry])
        return None
    verdict = f"its GPU kernel does not agree with the reference on {_card(x.device)} ({verdict})"
    _log.warning("%s runs its reference, because %s; please report this", name, verdict)
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
            allowed = (
                ROUNDINGS[actual.dtype] * torch.finfo(actual.dtype).eps * wanted.abs().max().item()
            )
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
    """What could change a kernel's result: its source, the compiled extension, torch, Triton and
    the driver's CUDA."""
    import triton

    here = Path(__file__).parent
    sources = sorted([*here.rglob("*.py"), *here.glob("_C.*")])
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
