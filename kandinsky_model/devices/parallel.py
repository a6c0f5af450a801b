# SPDX-License-Identifier: Apache-2.0
"""One run by several processes, each with a device and all weights: they share the two passes of
guidance, then the heads of attention.

A *pass* is one evaluation of the transformer: with the prompt, or (for guidance) without. Tokens
are split among the ranks of a pass. All layers but self-attention work on every token by itself;
around self-attention tokens are traded for heads and back (DeepSpeed-Ulysses, arXiv 2309.14509).
NABLA chooses blocks for every head by itself, so the split changes none of its choices.

Shapes: B batch, S all tokens, s tokens of this rank, H heads, h = H / size heads of this rank,
D head dim, N tensors that are traded together, c channels.
"""

from __future__ import annotations

import os
import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def share(
    world: int,
    heads: int,
    guided: bool,
) -> tuple[int, int]:
    """How `world` processes share a run: (passes at a time, ranks that split the heads of a pass).

    Passes come first, because between them only velocities are exchanged. ValueError where the
    number of processes does not divide the work.
    """
    pass_counts = (2, 1) if guided else (1,)
    for passes in pass_counts:
        if world % passes == 0 and heads % (world // passes) == 0:
            return passes, world // passes
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    fitting = sorted({n * passes for n in divisors for passes in pass_counts})
    raise ValueError(
        f"{heads} heads{' and two passes of guidance' if guided else ''} can be "
        f"shared by {', '.join(map(str, fitting))} "
        f"processes, got {world}; start one of these numbers, or give every process "
        "prompts of its own with --prompts"
    )


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process's place among those that share a run.

    passes: how many passes run at a time. index: the pass of this process, 0 with the prompt, 1
    without. team: the processes that split the heads of this pass, or None where there is only one.
    rivals: the processes that do the other pass for the same tokens, or None.
    """

    passes: int
    index: int
    team: dist.ProcessGroup | None
    rivals: dist.ProcessGroup | None

    @classmethod
    def of(cls, heads: int, guided: bool) -> Ranks:
        """The place of this process when all of the default group share a run.

        Every process must call it, because making a process group is collective.
        """
        world = dist.get_world_size()
        passes, size = share(world, heads, guided)
        everyone = range(world)
        teams = [dist.new_group(list(everyone[i * size : (i + 1) * size])) for i in range(passes)]
        rivals = [dist.new_group(list(everyone[place::size])) for place in range(size)]
        index, place = divmod(dist.get_rank(), size)
        return cls(
            passes,
            index,
            team=teams[index] if size > 1 else None,
            rivals=rivals[place] if passes > 1 else None,
        )

    @property
    def size(self) -> int:
        """How many ranks are in the team."""
        return dist.get_world_size(self.team) if self.team else 1

    def spans(self, tokens: int) -> list[slice]:
        """Which of the tokens belong to each rank of the team."""
        bounds = [i * tokens // self.size for i in range(self.size + 1)]
        return [slice(start, stop) for start, stop in pairwise(bounds)]

    def own(self, x: Tensor) -> Tensor:
        """This rank's tokens [B, s, ...] of x [B, S, ...]."""
        if not self.team:
            return x
        spans = self.spans(x.shape[1])
        return x[:, spans[dist.get_rank(self.team)]]

    def to_heads(self, x: Tensor, tokens: int) -> Tensor:
        """[N, B, s, H, D], this rank's tokens with all heads -> [N, B, S, h, D], all `tokens` with
        this rank's heads."""
        N, B, s, H, D = x.shape
        h = H // self.size
        by_rank = x.unflatten(3, (self.size, h))  # [N, B, s, size, h, D]
        sent = by_rank.permute(3, 0, 1, 2, 4, 5).contiguous()  # [size, N, B, s, h, D]
        lengths = _lengths(self.spans(tokens))
        counts = [N * B * length * h * D for length in lengths]
        received = x.new_empty(sum(counts))
        dist.all_to_all_single(received, sent.view(-1), counts, group=self.team)
        parts = [
            part.view(N, B, length, h, D)
            for part, length in zip(received.split(counts), lengths, strict=True)
        ]
        return torch.cat(parts, dim=2)  # [N, B, S, h, D]

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, S, c], all tokens with this rank's heads -> [B, s, size * c], this rank's tokens with
        all heads: `to_heads` undone."""
        B, S, c = x.shape
        spans = self.spans(S)
        s = _lengths(spans)[dist.get_rank(self.team)]
        sent = torch.cat([x[:, span].reshape(-1) for span in spans])
        counts = [B * length * c for length in _lengths(spans)]
        received = x.new_empty(self.size, B, s, c)
        dist.all_to_all_single(received.view(-1), sent, None, counts, group=self.team)
        return received.permute(1, 2, 0, 3).flatten(2)  # [B, s, size * c]

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """[B, s, c] of this rank's tokens -> [B, S, c], on every rank of the team."""
        if not self.team:
            return x
        lengths = _lengths(self.spans(tokens))
        padded = x.new_zeros(x.shape[0], max(lengths), x.shape[2])  # gathering wants equal sizes
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.team)
        cut = [part[:, :length] for part, length in zip(parts, lengths, strict=True)]
        return torch.cat(cut, dim=1)  # [B, S, c]

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the team, in place."""
        if self.team:
            dist.all_reduce(x, group=self.team)
        return x

    def both(self, velocity: Tensor) -> list[Tensor]:
        """The velocities of both passes, with the prompt and without, from this rank's own."""
        velocities = [torch.empty_like(velocity) for _ in range(2)]
        dist.all_gather(velocities, velocity.contiguous(), group=self.rivals)
        return velocities


