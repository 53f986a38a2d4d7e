import warnings

import numpy as np
import pytest

from nextblock.data.selection import held_out
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation import linear
from nextblock.evaluation.features import Features
from nextblock.evaluation.linear import linear_accuracy


def made(count: int, seed: int, dimensions: int = 20, signal: float = 1.0) -> Features:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    values = rng.normal(size=(count, dimensions))
    values[:, :3] += signal * 3 * np.eye(3)[labels]
    scale = np.exp(rng.normal(size=dimensions) * 0) * np.geomspace(1e-3, 1e3, dimensions)
    return Features((values * scale + 5).astype(np.float32), labels, np.arange(count))


def test_separable_classes_are_told_apart_whatever_the_scale() -> None:
    result = linear_accuracy(made(300, 0, signal=5), made(100, 1, signal=5))
    assert result.accuracy == 100
    assert result.converged
    assert result.strength in result.validation


def test_the_test_set_has_no_part_in_the_choice() -> None:
    train, test = made(200, 0), made(100, 1)
    shuffled = Features(test.values, np.roll(test.labels, 1), test.indices)
    a, b = linear_accuracy(train, test), linear_accuracy(train, shuffled)
    assert (a.strength, a.validation) == (b.strength, b.validation)
    assert a.accuracy > b.accuracy + 20


def test_noise_calls_for_strong_regularisation() -> None:
    train, test = made(300, 0, dimensions=150, signal=0.5), made(1000, 1, dimensions=150, signal=0.5)
    chosen = linear_accuracy(train, test)
    assert chosen.strength > 1e-3
    assert chosen.accuracy > linear_accuracy(train, test, strengths=[1e-5]).accuracy + 3


def test_the_search_stops_once_weaker_is_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([50.0, 60.0, 60.0, 59.0, 99.0])
    monkeypatch.setattr(linear, "_fit", lambda *a: True)
    monkeypatch.setattr(linear, "_percent", lambda *a: next(scores))
    result = linear_accuracy(made(50, 0), made(10, 1), strengths=(1e-4, 1, 1e-1, 1e-2, 1e-3))
    assert result.validation == {1: 50.0, 1e-1: 60.0, 1e-2: 60.0, 1e-3: 59.0}
    assert result.strength == 1e-1  # of equals the strongest


def test_running_out_of_iterations_is_told_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "MAX_ITERATIONS", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not linear_accuracy(made(200, 0), made(50, 1), strengths=[1e-5]).converged


def test_every_class_is_held_out_in_proportion() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 20, 2, 1])
    chosen = held_out(labels, linear.HELD_OUT, 0, "linear/held_out")
    assert [int(chosen[labels == c].sum()) for c in range(4)] == [15, 3, 1, 0]
    assert (chosen == held_out(labels, linear.HELD_OUT, 0, "linear/held_out")).all()
    assert (chosen != held_out(labels, linear.HELD_OUT, 1, "linear/held_out")).any()


def test_features_stay_as_they_were_and_constants_do_no_harm() -> None:
    train, test = made(60, 0), made(20, 1)
    train.values[:, 5] = test.values[:, 5] = 0.1
    before = train.values.copy(), test.values.copy()
    assert np.isfinite(linear_accuracy(train, test).accuracy)
    assert (train.values == before[0]).all()
    assert (test.values == before[1]).all()


def test_errors() -> None:
    with pytest.raises(ConfigError, match="strengths"):
        linear_accuracy(made(50, 0), made(10, 1), strengths=[0.0])
    each = Features(np.eye(4, dtype=np.float32), np.arange(4), np.arange(4))
    with pytest.raises(DataError, match="a class with at least two"):
        linear_accuracy(each, each)
