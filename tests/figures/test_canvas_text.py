"""Names on pictures are drawn as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from nextblock.figures.canvas import save, show_image


def test_dollar_signs_in_names_are_no_formulas(tmp_path: Path) -> None:
    figure = Figure()
    axes = figure.subplots()
    show_image(axes, np.zeros((4, 4, 3), np.uint8), r"a$\nonsense{b$.png")
    with pytest.raises(ValueError, match="Parse"):
        figure.savefig(tmp_path / "plain.png")  # what Matplotlib does by itself
    assert save(figure, tmp_path / "ours.png").is_file()


def test_powers_of_ten_on_an_axis_stay_formulas(tmp_path: Path) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], [1e-5, 1e5])
    axes.set_yscale("log")
    axes.set_title("a$b$c")
    save(figure, tmp_path / "log.png")
    save(figure, tmp_path / "log.png")  # the labels are there from the first time
    ticks = [label for label in axes.get_yticklabels() if "mathdefault" in label.get_text()]
    assert ticks
    assert all(label.get_parse_math() for label in ticks)
    assert not axes.title.get_parse_math()
