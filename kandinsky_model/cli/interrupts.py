# SPDX-License-Identifier: Apache-2.0
"""What Ctrl-C, SIGTERM and SIGHUP do: each stops the command, and none costs what is sampled."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NUMBERS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
STILL_SAVING = b"kandinsky: stops as soon as what was sampled is saved\n"


class Interrupts:
    """Turns signals into KeyboardInterrupt, and holds them back while that would lose work.

    In a `guarded` block the first signal raises KeyboardInterrupt. Those that follow wait until
    the block ends, because a second Ctrl-C may come while the block still saves what the first one
    stopped. `hold` makes the first one wait as well. State is global, as signals are.
    """

    def __init__(self) -> None:
        self.number = int(signal.SIGINT)  # the last signal that was received
        self._guarding = False
        self._held = False
        self._waiting = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Receive the signals inside, except those that the parent process told this one to ignore,
        as nohup does. Only the main thread can; elsewhere nothing changes."""
        previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    previous[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in previous.items():
                if signal.getsignal(number) == self._receive:  # nobody has changed it since
                    signal.signal(number, handler)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """See the class. A signal that still waits at the end raises KeyboardInterrupt there."""
        self._guarding = True
        try:
            yield
        finally:
            waiting = self._waiting
            self._guarding = self._held = self._waiting = False
        if waiting:
            raise KeyboardInterrupt

    def hold(self) -> None:
        """Let every signal wait from now on, until the end of the guarded block."""
        self._held = self._guarding

    def _receive(self, number: int, _frame: object) -> None:
        self.number = number
        if not self._held:
            self.hold()
            raise KeyboardInterrupt
        self._waiting = True
        with suppress(OSError):  # a terminal that has hung up
            os.write(2, STILL_SAVING)  # and no print, which this handler may have interrupted


INTERRUPTS = Interrupts()
