"""How runs went, from their metrics.csv, and how encoders compare, from a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from nextblock.errors import DataError
from nextblock.figures.canvas import BLUE, COLOURS, FAINT, ORANGE, save
from nextblock.training.run_folder import read_metrics

# column -> (title, label with unit)
PANELS = {
    "loss": ("Training loss", "loss"),
    "val_loss": ("Validation loss", "loss"),
    "ema_val_loss": ("Validation loss, averaged weights", "loss"),
    "knn": ("Nearest neighbours", "kNN accuracy (%)"),
    "effective_rank": ("Effective rank of the features", "dimensions in use"),
    "lr": ("Learning rate", "learning rate"),
}
MEASURES = {"knn": ("kNN (nothing trained)", ORANGE), "linear": ("linear probe", BLUE)}


def draw_curves(runs: Mapping[str, str | Path], path: str | Path) -> Path:
    """One panel for each quantity that any of the runs has, one line for each run, over optimiser steps.

    Args:
        runs: name -> its metrics.csv. A last line that is being written, blank values and absent columns are
            passed over, so a run may be drawn while it trains.
        path: of the picture; returned.

    The training loss is drawn faint, and over it its moving mean over 1/50 of the rows.
    Raises DataError when a file is missing or no run has anything to draw.
    """
    columns = {name: _columns(Path(file)) for name, file in runs.items()}
    present = [panel for panel in PANELS if any(panel in found for found in columns.values())]
    if not present:
        raise DataError(f"There is nothing to draw yet in {', '.join(str(file) for file in runs.values())}.")
    across = min(3, len(present))
    down = -(-len(present) // across)
    figure = Figure(figsize=(4.6 * across, 3.3 * down + 0.5), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for panel, each in zip(present, axes, strict=False):
        _draw_panel(each, panel, columns)
    for unused in axes[len(present) :]:
        unused.set_visible(False)
    handles = {str(line.get_label()): line for each in axes for line in each.get_lines()[::-1]}
    named = {name: handles[name] for name in runs if name in handles}
    figure.legend(
        list(named.values()), list(named), loc="outside lower center", ncols=min(4, len(named)), frameon=False
    )
    return save(figure, path)


def draw_bars(
    table: Sequence[Mapping[str, Any]], path: str | Path, *, title: str = "", chance: float | None = None
) -> Path:
    """Grouped horizontal bars of accuracies, the rows from top to bottom.

    Args:
        table: rows of `name` and, in percent, `knn` and `linear`; either may be absent or None in a row.
        path: of the picture; returned.
        title: above the bars.
        chance: percent; drawn as a dashed line.

    Raises DataError when the table holds no accuracy.
    """
    measures = [m for m in MEASURES if any(row.get(m) is not None for row in table)]
    if not measures:
        raise DataError(f"The table of {len(table)} rows holds neither {' nor '.join(map(repr, MEASURES))}.")
    figure = Figure(figsize=(8, 1.5 + 0.38 * len(table) * len(measures)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(measures)
    for i, measure in enumerate(measures):
        rows = [(y, float(row[measure])) for y, row in enumerate(table) if row.get(measure) is not None]
        places = [y + (i - (len(measures) - 1) / 2) * height for y, _ in rows]
        label, colour = MEASURES[measure]
        bars = axes.barh(places, [value for _, value in rows], height * 0.92, color=colour, label=label)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    if chance is not None:
        axes.axvline(chance, color=FAINT, linestyle="--", linewidth=1, label=f"chance ({chance:g} %)")
    axes.set_yticks(range(len(table)), [str(row["name"]) for row in table])
    axes.invert_yaxis()
    axes.set_xlabel("accuracy on test images (%)")
    axes.set_xlim(0, min(112, 1.15 * max(float(row[m]) for row in table for m in measures if row.get(m) is not None)))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return save(figure, path)


def _columns(file: Path) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """For each panel's column that holds a number: steps and values."""
    if not file.is_file():
        raise DataError(f"There is no {file}; a run writes its metrics.csv with its first log.")
    rows = read_metrics(file)
    found = {}
    for column in PANELS:
        pairs = [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]
        if pairs:
            found[column] = (np.array([s for s, _ in pairs]), np.array([v for _, v in pairs]))
    return found


def _draw_panel(
    axes: Axes, panel: str, columns: Mapping[str, dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]]
) -> None:
    for i, (name, found) in enumerate(columns.items()):
        if panel not in found:
            continue
        steps, values = found[panel]
        colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        if panel == "loss":
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = smoothed(values, len(values) // 50)
        # A line through a single point is nothing; loss and rate have a point for each log, too many to mark.
        few = "o" if np.isfinite(values).sum() < (5 if panel in ("loss", "lr") else 30) else ""
        axes.plot(steps, values, color=colour, linestyle=style, label=name, linewidth=1.6, marker=few, markersize=3.5)
    axes.set_title(PANELS[panel][0], fontsize=11)
    axes.set_ylabel(PANELS[panel][1])
    axes.set_xlabel("optimiser steps")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def smoothed(values: NDArray[np.float64], half_width: int) -> NDArray[np.float64]:
    """Mean over the values up to `half_width` rows away, fewer at the ends; what is not finite does not count."""
    good = np.isfinite(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(good, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(good)))
    at = np.arange(len(values))
    low, high = np.maximum(at - half_width, 0), np.minimum(at + half_width + 1, len(values))
    count = counts[high] - counts[low]
    return np.where(count > 0, (sums[high] - sums[low]) / np.maximum(count, 1), np.nan)
