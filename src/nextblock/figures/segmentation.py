"""Images beside their masks and what a head says of every pixel; how well each class is found."""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from nextblock.errors import DataError
from nextblock.figures.canvas import BLACK, BLUE, COLOURS, FAINT, ORANGE, save, show_image
from nextblock.figures.confusion import shortened
from nextblock.figures.probe import plain, require

IGNORED = 255
IGNORED_COLOUR = "#e4e4e4"
MOST_BARS = 60
MOST_NAMED = 24  # classes in a legend; the commonest of those that are seen
_HUES = 36


@lru_cache(maxsize=8)
def class_colours(count: int) -> tuple[str, ...]:
    """A colour for each class; the first seven can be told apart by colour-blind readers.

    Each further one is, of a wheel of hues, that which is furthest from all before it.
    """
    wheel = itertools.product(np.arange(_HUES) / _HUES, (0.45, 0.75, 1.0), (0.45, 0.7, 0.95))
    candidates = np.array([colorsys.hsv_to_rgb(*each) for each in wheel])  # [hues x 9, 3]
    found = [to_rgb(colour) for colour in (*COLOURS, IGNORED_COLOUR)]
    apart = np.abs(candidates[:, None] - np.array(found)).sum(-1).min(1)
    chosen = list(COLOURS[:count])
    while len(chosen) < count:
        furthest = candidates[int(apart.argmax())]
        chosen.append(to_hex(furthest))
        apart = np.minimum(apart, np.abs(candidates - furthest).sum(-1))
    return tuple(chosen)


def coloured(mask: NDArray[np.uint8], colours: Sequence[str]) -> NDArray[np.uint8]:
    """Class numbers uint8 [H, W] as a picture [H, W, 3]; ignored pixels are pale gray."""
    table = np.zeros((256, 3), dtype=np.uint8)
    for number, colour in (*enumerate(colours), (IGNORED, IGNORED_COLOUR)):
        table[number] = [round(255 * part) for part in to_rgb(colour)]
    return table[mask]


def draw_masks(
    images: NDArray[np.uint8], truth: NDArray[np.uint8], predictions: NDArray[np.uint8], classes: Sequence[str],
    path: str | Path, *, names: Sequence[str], title: str = "",
) -> Path:  # fmt: skip
    """One image a row: the image, its mask, the prediction, and the share of its labelled pixels that is right.

    Args:
        images: uint8 [K, H, W, C]. truth, predictions: class numbers uint8 [K, H, W], 255 in truth = ignored.
        classes: names by number; those that are seen are in the legend, at most the 24 commonest.
        path: of the picture; returned.
        names: of the images.
        title: above it.

    Raises DataError unless the arrays belong together.
    """
    if not len(images) or not len(images) == len(truth) == len(predictions) == len(names):
        raise DataError(f"{len(images)} images, {len(truth)} masks, {len(predictions)} predictions and {len(names)} "
                        "names: one of each for every row is needed.")  # fmt: skip
    colours = class_colours(len(classes))
    ratio = min(1.6, images.shape[1] / images.shape[2])
    seen = _seen(truth, predictions, len(classes))
    legend_in = 0.25 * -(-(len(seen) + 1) // 4) + 0.2
    figure = Figure(figsize=(7.6, 0.9 + len(images) * (2.3 * ratio + 0.28) + legend_in), layout="constrained")
    axes = figure.subplots(len(images), 3, squeeze=False)
    for i, line in enumerate(axes):
        known = truth[i] != IGNORED
        right = 100 * (truth[i] == predictions[i])[known].mean() if known.any() else float("nan")
        shown = (images[i], coloured(truth[i], colours), coloured(predictions[i], colours))
        heads = ("the image", "its mask", "predicted from patches") if i == 0 else ("", "", "")
        for each, picture, head in zip(line, shown, heads, strict=True):
            show_image(each, picture, head, fontsize=10)
        line[0].set_ylabel(shortened(names[i], 26), fontsize=8)
        line[2].set_xlabel(f"{right:.1f} % of its pixels right", fontsize=8)
    marks = [Patch(facecolor=colours[number], label=shortened(classes[number], 22)) for number in seen]
    if (truth == IGNORED).any():
        marks.append(Patch(facecolor=IGNORED_COLOUR, edgecolor=FAINT, label="ignored"))
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12)
    return save(figure, path)


def _seen(truth: NDArray[np.uint8], predictions: NDArray[np.uint8], count: int) -> list[int]:
    """The classes that occur, in order; of many the commonest."""
    pixels = np.bincount(truth.ravel(), minlength=256)[:count] + np.bincount(predictions.ravel(), minlength=256)[:count]
    commonest = np.argsort(-pixels, kind="stable")[:MOST_NAMED]
    return sorted(int(number) for number in commonest if pixels[number])


def draw_iou(
    classes: Sequence[str], iou: Sequence[float | None], ceiling: Sequence[float | None], path: str | Path, *,
    title: str = "",
) -> Path:  # fmt: skip
    """A bar for each class that occurs, the best on top, with a mark at what the patches' size allows.

    Args:
        classes: names. iou, ceiling: in percent; None where a class does not occur.
        path: of the picture; returned.
        title: above it.

    Of more than 60 classes the best and the worst 30 are drawn. Raises DataError when no class occurs.
    """
    found = [(float(v), c, name) for v, c, name in zip(iou, ceiling, classes, strict=True) if v is not None]
    require(found, "class to draw")
    mean = sum(value for value, _, _ in found) / len(found)
    found.sort(key=lambda row: -row[0])
    cut = len(found) > MOST_BARS
    rows = found[: MOST_BARS // 2] + found[-MOST_BARS // 2 :] if cut else found
    figure = Figure(figsize=(7.5, 1.7 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [value for value, _, _ in rows], 0.72, color=BLUE, label="linear head")
    tops = [(c, place) for place, (_, c, _) in zip(places, rows, strict=True) if c is not None]
    axes.plot(*zip(*tops, strict=True), "|", color=ORANGE, markersize=11, markeredgewidth=2.5,
              label="patches known exactly")  # fmt: skip
    for place, (value, _, _) in zip(places, rows, strict=True):
        inside = value >= 12
        axes.text(0.8 if inside else value + 1, place, f"{value:.1f}", color="white" if inside else BLACK, fontsize=8,
                  va="center_baseline")  # fmt: skip
    axes.axvline(mean, color=FAINT, linestyle="--", linewidth=1, label=f"mean of {len(found)}: {mean:.1f} %")
    if cut:
        axes.axhline(MOST_BARS // 2 - 0.5, color=BLACK, linewidth=1)
        axes.set_ylabel(f"best and worst {MOST_BARS // 2} of {len(found)} classes", fontsize=9)
    axes.set_yticks(places, [shortened(name, 30) for _, _, name in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 101)
    axes.set_xlabel("intersection over union (%)")
    axes.set_title(title, fontsize=12)
    plain(axes)
    axes.grid(False, axis="y")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(figure, path)
