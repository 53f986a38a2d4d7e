"""Batches, prepared by worker processes. What is in them does not depend on how many there are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from nextblock.data.augment import resize_and_crop
from nextblock.data.heartbeat import Heartbeats, reading
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source
from nextblock.data.stream import BadSample, Batch, load_sample
from nextblock.data.workers import StartWorker, arrived, context, quiet_deaths, tick_s
from nextblock.errors import NextblockError, SampleError

TIMEOUT_S = 25  # with a tick and the end of the workers, a hung one is told within 30 s

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
    `workers * prefetch` elements ahead. Raises DataError when the data fail, when a worker dies, and when the
    worker whose batch is waited for takes longer than `timeout_s` for one sample (for a stream that announces no
    samples by `heartbeat.reading`: for one batch).
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
        reading("")
        try:
            return self._load(positions)
        except NextblockError as error:
            # Handed over as a value: DataLoader would raise it again with the worker's traceback as message.
            return error
        finally:
            reading("")


def _batches(
    load: Callable[[Sequence[int]], B],
    plan: Iterable[Sequence[int]],
    workers: int,
    pin_memory: bool,
    prefetch: int,
    timeout_s: float,
) -> Iterator[B]:
    processes = context() if workers else None
    beats = Heartbeats(processes, workers) if workers else None
    loader = DataLoader(
        _Loader(load),
        sampler=plan,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        timeout=tick_s(timeout_s) if workers else 0,
        pin_memory=pin_memory and torch.cuda.is_available(),
        worker_init_fn=StartWorker(beats) if beats else None,
        multiprocessing_context=processes,
        generator=torch.Generator(),  # its own: DataLoader draws a number, and must not touch the global one
    )
    with quiet_deaths():
        batches: Any = iter(loader)
    return _unwrapped(batches, arrived(batches, beats, workers, timeout_s) if beats else batches)


def _unwrapped(batches: Any, arriving: Iterator[Any]) -> Iterator[Any]:
    try:
        for batch in arriving:
            if isinstance(batch, NextblockError):
                raise batch
            yield batch
    finally:
        # Now, not when the iterator is collected: a traceback keeps it alive, and collected as part of a cycle
        # its queues are gone before its workers hear that they should stop.
        if stop := getattr(batches, "_shutdown_workers", None):
            stop()


def _as_it_is(batch: Any) -> Any:
    return batch
