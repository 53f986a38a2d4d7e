"""What every figure shares: colours, writing the file, showing an image. No global state, no display."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from numpy.typing import NDArray

# Okabe and Ito's colours, told apart by colour-blind readers; the red is a plainer one.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2", "#E69F00", "#009E73", "#D7191C", "#CC79A7", "#56B4E9", "#222222",
)  # fmt: skip
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK)
FAINT = "#777777"
# What Matplotlib writes itself on an axis of powers, and nothing that a name could make a formula of.
_POWER = re.compile(r"\$\\mathdefault\{[-−]?(\d+(\.\d+)?)?(\\times)?(\d+\^\{[-−]?\d+(\.\d+)?\})?\}\$")


P = ParamSpec("P")
T = TypeVar("T")


def freed(draw: Callable[P, T]) -> Callable[P, T]:
    """A function that draws, and whose figures are gone when it returns.

    A figure is a cycle of some ten thousand objects. Left to Python, those outlive the drawing until all objects of the
    process are looked through, perhaps after fifty pictures more; here only those made meanwhile are.
    """

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        on = gc.isenabled()
        gc.disable()  # so that none of them is taken for an old object
        try:
            return draw(*args, **kwargs)
        finally:
            if on:
                gc.collect(0)
                gc.enable()

    return drawn


def save(figure: Figure, path: str | Path, dpi: int = 110) -> Path:
    """Write the figure in the format its suffix says (.png, .svg, .pdf); the folder is made when needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    for text in figure.findobj(Text):  # names of files and classes may hold dollar signs, which are no formulas
        if isinstance(text, Text) and text.get_text():
            text.set_parse_math(_POWER.fullmatch(text.get_text()) is not None)
    figure.savefig(path, dpi=dpi, facecolor="white")
    return path


def show_image(axes: Axes, image: NDArray[np.uint8], title: str = "", **text: Any) -> None:
    """Draw a uint8 image [H, W, C], square pixels, no ticks; other than 3 channels are drawn as their mean, gray.

    Matplotlib's own choice of interpolation keeps the pixels of small images square and smooths large ones.
    """
    gray = image.shape[2] != 3
    shown = image.mean(2) if gray else image
    axes.imshow(shown, cmap="gray" if gray else None, vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color="#cccccc", linewidth=0.5)
    axes.set_title(title, **text)


def outline(axes: Axes, mask: NDArray[np.bool_], colour: str, width_pt: float = 2.0) -> None:
    """Draw a line around the True pixels [H, W], whatever their shape."""
    framed = np.pad(mask, 1)
    y, x = np.nonzero(framed[1:, 1:-1] != framed[:-1, 1:-1])
    across = np.stack((np.stack((x, y), 1), np.stack((x + 1, y), 1)), 1)
    y, x = np.nonzero(framed[1:-1, 1:] != framed[1:-1, :-1])
    down = np.stack((np.stack((x, y), 1), np.stack((x, y + 1), 1)), 1)
    lines = np.concatenate((across, down)) - 0.5  # [lines, 2 ends, (x, y)]
    # Above the frame of the axes, and whole where the mask touches it.
    drawn = LineCollection(list(lines), colors=colour, linewidths=width_pt, capstyle="projecting", zorder=3)
    drawn.set_clip_on(False)
    axes.add_collection(drawn)
