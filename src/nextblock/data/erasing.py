"""Random erasing: a box of an image replaced by noise; and what a labelled trainer feeds its model.

The box is drawn on the host and the noise made on the device, both from random bits of the sample alone, so neither
depends on the batch. Source: Zhong, Zheng, Kang, Li and Yang, "Random erasing data augmentation", 2020; ranges and
the noise of its own for each pixel ("pixel" mode) as in timm.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextblock.data.preprocess import Preprocessing, normalize

if TYPE_CHECKING:
    from nextblock.data.stream import Batch

AREA = (0.02, 1 / 3)  # of the image's
RATIO = (0.3, 1 / 0.3)  # height / width
ATTEMPTS = 10
ERASE_UNIFORMS = 1 + 2 * ATTEMPTS + 2  # whether at all; area and ratio of each attempt; top and left

NOTHING = (0, 0, 0, 0)
Box = tuple[int, int, int, int]


def erase_box(height: int, width: int, probability: float, u: NDArray[np.float64]) -> Box:
    """The box (top, left, height, width) to be erased of an image of `height` x `width` pixels; NOTHING if none.

    `u` [ERASE_UNIFORMS] are uniform numbers in [0, 1). Area is uniform in AREA, height / width log-uniform in RATIO;
    the first of ten attempts that is smaller than the image is used, and if none is, nothing is erased.
    """
    if u[0] >= probability:
        return NOTHING
    pairs = u[1 : 1 + 2 * ATTEMPTS].reshape(ATTEMPTS, 2)
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * pairs[:, 0])
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = np.exp(low + (high - low) * pairs[:, 1])
    heights = np.rint(np.sqrt(area * ratio)).astype(int)
    widths = np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (heights >= 1) & (heights < height) & (widths >= 1) & (widths < width)
    if not fits.any():
        return NOTHING
    first = int(fits.argmax())
    h, w = int(heights[first]), int(widths[first])
    return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w


def prepare(batch: Batch, preprocessing: Preprocessing) -> Tensor:
    """What a labelled trainer feeds its model: the batch mirrored, normalised and erased, float32 [B, C, H, W].

    On the device of the batch's images, and without waiting for it.
    """
    return erase(normalize(batch.images, batch.flip, preprocessing), batch.erase, batch.noise)


def erase(x: Tensor, boxes: Tensor, keys: Tensor) -> Tensor:
    """Replace, in place, each image's box by standard normal noise; returns `x`, float [B, C, H, W].

    boxes: int64 [B, 4], top, left, height and width, height 0 for none. keys: int64 [B], 64 random bits for each
    image: its noise is a function of them and of the place in the image. Both on the host: so many pixels are
    touched as are erased, and that number must be known without waiting for the device.
    """
    areas = boxes[:, 2] * boxes[:, 3]
    total = int(areas.sum())
    if total == 0:
        return x
    channels, width = x.shape[1], x.shape[3]
    boxes, keys, areas = (values.to(x.device, non_blocking=True) for values in (boxes, keys, areas))
    owners = torch.repeat_interleave(torch.arange(len(x), device=x.device), areas, output_size=total)  # [N]
    inside = torch.arange(total, device=x.device) - (areas.cumsum(0) - areas)[owners]  # place in its box, [N]
    top, left, _, across = boxes[owners].unbind(1)
    rows, columns = top + inside // across, left + inside % across
    x[owners, :, rows, columns] = _normal(keys[owners], rows * width + columns, channels).to(x.dtype)
    return x


def _normal(keys: Tensor, places: Tensor, channels: int) -> Tensor:
    """float32 [N, channels], a function of each key and place, both int64 [N].

    Each value is one of 65,536 equally likely quantiles, looked up: integers and a table are the same for all batch
    sizes and devices, which logarithms and cosines are not in their last bit. 64 bits serve four channels.
    """
    groups = -(-channels // 4)
    counters = places[:, None] * groups + torch.arange(groups, device=keys.device)
    bits = _mix(_mix(keys[:, None] + counters * _GAMMA))  # [N, groups]
    shifts = torch.arange(0, 64, 16, device=keys.device)
    quantiles = (bits[:, :, None] >> shifts) & 0xFFFF  # [N, groups, 4]
    return _quantiles(keys.device)[quantiles.flatten(1)[:, :channels]]


# The finaliser of SplitMix64, as in randomness.py, in the signed integers that devices have; products wrap around.
_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_M1 = 0xBF58476D1CE4E5B9 - 2**64
_M2 = 0x94D049BB133111EB - 2**64


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _M1
    z = (z ^ _shifted(z, 27)) * _M2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & (2 ** (64 - bits) - 1)  # zeros move in, not the sign


@lru_cache(maxsize=8)
def _quantiles(device: torch.device) -> Tensor:
    """float32 [65536] on `device`; made on the host, so that it is the same everywhere."""
    with torch.inference_mode(False):
        middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
        return torch.special.ndtri(middles).to(torch.float32).to(device)
