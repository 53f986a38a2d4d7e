from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from nextblock.errors import DataError
from nextblock.figures import segmentation
from nextblock.figures.segmentation import class_colours, coloured, draw_iou, draw_masks

CLASSES = ["wall", "floor", "door"]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures instead of their files."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: Path) -> Path:
        figures.append(figure)
        return path

    monkeypatch.setattr(segmentation, "save", keep)
    return figures


def sheet(path: Any, **changes: Any) -> None:
    images = np.random.default_rng(0).integers(0, 255, (2, 8, 12, 3), dtype=np.uint8)
    truth = np.zeros((2, 8, 12), dtype=np.uint8)
    truth[0, :, :6] = 2
    truth[1, 0] = 255
    said = truth.copy()
    said[:, :, :3] = 0
    given = {"images": images, "truth": truth, "predictions": said, "classes": CLASSES, "names": ["a.jpg", "b.jpg"]}
    draw_masks(path=path, **given | changes)


def test_files_are_written(tmp_path: Path) -> None:
    sheet(tmp_path / "new/sheet.png", title="kitchen")
    draw_iou(CLASSES, [50.0, 8.0, None], [90.0, 70.0, None], tmp_path / "iou.png", title="kitchen")
    for path in (tmp_path / "new/sheet.png", tmp_path / "iou.png"):
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_colours_are_told_apart() -> None:
    for count in (2, 7, 21, 151):
        colours = class_colours(count)
        assert len(set(colours)) == count
        assert colours[:2] == class_colours(2)
    near = np.array([to_rgb(colour) for colour in class_colours(21)])
    apart = np.abs(near[:, None] - near).sum(-1) + 9 * np.eye(21)
    assert apart.min() > 0.1
    found = coloured(np.array([[0, 1, 255]], dtype=np.uint8), ["#ff0000", "#0000ff"])
    assert found.tolist() == [[[255, 0, 0], [0, 0, 255], [228, 228, 228]]]


def test_the_sheet_names_what_is_seen(drawn: list[Figure]) -> None:
    sheet("x.png")
    (figure,) = drawn
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["wall", "door", "ignored"]
    assert figure.axes[2].get_xlabel() == "75.0 % of its pixels right"
    assert figure.axes[5].get_xlabel() == "100.0 % of its pixels right"  # the ignored row does not count
    with pytest.raises(DataError, match="1 names"):
        sheet("x.png", names=["a"])


def test_bars_are_sorted_and_many_classes_are_cut(drawn: list[Figure]) -> None:
    draw_iou(CLASSES, [50.0, 80.0, None], [90.0, 70.0, None], "x.png")
    draw_iou([f"c{i}" for i in range(150)], list(map(float, range(100))) + [50.0] * 50, [99.0] * 150, "y.png")
    few, many = (figure.axes[0] for figure in drawn)
    assert [label.get_text() for label in few.get_yticklabels()] == ["floor", "wall"]
    assert [bar.get_width() for bar in few.containers[0]] == [80, 50]
    labels = [label.get_text() for label in many.get_yticklabels()]
    assert (len(labels), labels[0], labels[-1]) == (60, "c99", "c0")
    assert "mean of 150" in str([text.get_text() for text in drawn[1].legends[0].get_texts()])
    with pytest.raises(DataError, match="no class to draw"):
        draw_iou(["a"], [None], [None], "x.png")
