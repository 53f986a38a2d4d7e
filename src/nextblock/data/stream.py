"""The training stream: what is seen at a position is a pure function of (seed, position).

It does not depend on the number of workers or processes, nor on where a run was stopped and resumed; the state
of the stream is one number, the samples consumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nextblock.data.augment import CROP_UNIFORMS, Box, CropConfig, crop_box
from nextblock.data.decode import decode
from nextblock.data.decoders import PILLOW, chosen_decoder, decode_crop
from nextblock.data.erasing import ERASE_UNIFORMS, NOTHING, erase_box
from nextblock.data.heartbeat import reading
from nextblock.data.preprocess import Preprocessing
from nextblock.data.randaugment import RandAugment
from nextblock.data.sources import Source
from nextblock.errors import ConfigError, DataError, SampleError
from nextblock.randomness import hashed, shuffled, uniforms

ATTEMPTS = 100


class BadSample(NamedTuple):
    """A sample that could not be read: its name, one clause why, and the position it was wanted for."""

    name: str
    reason: str
    position: int


@dataclass
class Batch:
    """B images on their way to the model.

    images: uint8 [B, H, W, C]. labels: int64 [B], -1 where there is none. flip: bool [B], to be mirrored on the
    device. positions: int64 [B], global sample positions (in evaluation, indices). indices: int64 [B], the
    samples really used. bad: the samples that could not be. erase: int64 [B, 4], top, left, height and width of the
    box to be erased on the device after mirroring, height 0 for none; noise: int64 [B], 64 random bits for what
    fills it; both zeros where not given.
    """

    images: Tensor
    labels: Tensor
    flip: Tensor
    positions: Tensor
    indices: Tensor
    bad: list[BadSample]
    erase: Tensor = field(default_factory=lambda: torch.zeros(0, len(NOTHING), dtype=torch.int64))
    noise: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        if len(self.erase) == 0:
            self.erase = self.erase.new_zeros(len(self), len(NOTHING))
        if len(self.noise) == 0:
            self.noise = self.noise.new_zeros(len(self))

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory (torch's DataLoader calls this by its name)."""
        return self._replace({name: value.pin_memory() for name, value in self._tensors().items()})

    def to(self, device: torch.device | str) -> Batch:
        """A copy with the pixels, flips and labels on `device`; does not wait when the memory is pinned.

        Positions and indices stay: what is drawn from them is drawn on the host. So do `erase` and `noise`: how many
        pixels are erased must be known without waiting for the device.
        """
        moved = {k: getattr(self, k).to(device, non_blocking=True) for k in ("images", "labels", "flip")}
        return dataclasses.replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in fields if isinstance(value, Tensor)}

    def _replace(self, tensors: dict[str, Tensor]) -> Batch:
        return Batch(**tensors, bad=self.bad)


Order = Callable[[int, int, NDArray[np.int64]], NDArray[np.int64]]


