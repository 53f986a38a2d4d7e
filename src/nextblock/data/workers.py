"""Worker processes: how they are started, and how one that died or hangs is told, with the sample that it was at.

Nothing here knows what a batch is. `loading.py` sets torch's DataLoader to give up waiting every `tick_s`, when it sees
whether workers died, and `arrived` waits on. A thread looks whether the worker whose turn it is gives signs of life
(`heartbeat.py`).
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils.data._utils import signal_handling

from nextblock.data.heartbeat import Heartbeats
from nextblock.errors import DataError, shown

START_S = 300  # a worker that is not forked first imports torch, perhaps from a slow network disk
DEATH_S = 5  # the system closes what a worker had open before it says that the worker is no more
# how a worker that ended in the middle of something shows where its batch is taken
_BROKEN = (RuntimeError, OSError, EOFError, pickle.UnpicklingError, multiprocessing.ProcessError)


def context() -> Any:
    """How worker processes are made."""
    # A forked worker shares the source's memory, and scripts need no `__main__` guard; but CUDA does not
    # survive a fork.
    if platform.system() != "Linux":
        return multiprocessing.get_context("spawn")
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return multiprocessing.get_context("forkserver" if initialized else "fork")


class StartWorker:
    """What a worker does first (DataLoader's `worker_init_fn`)."""

    def __init__(self, beats: Heartbeats) -> None:
        self._beats = beats

    def __call__(self, worker: int) -> None:
        # Control-C and a scheduler's warning go to every process of the group; the main process decides.
        # Workers end when it tells them to, or when it is gone.
        for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        # A first SIGTERM is the scheduler's, to the whole group; a second one is our own process giving up on this one.
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
        torch.set_num_threads(1)
        self._beats.of_this_process(worker)


@contextmanager
def quiet_deaths() -> Iterator[None]:
    """While DataLoader starts workers, keep it from handling SIGCHLD.

    Its handler raises RuntimeError wherever the main process is when a worker dies, be it inside a save, or inside
    DataLoader itself, which then ends in whatever error. Without, the death is told where the worker's batch is waited
    for, within a tick.
    """
    handling: Any = signal_handling
    before = handling._SIGCHLD_handler_set
    handling._SIGCHLD_handler_set = True  # it takes it for done, by an earlier loader
    try:
        yield
    finally:
        handling._SIGCHLD_handler_set = before


def tick_s(timeout_s: float) -> float:
    """How often is looked whether a worker lives."""
    return min(1.0, timeout_s / 4)


def arrived(batches: Any, beats: Heartbeats, workers: int, timeout_s: float) -> Iterator[Any]:
    """What the workers hand over, in order; `batches` is DataLoader's iterator.

    Raises DataError when a worker died, or when the one whose turn it is gave no sign of life for `timeout_s` while it
    was waited for.
    """
    watch = _Watch(batches, beats, timeout_s)
    try:
        for number in itertools.count():
            with watch.waiting_for(number % workers):  # DataLoader deals batches out in turn
                try:
                    batch = _next(batches, beats, watch)
                except StopIteration:
                    return
            yield batch
    finally:
        watch.done.set()


def _next(batches: Any, beats: Heartbeats, watch: _Watch) -> Any:
    while True:
        try:
            return next(batches)
        except _BROKEN as error:
            if watch.told:  # it has ended the workers, which may show here in many ways
                raise DataError(watch.told) from error
            if str(error).startswith("DataLoader timed out"):  # a tick has passed, and no worker is dead
                continue
            by_itself = str(error).startswith("Caught ")  # handed over by a worker that lives
            if told := _death(batches, beats, 0 if by_itself else DEATH_S):
                raise DataError(told) from error
            raise


class _Watch(threading.Thread):
    """Ends the workers when the one that is waited for hangs.

    A thread of its own: taking a batch needs an answer of the worker that made it, for which torch waits without end;
    and so it does for the rest of a batch when a worker died in the middle of handing it over.
    """

    def __init__(self, batches: Any, beats: Heartbeats, timeout_s: float) -> None:
        super().__init__(daemon=True, name="watch over data workers")
        self.batches, self.beats, self.timeout_s = batches, beats, timeout_s
        self.done, self.told = threading.Event(), ""
        self._worker: int | None = None
        self._waits = 0
        self.start()

    @contextmanager
    def waiting_for(self, worker: int) -> Iterator[None]:
        self._worker, self._waits = worker, self._waits + 1
        try:
            yield
        finally:
            self._worker = None

    def run(self) -> None:
        ticks, seen, tick = 0, (-1, -1), tick_s(self.timeout_s)
        while not self.done.wait(tick):
            worker = self._worker
            if worker is None:
                continue
            # Ticks are counted, not hours read: a job that was suspended with all its workers has not hung.
            now = self._waits, self.beats.count(worker)
            ticks, seen = (ticks + 1 if now == seen else 0), now
            # A death is told by whoever waits, within a tick, if he is not caught in the middle of a batch.
            self.told = _death(self.batches, self.beats) if ticks > 2 else ""
            if ticks * tick >= (self.timeout_s if now[1] else max(self.timeout_s, START_S)):
                self.told = self.told or _hangs(self.beats, worker, ticks * tick)
            if self.told:
                _end(self.batches)
                return


def _hangs(beats: Heartbeats, worker: int, quiet_s: float) -> str:
    if not beats.count(worker):
        return f"data worker {worker} did not start within {quiet_s:g} s. Is the disk with Python's packages there?"
    sample = beats.sample(worker)
    at = f"it is still reading {shown(sample)}" if sample else "no batch arrived"
    return (
        f"data worker {worker} hangs: after {quiet_s:g} s {at}. Check the storage and this file; "
        "if it is only slow, raise timeout_s."
    )


def _death(batches: Any, beats: Heartbeats, within_s: float = 0) -> str:
    """What to tell of a worker that is no more, or will be within so many seconds; nothing where all live."""
    end = time.monotonic() + within_s
    while True:
        for worker, process in enumerate(batches._workers):
            if (code := process.exitcode) is not None:
                return _died(code, beats.sample(worker))
        if time.monotonic() >= end:
            return ""
        time.sleep(0.02)


def _died(code: int, sample: str) -> str:
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    at = f" while reading {shown(sample)}" if sample else ""
    return (
        f"a data worker died{at} ({how}). Most often memory or /dev/shm ran out: use fewer workers or smaller batches; "
        "after a SIGSEGV, look at that file. In a script, start the job under `if __name__ == '__main__':`."
    )


def _end(batches: Any) -> None:
    """End all workers at once: one that hangs or is stopped heeds nothing milder, and would be waited for."""
    for process in batches._workers:
        process.kill()
    # Now nobody else writes to the pipe of the batches: whoever is caught in the middle of one comes to its end.
    with suppress(OSError):
        batches._worker_result_queue._writer.close()
