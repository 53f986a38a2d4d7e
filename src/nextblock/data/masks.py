"""Masks: from a file's pixel values to class numbers, seen through the same window as their images.

| the mask is | its value |
|---|---|
| gray PNG of 1, 2, 4, 8 or 16 bits | the number stored in the file, never scaled |
| palette PNG | the index, whatever the colour |
| an integer or bool array or tensor [H, W], a Pillow image | the number |
| in colour, or with an alpha channel | refused: which colour is which class is not known |
| damaged | `SampleError`, as for an image |
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from nextblock.data.augment import random_resized_crop, resize_and_crop
from nextblock.data.decode import read_bytes
from nextblock.data.loading import TIMEOUT_S, training_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source
from nextblock.data.stream import BadSample, load_sample
from nextblock.errors import ConfigError, DataError, SampleError

IGNORED = 255  # in every mask that leaves this file
MOST_CLASSES = 254
_UNKNOWN = 254
_LARGEST = 65535
_STORED = {"L;2": 85, "L;4": 17}  # Pillow stretches gray of few bits over 0..255; this undoes it
_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class MaskConfig:
    """How masks are read, and what of an image is seen.

    Attributes:
        view: "whole" (the default: the whole image, resized to the encoder's input with its sides' ratio given up;
            everything that is labelled is seen and scored) or "crop" (the view of the other probes: the shorter side
            resized, then the central crop; shapes stay true, and what lies at the edges is never scored).
        values: pixel values of the classes, in their order, such as 0 255; empty = the value is the class number.
        ignore: pixel values that are no class: they count neither in training nor in a score.
        exif_orientation: turn images, and masks that have it, as their EXIF orientation says, where the encoder's
            own images were; no = neither is turned, for masks drawn on pixels as they are stored.

    Raises ConfigError for values that cannot work.
    """

    view: Literal["whole", "crop"] = "whole"
    values: tuple[int, ...] = ()
    ignore: tuple[int, ...] = (IGNORED,)
    exif_orientation: bool = True

    def __post_init__(self) -> None:
        if self.view not in ("whole", "crop"):
            raise ConfigError(f"segmentation.view must be 'whole' or 'crop'; got {self.view!r}.")
        if any(not 0 <= value <= _LARGEST for value in self.values):
            raise ConfigError(f"segmentation.values must lie in 0..{_LARGEST}; got {self.values}.")
        if len(set(self.values)) != len(self.values) or len(self.values) == 1 or len(self.values) > MOST_CLASSES:
            raise ConfigError(
                f"segmentation.values must name 2 to {MOST_CLASSES} classes, each once; got {self.values}."
            )

    def reading(self, preprocessing: Preprocessing) -> Preprocessing:
        """The encoder's preprocessing, images turned or not as masks need it."""
        return replace(preprocessing, exif_orientation=preprocessing.exif_orientation and self.exif_orientation)


def read_mask(content: Any, name: str, *, exif_orientation: bool = True) -> NDArray[np.int64]:
    """The values of a mask, int64 [H, W], by the table above.

    `content` is bytes or a path (of a PNG), a Pillow image, an array or a tensor. Raises DataError for what is no
    mask at all, SampleError for a damaged one.
    """
    if isinstance(content, Tensor):
        content = content.detach().cpu().numpy()
    if isinstance(content, np.ndarray):
        return _from_array(content, name)
    if isinstance(content, str | os.PathLike):
        content = read_bytes(content, name=name)
    if not isinstance(content, bytes | Image.Image):
        raise DataError(f"{name} is a {type(content).__name__}; a mask is a PNG, a Pillow image or an integer array.")
    try:
        image = Image.open(io.BytesIO(content), formats=("PNG",)) if isinstance(content, bytes) else content
        tiles = getattr(image, "tile", None)
        stored = tiles[0][3] if tiles else None  # gone once the pixels are loaded
        image.load()
        mode = image.mode
        turned = ImageOps.exif_transpose(image) if exif_orientation else image
        values = np.asarray(turned).astype(np.int64) if mode in _MODES else None
    except Exception as error:  # damage shows in many ways
        reason = "not a PNG" if isinstance(error, UnidentifiedImageError) else f"cannot be decoded: {error}"
        raise SampleError(name, reason) from error
    if values is None:
        raise DataError(
            f"{name} is a picture in colour or with an alpha channel (mode {mode}); the pixel value of a mask is its "
            "class. Save it as a gray or palette PNG."
        )
    return values // _STORED.get(stored, 1) if isinstance(stored, str) else values


def _from_array(values: NDArray[Any], name: str) -> NDArray[np.int64]:
    if values.dtype.kind not in "iub" or values.ndim != 2 or not values.size:
        raise DataError(f"{name} must be integers [H, W], one class number a pixel; got {values.dtype} {values.shape}.")
    return values.astype(np.int64)


@lru_cache(maxsize=8)
def _table(config: MaskConfig) -> NDArray[np.uint8]:
    """Class number of every value: [65536]."""
    table = np.full(_LARGEST + 1, _UNKNOWN, dtype=np.uint8)
    table[[value for value in config.ignore if 0 <= value <= _LARGEST]] = IGNORED
    if config.values:  # what is named is a class, even where it is also among the ignored
        table[list(config.values)] = np.arange(len(config.values))
    else:
        plain = [value for value in range(MOST_CLASSES) if value not in config.ignore]
        table[plain] = plain
    return table


