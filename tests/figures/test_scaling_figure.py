from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from nextblock.errors import DataError
from nextblock.figures import scaling


def curve(name: str, panel: str, x: list[float]) -> dict[str, Any]:
    points = [
        {"x": n, "median": 2 + n, "low": 1 + n, "high": 3 + n, "expected": 1 + n if n else None} for n in x
    ]  # fmt: skip
    return {
        "name": name,
        "panel": panel,
        "x": "size",
        "unit": "s",
        "points": points,
        "slope": 0.8,
        "theory_slope": -0.001,
    }


def test_curves_of_a_panel_are_drawn_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Figure] = []
    save = scaling.save
    monkeypatch.setattr(scaling, "save", lambda figure, path: kept.append(figure) or save(figure, path))
    curves = [curve("files", "opening", [1, 10]), curve("rows", "opening", [1, 10]), curve("a", "steps", [0, 1, 2])]
    file = scaling.draw_scaling(curves, tmp_path / "s.png")
    first, second = kept[0].axes
    assert (first.get_title(), second.get_title()) == ("opening", "steps")
    assert [t.get_text() for t in first.get_legend().get_texts()] == [
        "files 0.80, theory 0.00",
        "rows 0.80, theory 0.00",
    ]
    assert [t.get_text() for t in second.get_legend().get_texts()] == ["size 0", "exponent 0.80, theory 0.00"]
    assert [t.get_text() for t in second.get_xticklabels()] == ["1", "2"]
    assert (first.get_xscale(), first.get_yscale()) == ("log", "log")
    assert np.asarray(Image.open(file)).std() > 5


def test_twelve_panels_stand_in_three_rows(tmp_path: Path) -> None:
    file = scaling.draw_scaling([curve(str(n), f"panel {n}", [1, 2, 4]) for n in range(12)], tmp_path / "s.png")
    width, height = Image.open(file).size
    assert 1.2 < width / height < 1.6


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no curve to draw"):
        scaling.draw_scaling([], tmp_path / "s.png")
