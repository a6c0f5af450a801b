# SPDX-License-Identifier: Apache-2.0
"""One run by several processes, each with a device and all weights: they share the two passes of
guidance, then the heads of attention.

Tokens are split among the ranks of a pass. All layers but self-attention do every token by itself;
around self-attention tokens are traded for heads and back (DeepSpeed-Ulysses, arXiv 2309.14509).
NABLA chooses blocks for every head by itself, so it splits exactly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def share(world: int, heads: int, guided: bool) -> tuple[int, int]:
    """How `world` processes share a run: (ranks with a pass each, ranks that split its heads).
    ValueError where they cannot.

    Passes come first, because between them only velocities are exchanged.
    """
    for passes in (2, 1) if guided else (1,):
        if world % passes == 0 and heads % (world // passes) == 0:
            return passes, world // passes
    fitting = sorted(
        {
            n * passes
            for n in range(1, heads + 1)
            if heads % n == 0
            for passes in ((1, 2) if guided else (1,))
        }
    )
    raise ValueError(
        f"{heads} heads{' and two passes of guidance' if guided else ''} can be "
        f"shared by {', '.join(map(str, fitting))} "
        f"processes, got {world}; start one of these numbers, or give every process "
        "prompts of its own with --prompts"
    )


@dataclass(frozen=True, eq=False)
class Ranks:
    """This process's place among those that share a run. team: those that split the heads of its
    pass; rivals: those that do the other pass for the same tokens. A group of one is None."""

    passes: int
    index: int  # which pass: 0 with the prompt, 1 without
    team: dist.ProcessGroup | None
    rivals: dist.ProcessGroup | None

    @classmethod
    def of(cls, heads: int, guided: bool) -> Ranks:
        """The place of this process when all of the default group share a run. Every one of them
        must call it."""
        world, rank = dist.get_world_size(), dist.get_rank()
        passes, size = share(world, heads, guided)
        teams = [dist.new_group(list(range(i * size, (i + 1) * size))) for i in range(passes)]
        rivals = [dist.new_group(list(range(place, world, size))) for place in range(size)]
        index, place = divmod(rank, size)
        return cls(
            passes, index, teams[index] if size > 1 else None, rivals[place] if passes > 1 else None
        )

    @property
    def size(self) -> int:
        return dist.get_world_size(self.team) if self.team else 1

    def spans(self, tokens: int) -> list[slice]:
        """The tokens of every rank of the team."""
        return [
            slice(i * tokens // self.size, (i + 1) * tokens // self.size) for i in range(self.size)
        ]

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of x [B, S, ...]."""
        return x[:, self.spans(x.shape[1])[dist.get_rank(self.team)]] if self.team else x

    def to_heads(self, x: Tensor, tokens: int) -> Tensor:
        """[N, B, s, H, D] of this rank's tokens -> [N, B, S, H / size, D], all tokens of its share
        of the heads."""
        N, B, s, H, D = x.shape
        h, lengths = H // self.size, [span.stop - span.start for span in self.spans(tokens)]
        # [size, N, B, s, h, D]
        sent = x.unflatten(3, (self.size, h)).permute(3, 0, 1, 2, 4, 5).contiguous()
        received = x.new_empty(N * B * tokens * h * D)
        dist.all_to_all_single(
            received, sent.view(-1), [N * B * length * h * D for length in lengths], group=self.team
        )
        parts = received.split([N * B * length * h * D for length in lengths])
        return torch.cat(
            [part.view(N, B, length, h, D) for part, length in zip(parts, lengths, strict=True)], 2
        )

    def to_tokens(self, x: Tensor) -> Tensor:
        """[B, S, c] of this rank's heads -> [B, s, size * c], all heads of its tokens: `to_heads`
        undone."""
        B, S, c = x.shape
        spans = self.spans(S)
        sent = torch.cat([x[:, span].reshape(-1) for span in spans])
        own = spans[dist.get_rank(self.team)]
        received = x.new_empty(self.size, B, own.stop - own.start, c)
        dist.all_to_all_single(
            received.view(-1),
            sent,
            None,
            [B * (span.stop - span.start) * c for span in spans],
            group=self.team,
        )
        return received.permute(1, 2, 0, 3).flatten(2)

    def gather(self, x: Tensor, tokens: int) -> Tensor:
        """[B, s, c] of this rank's tokens -> [B, S, c], on every rank of the team."""
        if not self.team:
            return x
        lengths = [span.stop - span.start for span in self.spans(tokens)]
        padded = x.new_zeros(x.shape[0], max(lengths), x.shape[2])
        padded[:, : x.shape[1]] = x
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded, group=self.team)
        return torch.cat([part[:, :length] for part, length in zip(parts, lengths, strict=True)], 1)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over the team."""
        if self.team:
            dist.all_reduce(x, group=self.team)
        return x

    def both(self, velocity: Tensor) -> list[Tensor]:
        """The velocities of both passes, from this rank's own."""
        velocities = [torch.empty_like(velocity) for _ in range(2)]
        dist.all_gather(velocities, velocity.contiguous(), group=self.rivals)
        return velocities


@contextmanager
def processes(device: str | None) -> Iterator[tuple[int, int, str | None]]:
    """This process's rank, how many there are, and its device. One process where `torchrun` did not
    start several."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield 0, 1, device
        return
    cuda = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else device
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()


def from_first(make: Callable[[], bytes]) -> bytes:
    """What `make` gives in the first process, in every process. Where it fails there, the others
    leave quietly."""
    if dist.get_rank():
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, 0)
        if length < 0:
            raise SystemExit(2)  # the first process says why
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
