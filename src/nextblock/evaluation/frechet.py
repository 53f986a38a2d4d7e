"""The Fréchet distance between two sets of features, each taken as a Gaussian; float64 throughout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.feature_rows import as_rows, in_blocks


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] (divided by N - 1) of N features; count: N, None where nobody wrote it down.

    Raises DataError for other shapes and for numbers that are not finite.
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int | None = None

    def __post_init__(self) -> None:
        mean, covariance = (np.asarray(x, dtype=np.float64) for x in (self.mean, self.covariance))
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
            raise DataError(
                f"statistics are a mean [D] and a covariance [D, D]; got {list(mean.shape)} and "
                f"{list(covariance.shape)}."
            )
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise DataError("the statistics hold numbers that are not finite. Compute them anew.")
        if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * np.abs(covariance).max()):
            raise DataError("the covariance is not symmetric, so it is no covariance. Compute the statistics anew.")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", (covariance + covariance.T) / 2)

    @property
    def dimensions(self) -> int:
        return len(self.mean)


def statistics(features: Any) -> Statistics:
    """Mean and covariance of features [N, D], read once in blocks.

    Blocks are joined by the rule of Chan, Golub and LeVeque (1979), which never subtracts large numbers. Memory beyond
    the table is that of one block and two matrices [D, D]. Raises DataError for one image, and for numbers that are
    not finite.
    """
    table = as_rows(features, "features")
    width = table.shape[1]
    count, mean, scatter = 0, np.zeros(width), np.zeros((width, width))
    for _, values in in_blocks(table):
        own = values.mean(0)
        centred = values - own  # not in place: float64 features are the caller's own numbers
        total = count + len(values)
        shift = own - mean
        scatter += centred.T @ centred
        scatter += np.outer(shift, shift) * (count * len(values) / total)
        mean += shift * (len(values) / total)
        count = total
    return Statistics(mean, scatter / (count - 1), count)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """|m1 - m2|² + tr(S1 + S2 - 2 (S1^½ S2 S1^½)^½): the squared 2-Wasserstein distance of two Gaussians (Dowson and
    Landau 1982; as a distance of features: Heusel et al. 2017, arXiv 1706.08500, equation 6).

    With S1 = A Aᵀ and S2 = B Bᵀ the last trace is the sum of the singular values of Aᵀ B. So no square root of a
    matrix that is not symmetric is taken, nothing becomes complex, and covariances without full rank (fewer images
    than dimensions) need no special treatment. Raises ConfigError when the dimensions differ, DataError for a matrix
    that is no covariance.
    """
    if first.dimensions != second.dimensions:
        raise ConfigError(
            f"one set has statistics of {first.dimensions} dimensions, the other of {second.dimensions}. Take both "
            "from the same network, at the same image size."
        )
    shift = first.mean - second.mean
    a, b = _factor(first.covariance), _factor(second.covariance)
    overlap = np.linalg.svd(a.T @ b, compute_uv=False).sum() if a.size and b.size else 0.0
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return max(0.0, float(shift @ shift + traces - 2 * overlap))  # below 0 by rounding alone


def _factor(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    """A [D, rank] with A Aᵀ = covariance. Eigenvalues that rounding alone can make count as 0."""
    values, vectors = np.linalg.eigh(covariance)
    largest = float(np.abs(values).max())
    if values.min() < -1e-4 * largest:
        raise DataError(
            f"a covariance has the eigenvalue {values.min():.3g} beside the largest, {largest:.3g}; none can be below "
            "0. Compute the statistics anew."
        )
    kept = values > len(values) * np.finfo(np.float64).eps * largest
    return vectors[:, kept] * np.sqrt(values[kept])


__all__ = ["Statistics", "frechet_distance", "statistics"]
