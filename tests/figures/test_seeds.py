"""Intervals over seeds, and their picture."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nextblock.errors import DataError
from nextblock.figures.seeds import draw_seeds, interval


def test_the_interval_is_students() -> None:
    mean, low, high = interval([49.0, 50.0, 51.0])
    assert mean == 50.0
    assert high - mean == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)  # t(2 degrees, 97.5 %) times 1 / sqrt(3)
    assert mean - low == pytest.approx(high - mean)
    assert all(math.isnan(x) for x in interval([3.0])[1:])


def test_arms_with_and_without_a_kind_are_drawn(tmp_path: Path) -> None:
    arms = {"cells": {"linear": [50.0, 51.0], "attentive": [60.0]}, "random": {"linear": [40.0]}, "empty": {}}
    assert draw_seeds(arms, tmp_path / "seeds.png", title="t", baseline="random").stat().st_size > 5000
    with pytest.raises(DataError, match="no accuracy to draw"):
        draw_seeds({"empty": {}}, tmp_path / "none.png")
    other = {"cells": {"distance": [1.0, 2.0]}}
    assert draw_seeds(other, tmp_path / "other.png", panels={"distance": "Fréchet distance"}).stat().st_size > 5000
    with pytest.raises(DataError, match="nothing to draw"):
        draw_seeds(other, tmp_path / "none.png", panels={"kid": "KID"})
