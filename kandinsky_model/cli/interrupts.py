# SPDX-License-Identifier: Apache-2.0
"""What Ctrl-C, SIGTERM and SIGHUP do: each stops the command, and none costs what is sampled."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NUMBERS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
AT_ONCE = 1.0  # seconds within which signals are one wish: Ctrl-C pressed twice, a closed terminal
STILL_SAVING = b"kandinsky: stops as soon as what was sampled is saved\n"


class Interrupts:
    """Turns signals into KeyboardInterrupt, and holds them back while that would lose work.

    In a `guarded` block the first signal raises KeyboardInterrupt. Those that follow wait until
    the block ends, because a second Ctrl-C may come while the block still saves what the first one
    stopped. `hold` makes the first one wait as well. Elsewhere, those that follow at once belong to
    the first, and none counts once the command is ending. State is global, as signals are.
    """

    def __init__(self) -> None:
        self.number = int(signal.SIGINT)  # the last signal that was received
        self.came = False  # whether one was received since `handled` began
        self._guarding = False
        self._held = False
        self._waiting = False
        self._ending = False
        self._detail = ""
        self._raised = -AT_ONCE  # when, on the clock of time.monotonic

    @contextmanager
    def handled(self, is_program: bool = False) -> Iterator[None]:
        """Receive the signals inside, except those that the parent process told this one to ignore,
        as nohup does. Only the main thread can; elsewhere nothing changes.

        is_program: whether the process ends behind this. Signals then end it, without a word.
        """
        self.came = self._ending = False
        self._raised = -AT_ONCE
        previous: dict = {}
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    previous[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in previous.items():
                if signal.getsignal(number) == self._receive:  # nobody has changed it since
                    signal.signal(number, signal.SIG_DFL if is_program else handler)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """See the class. A signal that still waits at the end raises KeyboardInterrupt there."""
        self._guarding = True
        self._detail = ""
        try:
            yield
        except KeyboardInterrupt:
            self._ending = True
            raise
        finally:
            self._ending = self._ending or self._waiting
            self._guarding = self._held = False
        if self._waiting:
            self._waiting = False
            raise KeyboardInterrupt(self._detail)

    def hold(self) -> None:
        """Let every signal wait from now on, until the end of the guarded block."""
        self._held = self._guarding

    def say(self, detail: str) -> None:
        """What a signal that waits will say of the interruption."""
        self._detail = detail

    def end(self) -> None:
        """Let no further signal count: the command is ending."""
        self._ending = True

    def _receive(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if self._ending or (not self._guarding and now - self._raised < AT_ONCE):
            return
        self.number = number
        self.came = True
        if not self._held:
            self._raised = now
            self.hold()
            raise KeyboardInterrupt
        self._waiting = True
        with suppress(OSError):  # a terminal that has hung up
            os.write(2, STILL_SAVING)  # and no print, which this handler may have interrupted


INTERRUPTS = Interrupts()
