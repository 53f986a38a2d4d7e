"""Hold-outs and few-shot choices go class by class and depend on labels and seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from nextblock.data.selection import few_shot, held_out
from nextblock.errors import ConfigError, DataError

LABELS = np.array([0] * 10 + [3] * 5 + [1] * 2 + [7] + [-1] * 4, dtype=np.int64)


def test_held_out_takes_the_fraction_of_every_class() -> None:
    chosen = held_out(LABELS, 0.2, seed=0)
    assert chosen.dtype == bool
    assert chosen.shape == LABELS.shape
    assert {label: int(chosen[label == LABELS].sum()) for label in (0, 3, 1, 7, -1)} == {0: 2, 3: 1, 1: 1, 7: 0, -1: 0}


def test_held_out_leaves_one_image_of_each_class() -> None:
    chosen = held_out(LABELS, 0.999, seed=0)
    assert all((~chosen[label == LABELS]).sum() == 1 for label in (0, 3, 1, 7))


def test_held_out_depends_on_the_seed_alone() -> None:
    labels = np.arange(400) % 4
    assert (held_out(labels, 0.25, seed=1) == held_out(labels, 0.25, seed=1)).all()
    assert (held_out(labels, 0.25, seed=1) != held_out(labels, 0.25, seed=2)).any()


@pytest.mark.parametrize("labels", [np.arange(5), np.full(5, -1), np.zeros(0, dtype=np.int64)])
def test_nothing_to_hold_out(labels: np.ndarray) -> None:
    with pytest.raises(DataError, match="no image can be held out"):
        held_out(labels, 0.2, seed=0)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 20.0])
def test_a_fraction_is_a_fraction(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        held_out(LABELS, fraction, seed=0)


def test_few_shot_takes_as_many_of_every_class() -> None:
    labels = np.random.default_rng(0).integers(-1, 6, 300)
    chosen = few_shot(labels, 5, seed=0)
    assert chosen.dtype == np.int64
    assert (np.diff(chosen) > 0).all()
    assert np.unique(labels[chosen], return_counts=True)[1].tolist() == [5] * 6
    assert (labels[chosen] >= 0).all()
    assert chosen.tolist() != few_shot(labels, 5, seed=1).tolist()
    assert set(few_shot(labels, 2, seed=0)) <= set(chosen)


def test_few_shot_says_which_class_has_too_few() -> None:
    with pytest.raises(DataError, match=r"class 1 has 2 images to choose from .*, fewer than the 3"):
        few_shot(LABELS, 3, seed=0)
    with pytest.raises(DataError, match="none of these 3 images has a label"):
        few_shot(np.full(3, -1), 1, seed=0)
    with pytest.raises(ConfigError, match="per_class must be 1 or more; got 0"):
        few_shot(LABELS, 0, seed=0)
