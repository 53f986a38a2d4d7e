"""Data sets that are read while they come, through `datasets` streaming: nothing is fetched before it is used.

Such a set has no length and no image by number, so it is no `Source`; `nextblock.data.streaming` makes batches of it,
and a `Glimpse` tells as a source what is known of it beforehand.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import datasets
from datasets.distributed import split_dataset_by_node

from nextblock.data.heartbeat import reading, working
from nextblock.data.sources.protocol import Sample
from nextblock.data.sources.splits import split_candidates
from nextblock.data.sources.streamed_rows import Row
from nextblock.data.sources.web_connections import plain
from nextblock.errors import DataError, NextblockError, nearest

PREFIX = "hf-stream:"
_FILES = "parquet:"
_REVISION = re.compile(r"(hf://[^@]+)@([^/]+)(/.*)")
_MEANT = "Streams are hf-stream:NAME, of the hub, or hf-stream:parquet:PATTERN, of Parquet files here."
GLIMPSED = 64  # rows
_OPENING_ERRORS = (OSError, ValueError, datasets.exceptions.DatasetsError)


class Interrupted(DataError):
    """Reading broke off, perhaps in a way that passes."""


class StreamedImages:
    """The rows of a `datasets.IterableDataset`: an image column, and perhaps a label column of class numbers.

    `title` begins the samples' names. Raises DataError for a column that is missing or of a wrong type, and for a data
    set that is shuffled with a buffer, which `datasets` does not bring back.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        title: str,
        image_column: str = "image",
        label_column: str | None = None,
    ) -> None:
        if _is_shuffled(dataset._ex_iterable):
            raise DataError(f"{title} is shuffled with a buffer, whose content is lost on resume. Give it unshuffled.")
        self._files = list(dict.fromkeys(_files_of(dataset._ex_iterable)))
        columns = list(dataset.features or next(iter(dataset), {}))
        for column, kind in ((image_column, "image"), (label_column or image_column, "label")):
            if column not in columns:
                hint = nearest(column, columns)
                raise DataError(f"{title} has no {kind} column '{column}'; columns: {', '.join(columns)}.{hint}")
        self.title, self._image = title, image_column
        self._label = label_column or ("label" if "label" in columns else None)
        features = dataset.features or {}
        if isinstance(features.get(image_column), datasets.Image):
            dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        label = features.get(self._label)
        if not re.fullmatch(r"u?int\d+|bool|", str(getattr(label, "dtype", ""))):
            if label_column is not None:
                raise DataError(f"label column '{label_column}' of {title} is {label}; class numbers are needed")
            self._label = None
        self.classes: tuple[str, ...] | None = None
        if self._label and isinstance(label, datasets.ClassLabel):
            self.classes = tuple(label.names)
        self._dataset = dataset.with_format(None)
        self.description = f"{title}: streamed from {self.shards} file{'' if self.shards == 1 else 's'}"

    @property
    def shards(self) -> int:
        """Files, or what else the set is made of, that parts are made of."""
        return int(self._dataset.num_shards)

    @property
    def revision(self) -> str | None:
        """The state of the hub that the files are of, where they are there."""
        return next((found[2] for file in self._files if (found := _REVISION.fullmatch(file))), None)

    def manifest(self) -> list[tuple[str, int]]:
        """Names and sizes in bytes of the files, sorted bytewise by name; behind a network names alone, without the
        revision: most changes there are none of these files. One line for what has no files."""
        local = [file for file in self._files if os.path.isfile(file)]
        root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in local]) if local else None
        found = [(os.path.relpath(file, root), os.path.getsize(file)) for file in local]
        remote = (_REVISION.sub(r"\1\3", file) for file in self._files if "://" in file)
        found += [(plain(file), 0) for file in remote]
        return sorted(found, key=lambda entry: os.fsencode(entry[0])) or [(self.title, self.shards)]

    def part(self, number: int, parts: int, epoch: int) -> datasets.IterableDataset:
        """Part `number` of so many, of files in an order that `epoch` decides; together they are all rows.

        Each reads its own files where their number divides by the number of parts, or else all of them.
        """
        part = split_dataset_by_node(self._dataset, rank=number, world_size=parts)
        part.set_epoch(epoch)
        return part

    def next_rows(self, chunks: Iterator[Mapping[str, Sequence[Any]]], place: str) -> list[Row]:
        """The rows of the next of `chunks`, which are as `IterableDataset.iter` gives them; none behind the last one.

        Signs of life are given as long as they come. Raises Interrupted when they cannot be read; then `chunks` are
        spent.
        """
        reading(f"{self.title} {place}")
        try:
            with working():
                batch = next(chunks, None)
        except NextblockError:
            raise
        except Exception as error:  # of the network, of Arrow, of whatever made the set
            told = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise Interrupted(
                f"reading {self.title} failed: {told}. Check the network; then the same command, or --resume of the "
                "run, goes on."
            ) from error
        return [] if batch is None else self._rows(batch, place)

    def _rows(self, batch: Mapping[str, Sequence[Any]], place: str) -> list[Row]:
        images = batch[self._image]
        labels = batch[self._label] if self._label else [None] * len(images)
        others = {column: values for column, values in batch.items() if column != self._image}
        return [
            Row(image, None if label is None else int(label), self.title, place, number, others)
            for number, (image, label) in enumerate(zip(images, labels, strict=True))
        ]


