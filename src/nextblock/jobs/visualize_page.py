"""The pictures of a visualization in files, and the page that explains them in plain words."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nextblock.evaluation.pca_maps import ColourBasis
from nextblock.figures.attention import Look, draw_attention
from nextblock.figures.features import draw_cell_sizes, draw_changes, draw_feature_colours, draw_neighbours
from nextblock.figures.html_page import Picture, Section, write_page
from nextblock.figures.ordering import draw_ordering
from nextblock.figures.panels import short
from nextblock.jobs.output import written_whole
from nextblock.jobs.visualize_neighbours import Shown
from nextblock.jobs.visualize_settings import VisualizeSettings
from nextblock.ordering import Ordering

OPEN_ATTENTION = 2  # pictures of attention that are there without a click


@dataclass
class Seen:
    """Everything to be drawn, of B images.

    pixels: uint8 [B, H, W, C]. names: B. settings: what was asked. training_order: of pseudo-random orders, the first.
    basis: from features to colours; given: whether it came from a file. colours: name of a cell size -> uint8
    [B, h, w, 3]. cosines: of each, of patches with those under the mask in use, `own`: float64 [h, w]. unrelated: the
    cosine of two different patches. looks: for each image, of each layer. neighbours: for each image; None when not
    asked for. bank: among what, in words. about: lines under the heading.
    """

    pixels: NDArray[np.uint8]
    names: list[str]
    settings: VisualizeSettings
    training_order: Ordering | None
    basis: ColourBasis
    given: bool
    colours: dict[str, NDArray[np.uint8]]
    cosines: dict[str, NDArray[np.float64]]
    own: str
    unrelated: float
    looks: list[dict[int, list[Look]]]
    neighbours: list[list[Shown]] | None = None
    bank: str = ""
    about: list[str] = field(default_factory=list)


def draw_page(seen: Seen, folder: Path, title: str) -> tuple[Path, list[Path]]:
    """Draw every picture into the folder, then `index.html` with all of them inside; returns it and the pictures."""
    sections = [_ordering(seen, folder), _colours(seen, folder), _cells(seen, folder), _attention(seen, folder)]
    if seen.neighbours is not None:
        sections.append(_neighbours(seen, folder))
    page = folder / "index.html"
    with written_whole(page) as beside:
        write_page(beside, title, seen.about, sections)
    return page, [picture.path for section in sections for picture in section.pictures]


def _ordering(seen: Seen, folder: Path) -> Section:
    ordering = seen.settings.ordering
    if seen.settings.features.bidirectional:
        ordering = Ordering.whole(ordering.grid)
        words = ["The encoder is used here without its mask: every patch sees every other one."]
    else:
        words = [
            "The image is cut into patches, and neighbouring patches form a cell. A patch sees the patches of its own "
            "cell and of earlier cells (from dark to light), never later ones. So the features of the first cell know "
            "the first cell only, and those of the last cell know the whole image."
        ]
    pictures = [Picture(draw_ordering(ordering, folder / "ordering.png"), "The cells in their order, and the mask.")]
    if seen.training_order is not None:
        drawn = draw_ordering(seen.training_order, folder / "ordering-training.png")
        told = (
            f"In training the cells came in {seen.training_order.num_entities} pseudo-random orders; this is the first."
        )
        pictures.append(Picture(drawn, f"{told} Features are taken in the order above."))
    return Section("Who may see whom", words, pictures)


def _colours(seen: Seen, folder: Path) -> Section:
    held = " + ".join(f"{part:.0%}" for part in seen.basis.explained)
    origin = "taken from the given file" if seen.given else "found over the patches of all these images together"
    words = [
        "Every patch has a vector of features. Its three main directions (principal components), "
        f"{origin}, are shown as red, green and blue: patches of like colour have like features, in one image and "
        f"across images. The three hold {held} of the variation there; the rest is not seen.",
        "The colours are kept in colours.npz. Give it with --colours to see other images in the same colours.",
    ]
    drawn = draw_feature_colours(seen.pixels, seen.colours[seen.own], seen.names, folder / "features.png")
    return Section(
        "What is alike to the encoder", words, [Picture(path, "Images and their patches.") for path in drawn]
    )


def _cells(seen: Seen, folder: Path) -> Section:
    words = [
        "The same images, weights and colours; only the mask is another one. With larger cells a patch sees more of "
        "the image. The encoder has learned under one mask; the others show how much its features lean on it.",
        "Cosine 1 is no change. For scale: two different patches under the mask in use have a cosine of "
        f"{seen.unrelated:.3f} on average.",
    ]
    mean = {name: float(x.mean()) for name, x in seen.cosines.items()}
    drawn = draw_cell_sizes(seen.pixels, seen.colours, mean, seen.own, seen.names, folder / "cell-sizes.png")
    pictures = [Picture(path, "The same images under the masks of other cells, one row an image.") for path in drawn]
    changes = {name: 1 - x for name, x in seen.cosines.items() if name != seen.own}
    if changes:  # none where the whole grid is a single patch
        changed = draw_changes(changes, folder / "cell-sizes-changes.png")
        pictures.append(Picture(changed, "Where in the image the features change; the darker, the more."))
    return Section("The effect of the cells' size", words, pictures)


def _attention(seen: Seen, folder: Path) -> Section:
    words = [
        "Attention is how much a patch takes from each other patch, in each head of a layer: brighter is more. What "
        "the mask hides is white. It shows where information comes from, not what is done with it. Layers, heads, "
        "rows and columns are numbered from 0."
    ]
    if seen.settings.tokens is None:
        words.append(
            "Patches: the middle one, and those where the heads differ most in where they look. Choose others with "
            "--tokens 'row,column row,column'."
        )
    pictures = []
    for i, layers in enumerate(seen.looks):
        for layer, looks in layers.items():
            path = folder / f"attention-{i:02d}-layer-{layer + 1}.png"
            draw_attention(seen.pixels[i], looks, path, f"layer {layer + 1} · {short(seen.names[i], 60)}")
            pictures.append(Picture(path, f"Layer {layer + 1}, {seen.names[i]}"))
    return Section("Where a patch looks", words, pictures, unfolded=OPEN_ATTENTION)


def _neighbours(seen: Seen, folder: Path) -> Section:
    assert seen.neighbours is not None
    words = [
        f"Each image, and those nearest to it among {seen.bank}, by the cosine of their features (the mean over all "
        "patches). The image itself is left out where it is among them.",
    ]
    drawn = draw_neighbours(seen.pixels, seen.names, seen.neighbours, folder / "neighbours.png")
    return Section("What is nearest", words, [Picture(path, "One row an image.") for path in drawn])
