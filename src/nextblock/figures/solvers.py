"""How good samples are for how many evaluations of the model: one curve for each solver."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from nextblock.errors import DataError
from nextblock.figures.canvas import BLACK, COLOURS, FAINT, save
from nextblock.figures.probe import plain

TICKS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 500, 1000)
STYLES = ("-", "--", ":", "-.")


def draw_solvers(
    curves: Mapping[str, Mapping[int, float]],
    path: str | Path,
    *,
    reference: tuple[float, float] | None = None,
    equal: Mapping[str, int | None] | None = None,
    title: str = "",
) -> Path:
    """Fréchet distance (times 1000) over evaluations of each entity, both logarithmic.

    Args:
        curves: "solver, time grid" -> evaluations -> distance. A solver has a colour, its time grids differ in style.
        path: of the picture; returned.
        reference: (its distance, the largest that counts as equal), as a line and the band between the two.
        equal: curve -> evaluations from which on it is equal; drawn as a ring there, None = nowhere.
        title: above it.

    Raises DataError when no curve has a point above 0.
    """
    shown = {name: curve for name, curve in curves.items() if any(value > 0 for value in curve.values())}
    if not shown:
        raise DataError("There is no distance to draw.")
    solvers = list(dict.fromkeys(name.partition(", ")[0] for name in shown))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.set_yscale("log")
    drawn: dict[str, int] = {}
    for name, curve in shown.items():
        solver = name.partition(", ")[0]
        colour, style = COLOURS[solvers.index(solver) % len(COLOURS)], STYLES[drawn.get(solver, 0) % len(STYLES)]
        drawn[solver] = drawn.get(solver, 0) + 1
        at = sorted(curve)
        axes.plot(at, [1000 * curve[x] for x in at], style, color=colour, marker="o", markersize=3.5, label=name)
        found = (equal or {}).get(name)
        if found is not None:
            ring: dict[str, Any] = {
                "markersize": 11,
                "markerfacecolor": "none",
                "markeredgecolor": colour,
                "markeredgewidth": 1.6,
            }
            axes.plot([found], [1000 * curve[found]], "o", **ring)
    if reference is not None:
        centre, limit = reference
        axes.axhline(1000 * centre, color=BLACK, linewidth=1, label="reference (ring: as good from here)")
        axes.axhspan(1000 * centre, 1000 * limit, color=FAINT, alpha=0.2, linewidth=0)
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("evaluations of the model for each entity")
    axes.set_ylabel("Fréchet distance × 1000")
    axes.set_title(title)
    plain(axes)
    figure.legend(loc="outside right upper", frameon=False)
    return save(figure, path)
