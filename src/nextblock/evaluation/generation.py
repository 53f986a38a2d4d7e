"""How good are generated images? Two sets of features, compared; and the Inception score of one set.

    compare(samples, reference)  ->  {"frechet": 12.3, "kid": 0.004, "precision": 0.61, ...}

Every number depends on the features, and nearly every one on how many images there are; a number without both says
little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nextblock.errors import ConfigError, nearest
from nextblock.evaluation.feature_rows import Rows, SomeRows, as_rows, block, in_blocks, require_same_width
from nextblock.evaluation.frechet import frechet_distance, statistics
from nextblock.evaluation.neighbours import precision_recall
from nextblock.randomness import permutation, shuffled

METRICS = ("frechet", "kid", "precision_recall")
_ALSO_CALLED = {"fid": "frechet"}  # it looks like kid, but is called frechet until the features are Inception's
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # of precision and recall
PRECISION_COUNT = 50_000  # images of each set, as arXiv 1904.06991 takes: the work grows with the square

Watch = Callable[[str, int, int], None]


def compare(
    samples: Any,
    reference: Any,
    *,
    metrics: Sequence[str] = METRICS,
    k: int = NEIGHBOURS,
    precision_count: int = PRECISION_COUNT,
    seed: int = 0,
    device: torch.device | str | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Fréchet distance, KID, precision and recall of `samples` against `reference`.

    Args:
        samples, reference: `Features`, or arrays or tensors [N, D]; mapped files are read in blocks.
        metrics: some of "frechet", "kid", "precision_recall".
        k: neighbours of precision and recall; both are None where a set has not more images than that.
        precision_count: precision and recall take at most so many images of each set, drawn at random; 0 = all.
        seed: of the subsets of KID and of that draw.
        device: of the distances between neighbours; the CPU when absent.
        watch: called with (what is being computed, steps done, of how many).

    Returns a dict: frechet; kid and kid_std; precision and recall (0..1) and precision_counts, of how many images;
    counts [N, M]; dimensions. Raises ConfigError for sets that cannot be compared, DataError for too few images or
    numbers that are not finite.
    """
    require_precision_count(precision_count, k)
    for name in metrics:
        if name not in METRICS:
            raise ConfigError(f"no metric is named '{name}'.{metric_hint(name)} There are {', '.join(METRICS)}.")
    first, second = as_rows(samples, "samples"), as_rows(reference, "reference")
    require_same_width(first, second)
    found: dict[str, Any] = {"counts": [len(first), len(second)], "dimensions": first.shape[1]}
    if "frechet" in metrics:
        found["frechet"] = frechet_distance(statistics(first), statistics(second))
    if "kid" in metrics:
        found["kid"], found["kid_std"] = kid(first, second, seed=seed, watch=_named(watch, "KID"))
    if "precision_recall" in metrics:
        drawn = [
            _some(table, precision_count, seed, f"precision_recall/{side}")
            for side, table in (("samples", first), ("reference", second))
        ]
        pair: tuple[float | None, ...] = None, None
        if min(map(len, drawn)) > k:
            told = _named(watch, "precision and recall")
            pair = precision_recall(drawn[0], drawn[1], k=k, device=device, watch=told)
        found["precision"], found["recall"] = pair
        found["precision_counts"] = [len(table) for table in drawn]
    return found


def metric_hint(name: str, known: Sequence[str] = METRICS) -> str:
    """What somebody may have meant by a metric that is not there, as a sentence, or an empty string."""
    plain = name.strip().lower()
    return nearest(_ALSO_CALLED.get(plain, plain), known)


def require_precision_count(count: int, k: int = NEIGHBOURS) -> None:
    """Raise ConfigError for a number of images that precision and recall of k neighbours cannot take."""
    if count and count <= k:
        raise ConfigError(f"precision_count must be 0 (all images) or more than {k}; got {count}.")


def _some(table: Rows, count: int, seed: int, purpose: str) -> Rows:
    """`count` random rows of a table, in its order; all where it has no more, or count is 0."""
    if not 0 < count < len(table):
        return table
    return SomeRows(table, np.sort(shuffled(seed, purpose, len(table), np.arange(count))))


