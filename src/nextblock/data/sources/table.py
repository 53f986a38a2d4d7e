"""Parquet files and Hugging Face data sets, read through `datasets` (Arrow, memory-mapped)."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from nextblock.data.decode import read_bytes
from nextblock.data.sources.protocol import Sample
from nextblock.data.sources.splits import HELD_OUT, TRAIN, pick_split, split_candidates
from nextblock.errors import DataError, SampleError, nearest

if not sys.stderr.isatty():
    datasets.disable_progress_bars()  # a log file wants no thousand lines of bar

_OPENING_ERRORS = (OSError, ValueError, datasets.exceptions.DatasetsError)
# Of the Arrow file that `datasets` makes of Parquet: at most, and no more than the row group has. Its default of 1,000
# makes ten thousand batches of ten million rows, which cost seconds and hundreds of megabytes at each opening.
_ROWS_A_BATCH = 1_000_000
_SPLIT_IN_NAME = re.compile(rf"^(?:(\w+)-\d{{5}}-of-\d{{5}}|({'|'.join((TRAIN, *HELD_OUT))})(?:[-_.].*)?)\.parquet$")


class TableSource:
    """The rows of a `datasets.Dataset`: an image column, and perhaps a label column.

    `title` begins the samples' names. `files` are the paths the table was made from, where they are known: they
    are its manifest then, else the fingerprint that `datasets` keeps is.
    Raises DataError for a column that is missing or of a wrong type, and for a table without rows.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        title: str,
        image_column: str = "image",
        label_column: str | None = None,
        files: Sequence[str] = (),
    ) -> None:
        if not len(dataset):
            raise DataError(f"{title} has no rows")
        self._title, self._column = title, image_column
        self._files = tuple(files)
        self._fingerprint = str(dataset._fingerprint)
        _require_column(image_column, dataset.column_names, "image", title)
        if not _is_image(dataset.features[image_column]):
            raise DataError(
                f"column '{image_column}' of {title} is {dataset.features[image_column]}; an image column holds "
                "encoded images (Image, binary, or {bytes, path}) or paths"
            )
        self.classes, self._labels = _labels(dataset, title, label_column)
        images = dataset.select_columns([image_column])
        self._images = images.cast_column(image_column, datasets.Image(decode=False))
        labelled = "no labels" if self._labels is None else "with labels"
        labelled = f"{len(self.classes)} classes" if self.classes else labelled
        self.description = f"{title}: {len(dataset)} rows, {labelled}"

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        value = self._images[index][self._column]
        label = None if self._labels is None else int(self._labels[index])
        if value is None or (value["bytes"] is None and not value["path"]):
            raise SampleError(self.name(index), "the row holds no image")
        content = value["bytes"]
        if content is None:
            content = read_bytes(value["path"], name=self.name(index))
        return Sample(content, label)

    def name(self, index: int) -> str:
        return f"{self._title}[{index}]"

    def labels(self) -> NDArray[np.int64] | None:
        return self._labels

    def stamps(self) -> Iterator[str]:
        """The image column, when each file was changed, and the table's own fingerprint where there are no files."""
        yield self._column
        yield from (str(os.stat(file).st_mtime_ns) for file in self._files)
        if not self._files:
            yield self._fingerprint

    def manifest(self) -> Iterator[tuple[str, int]]:
        if not self._files:
            # without the title: a folder that was moved holds the same data
            yield f"dataset fingerprint:{self._fingerprint}", len(self)
            return
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in self._files])
        names = [(os.path.relpath(file, folder).replace(os.sep, "/"), os.stat(file).st_size) for file in self._files]
        yield from sorted(names, key=lambda entry: os.fsencode(entry[0]))


def _require_column(column: str, known: Sequence[str], kind: str, title: str) -> None:
    if column not in known:
        raise DataError(
            f"{title} has no {kind} column '{column}'; columns: {', '.join(known)}.{nearest(column, known)} "
            f"Name it with {kind}_column."
        )


def _is_image(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("binary", "large_binary", "string", "large_string")
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)


