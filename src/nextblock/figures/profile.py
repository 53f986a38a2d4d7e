"""Where the time of a training step goes: the mean step, and every step, as stacked bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nextblock.errors import DataError
from nextblock.figures.canvas import BLACK, FAINT, GREEN, ORANGE, PURPLE, RED, save
from nextblock.figures.probe import plain

FIXED = {
    "data": RED, "transfer": PURPLE, "inputs": "#E8C3D8", "backward": ORANGE, "optimizer": GREEN, "other": FAINT,
}  # fmt: skip
ROOMS = ("#003F66", "#0072B2", "#56B4E9", "#B5DDF5")  # of the forward pass, in order
LABELLED = 0.06  # share of a step from which a part of the bar is labelled


def draw_profile(
    phases: Sequence[str], steps: Sequence[Mapping[str, float]], path: str | Path, *, title: str = ""
) -> Path:
    """The mean step as one bar with shares, and below it a bar for each step.

    Args:
        phases: names in order; those that take no time are left out of the legend.
        steps: of each step, phase -> seconds.
        path: of the picture; returned.
        title: above it.

    Raises DataError when there is no step.
    """
    if not steps:
        raise DataError("There is no step to draw.")
    seconds = np.array([[step[name] for name in phases] for step in steps])  # [steps, phases]
    milliseconds, share = 1000 * seconds, seconds.sum(0) / max(seconds.sum(), 1e-12)
    colours = _colours(phases)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(1, 4))
    _mean_bar(above, milliseconds.mean(0), share, colours)
    left = np.zeros(len(steps))
    for i, name in enumerate(phases):
        if share[i] > 0.0005:
            label = f"{name} {100 * share[i]:.1f} %"
            below.bar(range(1, len(steps) + 1), milliseconds[:, i], 0.85, left, color=colours[i], label=label)
        left = left + milliseconds[:, i]
    below.set_xlabel("step with its parts timed")
    below.set_ylabel("ms")
    below.set_xlim(0.3, len(steps) + 0.7)
    below.xaxis.get_major_locator().set_params(integer=True)
    plain(below)
    below.grid(False, axis="x")
    figure.suptitle(title)
    figure.legend(*below.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save(figure, path)


def _mean_bar(
    axes: Axes, milliseconds: NDArray[np.float64], share: NDArray[np.float64], colours: Sequence[str]
) -> None:
    left = 0.0
    for width, part, colour in zip(milliseconds, share, colours, strict=True):
        axes.barh([0], [width], 0.8, left, color=colour)
        if part >= LABELLED:
            ink = BLACK if colour in (*ROOMS[2:], ORANGE, FIXED["inputs"]) else "white"
            axes.text(
                left + width / 2, 0, f"{100 * part:.0f} %", color=ink, ha="center", va="center_baseline", fontsize=9
            )
        left += width
    axes.set_xlim(0, left or 1)
    axes.set_yticks([])
    axes.set_xlabel("ms of the mean step")
    plain(axes)
    axes.grid(False)


def _colours(phases: Sequence[str]) -> list[str]:
    rooms = iter(ROOMS * (1 + len(phases) // len(ROOMS)))
    return [FIXED[name] if name in FIXED else next(rooms) for name in phases]
