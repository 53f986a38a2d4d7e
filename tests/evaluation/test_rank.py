import numpy as np
import pytest

from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.rank import effective_rank


@pytest.mark.parametrize("shape", [(200, 12), (8, 30)])
def test_agrees_with_the_definition(shape: tuple[int, int]) -> None:
    x = (np.random.default_rng(0).normal(size=shape) * np.geomspace(1, 1e-4, shape[1])).astype(np.float32)
    singular = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p = singular / singular.sum()
    assert effective_rank(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_known_values() -> None:
    assert effective_rank(np.eye(7, dtype=np.float32)) == pytest.approx(7)
    one_line = np.outer(np.arange(1, 50), np.ones(6)).astype(np.float32)
    assert effective_rank(one_line) == pytest.approx(1, abs=1e-5)
    assert effective_rank(np.zeros((5, 3), np.float32)) == 0


def test_errors() -> None:
    with pytest.raises(ConfigError, match="shape"):
        effective_rank(np.zeros((2, 3, 4), np.float32))
    with pytest.raises(DataError, match="not finite"):
        effective_rank(np.full((2, 3), np.inf, np.float32))
