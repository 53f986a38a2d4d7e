"""Scattered digits: scikit-learn's handwritten digits at random places and sizes on a larger canvas.

Centred digits are no test of features: raw pixels classify them almost perfectly. Scattered ones are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from nextblock.randomness import permutation, uniforms

CANVAS_PX = 32
SIZES_PX = (12, 24)
HELD_OUT = 360  # of 1,797 originals


@dataclass(frozen=True)
class Digits:
    """images: uint8 [N, 32, 32]. labels: int64 [N]. originals: int64 [N], which handwritten digit each one shows."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    originals: NDArray[np.int64]


def scattered_digits(seed: int, per_original: int) -> tuple[Digits, Digits]:
    """(training, held-out) canvases; no original is on both sides.

    Each original appears `per_original` times, each time at another place and with a side of 12 to 24 px. The split
    of the originals is always the same; places and sizes depend on the seed.
    """
    digits = load_digits()
    order = permutation(0, "scattered digits/split", len(digits.target))
    sides = {"train": order[HELD_OUT:], "held out": order[:HELD_OUT]}
    train, held_out = (
        _scatter(digits, np.repeat(originals, per_original), seed, f"scattered digits/{name}")
        for name, originals in sides.items()
    )
    return train, held_out


def _scatter(digits: object, originals: NDArray[np.int64], seed: int, purpose: str) -> Digits:
    pixels, labels = digits.images, digits.target  # type: ignore[attr-defined]
    draws = uniforms(seed, purpose, np.arange(len(originals)), 3)
    sides = (SIZES_PX[0] + draws[:, 0] * (SIZES_PX[1] - SIZES_PX[0] + 1)).astype(int)
    images = np.zeros((len(originals), CANVAS_PX, CANVAS_PX), dtype=np.uint8)
    for image, original, side, (u, v) in zip(images, originals, sides, draws[:, 1:], strict=True):
        digit = Image.fromarray((pixels[original] * (255 / 16)).astype(np.uint8))
        top, left = int(u * (CANVAS_PX - side + 1)), int(v * (CANVAS_PX - side + 1))
        image[top : top + side, left : left + side] = np.asarray(digit.resize((side, side), Image.Resampling.BICUBIC))
    return Digits(images, labels[originals].astype(np.int64), originals)
