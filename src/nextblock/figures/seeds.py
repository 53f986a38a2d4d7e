"""Several seeds of several arms: every one as a dot, their mean, and an interval around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from nextblock.errors import DataError
from nextblock.figures.canvas import BLUE, FAINT, save
from nextblock.figures.probe import ACCURACY, KINDS, plain


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """(mean, lower, upper) by Student's t over the seeds; a single seed has no interval: NaN twice."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(student.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def draw_seeds(
    arms: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | Path,
    *,
    title: str = "",
    baseline: str = "",
    panels: Mapping[str, str] | None = None,
) -> Path:
    """One row for each arm, a panel for each kind of number.

    Args:
        arms: arm -> kind -> the number of each seed; a kind may be absent.
        path: of the picture; returned.
        title: above it.
        baseline: the arm whose best (highest) seed is drawn as a dashed line through each panel.
        panels: kind -> what its axis says; when absent, the accuracies in percent of "linear" and "attentive" probes.

    Raises DataError when there is no number.
    """
    shown = panels or {kind: f"{kind} probe, {ACCURACY}" for kind in KINDS}
    kinds = [kind for kind in shown if any(found.get(kind) for found in arms.values())]
    if not kinds:
        raise DataError("There is nothing to draw." if panels else "There is no accuracy to draw.")
    figure = Figure(figsize=(1.8 + 4.2 * len(kinds), 1.2 + 0.42 * len(arms)), layout="constrained")
    every = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for kind, axes in zip(kinds, every, strict=True):
        for row, found in enumerate(arms.values()):
            values = list(found.get(kind, ()))
            if not values:
                continue
            mean, low, high = interval(values)
            axes.plot(values, [row] * len(values), "o", color=KINDS.get(kind, BLUE), markersize=5, alpha=0.55)
            axes.plot([mean], [row], "|", color="black", markersize=14, markeredgewidth=2)
            if len(values) > 1:
                axes.plot([low, high], [row, row], color="black", linewidth=1.2)
        if arms.get(baseline, {}).get(kind):
            axes.axvline(max(arms[baseline][kind]), color=FAINT, linestyle="--", linewidth=1)
        axes.set_xlabel(shown[kind])
        plain(axes)
    every[0].set_yticks(range(len(arms)), list(arms))
    every[0].set_ylim(len(arms) - 0.5, -0.5)
    figure.suptitle(title)
    return save(figure, path)