def _lengths(spans: list[slice]) -> list[int]:
    return [span.stop - span.start for span in spans]


class LostPeer(RuntimeError):
    """Another process that shared the run has ended, so this one cannot go on.

    run: what was sampled by then, a `sampling.run.Run`; None where nothing was.
    """

    run: Any = None


@contextmanager
def processes(device: str | None) -> Iterator[tuple[int, int, str | None]]:
    """(this process's rank, the number of processes, its device), with a process group while the
    body runs. One process, and no group, where `torchrun` did not start several.

    When a process ends, the others raise LostPeer, wherever they are. An exception that leaves the
    body has an attribute `is_told`: whether another process has failed with the same words, so that
    the user need not read them once for each.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield 0, 1, device
        return
    requested = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = torch.device(requested).type == "cuda"
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # torchrun itself keeps this store, so it outlives each process of the run.
    store, rank, world = next(iter(dist.rendezvous("env://")))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        with _termination_raises():
            yield rank, world, device
    except Exception as error:
        failure = _lost_peer() if _is_about_a_peer(error) else error
        failure.is_told = _is_told(store, rank, str(failure))  # type: ignore[attr-defined]
        if failure is error:
            raise
        raise failure from error
    finally:
        with suppress(Exception):  # a group whose members are gone cannot be left in order
            dist.destroy_process_group()


def _lost_peer() -> LostPeer:
    return LostPeer(
        f"process {dist.get_rank()} of {dist.get_world_size()} cannot go on, because another "
        "process of this run has ended; see what that one says, and start all of them again"
    )


@contextmanager
def needing_peers() -> Iterator[None]:
    """Raise LostPeer where a collective operation of the body fails."""
    try:
        yield
    except Exception as error:
        if _is_about_a_peer(error):
            raise _lost_peer() from error
        raise


def _is_about_a_peer(error: Exception) -> bool:
    """Whether a collective operation failed. gloo raises RuntimeError with the place in its own
    sources."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and ("gloo/" in str(error) or "NCCL" in str(error))
    )


@contextmanager
def _termination_raises() -> Iterator[None]:
    """While the body runs, SIGTERM raises LostPeer, unless others have set a handler: torchrun
    sends it to all processes when one has failed. After a failure or an interruption it is ignored,
    so that the exit status and the last words are about that; torchrun kills what does not end."""
    before = signal.getsignal(signal.SIGTERM)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminated(*_):
        raise _lost_peer()

    if before == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminated)
    afterwards: Any = signal.SIG_IGN
    try:
        yield
        afterwards = before
    finally:
        signal.signal(signal.SIGTERM, afterwards)


def _is_told(
    store: dist.Store,
    rank: int,
    text: str,
) -> bool:
    """Whether another process was the first to fail with this text."""
    key = f"kandinsky/failure/{zlib.crc32(text.encode())}"
    try:
        return store.compare_set(key, "", str(rank)) != str(rank).encode()
    except Exception:  # without the store, telling it twice is better than not at all
        return False


def from_first(make: Callable[[], bytes]) -> bytes:
    """What `make` gives in the first process, in every process. Where it fails there, the others
    raise LostPeer."""
    if dist.get_rank():
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, 0)
        if length < 0:
            raise _lost_peer()
        data = torch.empty(int(length), dtype=torch.uint8)
    else:
        try:
            data = torch.frombuffer(bytearray(make()), dtype=torch.uint8)
        except BaseException:
            dist.broadcast(torch.tensor([-1]), 0)
            raise
        dist.broadcast(torch.tensor([len(data)]), 0)
    dist.broadcast(data, 0)
    return data.numpy().tobytes()
