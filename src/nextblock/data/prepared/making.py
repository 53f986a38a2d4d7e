"""Preparing images, shard by shard. Where a shard ends depends on the images alone, not on who prepares them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from nextblock.data.heartbeat import reading
from nextblock.data.loading import TIMEOUT_S, training_batches
from nextblock.data.prepared.about import ABOUT, About
from nextblock.data.prepared.encoding import Encoding, encode, original_bytes
from nextblock.data.prepared.index import write_index
from nextblock.data.prepared.pieces import Image, read_images, remove_pieces, write_piece
from nextblock.data.prepared.shards import ShardRecord, ShardWriter
from nextblock.data.shard_folder import BAD_SAMPLES, known_labels, require_few_bad, write_bad_samples
from nextblock.data.sources import Source
from nextblock.data.stream import BadSample
from nextblock.durable import write_whole
from nextblock.errors import DataError, SampleError

_TOGETHER = 16  # images that a worker hands over at once
_LABELS = np.iinfo(np.int32)


class EncodedImages:
    """The images of a source, encoded: `load` is what `training_batches` asks of a stream."""

    def __init__(self, source: Source, encoding: Encoding) -> None:
        self.source, self.encoding = source, encoding

    def load(self, positions: Sequence[int]) -> list[Image | BadSample]:
        """The samples with these indices, in order."""
        return [self._encoded(int(position)) for position in positions]

    def _encoded(self, position: int) -> Image | BadSample:
        name = self.source.name(position)
        reading(name)
        try:
            sample = self.source[position]
            found = encode(sample.content, name, self.encoding)
        except SampleError as error:
            return BadSample(error.name, error.reason, position)
        label = -1 if sample.label is None else int(sample.label)
        return Image(position, name, label, found.content, found.kind, original_bytes(sample.content))


@dataclass(frozen=True)
class Maker:
    """What makes shards.

    folder: its prepared.json is there. source: the images. workers: encoding processes; 0 encodes in this one. max_bad:
    so many images may be broken; they are left out. timeout_s: longest wait for an image. on_images: called with
    the number of images just done, for a progress bar. on_shard: called when a shard is recorded. stop_asked: looked at
    every few images. alone: held while bad_samples.csv is written, where other processes make other pieces.
    """

    folder: Path
    source: Source
    workers: int
    max_bad: int
    timeout_s: float = TIMEOUT_S
    on_images: Callable[[int], None] = lambda count: None
    on_shard: Callable[[About], None] = lambda about: None
    stop_asked: Callable[[], bool] = lambda: False
    alone: Callable[[], AbstractContextManager[object]] = nullcontext

    def make(self, about: About, *, of_pieces: bool = False) -> About:
        """Make the shards that `about` lacks, and record each in prepared.json as soon as it is whole; then the index.

        of_pieces: the images that were never in a shard are taken from pieces, which go.

        Returns the finished `about`. Raises DataError when too many images are broken, labels are outside the classes,
        or the disk refuses; KeyboardInterrupt when a stop is asked for.
        """
        done = about.cuts[-1] if about.cuts else 0
        todo = [range(start, stop) for _, start, stop in about.lacking()]
        if not of_pieces:
            todo.append(range(done, about.count))
        with closing(self._encoded(about, todo)) as images:
            for number, _, stop in about.lacking():
                about = self._recorded(about, number, images, stop)
            rest = self._of_pieces(about, done) if of_pieces else images
            while about.count > (about.cuts[-1] if about.cuts else 0):
                about = self._recorded(about, len(about.cuts), rest, None)
                if of_pieces:
                    remove_pieces(self.folder, before=about.cuts[-1])
        return self._finished(about)

    def make_pieces(self, about: About, pieces: Sequence[range], bad: Sequence[BadSample] = ()) -> None:
        """Make these pieces; `bad` are the images that are left out of those that are there. Raises what `make` raises,
        where one of them shows it.

        Too many images are broken where those of the shards, those of the pieces that were there before and those of
        these pieces are: what other processes find meanwhile counts when the shards are put together.
        """
        done = about.cuts[-1] if about.cuts else 0
        known = [*about.bad, *(sample for sample in bad if sample.position >= done)]
        self._require_few_bad(known)
        with closing(self._encoded(about, pieces)) as images:
            for piece in pieces:
                with self._writing():
                    write_piece(self.folder, piece, self._checked(about, islice(images, len(piece)), known))

    def _encoded(self, about: About, ranges: Sequence[range]) -> Generator[Image | BadSample, None, None]:
        """The images at these positions, encoded by the workers."""
        plan = (part[i : i + _TOGETHER] for part in ranges for i in range(0, len(part), _TOGETHER))
        view = EncodedImages(self.source, about.encoding)
        loader = training_batches(view, plan, workers=self.workers, timeout_s=self.timeout_s)
        with closing(loader) as batches:  # type: ignore[type-var]  # a generator, said to be an iterator
            yield from self._one_by_one(batches)

    def _of_pieces(self, about: About, first: int) -> Iterator[Image | BadSample]:
        for image in read_images(self.folder, about.count, first):
            if self.stop_asked():
                raise KeyboardInterrupt
            yield image

    def _checked(
        self, about: About, images: Iterator[Image | BadSample], bad: list[tuple[str, str, int]]
    ) -> Iterator[Image | BadSample]:  # fmt: skip
        for image in images:
            if isinstance(image, BadSample):
                bad.append(image)
                self._require_few_bad(bad)
            else:
                _require_known(image, about.classes)
            yield image

    def _require_few_bad(self, bad: Sequence[tuple[str, str, int]]) -> None:
        require_few_bad(self.folder, bad, self.max_bad, self.alone)

    def _one_by_one(self, batches: Iterator[list[Image | BadSample]]) -> Iterator[Image | BadSample]:
        for batch in batches:
            if self.stop_asked():
                raise KeyboardInterrupt  # the shard that is being made is lost, those before are recorded
            self.on_images(len(batch))
            yield from batch

    def _recorded(self, about: About, number: int, images: Iterator[Image | BadSample], stop: int | None) -> About:
        """Make a shard that ends at `stop`, or, without one, where its contents are long enough."""
        record, end = self._shard(about, number, images, stop)
        cuts = about.cuts if stop is not None else (*about.cuts, end)
        about = about.with_shards(about.shards | {number: record}, cuts)
        with self._writing(), self.alone():
            write_bad_samples(self.folder, about.bad)
            write_about(self.folder, about)
        self.on_shard(about)
        return about

    def _shard(
        self, about: About, number: int, images: Iterator[Image | BadSample], stop: int | None
    ) -> tuple[ShardRecord, int]:
        last = about.count if stop is None else stop
        bad: list[tuple[str, str, int]] = []
        with self._writing():
            shard = ShardWriter(self.folder, number)
        with shard:
            for image in images:
                if isinstance(image, BadSample):
                    bad.append((image.name, image.reason, image.position))
                    self._require_few_bad([*about.bad, *bad])
                else:
                    _require_known(image, about.classes)
                    with self._writing():
                        shard.add(image.content, image.kind, image.label, image.name, image.original_bytes)
                end = image.position + 1
                if end == last or (stop is None and shard.content_bytes >= about.shard_mb * 2**20):
                    break
            with self._writing():
                return shard.finish(bad), end

    def _finished(self, about: About) -> About:
        if not about.images:
            raise DataError(f"none of the images can be decoded: see {self.folder / BAD_SAMPLES}.")
        with self._writing():
            about = dataclasses.replace(about, index=write_index(self.folder, about.in_order))
            write_about(self.folder, about)
        return about

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot write to {self.folder}: {error.strerror or error}. What is whole is kept: when there is room "
                "again, go on with the same command."
            ) from error


def write_about(folder: Path, about: About) -> None:
    """Write prepared.json whole or not at all."""
    write_whole(folder / ABOUT, about.to_json())


def _require_known(image: Image, classes: Sequence[str] | None) -> None:
    """Raise DataError for a label that is no class."""
    most = _LABELS.max if classes is None else len(classes) - 1
    if not -1 <= image.label <= most:
        there = f"labels go from 0 to {most}, and -1 means none" if classes is None else known_labels(len(classes))
        raise DataError(
            f"the images: {image.name} has the label {image.label}, but {there}. Mend the labels or the class names, "
            "and take another --out."
        )
