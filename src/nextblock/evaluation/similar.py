"""The images of a set that are nearest to a few others in feature space. Any number fits: they come in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nextblock.errors import ConfigError

SAME = 1e-9  # below 1: a cosine of features that differ by rounding in float32 only


@dataclass(frozen=True)
class Similar:
    """One image of the set. index: the number it was handed in with. cosine: of its features with the query's."""

    index: int
    name: str
    cosine: float


class NearestImages:
    """The k nearest images to each query, by the cosine of their features.

    Args:
        queries: [Q, D].
        k: so many for each.
    """

    def __init__(self, queries: ArrayLike, k: int) -> None:
        self._queries = _unit(np.asarray(queries, dtype=np.float64))
        self._k, self.seen = k, 0
        self._found: list[list[Similar]] = [[] for _ in self._queries]

    def add(
        self,
        features: ArrayLike,
        names: Sequence[str],
        same: NDArray[np.bool_] | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        """Look at more images.

        Args:
            features: [M, D].
            names: M.
            same: bool [Q, M], True where the image is the query itself, which is not its neighbour; absent: where
                the features are equal up to rounding.
            numbers: M; absent: in the order handed in, from 0.

        Raises ConfigError when the features are of another width than the queries'.
        """
        values = np.asarray(features, dtype=np.float64)
        if values.shape[1] != self._queries.shape[1]:
            raise ConfigError(
                f"these features have {values.shape[1]} dimensions, the queries' {self._queries.shape[1]}. "
                "Embed both with the same encoder."
            )
        cosines = self._queries @ _unit(values).T  # [Q, M]
        numbers = range(self.seen, self.seen + len(values)) if numbers is None else numbers
        left_out = cosines > 1 - SAME if same is None else same
        for q, row in enumerate(np.where(left_out, -np.inf, cosines)):
            order = np.argsort(-row, kind="stable")[: self._k]
            fresh = [Similar(numbers[i], names[i], float(row[i])) for i in order if row[i] > -np.inf]
            # sorted() is stable: of equally near ones the first one seen stays first
            self._found[q] = sorted([*self._found[q], *fresh], key=lambda one: -one.cosine)[: self._k]
        self.seen += len(values)

    def found(self) -> list[list[Similar]]:
        """For each query its neighbours, the nearest first; less than k where there are no more."""
        return [list(one) for one in self._found]


def _unit(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(np.float64).tiny)
