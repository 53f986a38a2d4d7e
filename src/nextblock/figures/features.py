"""What an encoder's features say about images: colours of patches, the effect of the cells' size, nearest images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nextblock.errors import ConfigError
from nextblock.figures.canvas import BLUE, FAINT, outline, save
from nextblock.figures.panels import draw, enlarged, foot, panels, short, write

IMAGES_PER_PAGE = 8
ACROSS = 4  # pairs of an image and its map


def draw_feature_colours(
    images: NDArray[np.uint8], colours: NDArray[np.uint8], names: Sequence[str], path: str | Path
) -> list[Path]:
    """Each image, and below it the colours of its patches.

    Args:
        images: uint8 [B, H, W, C].
        colours: uint8 [B, h, w, 3].
        names: B.
        path: of the picture; with more than eight images the second page has -2 before the suffix, and so on.

    Returns the pages. Raises ConfigError unless there is one name and one map for each image.
    """
    _require_same(len(images), colours=len(colours), names=len(names))
    made = []
    for page, numbers in _pages(len(images), path):
        columns = min(ACROSS, len(numbers))
        rows = 2 * -(-len(numbers) // columns)
        figure, axes = panels(rows, columns, ratio=_ratio(images), width_in=2.1)
        for place, i in enumerate(numbers):
            row, column = 2 * (place // columns), place % columns
            draw(axes[row, column], images[i], short(names[i], 30))
            draw(axes[row + 1, column], enlarged(colours[i], images.shape[1:3]), "its patches", colour=FAINT)
        made.append(save(figure, page))
    return made


def draw_cell_sizes(
    images: NDArray[np.uint8],
    colours: Mapping[str, NDArray[np.uint8]],
    cosines: Mapping[str, float],
    own: str,
    names: Sequence[str],
    path: str | Path,
) -> list[Path]:
    """An image a row: the colours of its patches under the mask of each cell size.

    Args:
        images: uint8 [B, H, W, C].
        colours: name of the cell size -> uint8 [B, h, w, 3].
        cosines: of each, how near the features are to those of `own`.
        own: the name of the encoder's own cells.
        names: B.
        path: as in `draw_feature_colours`.

    Returns the pages. Raises ConfigError unless everything is there for each image.
    """
    _require_same(len(images), names=len(names), **{name: len(values) for name, values in colours.items()})
    made = []
    for page, numbers in _pages(len(images), path):
        figure, axes = panels(
            len(numbers), 1 + len(colours), ratio=_ratio(images), width_in=1.5, head_in=0.14, foot_in=0.25
        )
        for line, i in zip(axes, numbers, strict=True):
            draw(line[0], images[i], short(names[i], 20))
            for each, (name, values) in zip(line[1:], colours.items(), strict=True):
                draw(each, enlarged(values[i], images.shape[1:3]))
                if i == numbers[0]:
                    mine = name == own
                    second = "as the encoder is used" if mine else f"cosine {cosines[name]:.3f}"
                    write(each, f"{_cells(name)}\n{second}", size_pt=9, colour=BLUE if mine else "black")
        foot(figure, "Cosine: of each patch's features with those under the encoder's own mask, mean over all images.")
        made.append(save(figure, page))
    return made


def draw_changes(changes: Mapping[str, NDArray[np.float64]], path: str | Path) -> Path:
    """Where features change with the size of the cells: name of the cell size -> [h, w], 0 is no change.

    One scale for all; white is no change. Returns the path.
    """
    top = max(float(np.max(values)) for values in changes.values())
    ratio = next(values.shape[0] / values.shape[1] for values in changes.values())
    figure, axes = panels(1, len(changes), ratio=ratio, width_in=1.7, above_in=0.36, foot_in=0.25)
    for each, (name, values) in zip(axes[0], changes.items(), strict=True):
        each.imshow(values, cmap="Purples", vmin=0, vmax=max(top, 1e-30), interpolation="nearest")
        outline(each, np.ones(values.shape, bool), FAINT, 0.5)
        write(each, f"{_cells(name)}\nup to {values.max():.3f}", size_pt=9)
    foot(figure, "1 - cosine of each patch's features, mean over all images.")
    return save(figure, path)


def _cells(name: str) -> str:
    return name if name == "no mask" else f"cells of {name}"


def draw_neighbours(
    images: NDArray[np.uint8],
    names: Sequence[str],
    neighbours: Sequence[Sequence[tuple[str, float, NDArray[np.uint8] | None]]],
    path: str | Path,
) -> list[Path]:
    """An image a row, then the images nearest to it, with the cosines of their features.

    Args:
        images: uint8 [B, H, W, C].
        names: B.
        neighbours: for each image (name, cosine, uint8 [H, W, C] or None where the picture is not known).
        path: as in `draw_feature_colours`.

    Returns the pages. Raises ConfigError unless there is everything for each image.
    """
    _require_same(len(images), names=len(names), neighbours=len(neighbours))
    made = []
    for page, numbers in _pages(len(images), path):
        most = max(1, *(len(neighbours[i]) for i in numbers))
        figure, axes = panels(len(numbers), 1 + most, ratio=_ratio(images), width_in=1.6, above_in=0.36)
        for line, i in zip(axes, numbers, strict=True):
            draw(line[0], images[i], f"the image\n{short(names[i])}", colour=BLUE)
            for each, (name, cosine, picture) in zip(line[1:], neighbours[i], strict=False):
                blank = np.full((*images.shape[1:3], 3), 232, np.uint8)
                draw(each, blank if picture is None else picture, f"cosine {cosine:.3f}\n{short(name)}")
                if picture is None:
                    each.text(0.5, 0.5, "not shown", transform=each.transAxes, ha="center", color=FAINT, fontsize=9)
        made.append(save(figure, page))
    return made


def _pages(count: int, path: str | Path) -> Iterator[tuple[Path, range]]:
    path = Path(path)
    for page, start in enumerate(range(0, count, IMAGES_PER_PAGE), 1):
        yield (
            path if page == 1 else path.with_stem(f"{path.stem}-{page}"),
            range(start, min(start + IMAGES_PER_PAGE, count)),
        )


def _ratio(images: NDArray[np.uint8]) -> float:
    return images.shape[1] / images.shape[2]


def _require_same(count: int, **others: int) -> None:
    wrong = [f"{other} {name}" for name, other in others.items() if other != count]
    if wrong or not count:
        raise ConfigError(f"there are {count} images to draw, and {', '.join(wrong) or 'one at least is needed'}.")