def class_numbers(
    values: NDArray[np.int64], name: str, config: MaskConfig, num_classes: int = MOST_CLASSES
) -> NDArray[np.uint8]:
    """uint8 [H, W]: classes 0..num_classes - 1, or 255 for ignored pixels. Raises DataError naming another value."""
    inside = (values >= 0) & (values <= _LARGEST)
    classes = _table(config)[np.where(inside, values, _LARGEST)]
    if not inside.all():
        classes = np.where(inside, classes, np.where(np.isin(values, config.ignore), IGNORED, _UNKNOWN))
        classes = classes.astype(np.uint8)
    wrong = (classes >= min(num_classes, _UNKNOWN)) & (classes != IGNORED)
    if wrong.any():
        value = int(values[wrong][0])
        known = f"the values {', '.join(map(str, config.values))}" if config.values else f"0 to {num_classes - 1}"
        raise DataError(
            f"{name} holds the value {value}; classes are {known}. Mend the mask, complete classes.txt, or name the "
            f"values that are no class: --segmentation.ignore {' '.join(map(str, (*config.ignore, value)))}"
        )
    return classes


def view_of(
    pixels: NDArray[np.uint8], mask: NDArray[np.uint8], preprocessing: Preprocessing, view: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image [H, W, C] and mask [H, W] of one size -> both as the encoder sees them, [*size_px, C] and [*size_px].

    The image is resampled as in every evaluation, the mask takes the nearest pixel of the same window.
    """
    height, width = mask.shape
    size = preprocessing.size_px
    if view == "whole":
        box = (0.0, 0.0, float(width), float(height))
        seen = random_resized_crop(pixels, (0, 0, height, width), size)
    else:
        box = _window(height, width, preprocessing.shorter_side_px, size)
        seen = resize_and_crop(pixels, preprocessing.shorter_side_px, size)
    nearest = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST, box=box)
    return seen, np.array(nearest)


def _window(
    height: int, width: int, resize_px: int, size_px: tuple[int, int]
) -> tuple[float, float, float, float]:  # left, top, right, bottom
    """What `resize_and_crop` sees of an image, in its own pixels; the tests hold both together."""
    shorter = min(height, width)
    sides = [resize_px if side == shorter else int(resize_px * side / shorter) for side in (height, width)]
    if sides[0] < size_px[0] or sides[1] < size_px[1]:
        cover = max(size_px[0] / height, size_px[1] / width)
        sides = [max(want, round(side * cover)) for side, want in zip((height, width), size_px, strict=True)]
    top, left = round((sides[0] - size_px[0]) / 2), round((sides[1] - size_px[1]) / 2)
    down, across = height / sides[0], width / sides[1]
    right, bottom = min(width, (left + size_px[1]) * across), min(height, (top + size_px[0]) * down)
    return left * across, top * down, right, bottom


@dataclass
class MaskBatch:
    """images: uint8 [B, H, W, C]. masks: uint8 [B, H, W], 255 = ignored. indices: int64 [B]. bad: left out.

    highest: the largest class number in the whole masks, before they were resized; -1 where there is none.
    """

    images: Tensor
    masks: Tensor
    indices: Tensor
    highest: int = -1
    bad: list[BadSample] = field(default_factory=list)


@dataclass(frozen=True)
class MaskView:
    """Batches of (image, mask) by index; what `loading.training_batches` takes."""

    images: Source
    masks: Source
    preprocessing: Preprocessing
    config: MaskConfig
    num_classes: int = MOST_CLASSES

    def load(self, indices: Sequence[int]) -> MaskBatch:
        """Broken pairs are left out. Raises DataError for a mask that does not fit its image or the classes."""
        p = self.preprocessing
        images = np.empty((len(indices), *p.size_px, p.channels), dtype=np.uint8)
        masks = np.empty((len(indices), *p.size_px), dtype=np.uint8)
        used: list[int] = []
        bad: list[BadSample] = []
        highest = -1
        for index in map(int, indices):
            try:
                pixels, mask = self.pair(index)
            except SampleError as error:
                bad.append(BadSample(error.name, error.reason, index))
                continue
            highest = max(highest, int(mask[mask != IGNORED].max(initial=0)) if (mask != IGNORED).any() else -1)
            images[len(used)], masks[len(used)] = view_of(pixels, mask, p, self.config.view)
            used.append(index)
        kept = len(used)
        whole = torch.from_numpy(images)[:kept], torch.from_numpy(masks)[:kept]
        return MaskBatch(*whole, torch.tensor(used, dtype=torch.int64), highest, bad)

    def pair(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Pixels [H, W, C] and class numbers [H, W] of one image."""
        upright, name = self.preprocessing.exif_orientation, self.masks.name(index)
        pixels, _ = load_sample(self.images, index, self.preprocessing)
        values = read_mask(self.masks[index].content, name, exif_orientation=upright)
        if values.shape != pixels.shape[:2]:
            raise DataError(self._other_size(index, values.shape, pixels.shape[:2]))
        return pixels, class_numbers(values, name, self.config, self.num_classes)

    def _other_size(self, index: int, mask: tuple[int, ...], image: tuple[int, ...]) -> str:
        told = f"the mask {self.masks.name(index)} is {mask[1]}×{mask[0]} px, its image {self.images.name(index)} "
        told += f"{image[1]}×{image[0]} px; they must have the same size."
        if mask == image[::-1] and self.preprocessing.exif_orientation:
            told += " Where images are turned by their EXIF orientation but masks were drawn on the stored pixels: "
            told += "--segmentation.exif_orientation no"
        return told


def masked_batches(
    view: MaskView, plan: Iterable[Sequence[int]], *, workers: int, timeout_s: float = TIMEOUT_S
) -> Iterator[MaskBatch]:
    """One batch for each list of indices, in order, prepared by worker processes."""
    return training_batches(view, plan, workers=workers, timeout_s=timeout_s)
