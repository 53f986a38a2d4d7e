"""Signs of life of worker processes: how far each has come, and which sample it is at.

A worker that reads slowly goes on giving signs, one for each sample; one that hangs does not. `reading(name)` is the
sign. It costs a microsecond, and does nothing outside of workers. Where one sample may take long and get on, as over a
network, there are `alive`, `waiting` and `working` besides.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_NAME_BYTES = 240
_sleep = time.sleep
_PIECE_S = 1.0  # of a wait, between two signs
LOOK_S = 1.0  # how often `working` looks, and may give a sign
BUSY = 0.0003  # the least part of one core that counts as work: a wait takes a third, 100 KB a second twice as much


class Heartbeats:
    """A counter and the name of the current sample for each worker, in memory shared with this process.

    Each worker writes to its own place alone. Counters only grow, so that this process needs no clock of another:
    while it waits it sees whether they do.
    """

    def __init__(self, context: Any, workers: int) -> None:
        self._counts = context.RawArray("q", workers)
        self._names = context.RawArray("c", workers * _NAME_BYTES)

    def of_this_process(self, worker: int) -> None:
        """From now on `reading` in this process is the sign of `worker`."""
        global _mine
        _mine = (self, worker)
        reading("")

    def beat(self, worker: int, name: str) -> None:
        # Cut between bytes; what is left of a letter is dropped when it is read.
        start, content = worker * _NAME_BYTES, name.encode(errors="surrogateescape")[: _NAME_BYTES - 1]
        self._names[start : start + len(content) + 1] = content + b"\0"
        self.beat_again(worker)

    def beat_again(self, worker: int) -> None:
        # Two threads of a worker may count one sign instead of two; the next one is counted again.
        self._counts[worker] += 1

    def count(self, worker: int) -> int:
        """Signs so far; 0 before the worker has started."""
        return int(self._counts[worker])

    def sample(self, worker: int) -> str:
        """What the worker is reading; an empty text between samples."""
        start = worker * _NAME_BYTES
        content: bytes = self._names[start : start + _NAME_BYTES]
        return content.partition(b"\0")[0].decode(errors="ignore")


_mine: tuple[Heartbeats, int] | None = None


def reading(name: str) -> None:
    """A worker begins to read the sample `name`, or, where it is empty, is between samples."""
    if _mine is not None:
        _mine[0].beat(_mine[1], name)


def alive() -> None:
    """The sample that is being read gets on."""
    if _mine is not None:
        _mine[0].beat_again(_mine[1])


def waiting(seconds: float) -> None:
    """Sleep on purpose, with signs of life."""
    end = time.monotonic() + seconds
    alive()
    while (rest := end - time.monotonic()) > 0:
        _sleep(min(rest, _PIECE_S))
        alive()


@contextmanager
def working() -> Iterator[None]:
    """Signs of life while code of others runs that tells nothing of itself, for as long as this worker gets on.

    That shows in processor time: bytes that come in take some, a wait for those that never come takes next to none.
    Who sleeps on purpose, as between two tries (the hub may ask for minutes), is alive too.
    """
    if _mine is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_signs, args=(done,), daemon=True, name="signs of life")
    thread.start()
    try:
        time.sleep = waiting  # type: ignore[assignment]  # this process is a worker: nobody else's
        yield
    finally:
        time.sleep = _sleep
        done.set()
        thread.join()


def _signs(done: threading.Event) -> None:
    before = _spent_s()
    while not done.wait(LOOK_S):
        now = _spent_s()
        if now - before >= BUSY * LOOK_S:
            alive()
        before = now


def _spent_s() -> float:
    """Processor time of all threads but this one."""
    return time.process_time() - time.thread_time()
