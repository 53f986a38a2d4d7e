"""The Fréchet distance against what is known of it in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from close import assert_close
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation import feature_rows
from nextblock.evaluation.feature_rows import SomeRows
from nextblock.evaluation.frechet import Statistics, frechet_distance, statistics

RNG = np.random.default_rng


def covariance(width: int, rank: int, seed: int) -> np.ndarray:
    a = RNG(seed).normal(size=(width, rank))
    return a @ a.T / rank


def rotation(width: int, seed: int) -> np.ndarray:
    return np.linalg.qr(RNG(seed).normal(size=(width, width)))[0]


@pytest.mark.parametrize("rank", [3, 40, 200])
def test_equal_gaussians_are_at_distance_0_whatever_the_rank(rank: int) -> None:
    s = Statistics(RNG(1).normal(size=40), covariance(40, rank, 0))
    assert 0 <= frechet_distance(s, s) < 1e-12 * np.trace(s.covariance)


@pytest.mark.parametrize("rank", [3, 200])
def test_a_shift_of_the_mean_counts_its_squared_length(rank: int) -> None:
    s, shift = covariance(40, rank, 0), RNG(2).normal(size=40)
    found = frechet_distance(Statistics(np.zeros(40), s), Statistics(shift, s))
    assert found == pytest.approx(shift @ shift, rel=1e-12)


def test_in_one_dimension() -> None:
    found = frechet_distance(Statistics(np.array([1.0]), np.array([[4.0]])), Statistics(np.array([3.0]), np.eye(1)))
    assert found == pytest.approx((3 - 1) ** 2 + (2 - 1) ** 2, rel=1e-14)


@pytest.mark.parametrize("zeros", [0, 15])
def test_commuting_covariances(zeros: int) -> None:
    """With the same eigenvectors the distance is that of the deviations; some of them may be 0, in either."""
    turn, deviations = rotation(30, 0), RNG(1).uniform(0.1, 3, size=(2, 30))
    deviations[0, :zeros] = 0
    deviations[1, zeros // 2 : zeros // 2 + zeros] = 0
    a, b = (Statistics(np.zeros(30), turn @ np.diag(d**2) @ turn.T) for d in deviations)
    expected = ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


def test_covariances_that_do_not_commute() -> None:
    """Of two 2 x 2 matrices the trace of the root is known: tr √M = √(tr M + 2 √det M), M = S1 S2."""
    a, b = covariance(2, 5, 3), covariance(2, 5, 4)
    product = a @ b
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    found = frechet_distance(Statistics(np.zeros(2), a), Statistics(np.zeros(2), b))
    assert not np.allclose(product, product.T)
    assert found == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-10)


def test_orthogonal_covariances_of_low_rank() -> None:
    """Neither sees the other: nothing is subtracted."""
    a, b = np.diag([1.0, 2, 0, 0]), np.diag([0.0, 0, 3, 4])
    assert frechet_distance(Statistics(np.zeros(4), a), Statistics(np.zeros(4), b)) == pytest.approx(10, rel=1e-12)
    assert frechet_distance(Statistics(np.zeros(4), a), Statistics(np.zeros(4), np.zeros((4, 4)))) == pytest.approx(3)


def test_fewer_images_than_dimensions_is_the_distance_of_their_plane() -> None:
    """20 images in 100 dimensions: turned and padded with zeros they are the same images in 19."""
    small, other = RNG(0).normal(size=(20, 19)), 2 * RNG(1).normal(size=(20, 19)) + 1
    turn = rotation(100, 2)
    wide, wider = (np.pad(x, ((0, 0), (0, 81))) @ turn for x in (small, other))
    expected = frechet_distance(statistics(small), statistics(other))
    assert frechet_distance(statistics(wide), statistics(wider)) == pytest.approx(expected, rel=1e-9)


def test_statistics_do_not_depend_on_blocks_and_stand_large_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    values = RNG(0).normal(size=(101, 7)) + 1e6
    whole = statistics(values)
    assert_close(whole.covariance, np.cov(values, rowvar=False), 1e-8)
    monkeypatch.setattr(feature_rows, "BLOCK_ROWS", 10)  # the last block is one image
    parts = statistics(values.astype(np.float64))
    assert_close(parts.mean, values.mean(0), 1e-14)
    assert_close(parts.covariance, np.cov(values, rowvar=False), 1e-8)
    assert parts.count == 101


class Watched:
    """A table that notes how many rows are read at once, and cannot be read as a whole."""

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.shape, self.most = values, values.shape, 0

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> np.ndarray:
        found = self.values[index]
        self.most = max(self.most, len(found))
        return found

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("the whole table was read into memory")


def test_statistics_read_a_table_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_rows, "BLOCK_ROWS", 16)
    table = Watched(RNG(0).normal(size=(1000, 3)).astype(np.float32))
    rows = RNG(1).permutation(1000)[:500]
    assert_close(statistics(SomeRows(table, rows)).mean, table.values[rows].mean(0), 1e-6)
    assert table.most == 16


def test_bad_input_is_told() -> None:
    good = Statistics(np.zeros(3), np.eye(3))
    with pytest.raises(ConfigError, match="3 dimensions, the other of 4"):
        frechet_distance(good, Statistics(np.zeros(4), np.eye(4)))
    with pytest.raises(DataError, match="eigenvalue -1"):
        frechet_distance(good, Statistics(np.zeros(3), np.diag([1.0, 1, -1])))
    with pytest.raises(DataError, match="not symmetric"):
        Statistics(np.zeros(2), np.array([[1.0, 0.5], [0, 1]]))
    with pytest.raises(DataError, match=r"\[3\] and \[2, 2\]"):
        Statistics(np.zeros(3), np.eye(2))
    with pytest.raises(DataError, match="not finite"):
        Statistics(np.array([np.nan]), np.eye(1))
    values = np.ones((5, 2))
    values[3, 1] = np.inf
    with pytest.raises(DataError, match="not finite"):
        statistics(values)
    with pytest.raises(DataError, match="1 image is not enough"):
        statistics(np.ones((1, 2)))
    with pytest.raises(ConfigError, match=r"\[2, 3, 4\]"):
        statistics(np.ones((2, 3, 4)))
