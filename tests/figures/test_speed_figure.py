from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes

from nextblock.errors import DataError
from nextblock.figures.speed import draw_speed

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
