"""scikit-learn's handwritten digits: scattered, at random places and sizes on a larger canvas, or plain.

Centred digits are no test of features: raw pixels classify them almost perfectly. Scattered ones are. Plain ones are
what a small generator learns in a minute.
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
ORIGINALS = 1797
HELD_OUT = 360  # of them


@dataclass(frozen=True)
class Digits:
    """images: uint8 [N, S, S]. labels: int64 [N]. originals: int64 [N], which handwritten digit each one shows."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    originals: NDArray[np.int64]


def scattered_digits(seed: int, per_original: int) -> tuple[Digits, Digits]:
    """(training, held-out) canvases; no original is on both sides.

    Each original appears `per_original` times, each time at another place and with a side of 12 to 24 px. The split
    of the originals is always the same; places and sizes depend on the seed.
    """
    digits, sides = load_digits(), _split()
    train, held_out = (
        _scatter(digits, np.repeat(originals, per_original), seed, f"scattered digits/{name}")
        for name, originals in sides.items()
    )
    return train, held_out


def plain_digits(size_px: int = 16) -> tuple[Digits, Digits]:
    """(training, held-out) digits, each original once, enlarged from 8×8 to fill `size_px` × `size_px`.

    The split is that of `scattered_digits`.
    """
    digits = load_digits()
    train, held_out = (
        Digits(
            np.stack([_drawn(digits.images[i], size_px) for i in originals]),
            digits.target[originals].astype(np.int64),
            originals,
        )
        for originals in _split().values()
    )
    return train, held_out


def on_canvas(digits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Digits uint8 [N, S, S] in the middle of black canvases: [N, 32, 32]."""
    edge = (CANVAS_PX - digits.shape[1]) // 2
    return np.pad(digits, ((0, 0), *((edge, CANVAS_PX - side - edge) for side in digits.shape[1:])))


def _split() -> dict[str, NDArray[np.int64]]:
    """Which originals are on which side."""
    order = permutation(0, "scattered digits/split", ORIGINALS)
    return {"train": order[HELD_OUT:], "held out": order[:HELD_OUT]}


def _drawn(pixels: NDArray[np.float64], side: int) -> NDArray[np.uint8]:
    """An original, 0..16 float [8, 8], as uint8 [side, side]."""
    digit = Image.fromarray((pixels * (255 / 16)).astype(np.uint8))
    return np.asarray(digit.resize((side, side), Image.Resampling.BICUBIC))


def _scatter(digits: object, originals: NDArray[np.int64], seed: int, purpose: str) -> Digits:
    pixels, labels = digits.images, digits.target  # type: ignore[attr-defined]
    draws = uniforms(seed, purpose, np.arange(len(originals)), 3)
    sides = (SIZES_PX[0] + draws[:, 0] * (SIZES_PX[1] - SIZES_PX[0] + 1)).astype(int)
    images = np.zeros((len(originals), CANVAS_PX, CANVAS_PX), dtype=np.uint8)
    for image, original, side, (u, v) in zip(images, originals, sides, draws[:, 1:], strict=True):
        top, left = int(u * (CANVAS_PX - side + 1)), int(v * (CANVAS_PX - side + 1))
        image[top : top + side, left : left + side] = _drawn(pixels[original], side)
    return Digits(images, labels[originals].astype(np.int64), originals)
