from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes

from nextblock.errors import DataError
from nextblock.figures.solvers import draw_solvers

CURVES = {
    "euler, uniform": {2: 0.009, 10: 0.002, 50: 0.001},
    "euler, quadratic": {2: 0.008, 10: 0.003},
    "heun, uniform": {3: 0.004, 19: 0.001},
}


def test_a_curve_for_each_arm_and_a_ring_where_it_is_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[float], list[float], str, str]] = []
    plot = Axes.plot

    def noted(self: Axes, x: list[float], y: list[float], style: str, **options: str) -> object:
        drawn.append((list(x), list(y), style, options.get("color", "")))
        return plot(self, x, y, style, **options)

    monkeypatch.setattr(Axes, "plot", noted)
    equal = {"euler, uniform": 10, "heun, uniform": None}
    file = draw_solvers(CURVES, tmp_path / "new" / "solvers.png", reference=(0.0015, 0.002), equal=equal, title="t")
    assert file.stat().st_size > 5000
    first, ring, second, third = drawn
    assert first[:2] == ([2, 10, 50], pytest.approx([9.0, 2.0, 1.0]))
    assert ring[:2] == ([10], pytest.approx([2.0]))
    assert first[3] == second[3] != third[3]  # a solver has one colour
    assert (first[2], second[2], third[2]) == ("-", "--", "-")  # its grids differ in style


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no distance to draw"):
        draw_solvers({"euler, uniform": {}}, tmp_path / "none.png")
