import numpy as np
import pytest

from nextblock.errors import ConfigError
from nextblock.evaluation import knn
from nextblock.evaluation.features import Features
from nextblock.evaluation.knn import knn_accuracy


def clusters(count: int, seed: int, noise: float = 1.2) -> Features:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count) * 7 + 2  # neither contiguous nor from 0
    centres = np.random.default_rng(99).normal(size=(40, 8))
    values = centres[labels] + noise * rng.normal(size=(count, 8))
    return Features(values.astype(np.float32), labels, np.arange(count))


def by_hand(train: Features, test: Features, k: int, temperature: float) -> float:
    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    right = 0
    for row, label in zip(unit(test.values.astype(np.float64)), test.labels, strict=True):
        similarity = unit(train.values.astype(np.float64)) @ row
        nearest = np.argsort(-similarity)[:k]
        votes = {
            c: np.exp(similarity[nearest][train.labels[nearest] == c] / temperature).sum() for c in set(train.labels)
        }
        right += max(votes, key=votes.__getitem__) == label
    return 100 * right / len(test)


def test_agrees_with_the_formula_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = clusters(120, 0), clusters(50, 1)
    whole = knn_accuracy(train, test, k=(1, 5, 20))
    assert whole == {k: pytest.approx(by_hand(train, test, k, 0.07)) for k in (1, 5, 20)}
    assert 40 < whole[20] < 100, "too easy or too hard to tell a wrong vote"
    monkeypatch.setattr(knn, "CHUNK_NUMBERS", 7 * 120)
    assert knn_accuracy(train, test, k=(1, 5, 20)) == whole


def test_temperature_matters_and_does_not_overflow() -> None:
    train, test = clusters(120, 0, noise=2.5), clusters(80, 1, noise=2.5)
    sharp = knn_accuracy(train, test, k=100, temperature=1e-4)[100]
    assert sharp == knn_accuracy(train, test, k=1)[1]  # only the nearest counts
    assert sharp != knn_accuracy(train, test, k=100, temperature=10.0)[100]


def test_k_above_the_training_set_takes_all_of_it() -> None:
    train, test = clusters(30, 0), clusters(50, 1)
    found = knn_accuracy(train, test, k=[30, 1000])
    assert list(found) == [30, 1000]
    assert found[30] == found[1000]


def test_a_class_that_was_never_shown_is_wrong() -> None:
    train = Features(np.eye(2, dtype=np.float32), np.array([0, 1]), np.arange(2))
    test = Features(np.eye(2, dtype=np.float32), np.array([0, 5]), np.arange(2))
    assert knn_accuracy(train, test, k=1) == {1: 50.0}


@pytest.mark.parametrize(
    ("wrong", "named"), [({"k": 0}, "k must"), ({"k": []}, "k must"), ({"temperature": 0}, "temperature")]
)
def test_settings_that_cannot_work(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        knn_accuracy(clusters(20, 0), clusters(5, 1), **wrong)
