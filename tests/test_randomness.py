from __future__ import annotations

import numpy as np
import pytest
import torch

from nextblock.randomness import hashed, normals, permutation, shuffled, uniforms


@pytest.mark.parametrize("n", [1, 2, 3, 10, 17, 1000, 4097])
def test_shuffled_is_a_permutation(n: int) -> None:
    assert sorted(shuffled(0, "epoch0", n, np.arange(n)).tolist()) == list(range(n))


def test_shuffled_depends_on_seed_and_purpose_only() -> None:
    first = shuffled(3, "epoch0", 1000, np.arange(1000))
    assert (first[500:510] == shuffled(3, "epoch0", 1000, np.arange(500, 510))).all()
    assert (first != shuffled(4, "epoch0", 1000, np.arange(1000))).mean() > 0.9
    assert (first != shuffled(3, "epoch1", 1000, np.arange(1000))).mean() > 0.9


def test_shuffled_has_no_visible_pattern() -> None:
    order = shuffled(0, "epoch0", 10_000, np.arange(10_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05


def test_shuffled_refuses_places_outside() -> None:
    with pytest.raises(ValueError, match="range"):
        shuffled(0, "epoch0", 10, [10])


def test_uniforms_are_uniform_and_independent() -> None:
    u = uniforms(0, "crop", np.arange(50_000), 4)
    assert u.shape == (50_000, 4)
    assert u.min() >= 0
    assert u.max() < 1
    assert np.abs(u.mean(0) - 0.5).max() < 0.01
    assert np.abs(u.var(0) - 1 / 12).max() < 0.002
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.02


def test_values_never_change() -> None:
    """A stored run must draw the same numbers with every later version."""
    assert hashed(0, "x", 0) == np.uint64(hashed(0, "x", [0, 1])[0])
    assert permutation(0, "order", 8).tolist() == PERMUTATION
    assert shuffled(7, "epoch2", 10, np.arange(10)).tolist() == SHUFFLED
    assert uniforms(1, "crop", [12345], 2)[0].tolist() == UNIFORMS


PERMUTATION = [1, 6, 4, 2, 3, 5, 7, 0]
SHUFFLED = [7, 9, 1, 6, 0, 8, 3, 2, 4, 5]
UNIFORMS = [0.33981742196396325, 0.40349404152640345]


def test_a_row_of_normals_depends_on_its_own_position_alone() -> None:
    together = normals(3, "noise", [5, 9, 2], (4, 6))
    alone = normals(3, "noise", [9], (4, 6))
    assert together.shape == (3, 4, 6)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(normals(4, "noise", [9], (4, 6)), alone)
    assert not torch.equal(normals(3, "other", [9], (4, 6)), alone)
    many = normals(0, "noise", range(200), (500,))
    assert abs(float(many.mean())) < 0.02
    assert abs(float(many.std()) - 1) < 0.02
    assert float(torch.corrcoef(many[:40]).fill_diagonal_(0).abs().max()) < 0.25