def locate(
    seed: int, positions: ArrayLike, length: int, order: Order | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Epoch and sample index at each of the global `positions` [B]; both int64 [B].

    An epoch is one permutation of all `length` samples, a different one each time: that of `order` (seed, epoch, places
    [B] -> indices [B]), for a source whose samples are better not read from everywhere at once, or else any.
    """
    if length < 1:
        raise DataError("a source without images cannot be trained on")
    epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), length)
    indices = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        if order is None:
            indices[here] = shuffled(seed, f"epoch{epoch}", length, places[here])
        else:
            indices[here] = order(seed, int(epoch), places[here])
    return epochs, indices


class TrainingStream:
    """Shuffled, cropped and mirrored samples of a source, for ever. Picklable when the source is.

    randaugment: what is changed after cropping, filled with the preprocessing's mean where it names no colour.
    erasing: the probability of a box to be erased; see `erasing.prepare`, which does it.
    decoder: who makes crops of files, see `decoders`; "auto" is resolved here. Part of what the stream is: a run that
    goes on must give the one it began with, which `stream.decoder` names.
    Raises ConfigError when `randaugment` does not take so many channels, `erasing` is no probability or the decoder is
    not there.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        crop: CropConfig,
        preprocessing: Preprocessing,
        randaugment: RandAugment | None = None,
        erasing: float = 0.0,
        decoder: str = PILLOW,
    ) -> None:
        if not 0 <= erasing <= 1:
            raise ConfigError(f"erasing must be a probability from 0 to 1, got {erasing}")
        self.source = source
        self.seed = seed
        self.crop = crop
        self.preprocessing = preprocessing
        self.randaugment = None if randaugment is None else randaugment.filled(preprocessing.mean or ())
        self.erasing = erasing
        self.decoder = chosen_decoder(decoder)

    def load(self, positions: Sequence[int]) -> Batch:
        """The samples at `positions` [B], in that order.

        A broken image is replaced by another one, which depends on (seed, position, attempt) alone, and listed
        in the batch's `bad`. Raises DataError when 100 in a row are broken, or when the storage fails.
        """
        where = np.asarray(positions, dtype=np.int64)
        _, indices = locate(self.seed, where, len(self.source), getattr(self.source, "order", None))
        draws = uniforms(self.seed, "crop", where, CROP_UNIFORMS + 1)
        flip = draws[:, CROP_UNIFORMS] < self.crop.flip
        shape = (len(where), *self.crop.size_px, self.preprocessing.channels)
        images = np.empty(shape, dtype=np.uint8)
        labels = np.full(len(where), -1, dtype=np.int64)
        bad: list[BadSample] = []
        for row, position in enumerate(where.tolist()):
            u = draws[row, :CROP_UNIFORMS]
            label, indices[row] = self._sample(position, int(indices[row]), u, images[row], bad)
            labels[row] = -1 if label is None else label
        self._augment(images, flip, where)
        return Batch(
            images=torch.from_numpy(images),
            labels=torch.from_numpy(labels),
            flip=torch.from_numpy(flip),
            positions=torch.from_numpy(where.copy()),
            indices=torch.from_numpy(indices),
            bad=bad,
            **self._erased(where),
        )

    def _augment(self, images: NDArray[np.uint8], flip: NDArray[np.bool_], where: NDArray[np.int64]) -> None:
        """RandAugment of the crops [B, H, W, C], in place."""
        if self.randaugment is None:
            return
        draws = uniforms(self.seed, "randaugment", where, self.randaugment.uniforms_needed)
        for row, mirrored in enumerate(flip):
            # Mirroring comes first, though the device does it last: a vertical shear holds the left edge, so signs
            # alone do not make the order irrelevant. What the device will mirror is augmented as in a mirror.
            seen = images[row, :, ::-1] if mirrored else images[row]
            changed = self.randaugment.apply(seen, draws[row])
            images[row] = changed[:, ::-1] if mirrored else changed

    def _erased(self, where: NDArray[np.int64]) -> dict[str, Tensor]:
        """The batch's `erase` and `noise`."""
        if self.erasing == 0:
            return {}
        draws = uniforms(self.seed, "erase", where, ERASE_UNIFORMS)
        boxes = np.array([erase_box(*self.crop.size_px, self.erasing, u) for u in draws], dtype=np.int64)
        noise = hashed(self.seed, "erase noise", where).view(np.int64)
        return {"erase": torch.from_numpy(boxes.reshape(-1, len(NOTHING))), "noise": torch.from_numpy(noise)}

    def _sample(
        self, position: int, index: int, u: NDArray[np.float64], out: NDArray[np.uint8], bad: list[BadSample]
    ) -> tuple[int | None, int]:
        """Label and index of the first readable sample for `position`, its crop in `out`; `u` draws the box."""
        for attempt in range(ATTEMPTS):
            try:
                return self._crop_of(index, u, out), index
            except SampleError as error:
                last = error
                bad.append(BadSample(error.name, error.reason, position))
                draw = hashed(self.seed, f"replacement{attempt}", position)
                index = int(draw % np.uint64(len(self.source)))
        raise DataError(
            f"{ATTEMPTS} samples in a row could not be read, the last one {last}. Are these images?"
        ) from last

    def _crop_of(self, index: int, u: NDArray[np.float64], out: NDArray[np.uint8]) -> int | None:
        """Label of one sample, its crop in `out` [*size_px, C]. Raises SampleError when it is broken."""

        def box_of(height: int, width: int) -> Box:
            return crop_box(height, width, self.crop, u)

        name = self.source.name(index)
        reading(name)
        sample = self.source[index]
        decode_crop(
            sample.content,
            name,
            box_of,
            self.crop.size_px,
            decoder=self.decoder,
            channels=self.preprocessing.channels,
            exif_orientation=self.preprocessing.exif_orientation,
            out=out,
        )
        return sample.label


def load_sample(source: Source, index: int, preprocessing: Preprocessing) -> tuple[NDArray[np.uint8], int | None]:
    """Pixels uint8 [H, W, C] and label of one sample. Raises SampleError when it is broken."""
    name = source.name(index)
    reading(name)
    sample = source[index]
    pixels = decode(
        sample.content,
        name,
        channels=preprocessing.channels,
        exif_orientation=preprocessing.exif_orientation,
    )
    return pixels, sample.label
