"""What the steps of a profile amount to, what else a profile measures: the loader alone, and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from nextblock.data.loading import Stream, training_batches
from nextblock.training.memory import free_bytes
from nextblock.training.profile_parts import StepTime

LOADED_IMAGES = 32  # in a batch of the loader measured alone: its rate does not depend on them
ROUNDS = 6  # batches of each worker that are counted
LOADING_SECONDS = 8.0


@dataclass(frozen=True)
class PhaseTime:
    """One phase over the steps: seconds, and its share of the step by the means, which add up."""

    name: str
    mean_s: float
    median_s: float
    low_s: float
    high_s: float
    share: float


def phase_times(steps: Sequence[StepTime], phases: Sequence[str]) -> list[PhaseTime]:
    """Mean, median and quartiles of every phase over steps with marks, in order."""
    total = mean(step.total_s for step in steps)
    return [_phase_time(name, [step.phases[name] for step in steps], total) for name in phases]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, median and quartiles."""
    low, high = np.percentile(seconds, (25, 75)).tolist()
    return {"mean": mean(seconds), "median": median(seconds), "low": low, "high": high}


def _phase_time(name: str, seconds: list[float], total: float) -> PhaseTime:
    of = spread(seconds)
    return PhaseTime(name, of["mean"], of["median"], of["low"], of["high"], of["mean"] / total if total else 0.0)


def loader_rate(
    stream: Stream[Any], *, start: int, images: int, workers: int, pin_memory: bool, timeout_s: float
) -> float:
    """Images per second of the workers when nothing else is done: what they can keep up for long.

    A short training does not show it, as its first batches were loaded before it began.

    Args:
        start: the first position to load.
        images: in a batch, at most.
        workers: at least one; the first batch of each is not counted.
    """
    size = min(images, LOADED_IMAGES)
    plan = (list(range(first, first + size)) for first in count(start, size))
    batches = training_batches(stream, plan, workers=workers, pin_memory=pin_memory, timeout_s=timeout_s)
    try:
        return _rate(batches, size, workers)
    finally:
        batches.close()  # type: ignore[attr-defined]  # a generator: its workers stop now


def _rate(batches: Iterator[Any], size: int, workers: int) -> float:
    """Whole rounds are counted: the batches of a round come at about the same time."""
    for _ in islice(batches, workers):
        pass
    begin, rounds, now = time.perf_counter(), 0, 0.0
    while rounds < ROUNDS and now < LOADING_SECONDS:
        for _ in islice(batches, workers):
            pass
        rounds, now = rounds + 1, time.perf_counter() - begin
    return rounds * workers * size / max(now, 1e-9)


def waiting_share(busy_s: float, loading_s: float) -> float:
    """Share of a step that waits for data in the long run: what loading its images takes longer than all else.

    Args:
        busy_s: of a step without its wait.
        loading_s: that the loader needs for a step's images.
    """
    longest = max(busy_s, loading_s)
    return (longest - busy_s) / longest if longest else 0.0


@dataclass(frozen=True)
class Memory:
    """Bytes.

    Attributes:
        peak: on CUDA what tensors held at most; on the CPU the most that this process had, its code included and its
            workers left out.
        free: on CUDA what was free at that moment; on the CPU what is free now. None where it cannot be told.
    """

    peak: int
    free: int | None


def memory_used(device: torch.device) -> Memory:
    free = free_bytes(device)
    if device.type != "cuda":
        import resource  # not on every system

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return Memory(peak if sys.platform == "darwin" else peak * 1024, free)
    peak = torch.cuda.max_memory_allocated(device)
    return Memory(peak, None if free is None else free + torch.cuda.memory_allocated(device) - peak)
