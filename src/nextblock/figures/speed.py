"""Speed beside a plain implementation: one bar for everything that was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nextblock.errors import DataError
from nextblock.figures.canvas import BLACK, BLUE, FAINT, ORANGE, save
from nextblock.figures.probe import plain

Measured = Mapping[str, Any]


def draw_speed(rows: Sequence[Measured], path: str | Path, *, title: str = "") -> Path:
    """How many times the plain path's number ours is, on a logarithmic axis; the plain path itself stands at 1.

    Args:
        rows: of name, device, ratio (ours / plain; rows without one are left out) and, if there, target (an upper bound
            turns the ratio round), ratio_second (against the compiled reference, a diamond) and spread, whose
            "ours/plain" are the quartiles, a thin line.
        path: of the picture; returned.
        title: above it.

    Raises DataError when no row has a ratio.
    """
    shown = [_as_gain(row) for row in rows if row.get("ratio")]
    if not shown:
        raise DataError("There is no ratio to draw.")
    figure = Figure(figsize=(8.5, 1.5 + 0.42 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    ends = [1.0, *(end for row in shown for end in _ends(row))]
    for y, row in enumerate(shown):
        ratio, spread = float(row["ratio"]), (row.get("spread") or {}).get("ours/plain")
        axes.barh(y, ratio - 1, left=1, height=0.62, color=BLUE)
        if spread:
            axes.plot(spread, [y, y], color=BLACK, linewidth=1.2)
        if row.get("ratio_second"):
            axes.plot([row["ratio_second"]], [y], "D", color=ORANGE, markeredgecolor="white", markersize=7)
        axes.annotate(
            f"{ratio:.3g} ×",
            (max(1.0, *_ends(row)), y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.axvline(1, color=FAINT, linewidth=1)
    axes.set_xlim(min(ends) / 1.15, max(ends) * 1.6)
    axes.set_yticks(range(len(shown)), [_label(row) for row in shown])
    axes.set_ylim(len(shown) - 0.45, -0.55)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _few(max(ends), value) else ""))
    second = any(row.get("ratio_second") for row in shown)
    axes.set_xlabel("ours / plain path" + (" (diamond: / the same compiled)" if second else ""))
    axes.set_title(title)
    plain(axes)
    axes.grid(False, axis="y")
    return save(figure, path)


_DEVICES = {"cpu": "CPU", "cuda": "GPU"}


def _label(row: Measured) -> str:
    """What the bar is of, in lines short enough to leave room for the bars."""
    return textwrap.fill(f"{row['name']} ({_DEVICES.get(row['device'], row['device'])})", 44)


def _as_gain(row: Measured) -> dict[str, Any]:
    """The row, where less is better (its target is an upper bound) with plain / ours: to the right is always better."""
    if not str(row.get("target", "")).startswith("≤"):
        return dict(row)
    second, spread = row.get("ratio_second"), (row.get("spread") or {}).get("ours/plain")
    turned = {"ratio": 1 / row["ratio"], "ratio_second": 1 / second if second else None}
    return {**row, **turned, "spread": {"ours/plain": tuple(1 / end for end in reversed(spread))} if spread else {}}


def _ends(row: Measured) -> list[float]:
    """Everything of a row that must be in the picture, along the axis."""
    spread = (row.get("spread") or {}).get("ours/plain") or ()
    return [float(value) for value in (row["ratio"], row.get("ratio_second"), *spread) if value]


def _few(largest: float, value: float) -> bool:
    """Whether a minor tick has room for its number: between 1 and 10 where there are no others."""
    return largest < 10 and round(value, 6) in (2, 3, 5)
