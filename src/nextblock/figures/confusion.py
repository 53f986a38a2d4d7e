"""What was taken for what: the confusion matrix of a classifier, of a few classes or of thousands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure, FigureBase
from numpy.typing import ArrayLike, NDArray

from nextblock.errors import DataError
from nextblock.figures.canvas import BLACK, FAINT, save

MOST_NUMBERS = 15  # classes; beyond, numbers in the cells are too small to read
MOST_POINTS = 250  # along an edge of the picture; more would be smaller than its pixels
PAIRS = 10


def draw_confusion(
    matrix: ArrayLike, classes: Sequence[str], path: str | Path, *, title: str = "", most: int = 40
) -> Path:
    """A heat map of what the images of each class were predicted as, in percent of that class.

    Args:
        matrix: images counted, int [C, C], true class by predicted class. A class without images is left gray.
        classes: C names.
        path: of the picture; returned.
        title: above it.
        most: with more classes than that, names find no room; the pairs confused most often are listed instead.

    Colours go with the square root of the percentage, so that rare confusions can be seen. Above 250 classes one
    point stands for several, and shows the largest of them. Raises DataError when the matrix is not [C, C].
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(classes), len(classes)) or not len(classes):
        raise DataError(f"a confusion matrix of {len(classes)} classes must be [C, C]; got {list(counts.shape)}.")
    with np.errstate(invalid="ignore"):
        percent = 100 * counts / counts.sum(1, keepdims=True)  # [C, C], NaN where a class has no images
    figure = _many(counts, percent, classes) if len(classes) > most else _few(percent, classes)
    figure.suptitle(title, fontsize=12)
    return save(figure, path)


def most_confused(matrix: ArrayLike, most: int = PAIRS) -> list[tuple[int, int, int]]:
    """(true class, predicted class, images) of the pairs confused most often; equal ones in the order of classes."""
    wrong = np.array(matrix)
    np.fill_diagonal(wrong, 0)
    places = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = (divmod(int(place), len(wrong)) for place in places)
    return [(true, predicted, int(wrong[true, predicted])) for true, predicted in pairs if wrong[true, predicted]]


def shortened(name: str, most: int) -> str:
    """At most so many characters, the middle left out: what tells names apart is often at their end."""
    if len(name) <= most:
        return name
    tail = (most - 1) // 2
    return f"{name[: most - 1 - tail].rstrip()}…{name[len(name) - tail :].lstrip()}"


def _few(percent: NDArray[np.float64], classes: Sequence[str]) -> Figure:
    count = len(classes)
    side = max(3.2, (0.52 if count <= MOST_NUMBERS else 0.24) * count)
    figure = Figure(figsize=(side + 3.2, side + 2), layout="constrained")
    axes = figure.subplots()
    _heat_map(figure, axes, percent)
    names = [shortened(name, 24) for name in classes]
    axes.set_xticks(range(count), names, fontsize=9, rotation=90)
    axes.set_yticks(range(count), names, fontsize=9)
    if count <= MOST_NUMBERS:
        for (true, predicted), value in np.ndenumerate(percent):
            if value >= 0.05:
                told = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
                ink = "white" if value > 30 else BLACK
                axes.text(predicted, true, told, ha="center", va="center", fontsize=9, color=ink)
    return figure


def _many(counts: NDArray[np.int64], percent: NDArray[np.float64], classes: Sequence[str]) -> Figure:
    figure = Figure(figsize=(12, 6), layout="constrained")
    # Two figures in one: beside a list as wide as its names, the heat map would otherwise be pushed off the page.
    parts = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.3, 1))[0]
    left, right = parts[0].subplots(), parts[1].add_axes((0, 0.06, 1, 0.84))
    size = -(-len(classes) // MOST_POINTS)  # classes to a point
    _heat_map(parts[0], left, _largest(percent, size))
    if size > 1:
        left.set_title(f"one point: the largest of {size}×{size} classes", fontsize=9, color=FAINT)
    _numbered(left, len(classes), size)
    right.set_axis_off()
    right.set_title("confused most often", fontsize=11, loc="left")
    totals = counts.sum(1)
    for row, (true, predicted, images) in enumerate(most_confused(counts)):
        top = 0.98 - row / PAIRS
        right.text(0.11, top, f"{images:,}", ha="right", va="top", fontsize=10, color=BLACK, weight="bold")
        right.text(0.14, top, shortened(classes[true], 46), va="top", fontsize=9)
        share = f"  ({100 * images / totals[true]:.0f} %)"
        right.text(
            0.14, top - 0.042, f"→ {shortened(classes[predicted], 44)}{share}", va="top", fontsize=9, color=FAINT
        )
    return figure


def _heat_map(figure: FigureBase, axes: Axes, percent: NDArray[np.float64]) -> None:
    axes.set_facecolor("#dddddd")
    picture = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("% of the true class's images", fontsize=9)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


def _numbered(axes: Axes, count: int, size: int) -> None:
    """Ticks at round class numbers, where one point stands for `size` classes."""
    step = next(s for s in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if count / s <= 10 or s == 5000)
    numbers = range(0, count, step)
    places = [(number + 0.5) / size - 0.5 for number in numbers]
    axes.set_xticks(places, map(str, numbers), fontsize=9)
    axes.set_yticks(places, map(str, numbers), fontsize=9)


def _largest(percent: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """The largest value of each square of `size` by `size`, NaN where it has none: [C, C] -> [ceil(C / size)] twice."""
    if size == 1:
        return percent
    short = -len(percent) % size
    padded = np.pad(np.where(np.isnan(percent), -1.0, percent), (0, short), constant_values=-1.0)
    squares = padded.reshape(len(padded) // size, size, len(padded) // size, size)
    largest = squares.max((1, 3))
    return np.where(largest < 0, np.nan, largest)
