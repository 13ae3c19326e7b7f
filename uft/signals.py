"""SIGTERM and Ctrl-C, noted for the end of the optimiser step instead of striking in the middle of it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended training, behind a checkpoint that the message names."""


class Terminated(SystemExit):
    """SIGTERM ended training, behind a checkpoint that the message names; as an exit status 128 + 15."""

    def __init__(self, message: str):
        super().__init__(128 + signal.SIGTERM)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignals:
    """While entered, the first SIGTERM or SIGINT is kept in `received`; a Ctrl-C behind it strikes at once.

    A second SIGTERM changes nothing, as schedulers may repeat themselves.  A process that ignores one of the signals
    goes on doing so.  Python delivers signals to the main thread only; in any other this does nothing.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        self.received = None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # None: installed by something other than Python, which could not be put back
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = number
            # not print: a handler may run in the middle of one
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping at the end of this optimiser step; Ctrl-C stops at once\n")
