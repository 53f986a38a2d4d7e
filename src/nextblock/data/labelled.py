"""Training and test images with labels that mean the same: from whatever names them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nextblock.data.named import NAMED, Columns, NamedDataset, data_root, find, is_named, named
from nextblock.data.named.copies import hub, parquet, prepared, saved, split_folders, usual_columns
from nextblock.data.named.dataset import Splits
from nextblock.data.named.opening import choose_splits, find_layout, join_splits, open_splits, spelled
from nextblock.data.selection import held_out
from nextblock.data.sources import Source, is_local, is_pattern, open_source
from nextblock.data.sources.table import open_dataset
from nextblock.data.sources.views import Subset, WithLabels, class_names, known_labels, renumbered
from nextblock.data.sources.web_connections import plain
from nextblock.errors import DataError, nearest

_TESTS = ("test", "val")  # in this order, where nobody says which; their other spellings count


@dataclass(frozen=True)
class Labelled:
    """Labelled images to train on and to test on; a label is a number in `classes` on both sides.

    dataset: the benchmark data set, where it is one. name: for tables and folders. note: what the person should
    know about how it was opened, in a sentence or two; empty when there is nothing to say.
    """

    train: Source
    test: Source
    classes: tuple[str, ...]
    dataset: NamedDataset | None
    name: str
    note: str


@dataclass(frozen=True)
class _Found:
    """What a spec names: splits, where there are several, else `whole`."""

    name: str
    splits: Splits = field(default_factory=dict)
    whole: Source | None = None
    dataset: NamedDataset | None = None


def open_labelled(
    spec: Any,
    *,
    test: Any = None,
    root: str | Path | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Labelled:
    """Open labelled images and make the labels of both sides agree.

    Args:
        spec: the name of a benchmark data set, looked up below `root` (its name wins over a folder of that name in
            the working directory, which is ./NAME); `hf:NAME` on the Hugging Face hub; a folder with train/ and test/
            or val/, or with one sub-folder for each class; Parquet files; or any Python source of images that
            `open_source` takes. A Path is always a path.
        test: the test images, where they are not part of `spec`; named in the same ways.
        root: the folder of all data sets; None: $NEXTBLOCK_DATA, else ./datasets.
        train_split, test_split: which splits, where there are several; "train+val" joins two.
        image_column, label_column: of tables; where nobody says, `img` and `fine_label` are tried as well.
        test_fraction, seed: how many and which images are held out, class by class, where there is no test set.

    Images without a label are left out. Raises DataError when it cannot be opened, has no labels or one class only,
    and when test images are of classes that training lacks.
    """
    columns = Columns(image_column, label_column)
    found = _find(spec, root, columns)
    to_train = tuple(train_split.split("+")) if train_split else ()
    if test is None:
        train, tested, notes = _both(found, to_train, test_split)
    else:
        train, tested, notes = _train_of(found, to_train), _test_of(_find(test, root, columns), test_split), ()
    train, notes = _with_labels(train, "training", notes)
    if tested is None:
        chosen = held_out(known_labels(train), test_fraction, seed)
        train, tested = Subset(train, np.flatnonzero(~chosen)), Subset(train, np.flatnonzero(chosen))
        notes += (f"no test split was given: {test_fraction * 100:g} % of the images were held out, class by class",)
    tested, notes = _with_labels(tested, "test", notes)
    train, tested, classes = _agreed(train, tested)
    used = np.unique(known_labels(train))
    if len(used) < 2:
        raise DataError(f"{train.description}: all images are of one class, {classes[used[0]]}; two are needed.")
    return Labelled(train, tested, classes, found.dataset, found.name, "; ".join(notes))


def _find(spec: Any, root: str | Path | None, columns: Columns) -> _Found:
    if isinstance(spec, str):
        if is_named(spec):
            return _find_named(spec, root, columns)
        if spec.startswith("hf:"):
            return _find_on_hub(spec, columns)
        if not is_local(spec) or is_pattern(spec):
            name = os.path.basename(plain(spec))
            return _Found(name, whole=open_source(spec, image_column=columns.image, label_column=columns.label))
        _require_known(spec)
    if isinstance(spec, str | os.PathLike):
        return _find_path(Path(spec).expanduser(), columns)
    if isinstance(spec, datasets.DatasetDict):
        opened = {
            str(split): partial(open_dataset, part, str(split), str(split), *usual_columns(columns, part.column_names))
            for split, part in spec.items()
        }
        return _Found("dataset", opened)
    image, label = columns.image, columns.label
    if isinstance(spec, datasets.Dataset):
        image, label = usual_columns(columns, spec.column_names)
    return _Found("images", whole=open_source(spec, image_column=image, label_column=label))


def _find_named(name: str, root: str | Path | None, columns: Columns) -> _Found:
    dataset, folder = named(name), find(name, root)
    if folder is None:
        wanted = data_root(root) / dataset.folder
        beside = f" To mean the folder of that name here, write ./{name}." if os.path.exists(name) else ""
        raise DataError(
            f"{dataset.title} is not on this machine: {wanted} is not there. {dataset.how} It comes from "
            f"{dataset.url}. Another place for all data sets: --data_root, or the variable NEXTBLOCK_DATA.{beside}"
        )
    return _Found(name, find_layout(dataset, folder, columns), dataset=dataset)


def _find_on_hub(spec: str, columns: Columns) -> _Found:
    name = spec.removeprefix("hf:")
    if "@" in name:
        return _Found(name, whole=open_source(spec, image_column=columns.image, label_column=columns.label))
    known = next((dataset for dataset in NAMED.values() if dataset.hub == name), None)
    return _Found(known.name if known else name, hub(spec, columns), dataset=known)


def _require_known(spec: str) -> None:
    if os.path.exists(os.path.expanduser(spec)):
        return
    parent, last = os.path.split(os.path.abspath(os.path.expanduser(spec)))
    siblings = os.listdir(parent) if os.path.isdir(parent) else []
    hint = nearest(last, [*NAMED, *siblings])
    raise DataError(
        f"'{spec}' is neither a file or folder here nor a data set's name.{hint} `nextblock datasets` lists the names; "
        "for the Hugging Face hub write hf:NAME."
    )


def _find_path(path: Path, columns: Columns) -> _Found:
    name = path.resolve().name
    for layout in (prepared, parquet, saved, split_folders) if path.is_dir() else ():
        splits = layout(path, columns)
        if len(splits) == 1 and not spelled("train", splits):
            return _Found(name, whole=next(iter(splits.values()))())
        if splits:
            return _Found(name, splits)
    image, label = columns.image, columns.label
    if path.suffix == ".parquet" and path.is_file():
        try:
            image, label = usual_columns(columns, pq.read_schema(path).names)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read {path}: {error}") from error
    return _Found(name, whole=open_source(path, image_column=image, label_column=label))


def _both(found: _Found, train: Sequence[str], test: str | None) -> tuple[Source, Source | None, tuple[str, ...]]:
    """Training images, test images if there are any, and notes."""
    if found.dataset is not None:
        return open_splits(found.dataset, found.splits, found.name, train, test)
    if found.whole is not None:
        return _whole(found, (*train, *([test] if test else []))), None, ()
    wanted = train or _own_train(found.splits)
    chosen = choose_splits(found.splits, wanted, test or "", exactly=True)
    if chosen is None or (test and chosen.test is None):
        raise _no_split(found, "+".join(wanted) if chosen is None else test)
    tests = (spelled(split, found.splits) for split in ([test] if test else _TESTS))
    here = next((name for name in tests if name and name not in chosen.train), None)
    return join_splits(found.splits, chosen.train), found.splits[here]() if here else None, ()


def _train_of(found: _Found, train: Sequence[str]) -> Source:
    """All of what is there without splits, else its training splits."""
    if found.whole is not None:
        return _whole(found, train)
    wanted = train or (found.dataset.train_splits if found.dataset else _own_train(found.splits))
    chosen = choose_splits(found.splits, wanted, "", exactly=bool(train))
    if chosen is None:
        raise _no_split(found, "+".join(wanted))
    return join_splits(found.splits, chosen.train)


def _test_of(found: _Found, test: str | None) -> Source:
    """All of what is there without splits, else its test split."""
    if found.whole is not None:
        return _whole(found, [test] if test else [])
    wanted = [test] if test else ([found.dataset.test_split] if found.dataset else list(_TESTS))
    for split in wanted:
        if here := spelled(split, found.splits):
            return found.splits[here]()
    raise _no_split(found, " or ".join(wanted))


def _own_train(splits: Splits) -> tuple[str, ...]:
    return ("train",) if spelled("train", splits) else ("trainval",)


def _whole(found: _Found, asked: Sequence[str]) -> Source:
    assert found.whole is not None
    if asked:
        raise DataError(f"{found.whole.description}: it has no splits, but '{'+'.join(asked)}' was asked for.")
    return found.whole


def _no_split(found: _Found, wanted: str | None) -> DataError:
    hint = nearest(wanted or "", found.splits)
    return DataError(f"{found.name} has no split '{wanted}'; splits: {', '.join(sorted(found.splits))}.{hint}")


def _with_labels(source: Source, side: str, notes: tuple[str, ...]) -> tuple[Source, tuple[str, ...]]:
    """The images of `source` that have a label, their labels known from here on; a note where some have none."""
    labels = known_labels(source)
    there = labels >= 0
    if not there.any():
        raise DataError(
            f"{source.description}: the {side} images have no labels. A folder needs one sub-folder for each class, a "
            "table a label column (name it with label_column), arrays (images, labels)."
        )
    known = source if source.labels() is not None else WithLabels(source, labels)
    if there.all():
        return known, notes
    left_out = f"{int((~there).sum())} {side} images without a label were left out"
    return Subset(known, np.flatnonzero(there)), (*notes, left_out)


def _agreed(train: Source, test: Source) -> tuple[Source, Source, tuple[str, ...]]:
    """Both sides with the class numbers of training, matched by name, and the class names.

    Where only one side has names, the other's numbers are taken to count in the order of these names.
    """
    names = train.classes or test.classes
    if names:
        train, test = (
            WithLabels(side, known_labels(side), names)
            if side.classes is None and known_labels(side).max() < len(names)
            else side
            for side in (train, test)
        )
    classes = class_names(train)
    return renumbered(train, classes), renumbered(test, classes), classes
