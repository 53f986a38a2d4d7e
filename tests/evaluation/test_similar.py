from __future__ import annotations

import numpy as np
import pytest

from nextblock.errors import ConfigError
from nextblock.evaluation.similar import NearestImages


def test_batches_give_what_a_whole_sort_gives() -> None:
    rng = np.random.default_rng(0)
    queries, bank = rng.normal(size=(3, 8)), rng.normal(size=(50, 8)).astype(np.float32)
    nearest = NearestImages(queries, 4)
    for start in range(0, 50, 7):
        part = bank[start : start + 7]
        nearest.add(part, [f"image {start + i}" for i in range(len(part))])
    cosines = queries @ bank.T / np.linalg.norm(queries, axis=1)[:, None] / np.linalg.norm(bank, axis=1)
    for row, found in zip(cosines, nearest.found(), strict=True):
        assert [one.index for one in found] == np.argsort(-row)[:4].tolist()
        assert [one.name for one in found] == [f"image {one.index}" for one in found]
        assert [one.cosine for one in found] == pytest.approx(np.sort(row)[::-1][:4])


def test_an_image_is_not_its_own_neighbour() -> None:
    bank = np.array([[1.0, 0], [0.9, 0.1], [1, 1e-3], [0, 0]], np.float32)
    nearest = NearestImages(bank[:1] * 2, 4)
    nearest.add(bank, "abcd")
    assert [one.name for one in nearest.found()[0]] == ["c", "b", "d"]
    told = NearestImages(bank[:1], 4)
    told.add(bank, "abcd", np.array([[False, False, True, True]]))
    assert [one.name for one in told.found()[0]] == ["a", "b"]


def test_equally_near_ones_keep_their_order_and_widths_are_compared() -> None:
    nearest = NearestImages(np.ones((1, 2)), 2)
    for name in "abc":
        nearest.add(np.array([[1.0, 0]]), name)
    assert [one.name for one in nearest.found()[0]] == ["a", "b"]
    with pytest.raises(ConfigError, match="3 dimensions, the queries' 2"):
        nearest.add(np.ones((1, 3)), "d")
