"""Orderings as pictures: which patches form which entity, and who may see whom."""

from __future__ import annotations

from collections.abc import Mapping
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
from nextblock.ordering import AnyOrdering, Ordering, ScalePyramid

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


def draw_entities(orderings: Mapping[str, AnyOrdering], path: str | Path) -> Path:
    """Several orderings side by side, the entities of each numbered and coloured in their order; name -> ordering.

    A pyramid shows its scales, the whole picture each, from the coarsest to the finest. Returns the path.
    """
    widths = [_scales_picture(o)[0].shape[1] if isinstance(o, ScalePyramid) else o.grid[1] for o in orderings.values()]
    figure = Figure(figsize=(0.28 * sum(widths) + 0.6 * len(widths), 3.6), layout="constrained")
    every = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for (name, ordering), axes in zip(orderings.items(), every, strict=True):
        colours = _colours(ordering.num_entities)
        if isinstance(ordering, ScalePyramid):
            _draw_scales(axes, ordering, colours)
        else:
            _draw_grid(axes, ordering, colours)
        entities = f"{ordering.num_entities} entities" if ordering.num_entities > 1 else "1 entity"
        axes.set_title(f"{name}\n{entities}", fontsize=10)
    return save(figure, path)


def _scales_picture(pyramid: ScalePyramid) -> tuple[NDArray[np.int64], list[int]]:
    """The number of the scale at every place, [h, W], -1 between them, standing on one line; where each begins."""
    picture = np.full((pyramid.grid[0], sum(w + 1 for _, w in pyramid.scales) - 1), -1)
    lefts, left = [], 0
    for number, (height, width) in enumerate(pyramid.scales):
        picture[-height:, left : left + width] = number
        lefts.append(left)
        left += width + 1
    return picture, lefts


def _draw_scales(axes: Axes, pyramid: ScalePyramid, colours: NDArray[np.float64]) -> None:
    picture, lefts = _scales_picture(pyramid)
    axes.imshow(np.where((picture < 0)[..., None], 1.0, colours[picture]))
    for number, (left, (height, width)) in enumerate(zip(lefts, pyramid.scales, strict=True)):
        top = picture.shape[0] - height
        axes.vlines(np.arange(width + 1) + left - 0.5, top - 0.5, top + height - 0.5, color="white", linewidth=0.5)
        axes.hlines(np.arange(height + 1) + top - 0.5, left - 0.5, left + width - 0.5, color="white", linewidth=0.5)
        middle = (left + (width - 1) / 2, top + (height - 1) / 2)
        axes.text(*middle, str(number), ha="center", va="center", fontsize=11, color=_ink(colours[number]))
    _bare(axes)


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
