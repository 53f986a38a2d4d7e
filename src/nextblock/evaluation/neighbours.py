"""Precision and recall of a set of features against another, by nearest neighbours; read in blocks, any number fits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from nextblock.errors import ConfigError
from nextblock.evaluation.feature_rows import Rows, in_blocks, require_same_width

BLOCK = 1024  # rows and columns of distances held at once: 8 MiB, and 16 MiB of features at 2,048 dimensions
ROUNDING = 1e-12  # of the squared lengths: what is nearer than that is at the same place

Watch = Callable[[int, int], None]


def precision_recall(
    samples: Rows,
    reference: Rows,
    *,
    k: int = 3,
    device: torch.device | str | None = None,
    watch: Watch | None = None,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

    Around each image of a set lies a ball that reaches to its k-th nearest neighbour in that set, itself not counted.
    Precision is the part of the samples inside a ball of the reference, recall the part of the reference inside a
    ball of the samples; both in 0..1. Both depend on the number of images: state it. Distances are float64.

    Args:
        samples, reference: features [N, D] and [M, D].
        device: where to compute; the CPU when absent.
        watch: called with (blocks done, of how many).

    Raises ConfigError when the dimensions differ, or a set has not more than k images.
    """
    require_same_width(samples, reference)
    if k < 1 or min(len(samples), len(reference)) <= k:
        raise ConfigError(f"k = {k} neighbours need more than {max(k, 1)} images, in both sets, and k of at least 1.")
    place = torch.device(device or "cpu")
    progress = _Progress(watch, _steps(len(samples), len(reference)))
    # Distances do not change when both sets are moved, and numbers around 0 are rounded less.
    centre = torch.from_numpy(next(in_blocks(reference, BLOCK))[1]).mean(0).to(place)
    own = _radii(samples, k, centre, progress)
    real = _radii(reference, k, centre, progress)
    inside = torch.zeros(len(samples), dtype=torch.bool, device=place)
    reached = torch.zeros(len(reference), dtype=torch.bool, device=place)
    for rows, x in _blocks(samples, centre):
        for columns, y in _blocks(reference, centre):
            distance, slack = _squared_distances(x, y)
            distance -= slack
            inside[rows] |= (distance <= real[columns]).any(1)
            reached[columns] |= (distance <= own[rows, None]).any(0)
            progress.step()
    return float(inside.double().mean()), float(reached.double().mean())


def expected_seconds(
    pairs: Sequence[tuple[int, int]], width: int, *, k: int = 3, device: torch.device | str | None = None
) -> float:
    """About how long `precision_recall` takes for sets of so many images in `width` dimensions, all pairs of sets one
    after the other: one block is timed here."""
    rows = min(BLOCK, max(max(pair) for pair in pairs))
    return sum(_steps(*pair) for pair in pairs) * _seconds_of_a_block(rows, width, k, torch.device(device or "cpu"))


def _seconds_of_a_block(rows: int, width: int, k: int, device: torch.device) -> float:
    x = torch.rand(rows, width, dtype=torch.float64, device=device)
    took = 0.0
    for _ in range(2):  # the first call of a library is slow
        start = time.perf_counter()
        distance, _ = _squared_distances(x, x)
        distance.topk(min(k, rows), largest=False).values.sum().item()  # waits for a GPU
        took = time.perf_counter() - start
    return took


def _steps(n: int, m: int) -> int:
    """Blocks of distances of sets of n and m images: within each, seen from one side, and between them."""
    a, b = -(-n // BLOCK), -(-m // BLOCK)
    return a * (a + 1) // 2 + b * (b + 1) // 2 + a * b


def _radii(table: Rows, k: int, centre: Tensor, progress: _Progress) -> Tensor:
    """The squared distance of every row to its k-th nearest other row: float64 [N]."""
    nearest = torch.full((len(table), k), torch.inf, dtype=torch.float64, device=centre.device)
    for rows, x in _blocks(table, centre):
        for columns, y in _blocks(table, centre, rows.start):  # the others are these, seen from the other side
            distance, _ = _squared_distances(x, y)
            if rows == columns:
                distance.fill_diagonal_(torch.inf)
            else:
                nearest[columns] = torch.cat((nearest[columns], distance.T), 1).topk(k, largest=False).values
            nearest[rows] = torch.cat((nearest[rows], distance), 1).topk(k, largest=False).values
            progress.step()
    return nearest[:, -1]


def _blocks(table: Rows, centre: Tensor, start: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """The blocks of a table from row `start` on, on the device of `centre` and moved by -centre."""
    for where, values in in_blocks(table, BLOCK, start):
        yield where, torch.from_numpy(values).to(centre.device) - centre


def _squared_distances(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Between the rows of [B, D] and [C, D], [B, C], and how much of each may be rounding."""
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)  # [B, C]
    return torch.addmm(lengths, x, y.T, alpha=-2).clamp_(min=0), lengths.mul_(ROUNDING)


class _Progress:
    def __init__(self, watch: Watch | None, total: int) -> None:
        self._watch, self._done, self._total = watch, 0, total

    def step(self) -> None:
        self._done += 1
        if self._watch:
            self._watch(self._done, self._total)


__all__ = ["expected_seconds", "precision_recall"]