class Glimpse:
    """A stream as far as it is known beforehand, in the form of a `Source`: its files, as many images as it is said to
    hold, and, whichever is asked for, one of the first. Nothing is read before that.
    """

    def __init__(self, images: StreamedImages, length: int) -> None:
        self._images, self._length = images, length
        self.classes = images.classes
        self.description = f"{images.description}, said to hold {length:,} images"

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _first(self) -> list[Row]:
        rows = self._images.next_rows(iter(self._images.part(0, 1, 0).iter(batch_size=GLIMPSED)), "first")
        if not rows:
            raise DataError(f"{self._images.title} holds no rows.")
        return rows

    def __getitem__(self, index: int) -> Sample:
        row = self._first[index % len(self._first)]
        return Sample(row.content, row.label)

    def name(self, index: int) -> str:
        return self._first[index % len(self._first)].name

    def labels(self) -> None:
        return None

    def manifest(self) -> Iterator[tuple[str, int]]:
        return iter(self._images.manifest())


def is_stream(spec: object) -> bool:
    """Whether `open_streamed` is meant."""
    return isinstance(spec, datasets.IterableDataset) or (isinstance(spec, str) and spec.startswith(PREFIX))


def absolute(spec: str | None) -> str | None:
    """With a pattern of local files as seen from any folder; everything else as it is."""
    start = PREFIX + _FILES
    if spec is None or not spec.startswith(start):
        return spec
    pattern = os.path.expanduser(spec.removeprefix(start))
    return start + (os.path.abspath(pattern) if pattern and "://" not in pattern else pattern)


def open_streamed(
    spec: str | datasets.IterableDataset, *, split: str = "train", image_column: str = "image",
    label_column: str | None = None,
) -> StreamedImages:  # fmt: skip
    """Open a data set to be streamed.

    Args:
        spec: `hf-stream:NAME`, with `:CONFIG` and `@SPLIT` behind it where needed, for one on the Hugging Face hub;
            `hf-stream:parquet:PATTERN` for Parquet files; or a `datasets.IterableDataset`.
        split, image_column, label_column: see `open_source`.

    Raises DataError when nothing usable is there.
    """
    if isinstance(spec, datasets.IterableDataset):
        return StreamedImages(spec, "stream", image_column, label_column)
    name = spec.removeprefix(PREFIX)
    if name.startswith(_FILES):
        pattern = os.path.expanduser(name.removeprefix(_FILES))
        if not pattern or "://" in pattern:
            raise DataError(f"{spec} names no file here. {_MEANT} Files behind a network are opened in Python.")
        files = sorted(glob.glob(pattern, recursive=True))
        if not files:
            raise DataError(f"no file matches {pattern}. {_MEANT}")
        dataset = _loaded(spec, "parquet", data_files={"train": files}, split="train")
        return StreamedImages(dataset, pattern, image_column, label_column)
    name, _, asked = name.partition("@")
    name, _, config = name.partition(":")
    if not name:
        raise DataError(f"{spec} names no data set. {_MEANT}")
    for candidate in split_candidates(asked or split):
        dataset = _loaded(spec, name, name=config or None, split=candidate)
        if dataset is not None:
            return StreamedImages(dataset, f"{spec.partition('@')[0]}@{candidate}", image_column, label_column)
    raise DataError(f"{spec} has no split '{asked or split}'.")


def _loaded(spec: str, path: str, **options: Any) -> datasets.IterableDataset | None:
    """None where there is no such split."""
    try:
        return datasets.load_dataset(path, streaming=True, **options)
    except _OPENING_ERRORS as error:
        told = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        if "Bad split" in told or "Unknown split" in told:
            return None
        offline = next((name for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(name)), None)
        advice = f"{offline} is set: unset it" if offline else "Check the name, the network, and access to gated sets"
        raise DataError(f"cannot open {spec}: {told}. {advice}.") from error


def _is_shuffled(examples: Any) -> bool:
    shuffled = type(examples).__name__ == "BufferShuffledExamplesIterable"
    return shuffled or any(map(_is_shuffled, _inner(examples)))


def _files_of(examples: Any) -> list[str]:
    """Paths and addresses that the examples come from, as far as `datasets` tells."""
    lists = [value for value in getattr(examples, "kwargs", {}).values() if isinstance(value, list)]
    own = [str(item) for items in lists for item in items if isinstance(item, str)]
    return own + [file for part in _inner(examples) for file in _files_of(part)]


def _inner(examples: Any) -> list[Any]:
    found = [getattr(examples, "ex_iterable", None), *getattr(examples, "ex_iterables", ())]
    return [part for part in found if part is not None]
