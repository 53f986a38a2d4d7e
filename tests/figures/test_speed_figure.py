from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes

from nextblock.errors import DataError
from nextblock.figures.speed import _as_gain, draw_speed

ROWS = [
    {"name": "step", "device": "cpu", "ratio": 1.3, "ratio_second": 1.1, "spread": {"ours/plain": [1.2, 1.4]}},
    {"name": "memory", "device": "cuda", "ratio": 0.6},
    {"name": "startup", "device": "cpu", "ratio": None},
]


def test_one_bar_for_each_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []
    barh = Axes.barh

    def noted(self: Axes, y: float, width: float, *more: object, **options: object) -> object:
        drawn.append((y, width))
        return barh(self, y, width, *more, **options)

    monkeypatch.setattr(Axes, "barh", noted)
    file = draw_speed(ROWS, tmp_path / "speed.png")
    assert drawn == [(0, pytest.approx(0.3)), (1, pytest.approx(-0.4))]
    assert file.stat().st_size > 1000


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no ratio to draw"):
        draw_speed(ROWS[2:], tmp_path / "speed.png")


def test_where_less_is_better_the_bar_still_points_to_the_better_side() -> None:
    less = {
        "name": "memory",
        "ratio": 0.5,
        "ratio_second": 0.8,
        "target": "≤ 0.7 × plain",
        "spread": {"ours/plain": (0.4, 0.8)},
    }
    assert _as_gain(less) == {**less, "ratio": 2.0, "ratio_second": 1.25, "spread": {"ours/plain": (1.25, 2.5)}}
    more = {"name": "speed", "ratio": 2.0, "target": "≥ 2 × plain"}
    assert _as_gain(more) == more
