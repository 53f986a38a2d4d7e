"""Worker processes: how they are started, and how one that died or hangs is told, with the sample that it was at.

Nothing here knows what a batch is. `loading.py` sets torch's DataLoader to give up waiting every `tick_s`, when it sees
whether workers died, and `arrived` waits on. A thread looks whether the worker whose turn it is gives signs of life
(`heartbeat.py`).
"""

from __future__ import annotations

import itertools
import multiprocessing
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nextblock.data.heartbeat import Heartbeats
from nextblock.errors import DataError, shown

START_S = 300  # a worker that is not forked first imports torch, perhaps from a slow network disk


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
    """While DataLoader starts workers, keep it from taking SIGCHLD.

    Its handler raises RuntimeError wherever the main process is when a worker dies, be it inside a save. Without, the
    death is told where the worker's batch is waited for, within a tick.
    """
    number = getattr(signal, "SIGCHLD", None)
    before = signal.getsignal(number) if number else None
    try:
        yield
    finally:
        if number and before is not None and signal.getsignal(number) is not before:
            signal.signal(number, before)


def tick_s(timeout_s: float) -> float:
    """How often is looked whether a worker lives."""
    return min(1.0, timeout_s / 4)


def arrived(batches: Iterator[Any], beats: Heartbeats, workers: int, timeout_s: float) -> Iterator[Any]:
    """What the workers hand over, in order.

    Raises DataError when a worker died, or when the one whose turn it is began no sample for `timeout_s` while it was
    waited for.
    """
    watch = _Watch(beats, timeout_s)
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


def _next(batches: Iterator[Any], beats: Heartbeats, watch: _Watch) -> Any:
    while True:
        try:
            return next(batches)
        except (RuntimeError, OSError, EOFError) as error:
            if watch.told:  # it has ended the workers, which may show here in many ways
                raise DataError(watch.told) from error
            text = str(error)
            if text.startswith("DataLoader worker"):
                raise DataError(_died(batches, beats, text)) from error
            if not text.startswith("DataLoader timed out"):  # a tick has passed, and no worker is dead
                raise


class _Watch(threading.Thread):
    """Ends the workers when the one that is waited for hangs.

    A thread of its own: taking a batch needs an answer of the worker that made it, for which torch waits without end.
    """

    def __init__(self, beats: Heartbeats, timeout_s: float) -> None:
        super().__init__(daemon=True, name="watch over data workers")
        self.beats, self.timeout_s = beats, timeout_s
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
        quiet_s, seen = 0.0, (-1, -1)
        while not self.done.wait(tick_s(self.timeout_s)):
            worker = self._worker
            if worker is None:
                continue
            # Ticks are counted, not hours read: a job that was suspended with all its workers has not hung.
            now = self._waits, self.beats.count(worker)
            quiet_s, seen = (quiet_s + tick_s(self.timeout_s) if now == seen else 0.0), now
            if quiet_s >= (self.timeout_s if now[1] else max(self.timeout_s, START_S)):
                self.told = _hangs(self.beats, worker, quiet_s)
                kill(self.beats)
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


def _died(batches: Iterator[Any], beats: Heartbeats, text: str) -> str:
    """`text` is what DataLoader says of it."""
    how, at = text.partition("\n")[0].rstrip("."), ""
    for worker, process in enumerate(getattr(batches, "_workers", ())):
        if process.exitcode is not None:
            code = process.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            at = f" while reading {shown(beats.sample(worker))}" if beats.sample(worker) else ""
            break
    return (
        f"a data worker died{at} ({how}). Most often memory or /dev/shm ran out: use fewer workers or smaller batches; "
        "after a SIGSEGV, look at that file. In a script, start the job under `if __name__ == '__main__':`."
    )


def kill(beats: Heartbeats) -> None:
    """End all workers at once: one that hangs or is stopped heeds nothing milder, and would be waited for."""
    ours = set(beats.pids())
    for process in multiprocessing.active_children():
        if process.pid in ours:
            process.kill()
