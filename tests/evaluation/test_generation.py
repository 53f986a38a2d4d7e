"""KID, precision, recall and the Inception score against plain formulas and closed forms."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch

from nextblock.errors import ConfigError, DataError
from nextblock.evaluation import feature_rows, generation, neighbours
from nextblock.evaluation.features import Features
from nextblock.evaluation.frechet import frechet_distance, statistics
from nextblock.evaluation.generation import (
    PRECISION_COUNT,
    compare,
    inception_score,
    kid,
    real_against_real,
)
from nextblock.evaluation.neighbours import expected_seconds, precision_recall
from nextblock.randomness import shuffled, uniforms

RNG = np.random.default_rng


def normal(count: int, width: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return (scale * RNG(seed).normal(size=(count, width)) + shift).astype(np.float32)


def by_hand(samples: np.ndarray, reference: np.ndarray, k: int) -> tuple[float, float]:
    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=2)

    def covered(points: np.ndarray, balls: np.ndarray) -> float:
        radius = np.sort(distances(balls, balls), axis=1)[:, k]  # column 0 is the image itself
        return float((distances(points, balls) <= radius).any(1).mean())

    return covered(samples, reference), covered(reference, samples)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_agree_with_the_formula_whatever_the_blocks(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, reference = normal(90, 4, 0, scale=0.6), normal(70, 4, 1)
    expected = by_hand(samples, reference, k)
    assert expected[0] > expected[1] + 0.05, "samples of too little spread: precise, with little recall"
    assert precision_recall(samples, reference, k=k) == pytest.approx(expected)
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(neighbours, "BLOCK", 13)
    again = precision_recall(samples, reference, k=k, watch=lambda done, total: steps.append((done, total)))
    assert again == pytest.approx(expected)
    assert steps[-1] == (7 * 8 // 2 + 6 * 7 // 2 + 7 * 6,) * 2


def test_precision_and_recall_at_their_ends() -> None:
    x = normal(40, 5, 0)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 100) == (0.0, 0.0)
    # copies of one image: balls without extent
    copies = np.repeat(normal(1, 64, 1, shift=50.0), 6, axis=0)
    assert precision_recall(copies, copies) == (1.0, 1.0)
    assert precision_recall(copies, np.concatenate((copies, normal(30, 64, 2)))) == (1.0, pytest.approx(6 / 36))


def test_what_rounding_alone_tells_apart_is_at_the_same_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of five images, in two orders: computed in other blocks, a distance of 0 comes out as 0 or a little more,
    and must not fall out of a ball of radius 0."""
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    for seed in range(6):
        for width in (37, 64):
            images = RNG(seed).normal(size=(5, width)) * 3 + 5
            assert precision_recall(np.repeat(images, 6, axis=0), np.tile(images, (6, 1))[:-3]) == (1.0, 1.0)


class Held:
    """A table [count, width] that lies nowhere: its rows are made when they are read. It counts those still held."""

    def __init__(self, count: int, seed: int = 0, width: int = 4) -> None:
        self.shape, self.seed = (count, width), seed
        self.now = self.most = 0

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        rows = np.arange(len(self))[index]
        found = uniforms(self.seed, "table", rows, self.shape[1])
        self.now += len(rows)
        self.most = max(self.most, self.now)
        weakref.finalize(found, self._released, len(rows))
        return found

    def _released(self, count: int) -> None:
        self.now -= count

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        raise AssertionError("the whole table was read into memory")


