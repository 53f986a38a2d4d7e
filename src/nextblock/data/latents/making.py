"""Filling a latent cache, shard by shard. A shard covers a fixed range of the source's images, whoever makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextblock.data.latents.cache import About, require_known
from nextblock.data.latents.crop import CroppedImages
from nextblock.data.latents.shards import ShardRecord, write_shard
from nextblock.data.loading import TIMEOUT_S, training_batches
from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.data.shard_folder import BAD_SAMPLES, require_few_bad, write_bad_samples
from nextblock.data.sources import Source
from nextblock.data.stream import BadSample, Batch
from nextblock.errors import DataError
from nextblock.vae import Autoencoder

# A CPU's caches hold a few layers' values of so many pixels; more at a time are fetched from memory by every layer, and
# fresh memory from the system costs more than the arithmetic.
CPU_PASS_PIXELS = 2**15


@dataclass(frozen=True)
class Maker:
    """What makes shards.

    folder: of the cache; its latents.json is there. source: the images. vae: on its device. batch_size: images that are
    loaded and encoded together, of which a shard has whole ones and a rest; it changes the moments by rounding only.
    workers: loading processes. max_bad: so many images may be broken, which are left out: of this process's shards and
    of those that others had recorded when it recorded one. timeout_s: longest wait for a sample. on_images: called with
    the number of images just done, for a progress bar. on_shard: called when a shard is recorded. stop_asked: looked at
    before each batch. numbers: of the shards to make; None: all. alone: held while latents.json and bad_samples.csv are
    read and written, where other processes make other shards of the cache.
    """

    folder: Path
    source: Source
    vae: Autoencoder
    batch_size: int
    workers: int
    max_bad: int
    timeout_s: float = TIMEOUT_S
    on_images: Callable[[int], None] = lambda count: None
    on_shard: Callable[[About], None] = lambda about: None
    stop_asked: Callable[[], bool] = lambda: False
    numbers: Sequence[int] | None = None
    alone: Callable[[], AbstractContextManager[object]] = nullcontext

    def make(self, about: About) -> About:
        """Make the shards that `about` lacks, and record each in latents.json as soon as it is whole.

        Returns what is there then, finished where no shard is lacking. Raises DataError when too many images are
        broken, labels are outside the classes, moments are not finite, or the disk refuses; KeyboardInterrupt when a
        stop is asked for.
        """
        todo = lacking(about, self.numbers)
        plan = (part for number in todo for part in _parts(about, number, self.batch_size))
        view: Any = CroppedImages(self.source, Preprocessing.from_dict(about.preprocessing))
        on_gpu = next(self.vae.parameters()).is_cuda
        if not on_gpu:
            model: Any = self.vae  # torch's types do not know a module's memory format
            model.to(memory_format=torch.channels_last)
        loader: Any = training_batches(view, plan, workers=self.workers, pin_memory=on_gpu, timeout_s=self.timeout_s)
        with closing(loader) as batches:
            for number in todo:
                about = self._recorded(about, {number: self._shard(about, number, batches)})
                self.on_shard(about)
        return self._recorded(about, {})

    def _recorded(self, about: About, made: dict[int, ShardRecord]) -> About:
        """What is there with what was `made`, in latents.json: finished where it is all."""
        with self.alone():
            there = About.read(self.folder)  # others may have added to it
            about = dataclasses.replace(with_shards(there, there.shards | made), asked=about.asked)
            whole = not made and len(about.shards) == about.shard_count
            if whole and not any(record.images for record in about.shards.values()):
                raise DataError(f"none of the images can be decoded: see {self.folder / BAD_SAMPLES}.")
            if made or whole:
                write_bad_samples(self.folder, about.bad)
                about = dataclasses.replace(about, finished=whole)
                about.write(self.folder)
        return about

    def _shard(self, about: About, number: int, batches: Iterator[Batch]) -> ShardRecord:
        preprocessing = Preprocessing.from_dict(about.preprocessing)
        parts = _parts(about, number, self.batch_size)
        moments = np.empty((sum(map(len, parts)), 2, *about.shape), dtype=about.dtype)
        labels: list[int] = []
        names: list[str] = []
        bad: list[BadSample] = []
        for batch in islice(batches, len(parts)):
            if self.stop_asked():
                raise KeyboardInterrupt  # the shard that is being made is lost, those before are recorded
            bad += batch.bad
            require_few_bad(self.folder, [*about.bad, *bad], self.max_bad, self.alone)
            called = [self.source.name(int(index)) for index in batch.indices]
            if called:
                require_known(batch.labels.numpy(), about.classes, called.__getitem__, "the images")
                here = moments[len(names) : len(names) + len(called)]
                here[:] = _encoded(self.vae, batch.images, preprocessing, here.dtype, called)
            names += called
            labels += batch.labels.tolist()
            self.on_images(len(batch) + len(batch.bad))
        values = moments[: len(names)], np.array(labels, dtype=np.int64), names
        try:
            return write_shard(self.folder, number, *values, bad)
        except OSError as error:
            raise DataError(
                f"cannot write to {self.folder}: {error.strerror or error}. When there is room again, go on with: "
                f"nextblock cache-latents --resume {self.folder}"
            ) from error


def lacking(about: About, numbers: Sequence[int] | None = None) -> list[int]:
    """Those of the shards `numbers`, by default of all, that are to be made."""
    return [
        number for number in (range(about.shard_count) if numbers is None else numbers) if number not in about.shards
    ]


def with_shards(about: About, shards: dict[int, ShardRecord]) -> About:
    """`about` with these shards, in order."""
    return dataclasses.replace(about, finished=False, shards=dict(sorted(shards.items())))


def _parts(about: About, number: int, batch_size: int) -> list[range]:
    """The source's images of a shard, one range for each forward pass."""
    start = number * about.shard_images
    stop = min(start + about.shard_images, int(about.data["count"]))
    return [range(first, min(first + batch_size, stop)) for first in range(start, stop, batch_size)]


