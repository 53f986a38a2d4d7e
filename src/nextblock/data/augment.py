"""Crops: which box of an image is used, and its resampling. All functions are pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nextblock.errors import ConfigError

ATTEMPTS = 10
CROP_UNIFORMS = 2 * ATTEMPTS + 2  # area and ratio of each attempt, then top and left

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class CropConfig:
    """The training crop: a random part of the image, resized, perhaps mirrored.

    size_px: height and width of the result. scale: smallest and largest part of the image's area.
    ratio: smallest and largest width / height of the part. flip: probability of mirroring.
    """

    size_px: tuple[int, int]
    scale: tuple[float, float] = (0.3, 1.0)
    ratio: tuple[float, float] = (0.75, 1.5)
    flip: float = 0.5

    def __post_init__(self) -> None:
        for field in ("size_px", "scale", "ratio"):
            value = getattr(self, field)
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise ConfigError(f"{field} must be two numbers, got {value!r}")
            object.__setattr__(self, field, tuple(value))
        if any(side < 1 for side in self.size_px):
            raise ConfigError(f"size_px must be a height and a width of at least 1, got {self.size_px}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ConfigError(f"scale must satisfy 0 < smallest <= largest <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"ratio must satisfy 0 < smallest <= largest, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip must be a probability from 0 to 1, got {self.flip}")


def crop_box(height: int, width: int, config: CropConfig, u: NDArray[np.float64]) -> Box:
    """The box (top, left, height, width) of a random resized crop of an image of `height` x `width` pixels.

    `u` [CROP_UNIFORMS] are uniform numbers in [0, 1). Area is uniform in `config.scale`, width / height
    log-uniform in `config.ratio`; the first of ten attempts that fits is used, else the largest central box
    whose ratio is allowed. Source: the Inception crop (Szegedy et al., "Going deeper with convolutions", 2015).
    """
    pairs = u[: 2 * ATTEMPTS].reshape(ATTEMPTS, 2)
    low, high = math.log(config.ratio[0]), math.log(config.ratio[1])
    ratios = np.exp(low + (high - low) * pairs[:, 1])
    # Not in arrays: the first attempt nearly always fits, and between two images every call of NumPy comes slowly.
    for share, ratio in zip(pairs[:, 0].tolist(), ratios.tolist(), strict=True):
        area = height * width * (config.scale[0] + (config.scale[1] - config.scale[0]) * share)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w
    return _central_box(height, width, config)


def _central_box(height: int, width: int, config: CropConfig) -> Box:
    ratio = min(max(width / height, config.ratio[0]), config.ratio[1])
    w = min(width, max(1, round(height * ratio)))
    h = min(height, max(1, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    pixels: NDArray[np.uint8] | Image.Image, box: Box, size_px: tuple[int, int]
) -> NDArray[np.uint8]:
    """Resize the `box` (top, left, height, width) of `pixels` to uint8 [*size_px, C]; by Pillow.

    `pixels` is uint8 [H, W, C] or, the same with a copy less, a Pillow image of mode L or RGB.
    """
    top, left, h, w = box
    corners = (left, top, left + w, top + h)
    if isinstance(pixels, Image.Image):
        return _resize_image(pixels, corners, size_px).reshape(*size_px, -1)
    return _resize(pixels, corners, size_px)


def resize_by_torch(
    pixels: NDArray[np.uint8], size_px: tuple[int, int], out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Resize `pixels` uint8 [H, W, C] to uint8 [*size_px, C]: Pillow's filter, several times as fast on x86.

    `out`, contiguous, is filled and returned where it is given.
    """
    if out is None:
        out = np.empty((*size_px, pixels.shape[2]), dtype=np.uint8)
    writable = np.require(pixels, requirements="W")  # torch warns of anything else
    # What torch.nn.functional.interpolate(mode="bicubic", antialias=True) calls, which cannot be given an `out`.
    resize = torch.ops.aten._upsample_bicubic2d_aa.out
    resize(_channels_last(writable), size_px, False, None, None, out=_channels_last(out))
    return out


def _channels_last(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """[1, C, H, W] in the memory of `pixels` [H, W, C]."""
    return torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)


def resize_and_crop(pixels: NDArray[np.uint8], resize_px: int, size_px: tuple[int, int]) -> NDArray[np.uint8]:
    """The evaluation view: the shorter side resized to `resize_px`, then the central `size_px` (height, width).

    Never pads: where `resize_px` is too small for `size_px`, the image is made just large enough to cover it.
    `pixels` is uint8 [H, W, C]; returns uint8 [*size_px, C].
    """
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    # Sides are truncated and the margins halved with rounding as in torchvision, to see the same pixels.
    sides = [resize_px if side == shorter else int(resize_px * side / shorter) for side in (height, width)]
    if sides[0] < size_px[0] or sides[1] < size_px[1]:
        cover = max(size_px[0] / height, size_px[1] / width)
        sides = [max(want, round(side * cover)) for side, want in zip((height, width), size_px, strict=True)]
    top, left = round((sides[0] - size_px[0]) / 2), round((sides[1] - size_px[1]) / 2)
    # Only the part that is kept is resampled: a 1 x 50,000 image must not become 256 x 12,800,000.
    down, across = height / sides[0], width / sides[1]
    right, bottom = min(width, (left + size_px[1]) * across), min(height, (top + size_px[0]) * down)
    return _resize(pixels, (left * across, top * down, right, bottom), size_px)


def _resize(
    pixels: NDArray[np.uint8], box: tuple[float, float, float, float], size_px: tuple[int, int]
) -> NDArray[np.uint8]:
    """Bicubic with antialiasing. `box` is Pillow's: left, top, right, bottom."""
    if pixels.shape[2] == 3:
        return _resize_image(Image.fromarray(np.ascontiguousarray(pixels)), box, size_px)
    # Not Pillow's 2 and 4 channel modes: they would weight the colours by alpha.
    planes = (Image.fromarray(np.ascontiguousarray(pixels[:, :, c])) for c in range(pixels.shape[2]))
    return np.stack([_resize_image(plane, box, size_px) for plane in planes], axis=-1)


def _resize_image(
    image: Image.Image, box: tuple[float, float, float, float], size_px: tuple[int, int]
) -> NDArray[np.uint8]:
    return np.asarray(image.resize((size_px[1], size_px[0]), Image.Resampling.BICUBIC, box=box))