def _named(watch: Watch | None, what: str) -> Callable[[int, int], None] | None:
    return None if watch is None else lambda done, total: watch(what, done, total)


def real_against_real(reference: Any, *, seed: int = 0, **settings: Any) -> dict[str, Any] | None:
    """`compare` of two random halves of one set: what is left between sets that do not differ. None below 4 images.

    The halves have half the images each, and a Fréchet distance of fewer images is larger (Chong and Forsyth 2020,
    arXiv 1911.07023): below as many samples or more this floor is too high rather than too low, below fewer samples
    than a half it is too low. `settings` are those of `compare`.
    """
    table = as_rows(reference, "reference")
    if len(table) < 4:
        return None
    order, middle = permutation(seed, "halves", len(table)), len(table) // 2
    halves = [SomeRows(table, np.sort(half)) for half in (order[:middle], order[middle:])]
    return compare(*halves, seed=seed, **settings)


def kid(
    samples: Rows,
    reference: Rows,
    *,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
    watch: Callable[[int, int], None] | None = None,
) -> tuple[float, float | None]:
    """Kernel distance, mean and standard deviation over random subsets (Bińkowski et al. 2018, arXiv 1801.01401).

    The unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³, so it may be below 0, and its mean
    does not depend on the number of images. Subsets have `subset_size` images of each set, or as many as the smaller
    set has; where both sets are one subset, there is nothing to vary and the deviation is None.
    """
    require_same_width(samples, reference)
    size = min(subset_size, len(samples), len(reference))
    if size == len(samples) == len(reference):
        subsets = 1
    found = []
    for number in range(subsets):
        rows = [
            np.sort(permutation(seed, f"kid/{side}/{number}", len(table))[:size])
            for side, table in enumerate((samples, reference))
        ]
        found.append(_squared_discrepancy(block(samples, rows[0]), block(reference, rows[1])))
        if watch:
            watch(number + 1, subsets)
    return float(np.mean(found)), float(np.std(found)) if subsets > 1 else None


def _squared_discrepancy(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Unbiased, of two of [S, D]: the mean kernel within each set, no image with itself, less twice that between."""
    size, width = x.shape

    def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
        found = a @ b.T / width + 1
        return found * found * found  # three times as fast as a power

    within = sum(float(own.sum() - np.trace(own)) for own in (kernel(x, x), kernel(y, y)))
    return within / (size * (size - 1)) - 2 * float(kernel(x, y).mean())


def inception_score(probabilities: Any, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """exp of the mean divergence of each image's class probabilities from their mean: mean and deviation over splits
    (Salimans et al. 2016, arXiv 1606.03498).

    `probabilities` [N, C] are put into a random order first: samples often lie class by class, and a split of few
    classes would score low. Between 1 and C; it knows no reference, and grows with the number of images. Fewer images
    than splits are one split. float64.
    """
    table = as_rows(probabilities, "class probabilities")
    order = permutation(seed, "inception score", len(table))
    parts = np.array_split(order, splits if len(table) >= splits else 1)
    scores = [_score(SomeRows(table, np.sort(part))) for part in parts]
    return float(np.mean(scores)), float(np.std(scores))


def _score(table: Rows) -> float:
    """Of one split: the mean of Σ p log p over images, less Σ m log m of the mean m."""
    mean, negentropy = np.zeros(table.shape[1]), 0.0
    for _, p in in_blocks(table):
        mean += p.sum(0) / len(table)
        negentropy += _plogp(p) / len(table)
    return math.exp(negentropy - _plogp(mean))


def _plogp(p: NDArray[np.float64]) -> float:
    return float((p * np.log(np.where(p > 0, p, 1.0))).sum())


__all__ = [
    "METRICS", "NEIGHBOURS", "PRECISION_COUNT", "compare", "inception_score", "kid", "metric_hint",
    "precision_recall", "real_against_real", "require_precision_count",
]  # fmt: skip
