"""Signs of life of worker processes: how far each has come, and which sample it is at.

A worker that reads slowly goes on giving signs, one for each sample; one that hangs does not. `reading(name)` is the
sign. It costs a microsecond, and does nothing outside of workers.
"""

from __future__ import annotations

from typing import Any

_NAME_BYTES = 240


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
