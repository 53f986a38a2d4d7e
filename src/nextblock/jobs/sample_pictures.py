"""What a person looks at after sampling: a labelled sheet, and the first images as they came about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextblock.figures.samples import animation, contact_sheet
from nextblock.jobs.output import written_whole
from nextblock.jobs.sample_folder import SampleFolder
from nextblock.ordering import AnyOrdering, ScalePyramid

MOST_ON_SHEET = 64
MOST_FRAMES = 40  # each is decoded
MOST_COLUMNS = 10
UNBEGUN = 128  # gray

Decode = Callable[[Tensor], NDArray[np.uint8]]


def draw_sheet(folder: SampleFolder, classes: Sequence[int], names: Sequence[str]) -> Path:
    """The first images, each under its class; a column for each class where a few take turns."""
    count = min(folder.count, MOST_ON_SHEET)
    images = np.stack([folder.read(number) for number in range(count)])
    titles = [names[classes[number % len(classes)]] for number in range(count)] if classes else []
    columns = len(classes) if 1 < len(classes) <= MOST_COLUMNS and count > len(classes) else 0
    with written_whole(folder.sheet) as beside:
        drawn = beside.with_suffix(".png")  # the ending decides the format
        contact_sheet(images, titles, drawn, columns=columns).rename(beside)
    return folder.sheet


class Frames:
    """Handed to the sampler as `watch`: keeps the latents of the first images at evenly chosen solver steps.

    Args:
        images: so many of the batch.
        steps: solver steps of all sampled entities together.
    """

    def __init__(self, images: int, steps: int) -> None:
        self.images, self._every = images, -(-steps // MOST_FRAMES)
        self._seen = 0
        self.kept: list[tuple[int, Tensor]] = []

    def __call__(self, entity: int, step: int, picture: Callable[[], Tensor]) -> None:
        if self._seen % self._every == 0:
            self.kept.append((entity, picture()[: self.images].float().cpu()))
        self._seen += 1

    def draw(self, path: Path, finished: NDArray[np.uint8], ordering: AnyOrdering, decode: Decode) -> Path:
        """Decode every kept state, entities not begun yet gray, and rest on the `finished` images, uint8 [B, H, W, C].

        `decode` turns latents [B, C, h, w] into such images.
        """
        place = _entity_of_pixels(ordering, finished.shape[1:3])
        frames = [self._frame(entity, decode(latents), place) for entity, latents in self.kept]
        with written_whole(path) as beside:
            drawn = beside.with_suffix(path.suffix)  # the ending decides the format
            animation([*frames, finished[: self.images]], drawn).rename(beside)
        return path

    def _frame(self, entity: int, images: NDArray[np.uint8], place: NDArray[np.int64] | None) -> NDArray[np.uint8]:
        return images if place is None else np.where(place[:, :, None] > entity, np.uint8(UNBEGUN), images)


def _entity_of_pixels(ordering: AnyOrdering, size_px: Sequence[int]) -> NDArray[np.int64] | None:
    """The entity of each pixel, [H, W]; None for a pyramid, each of whose entities is the whole picture."""
    if isinstance(ordering, ScalePyramid):
        return None
    entity = ordering.merge(ordering.entity[None])[0]  # [h, w]
    for axis in (0, 1):
        entity = torch.repeat_interleave(entity, size_px[axis] // entity.shape[axis], axis)
    return entity.numpy()
