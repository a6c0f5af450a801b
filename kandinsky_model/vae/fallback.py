# SPDX-License-Identifier: Apache-2.0
"""Streaming that ends in finite values: what overflows float16 is computed in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .schemes import Scheme, schemes_within, stream_within
from .stream import Chain, NotFinite, check_finite

_log = logging.getLogger(__name__)


class Streaming:
    """Streams tensors through a chain, each with statistics of its own.

    The largest float16 is 65,504, and activations of this VAE can be larger: those of the bundled
    one reach 240,000. Where a chain in float16 meets a value that is not finite, streaming goes on
    in float32, behind the pieces that have been given out, and stays there for further tensors. No
    other dtype has a remedy, and there NotFinite is raised.

    wide: makes the same chain in float32. memory_budget, notify: as in
    `HunyuanVideoVAE.decode_frames`.
    """

    def __init__(
        self,
        chain: Chain,
        wide: Callable[[], Chain],
        memory_budget: int | None,
        notify: Callable[[str], None],
    ):
        self.chain = chain
        self.wide = wide
        self.memory_budget = memory_budget
        self.notify = notify
        self.dtype = chain.weight.dtype

    def __call__(self, x: Tensor) -> Iterator[Tensor]:
        """Finite pieces [B, C', f, Y', X'] of what becomes of x [B, C, T, Y, X], in its dtype.

        The call itself refuses a budget that is too small, before anything is computed.
        """
        if self.chain.weight.dtype != self.dtype:
            return self._pieces_in_float32(x, given=0)
        return self._pieces(x, schemes_within(self.chain, x.shape, self.memory_budget))

    def _pieces(
        self,
        x: Tensor,
        schemes: list[Scheme],
    ) -> Iterator[Tensor]:
        given = 0  # frames given out
        try:
            for piece in stream_within(self.chain, x, schemes, self.notify):
                check_finite(piece, self.chain.doing)
                given += piece.shape[2]
                yield piece
            return
        except NotFinite:
            if self.dtype != torch.float16:
                raise
        # outside the handler, whose exception would keep the tensors of the failed attempt alive
        _log.warning(
            "%s overflows float16; it goes on in float32, which takes twice the memory",
            self.chain.doing,
        )
        self.chain = self.wide()
        yield from self._pieces_in_float32(x, given)

    def _pieces_in_float32(self, x: Tensor, given: int) -> Iterator[Tensor]:
        """The pieces behind the first `given` frames."""
        if x.is_floating_point():
            x = x.float()
        seen = 0
        for piece in stream_within(self.chain, x, self._schemes(x), self.notify):
            seen += piece.shape[2]
            check_finite(piece, self.chain.doing)
            if seen > given:  # pieces are cut alike in every dtype
                narrow = piece.to(self.dtype)
                check_finite(narrow, self.chain.doing)
                yield narrow

    def _schemes(self, x: Tensor) -> list[Scheme]:
        """The schemes in float32 within the budget, or the smallest where none is.

        The budget was checked for float16. Going beyond it, with a word about that, is better than
        to end with nothing.
        """
        schemes = schemes_within(self.chain, x.shape, None)
        if self.memory_budget is None:
            return schemes
        fitting = [s for s in schemes if s.predicted_peak_bytes <= self.memory_budget]
        if not fitting:
            _log.warning(
                "%s in float32 needs %d bytes, more than the memory budget of %d; it goes on",
                self.chain.doing,
                schemes[-1].predicted_peak_bytes,
                self.memory_budget,
            )
        return fitting or schemes[-1:]
