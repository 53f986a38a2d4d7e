"""An ordering as a picture: which patches form which entity, and who may see whom."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from nextblock.figures.canvas import FAINT, outline, save
from nextblock.mask import block_causal_mask
from nextblock.ordering import Ordering

MOST_NUMBERS = 400  # patches; beyond, numbers are too small to read


def draw_ordering(ordering: Ordering, path: str | Path) -> Path:
    """The grid, each patch with the number of its entity, beside the block-causal mask of the sequence.

    One colour for each entity, from dark (first) to light (last); the same in both. Returns the path.
    """
    figure = Figure(figsize=(9, 5), layout=ConstrainedLayoutEngine(h_pad=0.1))
    left, right = figure.subplots(1, 2)
    colours = _colours(ordering.num_entities)
    _draw_grid(left, ordering, colours)
    _draw_mask(right, ordering, colours)
    figure.supxlabel(
        f"{ordering.num_entities} entities of {ordering.size[0]}×{ordering.size[1]} patches on a grid of "
        f"{ordering.grid[0]}×{ordering.grid[1]}. Each entity is predicted from the entities before it.",
        fontsize=9,
        color=FAINT,
    )
    return save(figure, path)


def _colours(count: int) -> NDArray[np.float64]:
    """[count, 3] in 0..1."""
    return matplotlib.colormaps["viridis"](np.linspace(0.12, 0.98, count))[:, :3]


def _draw_grid(axes: Axes, ordering: Ordering, colours: NDArray[np.float64]) -> None:
    entity = ordering.entity[ordering.inverse].reshape(ordering.grid).numpy()  # [h, w]
    axes.imshow(colours[entity])
    for number in range(ordering.num_entities):
        outline(axes, entity == number, "white", 1.5)
    if ordering.num_patches <= MOST_NUMBERS:
        size_pt = min(14.0, 150 / max(ordering.grid))
        for (y, x), number in np.ndenumerate(entity):
            ink = _ink(colours[number])
            axes.text(x, y, str(number), ha="center", va="center", fontsize=size_pt, color=ink)
    axes.set_title("the image's patches and their entity", fontsize=10)
    _bare(axes)


def _draw_mask(axes: Axes, ordering: Ordering, colours: NDArray[np.float64]) -> None:
    may_see = block_causal_mask(ordering.entity).numpy()
    picture = np.where(may_see[..., None], colours[ordering.entity.numpy()][None], np.array(to_rgb("#f0f0f0")))
    axes.imshow(picture, interpolation="nearest")
    if ordering.num_patches <= 64:
        edges = np.arange(ordering.num_patches + 1) - 0.5
        axes.hlines(edges, -0.5, edges[-1], color="white", linewidth=0.5)
        axes.vlines(edges, -0.5, edges[-1], color="white", linewidth=0.5)
    axes.set_title("who may see whom (gray: may not)", fontsize=10)
    axes.set_xlabel("token that is seen", fontsize=9)
    axes.set_ylabel("token that looks", fontsize=9)
    _bare(axes)


def _ink(colour: NDArray[np.float64]) -> str:
    return "black" if colour @ np.array([0.299, 0.587, 0.114]) > 0.5 else "white"


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
