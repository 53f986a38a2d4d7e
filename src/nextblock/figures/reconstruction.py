"""What an XTRA model predicts of an image, cell by cell, beside what needs no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from nextblock.errors import ConfigError
from nextblock.figures.canvas import BLUE, FAINT, RED, freed, outline, save, show_image

MOST_STEPS = 16
IMAGES_PER_PAGE = 16
UNSEEN = 128  # gray of what the model has not seen


class Reconstructed(Protocol):
    """The arrays drawn here: B images, K cells in the order of prediction.

    originals, predictions, baselines: uint8 [B, H, W, C]. place: int64 [H, W], the cell of each pixel, 0..K-1.
    The errors: [B, K-1], of cells 1..K-1, in the units of the training loss and in pixels of 0..1.
    normalized_cells: whether each cell's true mean and contrast were lent to its prediction.
    """

    @property
    def originals(self) -> NDArray[np.uint8]: ...
    @property
    def predictions(self) -> NDArray[np.uint8]: ...
    @property
    def baselines(self) -> NDArray[np.uint8]: ...
    @property
    def place(self) -> NDArray[np.int64]: ...
    @property
    def prediction_errors(self) -> NDArray[np.float32]: ...
    @property
    def baseline_errors(self) -> NDArray[np.float32]: ...
    @property
    def prediction_pixel_errors(self) -> NDArray[np.float32]: ...
    @property
    def baseline_pixel_errors(self) -> NDArray[np.float32]: ...
    @property
    def normalized_cells(self) -> bool: ...


def draw_image(recs: Reconstructed, i: int, path: str | Path, name: str = "") -> Path:
    """One image: original, prediction and baseline; below, up to 16 steps as the model met them.

    Args:
        recs: the arrays of the images.
        i: which image.
        path: of the picture; returned.
        name: in the title.

    Raises ConfigError when there is no image i.
    """
    if not 0 <= i < len(recs.originals):
        raise ConfigError(f"there are {len(recs.originals)} images, numbered from 0; got i = {i}.")
    height, width = recs.place.shape
    steps = _steps(recs)
    across = min(8, len(steps))
    down = -(-len(steps) // across)
    ratio = min(1.6, height / width)
    heights_in = (0.4, 12 / 3 * 0.95 * ratio + 0.6, 0.5 + down * (12 / 8 * ratio + 0.3), 1.0)
    figure = Figure(figsize=(12, sum(heights_in)), layout="constrained")
    head, top, bottom, foot = figure.subfigures(4, 1, squeeze=False, height_ratios=heights_in)[:, 0]
    head.text(0.5, 0.5, name, ha="center", va="center", fontsize=13)
    _draw_whole(top, recs, i)
    _draw_steps(bottom, recs, i, steps, (down, across))
    foot.text(0.5, 0.5, _caption(recs), ha="center", va="center", fontsize=9, color=FAINT)
    return save(figure, path)


@freed
def draw_contact_sheet(recs: Reconstructed, names: Sequence[str], path: str | Path) -> list[Path]:
    """All images, one a row: original, what the model saw at the middle step, prediction, baseline.

    Sixteen rows a page; the second page is `path` with -2 before the suffix, and so on. Returns the pages.
    Raises ConfigError unless there is one name for each image.
    """
    if len(names) != len(recs.originals) or not len(names):
        raise ConfigError(f"one name for each of the {len(recs.originals)} images is needed; got {len(names)}.")
    path = Path(path)
    pages = []
    for page, start in enumerate(range(0, len(names), IMAGES_PER_PAGE), 1):
        rows = range(start, min(start + IMAGES_PER_PAGE, len(names)))
        figure = _sheet(recs, names, rows)
        pages.append(save(figure, path if page == 1 else path.with_stem(f"{path.stem}-{page}")))
    return pages


def _draw_whole(figure: SubFigure, recs: Reconstructed, i: int) -> None:
    images = (recs.originals[i], recs.predictions[i], recs.baselines[i])
    titles = (
        f"The image\n{recs.place.shape[0]}×{recs.place.shape[1]} px in {_cells(recs)} cells",
        f"Predicted, each cell from the true cells before it\n{_errors(recs, i, 'prediction')}",
        f"{_baseline_name(recs)}\n{_errors(recs, i, 'baseline')}",
    )
    for axes, image, title in zip(figure.subplots(1, 3), images, titles, strict=True):
        show_image(axes, image, title, fontsize=10)
        if image is not images[0]:
            outline(axes, recs.place == 0, BLUE)


def _draw_steps(
    figure: SubFigure, recs: Reconstructed, i: int, steps: NDArray[np.int64], shape: tuple[int, int]
) -> None:
    figure.suptitle(
        "Step by step: what the model had seen (the rest gray) and, outlined in red, the cell it then predicted",
        fontsize=11,
    )
    axes = figure.subplots(*shape, squeeze=False).flatten()
    for each, step in zip(axes, steps, strict=False):
        error = recs.prediction_errors[i, step - 1]
        show_image(each, _seen(recs, i, step, recs.predictions[i]), f"cell {step + 1}: error {error:.2f}", fontsize=8)
        outline(each, recs.place == step, RED, 1.5)
    for unused in axes[len(steps) :]:
        unused.set_visible(False)


def _sheet(recs: Reconstructed, names: Sequence[str], rows: range) -> Figure:
    height, width = recs.place.shape
    spacing = ConstrainedLayoutEngine(h_pad=0.02, w_pad=0.06)
    side_in = 2.2 * min(1.6, height / width)
    figure = Figure(figsize=(10.4, len(rows) * (side_in + 0.25) + 2.1), layout=spacing)
    middle = _cells(recs) // 2
    heads = (
        "The image",
        f"What the model sees\nto predict cell {middle + 1} of {_cells(recs)} (red)",
        "Predicted, each cell\nfrom the true cells before it",
        _baseline_name(recs).replace(", ", ",\n"),
    )
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for line, i in zip(axes, rows, strict=True):
        seen = _seen(recs, i, middle, np.full_like(recs.originals[i], UNSEEN))
        for column, image in enumerate((recs.originals[i], seen, recs.predictions[i], recs.baselines[i])):
            show_image(line[column], image, heads[column] if i == rows[0] else "", fontsize=10)
        line[0].set_ylabel(names[i], fontsize=8)
        outline(line[1], recs.place == middle, RED, 1.5)
        outline(line[2], recs.place == 0, BLUE, 1.5)
        outline(line[3], recs.place == 0, BLUE, 1.5)
        line[2].set_xlabel(_errors(recs, i, "prediction"), fontsize=8)
        line[3].set_xlabel(_errors(recs, i, "baseline"), fontsize=8)
    figure.supxlabel("\n" + _caption(recs), fontsize=9, color=FAINT)
    return figure


def _steps(recs: Reconstructed) -> NDArray[np.int64]:
    """Up to 16 of the cells 1..K-1, evenly chosen, first and last among them."""
    last = _cells(recs) - 1
    return np.unique(np.linspace(1, last, min(MOST_STEPS, last)).round().astype(np.int64))


def _seen(recs: Reconstructed, i: int, step: int, put: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The true cells before `step`, the pixels of `put` in cell `step`, gray after: [H, W, C]."""
    place = recs.place[..., None]
    gray = np.full_like(put, UNSEEN)
    return np.where(place < step, recs.originals[i], np.where(place == step, put, gray))


