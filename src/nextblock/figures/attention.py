"""Attention drawn over an image: where a patch looks, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from nextblock.errors import ConfigError
from nextblock.figures.canvas import BLACK, SKY, outline, save
from nextblock.figures.panels import GAP_IN, MARGIN_IN, draw, enlarged, foot, head, panels

ACROSS = 7  # panels of a row; more heads go on in the next
HIDDEN = 0.88  # how white a patch is that may not be looked at
EVEN_TIMES = 3.0  # the least top of a scale, times what each patch would get if all got the same
DIM = 0.6  # of the image under the colours


@dataclass(frozen=True)
class Look:
    """Where one patch looks.

    patch: (row, column) from 0. why: a few words on why it was chosen; may be empty. weights: float [heads, h, w],
    of each head 1 in all. heads: the number of each. mean: float [h, w], over all heads of the layer. visible: bool
    [h, w], True where the mask lets it look.
    """

    patch: tuple[int, int]
    why: str
    weights: NDArray[np.float32]
    heads: Sequence[int]
    mean: NDArray[np.float32]
    visible: NDArray[np.bool_]


def draw_attention(image: NDArray[np.uint8], looks: Sequence[Look], path: str | Path, title: str = "") -> Path:
    """One image, a patch a row: the image with the patch outlined, then the mean over heads, then heads.

    Args:
        image: uint8 [H, W, C], its sides whole numbers of patches.
        looks: the patches to be drawn.
        path: of the picture; returned.
        title: over it.

    Raises ConfigError without a patch to draw.
    """
    if not looks:
        raise ConfigError("there is no patch whose attention could be drawn.")
    size = image.shape[:2]
    columns = min(ACROSS, 2 + len(looks[0].heads))
    lines = -(-(2 + len(looks[0].heads)) // columns)
    figure, axes = panels(
        len(looks) * lines, columns, ratio=size[0] / size[1], width_in=1.5, above_in=0.36, head_in=0.26, foot_in=0.36
    )
    head(figure, title)
    for i, look in enumerate(looks):
        every = axes[i * lines : (i + 1) * lines].flatten()
        here = np.zeros(look.visible.shape, bool)
        here[look.patch] = True
        told = f"{look.why}: patch {look.patch[0]},{look.patch[1]}\neven would be {1 / look.visible.sum():.1%}"
        draw(every[0], image, told)
        _mark(every[0], enlarged(here, size))
        maps = {f"mean of all heads\nup to {look.mean.max():.1%}": look.mean}
        maps |= {f"head {n}\nup to {w.max():.1%}": w for n, w in zip(look.heads, look.weights, strict=True)}
        for each, (name, weights) in zip(every[1:], maps.items(), strict=False):
            draw(each, overlay(image, weights, look.visible), name)
            _mark(each, enlarged(here, size))
    foot(figure, _words(looks, columns * 1.5 + (columns - 1) * GAP_IN + 2 * MARGIN_IN))
    return save(figure, path)


def _mark(axes: Axes, here: NDArray[np.bool_]) -> None:
    outline(axes, here, BLACK, 2.2)  # under the light line, which alone is lost on a light picture
    outline(axes, here, SKY, 1.0)


def overlay(image: NDArray[np.uint8], weights: NDArray[np.float32], visible: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image in gray, [H, W, C], under the colours of the weights [h, w]; nearly white where not `visible`."""
    gray = image.mean(2, keepdims=True) * DIM
    even = 1 / max(1, int(visible.sum()))
    top = max(float(np.max(weights)), EVEN_TIMES * even)  # what is nearly even is not to look like much
    strength = enlarged(weights / top, image.shape[:2])[..., None]
    hot = 255 * matplotlib.colormaps["inferno"](0.3 + 0.65 * strength[..., 0])[..., :3]
    opaque = 0.85 * np.sqrt(strength)  # the root: weak attention is still seen
    shown = gray * (1 - opaque) + hot * opaque
    seen = enlarged(visible, image.shape[:2])[..., None]
    whitened = gray * (1 - HIDDEN) + 255 * HIDDEN
    return np.where(seen, shown, whitened).round().astype(np.uint8)


def _words(looks: Sequence[Look], width_in: float) -> str:
    parts = ["Blue frame: the patch that looks.", "Bright: where. Each picture has its own scale."]
    if not all(look.visible.all() for look in looks):
        parts.append("White: the mask hides it.")
    together = " ".join(parts)
    return together if len(together) < width_in * 15 else "\n".join([parts[0], " ".join(parts[1:])])
