# SPDX-License-Identifier: Apache-2.0
"""What both stages of the tiny model's training share: the optimiser, the learning rate over time,
the moving average of the weights, and the choice of a dtype."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import platform
import time
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..devices.available import cpu_name
from ..training.state import average_into

logger = logging.getLogger(__name__)


class Optimizer:
    """Orthogonalised momentum (Muon) for the matrices of a module, AdamW for everything else.

    On flat pictures neighbouring inputs are equal, so elementwise steps of all weights add up in a
    few directions and blow up; an orthogonal step moves every direction alike. It is scaled to the
    root mean square of an AdamW step, so one learning rate serves both; `boost` lengthens it for
    the matrices alone. Convolution kernels count as matrices [out, in * taps]. Embeddings are
    tables, not matrices.
    """

    def __init__(self, module, momentum=0.95, decay=0.01, boost=1.0):
        tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.matrices = [p for p in self.parameters if p.ndim >= 2 and id(p) not in tables]
        known = {id(p) for p in self.matrices}
        others = [p for p in self.parameters if id(p) not in known]
        self.boost = boost
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
        # Muon takes [R, C] only, so it is given views of the same memory
        self.views = [p.detach().view(len(p), -1) for p in self.matrices]
        self.muon = torch.optim.Muon(
            self.views,
            momentum=momentum,
            weight_decay=decay / boost,  # which Muon multiplies with the lengthened rate
            adjust_lr_fn="match_rms_adamw",
        )

    def step(self, loss, rate, clip=1.0):
        """One step down `loss` with learning rate `rate`; gradients are clipped to norm `clip`
        together."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, clip)
        for parameter, view in zip(self.matrices, self.views, strict=True):
            view.grad = None if parameter.grad is None else parameter.grad.flatten(1)
        for optimizer, own_rate in ((self.adam, rate), (self.muon, rate * self.boost)):
            for group in optimizer.param_groups:
                group["lr"] = own_rate
            optimizer.step()


class Clock:
    """The progress of a stage, its learning rate, and its log of losses.

    minutes: a limit of time; the progress is that of the steps or of the time, whichever is
    further.
    """

    def __init__(self, steps: int, minutes: float | None = None):
        self.steps = steps
        self.minutes = minutes
        self.started = time.time()
        self.losses: list[dict] = []

    @property
    def seconds(self) -> float:
        return time.time() - self.started

    def progress(self, step: int) -> float:
        """In 0..1."""
        used = self.seconds / 60 / self.minutes if self.minutes else 0.0
        return min(1.0, max(step / self.steps, used))

    def rate(self, step: int, peak: float, warmup: int = 50) -> float:
        """The learning rate: a linear warm-up, then a cosine to zero."""
        warm = min(1.0, (step + 1) / warmup)
        decayed = 0.5 * (1 + math.cos(math.pi * self.progress(step)))
        return peak * warm * decayed

    def record(self, step: int, **losses: float) -> None:
        """Put an entry into the log of losses."""
        entry = {
            "step": step,
            "seconds": round(self.seconds, 1),
            **{name: round(value, 5) for name, value in losses.items()},
        }
        self.losses.append(entry)
        logger.info("%s", "  ".join(f"{name} {value:g}" for name, value in entry.items()))


class Average:
    """The exponential moving average of a module's parameters, kept in a copy of it, `module`."""

    def __init__(self, module: nn.Module, decay: float):
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay

    def update(self, module: nn.Module, step: int) -> None:
        """Move the average towards the parameters after step number `step`, counted from 0."""
        pairs = zip(self.module.parameters(), module.parameters(), strict=True)
        for average, current in pairs:
            average_into(average, current, self.decay, step)


@contextlib.contextmanager
def short_attention(device: torch.device | str) -> Iterator[None]:
    """While the body runs, dense attention on the CPU is two matrix products: the backward pass of
    PyTorch's fused kernel is slow over a few hundred tokens."""
    if torch.device(device).type != "cpu":
        yield
        return
    # despite its name this setting governs products on the CPU too
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def training_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bf16 on a GPU, and where this CPU multiplies bf16 matrices faster than fp32 ones, which those
    with AVX512-BF16 or AMX do. It is measured, not looked up."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    seconds: dict[torch.dtype, float] = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(2048, 256).to(dtype)
        b = torch.randn(256, 1024).to(dtype)
        best = math.inf
        for _ in range(6):
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
        seconds[dtype] = best
    return min(seconds, key=seconds.__getitem__)


def machine() -> dict:
    """A description of this machine for the log of a training."""
    return {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "arithmetic": str(training_dtype()).removeprefix("torch."),
    }