@pytest.mark.parametrize(("metric", "most"), [("frechet", 2 * 64), ("kid", 100), ("precision_recall", 3 * 128)])
def test_any_number_of_images_is_compared_in_the_memory_of_a_few_blocks(
    metric: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most so many rows of each set are held, of 1,600 images as of 3,200: a block, or the two that are compared,
    while the next is read; of KID one subset."""
    monkeypatch.setattr(feature_rows, "BLOCK_ROWS", 64)
    monkeypatch.setattr(neighbours, "BLOCK", 128)
    monkeypatch.setitem(kid.__kwdefaults__, "subset_size", 100)
    held = []
    for count in (1600, 3200):
        sets = Held(count, 0), Held(count + 100, 1)
        compare(*sets, metrics=[metric])
        held.append(max(table.most for table in sets))
    assert held[0] == held[1] <= most
    whole = Held(3200)
    real_against_real(whole, metrics=[metric])
    assert whole.most <= 2 * most  # each half is a table of its own


def test_the_inception_score_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_rows, "BLOCK_ROWS", 64)
    table = Held(3200)
    inception_score(table)
    assert table.most <= 128


def test_precision_and_recall_take_so_many_images_of_each_set() -> None:
    x, y = normal(300, 4, 0, scale=0.7), normal(90, 4, 1)
    found = compare(x, y, metrics=["precision_recall"], precision_count=120)
    assert found["precision_counts"] == [120, 90]
    assert found["counts"] == [300, 90]
    rows = np.sort(shuffled(0, "precision_recall/samples", 300, np.arange(120)))
    assert (found["precision"], found["recall"]) == precision_recall(x[rows], y)
    assert compare(x, y, metrics=["precision_recall"], precision_count=120) == found
    other = compare(x, y, metrics=["precision_recall"], precision_count=120, seed=1)
    assert (other["precision"], other["recall"]) != (found["precision"], found["recall"])
    everything = compare(x, y, metrics=["precision_recall"], precision_count=0)
    assert everything["precision_counts"] == [300, 90]
    assert (everything["precision"], everything["recall"]) == precision_recall(x, y)
    assert PRECISION_COUNT == 50_000
    with pytest.raises(ConfigError, match=r"precision_count must be 0 .* or more than 3; got -1"):
        compare(x, y, precision_count=-1)


def test_the_time_of_precision_and_recall_grows_with_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_seconds_of_a_block", lambda rows, width, k, device: rows * width / 1e6)
    assert expected_seconds([(1024, 1024)], 500) == pytest.approx(3 * 0.512)
    assert expected_seconds([(10 * 1024, 1)], 500) == pytest.approx((55 + 1 + 10) * 0.512)
    assert expected_seconds([(100, 100), (50, 50)], 500) == pytest.approx((3 + 3) * 0.05)
    monkeypatch.undo()
    assert 0 < expected_seconds([(10, 10)], 4) < 10


def kid_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kid_of_whole_sets_is_the_unbiased_formula() -> None:
    x, y = normal(12, 3, 0).astype(np.float64), normal(12, 3, 1, shift=0.5).astype(np.float64)
    assert kid(x, y) == (pytest.approx(kid_by_hand(x, y), rel=1e-10), None)


def test_kid_of_subsets_is_unbiased_and_seeded() -> None:
    same = kid(normal(400, 4, 0), normal(300, 4, 1), subsets=50, subset_size=60)
    other = kid(normal(400, 4, 0), normal(300, 4, 1, shift=0.5), subsets=50, subset_size=60)
    assert same[1] is not None
    assert abs(same[0]) < same[1]  # around 0, on either side
    assert other[1] is not None
    assert other[0] > 2 * other[1]
    assert kid(normal(400, 4, 0), normal(300, 4, 1), subsets=50, subset_size=60) == same
    assert kid(normal(400, 4, 0), normal(300, 4, 1), subsets=50, subset_size=60, seed=1) != same


def test_inception_score_closed_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    certain = np.tile(np.eye(5), (40, 1))  # every class as often, each image sure of one
    assert inception_score(certain, splits=1) == (pytest.approx(5.0), 0.0)
    assert inception_score(np.full((200, 5), 0.2)) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    p = RNG(0).dirichlet(np.ones(7), size=64)
    monkeypatch.setattr(feature_rows, "BLOCK_ROWS", 10)
    expected = np.exp((p * np.log(p / p.mean(0))).sum(1).mean())
    assert inception_score(p, splits=1)[0] == pytest.approx(expected, rel=1e-12)
    assert inception_score(p[:8])[1] == 0.0  # fewer images than splits


def test_inception_score_does_not_depend_on_the_classes_lying_in_order() -> None:
    sorted_by_class = np.repeat(np.eye(10), 100, axis=0)  # in order, each of ten splits would be one class: 1.0
    mean, _ = inception_score(sorted_by_class)
    assert 9 < mean <= 10


def test_compare_takes_features_arrays_and_tensors() -> None:
    x, y = normal(60, 4, 0), normal(50, 4, 1, shift=1.0)
    found = compare(x, y)
    assert found["frechet"] == frechet_distance(statistics(x), statistics(y))
    assert (found["precision"], found["recall"]) == precision_recall(x, y)
    assert found["counts"] == [60, 50]
    assert found["dimensions"] == 4
    as_features = Features(x, np.full(60, -1), np.arange(60))
    assert compare(as_features, torch.from_numpy(y)) == found
    only = compare(x, y, metrics=["frechet"])
    assert set(only) == {"frechet", "counts", "dimensions"}


def test_the_floor_is_two_disjoint_halves_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(200, 4, 0)
    floor = real_against_real(x)
    assert floor is not None
    assert floor["counts"] == [100, 100]
    assert 0 < floor["frechet"] < 0.2 < compare(x, x + 1)["frechet"]
    assert real_against_real(x) == floor
    assert real_against_real(x, seed=1) != floor
    # of 0..7 one half has what the other lacks
    seen: list[np.ndarray] = []
    monkeypatch.setattr(generation, "statistics", lambda rows: seen.append(rows[:]) or statistics(rows))
    real_against_real(np.arange(8.0)[:, None], metrics=["frechet"])
    assert sorted(np.concatenate(seen)[:, 0]) == list(range(8))
    assert real_against_real(x[:3]) is None


def test_bad_input_is_told() -> None:
    x = normal(10, 4, 0)
    with pytest.raises(ConfigError, match="4 dimensions, the other of 5"):
        compare(x, normal(10, 5, 0))
    with pytest.raises(ConfigError, match="Did you mean 'frechet'"):
        compare(x, x, metrics=["frechett"])
    with pytest.raises(DataError, match="1 image"):
        compare(x[:1], x)
    with pytest.raises(ConfigError, match=r"\[10, 2, 2\]"):
        compare(x.reshape(10, 2, 2), x)
    with pytest.raises(ConfigError, match="more than 3 images"):
        precision_recall(x[:3], x)
    few = compare(x[:3], x)
    assert few["precision"] is None
    assert few["frechet"] >= 0
    x[4, 2] = np.nan
    for metric in ("frechet", "kid", "precision_recall"):
        with pytest.raises(DataError, match="not finite"):
            compare(x, normal(10, 4, 1), metrics=[metric])
