"""Batches, prepared by worker processes. What is in them does not depend on how many there are."""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nextblock.data.augment import resize_and_crop
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source
from nextblock.data.stream import BadSample, Batch, load_sample
from nextblock.errors import DataError, NextblockError, SampleError

TIMEOUT_S = 120

B = TypeVar("B")
B_co = TypeVar("B_co", covariant=True)


class Stream(Protocol[B_co]):
    """What is seen at a position: `stream.TrainingStream` of images, `latents.LatentStream` of cached latents."""

    def load(self, positions: Sequence[int]) -> B_co: ...


def default_workers(processes: int = 1) -> int:
    """How many workers suit each of so many processes: the cores it may use, less one, at most 16.

    One core stays with the process that drives the model: on 2 cores a second worker would only take turns with
    it, and on 1 core a worker costs more than it brings. The processes of a node share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = max(1, processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(0, min(16, cores // ranks - 1))


def training_batches(
    stream: Stream[B],
    plan: Iterable[Sequence[int]],
    *,
    workers: int,
    pin_memory: bool = False,
    prefetch: int = 4,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[B]:
    """One batch for each element of `plan`, a list of global positions; in order.

    The workers start now, not at the first batch. `plan` may be endless: it is read at most
    `workers * prefetch` elements ahead. Raises DataError when the data fail, when a worker dies, and when a
    batch takes longer than `timeout_s`.
    """
    return _batches(stream.load, plan, workers, pin_memory, prefetch, timeout_s)


def evaluation_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int = 0,
    indices: Sequence[int] | None = None,
    pin_memory: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> Iterator[Batch]:
    """The samples `indices` (all by default) in order: resized, centrally cropped, never mirrored.

    Broken images are left out of their batch, which may so be smaller or empty, and listed in its `bad`.
    """
    chosen = range(len(source)) if indices is None else indices
    plan = (chosen[start : start + batch_size] for start in range(0, len(chosen), batch_size))
    return _batches(_EvaluationView(source, preprocessing).load, plan, workers, pin_memory, 2, timeout_s)


class _EvaluationView:
    def __init__(self, source: Source, preprocessing: Preprocessing) -> None:
        self.source = source
        self.preprocessing = preprocessing

    def load(self, indices: Sequence[int]) -> Batch:
        p = self.preprocessing
        images = np.empty((len(indices), *p.size_px, p.channels), dtype=np.uint8)
        labels: list[int] = []
        used: list[int] = []
        bad: list[BadSample] = []
        for index in map(int, indices):
            try:
                pixels, label = load_sample(self.source, index, p)
            except SampleError as error:
                bad.append(BadSample(error.name, error.reason, index))
                continue
            images[len(used)] = resize_and_crop(pixels, p.shorter_side_px, p.size_px)
            labels.append(-1 if label is None else label)
            used.append(index)
        return Batch(
            images=torch.from_numpy(images)[: len(used)],
            labels=torch.tensor(labels, dtype=torch.int64),
            flip=torch.zeros(len(used), dtype=torch.bool),
            positions=torch.tensor(used, dtype=torch.int64),
            indices=torch.tensor(used, dtype=torch.int64),
            bad=bad,
        )


class _Loader(Dataset[Any]):
    """Gives torch's DataLoader a map from a list of positions to a batch."""

    def __init__(self, load: Callable[[Sequence[int]], Any]) -> None:
        self._load = load

    def __getitem__(self, positions: Sequence[int]) -> Any:
        try:
            return self._load(positions)
        except NextblockError as error:
            # Handed over as a value: DataLoader would raise it again with the worker's traceback as message.
            return error


def _batches(
    load: Callable[[Sequence[int]], B],
    plan: Iterable[Sequence[int]],
    workers: int,
    pin_memory: bool,
    prefetch: int,
    timeout_s: float,
) -> Iterator[B]:
    loader = DataLoader(
        _Loader(load),
        sampler=plan,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        timeout=timeout_s if workers else 0,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        multiprocessing_context=_context() if workers else None,
        generator=torch.Generator(),  # its own: DataLoader draws a number, and must not touch the global one
    )
    return _unwrapped(iter(loader), timeout_s)


def _unwrapped(batches: Iterator[Any], timeout_s: float) -> Iterator[Any]:
    try:
        for batch in batches:
            if isinstance(batch, NextblockError):
                raise batch
            yield batch
    except RuntimeError as error:
        explained = _explain(str(error), timeout_s)
        if explained is None:
            raise
        raise DataError(explained) from error
    finally:
        # Now, not when the iterator is collected: a traceback keeps it alive, and collected as part of a cycle
        # its queues are gone before its workers hear that they should stop.
        if stop := getattr(batches, "_shutdown_workers", None):
            stop()


def _explain(text: str, timeout_s: float) -> str | None:
    """What a RuntimeError of torch's DataLoader means for the person; None when it is a bug in a worker."""
    if text.startswith("DataLoader timed out"):
        return (
            f"no batch arrived within {timeout_s:g} s: the storage hangs, or the workers are too slow. "
            "Check the storage, use more workers, or raise the timeout."
        )
    if text.startswith("DataLoader worker"):
        return (
            f"a data worker died ({text.partition(chr(10))[0].rstrip('.')}). Most often memory or /dev/shm ran out: "
            "use fewer workers or smaller batches. In a script, start the job under `if __name__ == '__main__':`."
        )
    return None


def _context() -> Any:
    # A forked worker shares the source's memory, and scripts need no `__main__` guard; but CUDA does not
    # survive a fork.
    if platform.system() != "Linux":
        return multiprocessing.get_context("spawn")
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return multiprocessing.get_context("forkserver" if initialized else "fork")


def _start_worker(_: int) -> None:
    # Control-C and a scheduler's warning go to every process of the group; the main process decides.
    # Workers end when it tells them to, or when it is gone.
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # A first SIGTERM is the scheduler's, to the whole group; a second one is our own process giving up on this one.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    torch.set_num_threads(1)


def _as_it_is(batch: Any) -> Any:
    return batch
