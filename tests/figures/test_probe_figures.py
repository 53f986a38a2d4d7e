from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from nextblock.errors import DataError
from nextblock.figures import confusion, probe, suite
from nextblock.figures.confusion import draw_confusion, most_confused, shortened
from nextblock.figures.probe import draw_layers, draw_learning_rates, draw_probe_curves
from nextblock.figures.suite import draw_suite


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures instead of their files."""
    figures: list[Figure] = []

    def keep(figure: Figure, path: Path) -> Path:
        figures.append(figure)
        return path

    for module in (probe, confusion, suite):
        monkeypatch.setattr(module, "save", keep)
    return figures


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def head(lr: float, accuracy: float | None, **more: Any) -> dict[str, Any]:
    return {"kind": "linear", "lr": lr, "weight_decay": 0.0, "layers": "layer 12", "accuracy": accuracy} | more


def test_files_are_written(tmp_path: Path) -> None:
    curve = {"step": 1, "epoch": 1.0, "head": 0, "kind": "linear", "lr": 0.1, "val_top1": 3.0, "train_loss": 2.0}
    layer = {"kind": "linear", "layer": 1, "bidirectional": False, "accuracy": 12.0}
    made = [
        draw_learning_rates([head(0.1, 50.0)], tmp_path / "new" / "rates.png", title="rates"),
        draw_probe_curves([curve], tmp_path / "curves.png"),
        draw_layers([layer], tmp_path / "layers.png"),
        draw_suite([{"name": "dtd", "linear": 20.0}], tmp_path / "suite.png"),
        draw_confusion([[3, 1], [0, 2]], ["a", "b"], tmp_path / "few.png"),
        draw_confusion(np.eye(41, dtype=int), [str(i) for i in range(41)], tmp_path / "many.png"),
    ]
    for path in made:
        with Image.open(path) as image:
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50


def test_learning_rates_are_grouped_and_sorted(drawn: list[Figure]) -> None:
    rows = [head(0.1, 3.0), head(0.001, 1.0), head(0.01, 2.0), head(0.01, 9.0, layers="layers 7-12")]
    draw_learning_rates(rows, "x.png", chosen=3)
    (axes,) = drawn[0].axes
    lines = {str(line.get_label()): line for line in axes.get_lines()}
    assert labels(drawn[0]) == ["linear, layer 12", "linear, layers 7-12", "chosen: 0.01, 9.0 %"]
    assert lines["linear, layer 12"].get_xydata().tolist() == [[0.001, 1.0], [0.01, 2.0], [0.1, 3.0]]
    assert axes.get_xscale() == "log"


def test_diverged_heads_are_crosses_and_no_points(drawn: list[Figure]) -> None:
    draw_learning_rates([head(0.1, None), head(0.3, float("nan")), head(0.01, 40.0)], "x.png", chosen=0)
    lines = {str(line.get_label()): line for line in drawn[0].axes[0].get_lines()}
    assert lines["diverged"].get_xdata().tolist() == [0.1, 0.3]
    assert lines["linear"].get_xdata().tolist() == [0.01]
    draw_learning_rates([head(0.1, None)], "x.png")
    with pytest.raises(DataError, match="no head to draw"):
        draw_learning_rates([], "x.png")


def curves() -> list[dict[str, Any]]:
    rows = []
    for number, (kind, lr, last) in enumerate([("linear", 0.2, 60.0), ("linear", 0.1, 50.0), ("attentive", 0.1, 70.0)]):
        for epoch in (2.0, 1.0):  # from files in any order
            made = {"step": epoch, "epoch": epoch, "head": number, "kind": kind, "lr": lr}
            rows.append(made | {"train_loss": 4 / epoch, "val_top1": last if epoch == 2 else 99.0})
        rows.append(made | {"epoch": 1.5, "train_loss": "", "val_top1": None})
    return rows


def test_the_best_head_of_each_kind_is_the_one_that_ends_best(drawn: list[Figure]) -> None:
    draw_probe_curves(curves(), "x.png")
    assert labels(drawn[0]) == ["linear: best of 2, lr 0.2, 60.00 %", "attentive: lr 0.1, 70.00 %"]
    loss, accuracy = drawn[0].axes
    assert [line.get_linewidth() > 2 for line in accuracy.get_lines()] == [True, False, True]
    assert loss.get_lines()[0].get_xydata().tolist() == [[1.0, 4.0], [2.0, 2.0]]
    assert accuracy.get_lines()[0].get_color() == probe.KINDS["linear"].lower()


def test_without_accuracies_there_is_one_panel(drawn: list[Figure]) -> None:
    rows = [row | {"val_top1": None, "train_loss": row["train_loss"] or None} for row in curves()]
    rows[0]["train_loss"] = 1.0
    draw_probe_curves(rows, "x.png")
    assert len(drawn[0].axes) == 1
    assert labels(drawn[0])[0] == "linear: best of 2, lr 0.2, last loss 1"
    with pytest.raises(DataError, match="no loss or accuracy"):
        draw_probe_curves([row | {"train_loss": float("inf"), "val_top1": None} for row in rows], "x.png")


def test_diverged_losses_do_not_flatten_the_others() -> None:
    assert probe._top([4.6, 4.8, 4.7, 1e6]) == pytest.approx(7.2)
    assert probe._top([0.7, 0.7, 1.2, 1.3]) == pytest.approx(1.05 * 1.3)
    assert probe._top([2.0]) == pytest.approx(2.1)


def test_layers_name_their_best(drawn: list[Figure]) -> None:
    rows = [
        {"kind": "linear", "layer": layer, "bidirectional": bidirectional, "accuracy": accuracy}
        for bidirectional, accuracies in ((False, (10, 30, 20)), (True, (5, None, 6)))
        for layer, accuracy in enumerate(accuracies, start=1)
    ]
    draw_layers(rows, "x.png")
    assert labels(drawn[0]) == [
        "linear, causal: best at layer 2, 30.0 %", "linear, bidirectional: best at layer 3, 6.0 %"
    ]  # fmt: skip


def test_a_suite_has_bars_and_published_marks(drawn: list[Figure]) -> None:
    rows = [
        {"name": "dtd", "linear": 60.0, "attentive": None, "published": {"MAE-H": 78.1, "XTRA-H": None}},
        {"name": "rxrx1", "linear": 4.0, "attentive": 6.0},
    ]
    draw_suite(rows, "x.png")
    (axes,) = drawn[0].axes
    assert [bar.get_width() for group in axes.containers for bar in group] == [60.0, 4.0, 6.0]
    assert axes.get_lines()[0].get_xdata().tolist() == [78.1]
    assert labels(drawn[0]) == ["linear probe", "attentive probe", "MAE-H, published"]
    with pytest.raises(DataError, match="no accuracy"):
        draw_suite([{"name": "dtd", "linear": None}], "x.png")


def test_confusion_is_in_percent_of_the_true_class(drawn: list[Figure]) -> None:
    draw_confusion([[3, 1, 0], [0, 20, 0], [0, 0, 0]], ["a", "b", "a very long name of a kind of dog"], "x.png")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["75", "25", "100"]
    shown = axes.images[0].get_array()
    assert np.ma.getmaskarray(shown)[2].all()  # no image of that class: nothing known
    assert axes.get_yticklabels()[2].get_text() == "a very long…kind of dog"
    for wrong in ([[1, 2]], np.eye(3)):
        with pytest.raises(DataError, match=r"of 2 classes must be \[C, C\]"):
            draw_confusion(wrong, ["a", "b"], "x.png")


def test_many_classes_are_listed_by_their_confusions(drawn: list[Figure]) -> None:
    counts = np.diag(np.full(600, 10))
    counts[7, 599], counts[3, 4] = 30, 5
    draw_confusion(counts, [f"class {i}" for i in range(600)], "x.png")
    heat, listed = (axes for axes in drawn[0].axes if axes.images or axes.texts)
    assert heat.images[0].get_array().shape == (200, 200)
    assert heat.images[0].get_array()[2, 199] == 75  # the largest of its 3x3 classes
    said = [text.get_text() for text in listed.texts]
    assert said == ["30", "class 7", "→ class 599  (75 %)", "5", "class 3", "→ class 4  (33 %)"]


def test_most_confused_pairs() -> None:
    assert most_confused([[50, 2, 7], [7, 50, 0], [0, 0, 50]], most=3) == [(0, 2, 7), (1, 0, 7), (0, 1, 2)]
    assert most_confused(np.eye(3)) == []


def test_long_names_lose_their_middle() -> None:
    assert shortened("Chevrolet Silverado 1500 Crew Cab 2012", 13) == "Chevro…b 2012"
    assert shortened("cat", 3) == "cat"
