"""How time, rate and memory grow: a small panel for everything that was measured over some size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from nextblock.errors import DataError
from nextblock.figures.canvas import COLOURS, FAINT, save
from nextblock.figures.probe import plain

Curve = Mapping[str, Any]

COLUMNS = 4
FEW_DECADES, FEW_SIZES = 1.8, 7


def draw_scaling(curves: Sequence[Curve], path: str | Path, *, title: str = "") -> Path:
    """Measured points with quartiles and theory's line (dashed), both axes logarithmic, the exponents in the panel.

    Args:
        curves: of name, panel (curves of one panel are drawn together), x and unit (of the axes), slope (fitted to the
            points), theory_slope, and points of x, median, low, high and expected (theory's; None where it has none).
            A point at x = 0 is a dotted level, named with its axis.
        path: of the picture; returned.
        title: above it.

    Raises DataError when there is no curve.
    """
    if not curves:
        raise DataError("There is no curve to draw.")
    panels: dict[str, list[Curve]] = {}
    for curve in curves:
        panels.setdefault(str(curve["panel"]), []).append(curve)
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.3 * columns, 3.1 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, shown) in zip(grid, panels.items(), strict=False):
        _panel(axes, name, shown)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def _panel(axes: Axes, name: str, shown: Sequence[Curve]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for curve, colour in zip(shown, COLOURS, strict=False):
        _draw(axes, curve, colour, named=len(shown) > 1)
    _room(axes, shown)
    _ticks(axes, shown[0]["points"])
    axes.set_title(name, fontsize=10)
    axes.set_xlabel(str(shown[0]["x"]), fontsize=9)
    axes.set_ylabel(str(shown[0]["unit"]), fontsize=9)
    axes.tick_params(labelsize=8)
    axes.legend(loc="upper left", fontsize=7, frameon=False, handlelength=1.4, borderaxespad=0.2)
    plain(axes)


def _draw(axes: Axes, curve: Curve, colour: str, *, named: bool) -> None:
    label = f"{curve['name'] if named else 'exponent'} {_signed(curve['slope'])}"
    label += f", theory {_signed(curve['theory_slope'])}"
    points = [point for point in curve["points"] if point["x"] > 0]
    x, y = [point["x"] for point in points], [point["median"] for point in points]
    spread = [[p["median"] - p["low"] for p in points], [p["high"] - p["median"] for p in points]]
    axes.errorbar(x, y, yerr=spread, fmt="o-", color=colour, markersize=4, linewidth=1.4, capsize=2, label=label)
    axes.plot(x, [point["expected"] for point in points], "--", color=colour, linewidth=1, alpha=0.6)
    for point in curve["points"]:
        if point["x"] == 0:
            axes.axhline(point["median"], linestyle=":", color=FAINT, label=f"{curve['x']} 0")


def _signed(exponent: float) -> str:
    return f"{exponent:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _room(axes: Axes, shown: Sequence[Curve]) -> None:
    """At least a decade, and room above the curves for a line of text each."""
    values = [p[key] for curve in shown for p in curve["points"] for key in ("median", "expected") if p[key]]
    lines = len(shown) + any(p["x"] == 0 for curve in shown for p in curve["points"])
    low, high = math.log10(min(values)), math.log10(max(values))
    spare = max(0.0, 1 - (high - low)) / 2
    low, high = low - spare - 0.05, high + spare + 0.05
    axes.set_ylim(10**low, 10 ** (high + (high - low) * (0.06 + 0.09 * lines)))
    if high - low < FEW_DECADES:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value < 1e5 else f"{value:.0e}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _ticks(axes: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Few sizes are named each; many are left to powers of ten."""
    xs = [point["x"] for point in points if point["x"] > 0]
    if len(xs) <= FEW_SIZES and max(xs) < 1e5:
        axes.set_xticks(xs, [f"{x:g}" for x in xs])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