def _labels(
    dataset: datasets.Dataset, title: str, column: str | None
) -> tuple[tuple[str, ...] | None, NDArray[np.int64] | None]:
    if column is None and "label" not in dataset.column_names:
        return None, None
    name = column or "label"
    _require_column(name, dataset.column_names, "label", title)
    feature = dataset.features[name]
    dtype = getattr(feature, "dtype", "")
    if not re.fullmatch(r"u?int\d+|bool|(large_)?string", str(dtype)):
        if column is None:
            return None, None  # nobody asked for it
        raise DataError(f"label column '{name}' of {title} is {feature}; integers or strings are needed")
    # In Arrow and NumPy all the way: ten million Python objects would take seconds and most of a gigabyte.
    values: Any = dataset.select_columns([name]).with_format("arrow")[:][name]
    if "string" in dtype:
        return _numbered(values)
    classes = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return classes, np.require(values.cast("int64").fill_null(-1).to_numpy(), requirements="W")


def _numbered(column: Any) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The sorted names in a column of strings, and for each row the number of its name; -1 where there is none."""
    encoded = column.dictionary_encode().unify_dictionaries()
    names = encoded.chunk(0).dictionary.to_pylist()
    classes = tuple(sorted(names))
    numbers = {name: number for number, name in enumerate(classes)}
    number_of = np.array([*(numbers[name] for name in names), -1], dtype=np.int64)
    rows = [chunk.indices.fill_null(len(names)).to_numpy(zero_copy_only=False) for chunk in encoded.chunks]
    return classes, number_of[np.concatenate(rows)]


def open_parquet(
    files: Sequence[str], title: str, split: str, named: bool, image_column: str, label_column: str | None
) -> TableSource:
    """The Parquet `files`; where their names tell splits apart, those of `split`.

    `named`: the person named the files (not a folder), so one split among them is the one that is meant.
    """
    splits: dict[str, list[str]] = {}
    for file in sorted(files):
        found = _SPLIT_IN_NAME.match(os.path.basename(file))
        splits.setdefault((found[1] or found[2]) if found else "", []).append(file)
    chosen = splits.pop("", [])
    if splits and not (named and len(splits) + bool(chosen) == 1):
        chosen = splits[pick_split(split, splits, title)]
    elif splits:
        (chosen,) = splits.values()
    try:
        dataset = datasets.load_dataset(
            "parquet", data_files={"train": chosen}, split="train", writer_batch_size=_ROWS_A_BATCH
        )
    except _OPENING_ERRORS as error:
        raise DataError(f"cannot read the Parquet files of {title}: {_first_line(error)}") from error
    return TableSource(dataset, title, image_column, label_column, chosen)


def open_saved(folder: str, split: str, image_column: str, label_column: str | None) -> TableSource:
    """A folder made by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    try:
        dataset = datasets.load_from_disk(folder)
    except _OPENING_ERRORS as error:
        raise DataError(f"cannot open the saved data set {folder}: {_first_line(error)}") from error
    return open_dataset(dataset, folder, split, image_column, label_column)


def open_dataset(
    dataset: datasets.Dataset | datasets.DatasetDict,
    title: str,
    split: str,
    image_column: str,
    label_column: str | None,
) -> TableSource:
    """A data set in memory or on disk; `split` matters only where there are several."""
    if isinstance(dataset, datasets.DatasetDict):
        chosen = pick_split(split, dataset, title)
        dataset, title = dataset[chosen], f"{title}@{chosen}"
    return TableSource(dataset, title, image_column, label_column)


def open_hub(spec: str, split: str, image_column: str, label_column: str | None) -> TableSource:
    """`hf:NAME`, `hf:NAME@SPLIT` or `hf:NAME:CONFIG@SPLIT`; NAME is on the hub, or a folder of a saved data set."""
    name, _, asked = spec.removeprefix("hf:").partition("@")
    split = asked or split
    if os.path.isdir(name):
        return open_saved(name, split, image_column, label_column)
    name, _, config = name.partition(":")
    for candidate in split_candidates(split):
        try:
            dataset = datasets.load_dataset(name, config or None, split=candidate)
        except _OPENING_ERRORS as error:
            if "Unknown split" in str(error):
                unknown = _first_line(error)
                continue
            raise DataError(
                f"cannot open {spec}: {_first_line(error)}. Check the name (hf:OWNER/NAME, with a configuration "
                "hf:OWNER/NAME:CONFIG), the network, and access to gated data sets."
            ) from error
        return TableSource(dataset, f"hf:{name}{config and ':' + config}@{candidate}", image_column, label_column)
    raise DataError(f"{spec} has no split '{split}': {unknown}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
