"""Generated images: a labelled sheet of them, and a moving picture of how they came about. Pixels stay pixels.

Drawn by Pillow: every pixel of a small image becomes a whole number of pixels of the sheet, which a plot would blur.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nextblock.errors import ConfigError, DataError

SHOWN_PX = 96  # small images are enlarged until their shorter side is at least about this
GAP_PX = 6
TEXT_PX = 13
LAST_MS = 2000  # the finished images stay so long
ANIMATED = (".gif", ".webp")
_INK, _PAPER = (34, 34, 34), (255, 255, 255)


def contact_sheet(
    images: NDArray[np.uint8], titles: Sequence[str], path: str | Path, *, columns: int = 0, scale: int = 0
) -> Path:
    """All images in a grid, row after row, each under its title.

    Args:
        images: uint8 [N, H, W, C]; other than 3 channels are drawn as their mean, gray.
        titles: N texts, or none; shortened to the width of the images.
        path: of the picture (.png); its folder is made when needed. Returned.
        columns: images to a row; 0 = as many as make the sheet about square.
        scale: every pixel is drawn as scale × scale pixels; 0 = chosen, so that small images can be seen.

    Raises DataError unless the images are as said and there is one title for each, or none.
    """
    _require_images(images)
    if titles and len(titles) != len(images):
        raise DataError(f"one title for each of the {len(images)} images is needed, or none; got {len(titles)}.")
    shown = _enlarged(images, scale)
    height, width = shown.shape[1:3]
    columns = columns or int(np.ceil(np.sqrt(len(shown))))
    rows = -(-len(shown) // columns)
    label = TEXT_PX + 4 if any(titles) else 0
    sheet = Image.new("RGB", (_along(columns, width), _along(rows, height + label)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(shown):
        left, top = GAP_PX + i % columns * (width + GAP_PX), GAP_PX + i // columns * (height + label + GAP_PX)
        sheet.paste(Image.fromarray(image), (left, top + label))
        if titles:
            draw.text((left, top), _fitting(titles[i], width), fill=_INK, font=_font())
    return _save(sheet, Path(path))


def animation(frames: Sequence[NDArray[np.uint8]], path: str | Path, *, ms: int = 80, scale: int = 0) -> Path:
    """A moving picture, endlessly repeated, of the images side by side; the last frame stays for two seconds.

    Args:
        frames: each uint8 [N, H, W, C], all of one shape; other than 3 channels are drawn as their mean, gray.
        path: of the picture: .gif (256 colours a frame) or .webp; its folder is made when needed. Returned.
        ms: milliseconds a frame.
        scale: every pixel is drawn as scale × scale pixels; 0 = chosen, so that small images can be seen.

    Raises ConfigError for another ending, DataError unless the frames are as said.
    """
    path = Path(path)
    if path.suffix not in ANIMATED:
        raise ConfigError(f"an animation must end in {' or '.join(ANIMATED)}; got {path.name}.")
    if not len(frames):
        raise DataError("there is no frame to draw.")
    for frame in frames:
        _require_images(frame)
        if frame.shape != frames[0].shape:
            raise DataError(f"all frames must have one shape; got {list(frames[0].shape)} and {list(frame.shape)}.")
    strips = [_strip(_enlarged(frame, scale)) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    # The quality is that of WebP; GIF knows none.
    strips[0].save(
        path, save_all=True, append_images=strips[1:], duration=[ms] * (len(strips) - 1) + [LAST_MS], loop=0, quality=90
    )
    return path


def _require_images(images: NDArray[np.uint8]) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or not all(images.shape):
        raise DataError(f"images to draw must be uint8 [N, H, W, C], not empty; got {images.dtype} {images.shape}.")


def _enlarged(images: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """uint8 [N, H, W, C] -> [N, H * scale, W * scale, 3]."""
    if images.shape[3] != 3:
        images = np.repeat(images.mean(3, keepdims=True).round().astype(np.uint8), 3, axis=3)
    scale = scale or max(1, -(-SHOWN_PX // min(images.shape[1:3])))
    return images.repeat(scale, axis=1).repeat(scale, axis=2)


def _strip(images: NDArray[np.uint8]) -> Image.Image:
    height, width = images.shape[1:3]
    strip = Image.new("RGB", (_along(len(images), width), _along(1, height)), _PAPER)
    for i, image in enumerate(images):
        strip.paste(Image.fromarray(image), (GAP_PX + i * (width + GAP_PX), GAP_PX))
    return strip


def _along(count: int, side: int) -> int:
    """So many sides with a gap before, between and after them."""
    return count * (side + GAP_PX) + GAP_PX


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    # Matplotlib brings a font that has most of the world's letters; Pillow's own has Latin ones only.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), TEXT_PX - 2)


def _fitting(title: str, width_px: int) -> str:
    """The title, or as much of its beginning as fits, with an ellipsis."""
    if _font().getlength(title) <= width_px:
        return title
    cut = next((n for n in range(len(title) - 1, 0, -1) if _font().getlength(title[:n].rstrip() + "…") <= width_px), 0)
    return title[:cut].rstrip() + "…"


def _save(picture: Image.Image, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path
