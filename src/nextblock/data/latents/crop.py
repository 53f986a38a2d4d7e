"""The crop of the latent cache: ADM's central square, and the images of a source in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source
from nextblock.data.stream import BadSample, Batch, load_sample
from nextblock.errors import SampleError

MOST_ELONGATED = 16


def adm_center_crop(pixels: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """The central square of an image as ADM prepares it (Dhariwal and Nichol, arXiv 2105.05233, its released code).

    While the shorter side is at least twice `size_px` the image is halved by averaging; then it is resized
    (bicubic) so that the shorter side is `size_px`, and the centre is kept. An image more than 16 times as long as
    wide, which would grow beyond all memory, is first cut to that.

    `pixels` is uint8 [H, W, C], C 1 or 3; returns uint8 [size_px, size_px, C].
    """
    pixels = _not_endless(pixels)
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    while min(image.size) >= 2 * size_px:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size_px / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size_px) // 2, (image.height - size_px) // 2
    return np.asarray(image.crop((left, top, left + size_px, top + size_px))).reshape(size_px, size_px, -1)


def _not_endless(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    most = MOST_ELONGATED * min(height, width)
    top, left = max(0, height - most) // 2, max(0, width - most) // 2
    return pixels[top : top + most, left : left + most]


class CroppedImages:
    """The images of a source in ADM's crop: `load` is what `training_batches` asks of a stream."""

    def __init__(self, source: Source, preprocessing: Preprocessing) -> None:
        self.source, self.preprocessing = source, preprocessing

    def load(self, positions: Sequence[int]) -> Batch:
        """The samples with these indices, in order; broken ones are left out and listed in `bad`."""
        p = self.preprocessing
        images: list[NDArray[np.uint8]] = []
        labels: list[int] = []
        used: list[int] = []
        bad: list[BadSample] = []
        for index in map(int, positions):
            try:
                pixels, label = load_sample(self.source, index, p)
            except SampleError as error:
                bad.append(BadSample(error.name, error.reason, index))
                continue
            images.append(adm_center_crop(pixels, p.size_px[0]))
            labels.append(-1 if label is None else label)
            used.append(index)
        stacked = np.stack(images) if images else np.empty((0, *p.size_px, p.channels), dtype=np.uint8)
        return Batch(
            images=torch.from_numpy(stacked),
            labels=torch.tensor(labels, dtype=torch.int64),
            flip=torch.zeros(len(used), dtype=torch.bool),
            positions=torch.tensor(used, dtype=torch.int64),
            indices=torch.tensor(used, dtype=torch.int64),
            bad=bad,
        )