@torch.inference_mode()
def _encoded(
    vae: Autoencoder, images: Tensor, preprocessing: Preprocessing, dtype: np.dtype[Any], names: Sequence[str]
) -> NDArray[Any]:
    """Moments [B, 2, 2C, h, w] of uint8 images [B, H, W, 3], as they are and mirrored."""
    device = next(vae.parameters()).device
    x = normalize(images.to(device, non_blocking=True), None, preprocessing)  # [B, 3, H, W]
    both = _both_moments(vae, x)
    with np.errstate(over="ignore"):
        found = both.float().cpu().numpy().astype(dtype)
    if not np.isfinite(found).all():
        first = names[int(np.argmin(np.isfinite(found).all(axis=(1, 2, 3, 4))))]
        advice = " Does --dtype float32 help?" if dtype == np.float16 else ""
        raise DataError(
            f"the VAE gives moments of {first} that are not finite in {dtype}. Are these its weights?{advice}"
        )
    return found


def _both_moments(vae: Autoencoder, x: Tensor) -> Tensor:
    """Moments [B, 2, 2C, h, w] of images [B, 3, H, W] and of their mirror images.

    A CPU takes a few at a time. How many depends on the size of the images alone and a batch starts anew, so that a
    cache that goes on is the same to the byte.
    """
    if x.is_cuda:
        return torch.stack([vae.moments(x), vae.moments(x.flip(3))], dim=1)
    both = torch.stack([x, x.flip(3)], dim=1).flatten(0, 1)  # [2B, 3, H, W], an image and its mirror image side by side
    both = both.contiguous(memory_format=torch.channels_last)  # oneDNN's convolutions are about a third faster so
    few = max(1, CPU_PASS_PIXELS // (x.shape[2] * x.shape[3]))
    moments = torch.cat([vae.moments(both[start : start + few]) for start in range(0, len(both), few)])
    return moments.reshape(len(x), 2, *moments.shape[1:])
