"""A linear classifier on frozen features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from nextblock.data.selection import held_out
from nextblock.errors import ConfigError
from nextblock.evaluation.features import Features, labelled_pair

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
HELD_OUT = 0.15
PATIENCE = 2
MAX_ITERATIONS = 1000
TOLERANCE = 1e-4
# Below this many classes the products are so narrow that BLAS threads mostly wait for each other (measured
# tens of times slower on a busy machine).
MANY_CLASSES = 64


@dataclass(frozen=True)
class LinearResult:
    """What `linear_accuracy` found.

    accuracy: percent of the test images. strength: the one chosen. validation: percent of the held-out training
    images for each strength tried. converged: whether the last fit met its tolerance before its iterations ran
    out; where it did not, more iterations would still move the accuracy a little.
    """

    accuracy: float
    strength: float
    validation: dict[float, float]
    converged: bool


def linear_accuracy(
    train: Features, test: Features, *, seed: int = 0, strengths: Sequence[float] = STRENGTHS
) -> LinearResult:
    """Accuracy in percent of multinomial logistic regression (L-BFGS, scikit-learn) on standardised features.

    It minimises the mean cross entropy plus strength / 2 times the squared weights, so that a strength means the
    same for any number of images. The strength is chosen on 15 % of the *training* images, held out class by
    class; the test images play no part in it. Strengths are tried from strong to weak and the search ends after
    two in a row that are no better. Then all training images are fitted, starting from the best of these fits.

    Args:
        train, test: pooled features; images without a label are left out. A test image of a class that the
            training set has not counts as wrong.
        seed: decides the held-out images.
        strengths: to choose from; one alone is taken as it is.

    Raises ConfigError for strengths or dimensions that cannot work, DataError when there are no labels, one class
    only, or no class with two images to choose the strength by.
    """
    train, test = labelled_pair(train, test)
    candidates = sorted(set(strengths), reverse=True)
    if not candidates or candidates[-1] <= 0:
        raise ConfigError(f"strengths must be one or more numbers above 0; got {strengths!r}.")
    apart = np.zeros(len(train), dtype=bool)
    if len(candidates) > 1:
        apart = held_out(train.labels, HELD_OUT, seed, "linear/held_out")
    order = np.argsort(apart, kind="stable")  # the held-out ones last, so that both parts are views
    fitted = len(order) - int(apart.sum())
    mean, deviation = _statistics(train.values)
    x, labels = _standardised(train.values[order], mean, deviation), train.labels[order]
    narrow = len(np.unique(labels)) < MANY_CLASSES
    with threadpool_limits(limits=1 if narrow else None, user_api="blas"):
        model, validation = _search(x, labels, fitted, candidates)
        strength = max(validation, key=lambda s: (validation[s], s))  # of equals the strongest
        converged = _fit(model, x, labels, strength)
        accuracy = _percent(model, _standardised(test.values.copy(), mean, deviation), test.labels)
    return LinearResult(accuracy, strength, validation, converged)


def _search(
    x: NDArray[np.float32], labels: NDArray[np.int64], fitted: int, strengths: Sequence[float]
) -> tuple[LogisticRegression, dict[float, float]]:
    """The best model, to start the last fit from, and the held-out accuracy by strength, from strong to weak.

    Each fit starts where the one before ended: weak strengths need many more iterations from nothing.
    """
    model = LogisticRegression(max_iter=MAX_ITERATIONS, tol=TOLERANCE, warm_start=True)
    if len(strengths) == 1:
        return model, {strengths[0]: float("nan")}
    found: dict[float, float] = {}
    best, best_model, worse = -1.0, model, 0
    for strength in strengths:
        _fit(model, x[:fitted], labels[:fitted], strength)
        found[strength] = _percent(model, x[fitted:], labels[fitted:])
        if found[strength] > best:
            best, best_model, worse = found[strength], deepcopy(model), 0
        else:
            worse += 1
        if worse == PATIENCE:
            break
    return best_model, found


def _fit(model: LogisticRegression, x: NDArray[np.float32], labels: NDArray[np.int64], strength: float) -> bool:
    """Whether the fit converged; scikit-learn's C is the inverse of the strength summed over the images."""
    model.set_params(C=1 / (strength * len(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, labels)
    return int(model.n_iter_.max()) < MAX_ITERATIONS


def _percent(model: LogisticRegression, x: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    return 100 * float((model.predict(x) == labels).mean())


def _statistics(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation of each dimension, [D] each; a constant dimension gets 1."""
    mean = values.mean(0, dtype=np.float64)
    deviation = values.std(0, dtype=np.float64)
    deviation[deviation <= 1e-7 * np.abs(mean)] = 1
    return mean.astype(np.float32), deviation.astype(np.float32)


def _standardised(
    values: NDArray[np.float32], mean: NDArray[np.float32], deviation: NDArray[np.float32]
) -> NDArray[np.float32]:
    """In place."""
    values -= mean
    values /= deviation
    return values
