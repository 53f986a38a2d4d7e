"""Ask a job to stop at the next good moment: Ctrl-C and SIGTERM."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType


class Stopped(KeyboardInterrupt):
    """A job that returns nothing else was stopped; its message says how to go on.

    `signal` is the number of the signal that stopped it: SIGINT where none was noted.
    """

    def __init__(self, message: str, received: int) -> None:
        super().__init__(message)
        self.signal = int(received or signal.SIGINT)


class StopRequest:
    """While active, the first signal is remembered, also one that was ignored before (of what a script starts with
    `&`, Ctrl-C is); a second Ctrl-C interrupts at once.

    Args:
        until: what is still waited for, as is told when a signal comes.

    `received` is the signal's number, or 0.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, until: str = "this step is done and saved") -> None:
        self.until, self.received = until, 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.signals}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def __call__(self) -> bool:
        return self.received != 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        print(f"\nstopping when {self.until}; Ctrl-C again stops at once", file=sys.stderr, flush=True)