def _cells(recs: Reconstructed) -> int:
    return recs.prediction_errors.shape[1] + 1


def _errors(recs: Reconstructed, i: int, which: str) -> str:
    error = getattr(recs, f"{which}_errors")[i].mean()
    pixel_error = getattr(recs, f"{which}_pixel_errors")[i].mean()
    return f"error {error:.3f}, in pixels {pixel_error:.4f}"


def _baseline_name(recs: Reconstructed) -> str:
    return (
        "Without a model, mean and contrast alone"
        if recs.normalized_cells
        else "Without a model, each cell's true mean"
    )


def _caption(recs: Reconstructed) -> str:
    first = "The first cell (blue outline) is given, never predicted, and not in the errors."
    if recs.normalized_cells:
        return (
            "The model predicts the pattern of a cell; the cell's true mean (over all its pixels and colours) and "
            "contrast are lent to it for drawing.\nWith no pattern known, the best guess with that same help is a "
            "flat cell: the picture on the right. The model's merit is what is better than that.\n"
            "Error: mean squared error in the training loss's units (each cell scaled to mean 0, deviation 1; flat is "
            f"about 1). In pixels: of values from 0 to 1.\n{first}"
        )
    return (
        "The model predicts the pixels themselves. The picture on the right has every cell flat at its true mean "
        "(over all its pixels and colours),\nwhich the model is not told. Error: mean squared error in the training "
        f"loss's units (normalised pixels). In pixels: of values from 0 to 1.\n{first}"
    )
