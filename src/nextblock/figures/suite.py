"""A suite of data sets: both probes on each, beside published accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextblock.figures.canvas import BLACK, COLOURS, save
from nextblock.figures.confusion import shortened
from nextblock.figures.probe import ACCURACY, KINDS, Row, number, plain, require


def draw_suite(rows: Sequence[Row], path: str | Path, *, title: str = "") -> Path:
    """Grouped horizontal bars, the data sets from top to bottom, and published values as marks over them.

    Args:
        rows: of name and, in percent, linear and attentive, either of which may be absent or None; `published`, if
            there, maps the name of a model to its accuracy or None.
        path: of the picture; returned.
        title: above it.

    Raises DataError when no row holds an accuracy.
    """
    kinds = [kind for kind in KINDS if any(number(row.get(kind)) is not None for row in rows)]
    require(kinds, "accuracy to draw")
    height = 0.8 / len(kinds)
    figure = Figure(figsize=(8.5, 1.6 + 0.26 * len(rows) * (len(kinds) + 0.6)), layout="constrained")
    axes = figure.subplots()
    for i, kind in enumerate(kinds):
        found = [(y, value) for y, row in enumerate(rows) if (value := number(row.get(kind))) is not None]
        places = [y + (i - (len(kinds) - 1) / 2) * height for y, _ in found]
        axes.barh(places, [v for _, v in found], height * 0.92, color=KINDS[kind], label=f"{kind} probe")
        for place, (y, value) in zip(places, found, strict=True):
            # At the foot of the bar, where no published mark lies; a bar too short for it has it beyond the marks.
            inside = value >= 10
            beyond = max(value, *(published for _, published in _marks(rows[y])), 0) + 1.5
            ink = "white" if inside and kind == "linear" else BLACK
            axes.text(0.7 if inside else beyond, place, f"{value:.1f}", color=ink, fontsize=8, va="center_baseline")
    _published(axes, rows)
    axes.set_yticks(range(len(rows)), [shortened(str(row["name"]), 30) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.set_xlim(0, 101)
    axes.set_xlabel(ACCURACY)
    axes.set_title(title)
    plain(axes)
    axes.grid(False, axis="y")
    bars = axes.containers
    marks = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    figure.legend(handles=[*bars, *marks], loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(figure, path)


def _published(axes: Axes, rows: Sequence[Row]) -> None:
    """One mark for each published value; those of one data set one above the other, as they are often alike."""
    names = list(dict.fromkeys(name for row in rows for name, _ in _marks(row)))
    for i, name in enumerate(names):
        down = (i - (len(names) - 1) / 2) * 0.6 / len(names)
        marks = [(value, y + down) for y, row in enumerate(rows) for told, value in _marks(row) if told == name]
        axes.plot(
            *zip(*marks, strict=True), linestyle="", marker="Ds^ovPX"[i % 7], markersize=6,
            color=(BLACK, *COLOURS[2:-1])[i % 5], markeredgecolor="white", label=f"{name}, published",
        )  # fmt: skip


def _marks(row: Row) -> list[tuple[str, float]]:
    """Published values by name, those that there are."""
    found = ((name, number(value)) for name, value in (row.get("published") or {}).items())
    return [(name, value) for name, value in found if value is not None]
