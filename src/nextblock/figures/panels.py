"""Many small pictures in rows and columns, at sizes in inches, with room for what is written about them.

Placed by hand: a layout engine takes seconds for the hundred panels of a page of attention maps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from nextblock.figures.canvas import FAINT

MARGIN_IN = 0.12
GAP_IN = 0.1
TALLEST = 1.6  # times as high as wide


def panels(
    rows: int,
    columns: int,
    *,
    ratio: float = 1.0,
    width_in: float = 1.6,
    above_in: float = 0.24,
    head_in: float = 0.0,
    foot_in: float = 0.0,
    left_in: float = 0.0,
) -> tuple[Figure, NDArray[np.object_]]:
    """A figure and its axes [rows, columns], every one empty and without a frame.

    Args:
        rows, columns: of panels.
        ratio: height / width of a panel, as of the images; at most 1.6.
        width_in: of a panel.
        above_in: room over each panel, for its title.
        head_in, foot_in, left_in: room around all of them.
    """
    height_in = width_in * min(TALLEST, ratio)
    left, top = MARGIN_IN + left_in, MARGIN_IN + head_in + above_in
    wide = left + columns * (width_in + GAP_IN) - GAP_IN + MARGIN_IN
    high = top + rows * (height_in + above_in + GAP_IN) - above_in - GAP_IN + MARGIN_IN + foot_in
    figure = Figure(figsize=(wide, high))
    axes = figure.subplots(
        rows, columns, squeeze=False,
        gridspec_kw={
            "left": left / wide, "right": 1 - MARGIN_IN / wide, "wspace": GAP_IN / width_in,
            "top": 1 - top / high, "bottom": (MARGIN_IN + foot_in) / high, "hspace": (above_in + GAP_IN) / height_in,
        },
    )  # fmt: skip
    for each in axes.flat:
        each.set_axis_off()
    return figure, axes


def draw(axes: Axes, image: NDArray[Any], title: str = "", *, size_pt: float = 8, colour: str = "black") -> None:
    """A uint8 image [H, W, C] in a panel; other than 3 channels as their mean, gray. Enlarged pixels stay square."""
    shown = image if image.shape[2] == 3 else np.repeat(image.mean(2, keepdims=True).astype(np.uint8), 3, 2)
    axes.imshow(shown)
    write(axes, title, size_pt=size_pt, colour=colour)


def write(axes: Axes, title: str, *, size_pt: float = 8, colour: str = "black") -> None:
    """A title as it is: a dollar sign in the name of a file begins no formula."""
    # At a stated height: to find one, matplotlib lays out the ticks, which are not drawn, and takes half of all time.
    axes.set_title(title, fontsize=size_pt, color=colour, pad=4, y=1.0, parse_math=False)


def foot(figure: Figure, words: str) -> None:
    """Words under all panels, in the room of `foot_in`."""
    high = figure.get_size_inches()[1]
    figure.text(0.5, MARGIN_IN / high, words, ha="center", va="bottom", fontsize=8.5, color=FAINT, parse_math=False)


def head(figure: Figure, words: str) -> None:
    """Words over all panels, in the room of `head_in`."""
    high = figure.get_size_inches()[1]
    figure.text(0.5, 1 - MARGIN_IN / high, words, ha="center", va="top", fontsize=10, parse_math=False)


def short(name: str, most: int = 21) -> str:
    """The end of a name, which tells files apart, on one line and in letters that can be drawn."""
    name = "".join(letter if letter.isprintable() else "�" for letter in name)
    return name if len(name) <= most else f"…{name[1 - most :]}"


def enlarged(patches: NDArray[Any], size_px: tuple[int, int]) -> NDArray[Any]:
    """One value a patch to one a pixel, nearest: [h, w, ...] -> [H, W, ...], whole numbers of pixels to a patch."""
    for axis in (0, 1):
        patches = np.repeat(patches, size_px[axis] // patches.shape[axis], axis)
    return patches
