"""Layouts of the data sets of WILDS (Koh et al., 2021): a metadata table beside the images.

Learned from the data set classes of the `wilds` package, versions 1 and 2.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from nextblock.data.named.dataset import Columns, Splits
from nextblock.data.named.files import classes_by_number, inner, listed
from nextblock.data.sources import Source
from nextblock.errors import DataError


def iwildcam(folder: Path, columns: Columns) -> Splits:
    """metadata.csv with filename, y and split (train, val, test, id_val, id_test); all images in train/.

    The table is that of version 2.0. Class names come from categories.csv (y, name) where it is there; its columns
    are from memory. All 182 classes are numbered as `y` is, whichever split they are in.
    """
    place = inner(folder, "metadata.csv", "train", tops=("iwildcam_v2.0",))
    if place is None or not {"filename", "y", "split"} <= _header(place / "metadata.csv"):
        return {}
    splits = ("train", "val", "test", "id_val", "id_test")
    return {split: partial(_iwildcam, place, split) for split in splits}


def _iwildcam(place: Path, split: str) -> Source:
    files, y, splits = _read(place / "metadata.csv", "filename", "y", "split")
    numbers = list(map(int, y))
    named: list[tuple[int, str]] = []
    if {"y", "name"} <= _header(place / "categories.csv"):
        known = zip(*_read(place / "categories.csv", "y", "name"), strict=True)
        named = [(int(number), name) for number, name in known if int(number) <= max(numbers)]
    chosen = _chosen(splits, split, place)
    names = [f"train/{files[row]}" for row in chosen]
    classes = classes_by_number([(number, str(number)) for number in numbers] + named)
    return listed(place, names, [numbers[row] for row in chosen], classes, f"iWildCam2020-WILDS {split}")


def camelyon17(folder: Path, columns: Columns) -> Splits:
    """metadata.csv with patient, node, x_coord, y_coord, tumor, center and split; images in patches/.

    Hospital 1 is `val`, hospital 2 is `test`, both unseen in training; for the others the column `split` says 0 for
    `train` and 1 for `id_val`.
    """
    place = inner(folder, "metadata.csv", "patches", tops=("camelyon17_v1.0",))
    wanted = {"patient", "node", "x_coord", "y_coord", "tumor", "center", "split"}
    if place is None or not wanted <= _header(place / "metadata.csv"):
        return {}
    return {split: partial(_camelyon17, place, split) for split in ("train", "val", "test", "id_val")}


def _camelyon17(place: Path, split: str) -> Source:
    table = place / "metadata.csv"
    patient, node, x, y, tumor = _read(table, "patient", "node", "x_coord", "y_coord", "tumor")
    center, own = _read(table, "center", "split")
    hospitals, seen = {"1": "val", "2": "test"}, {"0": "train", "1": "id_val"}
    splits = [hospitals.get(c) or seen.get(s, "none") for c, s in zip(center, own, strict=True)]
    chosen = _chosen(splits, split, place)
    names = []
    for row in chosen:
        slide = f"patient_{int(patient[row]):03d}_node_{node[row]}"
        names.append(f"patches/{slide}/patch_{slide}_x_{x[row]}_y_{y[row]}.png")
    labels = [int(tumor[row]) for row in chosen]
    return listed(place, names, labels, ("normal", "tumor"), f"Camelyon17-WILDS {split}")


def rxrx1(folder: Path, columns: Columns) -> Splits:
    """metadata.csv with experiment, plate, well, site, sirna, sirna_id and dataset (train, val, test).

    An image is images/EXPERIMENT/PlatePLATE/WELL_sSITE.png. `sirna`, the names of the classes, is from memory and
    may be missing.
    """
    place = inner(folder, "metadata.csv", "images", tops=("rxrx1_v1.0",))
    wanted = {"experiment", "plate", "well", "site", "sirna_id", "dataset"}
    if place is None or not wanted <= _header(place / "metadata.csv"):
        return {}
    return {split: partial(_rxrx1, place, split) for split in ("train", "val", "test")}


def _rxrx1(place: Path, split: str) -> Source:
    table = place / "metadata.csv"
    called = "sirna" if "sirna" in _header(table) else "sirna_id"
    experiment, plate, well, site = _read(table, "experiment", "plate", "well", "site")
    numbers, sirna, splits = _read(table, "sirna_id", called, "dataset")
    classes = classes_by_number(zip(map(int, numbers), sirna, strict=True))
    chosen = _chosen(splits, split, place)
    names = [f"images/{experiment[row]}/Plate{plate[row]}/{well[row]}_s{site[row]}.png" for row in chosen]
    return listed(place, names, [int(numbers[row]) for row in chosen], classes, f"RxRx1-WILDS {split}")


def fmow(folder: Path, columns: Columns) -> Splits:
    """rgb_metadata.csv with category and split (train, val, test; seq is left out); images/rgb_img_ROW.png.

    The splits are those of fMoW itself, as in XTRA's evaluation, not those by time that WILDS makes of them.
    """
    place = inner(folder, "rgb_metadata.csv", "images", tops=("fmow_v1.1",))
    if place is None or not {"category", "split"} <= _header(place / "rgb_metadata.csv"):
        return {}
    return {split: partial(_fmow, place, split) for split in ("train", "val", "test")}


def _fmow(place: Path, split: str) -> Source:
    categories, splits = _read(place / "rgb_metadata.csv", "category", "split")
    classes = sorted(set(categories))
    numbers = {name: number for number, name in enumerate(classes)}
    chosen = _chosen(splits, split, place)
    names = [f"images/rgb_img_{row}.png" for row in chosen]
    return listed(place, names, [numbers[categories[row]] for row in chosen], classes, f"fMoW {split}")


def _header(path: Path) -> set[str]:
    """The column names of a table; none when it cannot be read."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return set(next(csv.reader(file), ()))
    except (OSError, UnicodeDecodeError, csv.Error):
        return set()


def _read(path: Path, *columns: str) -> list[list[str]]:
    """The columns named, as text: half a million rows as dicts of all columns would be a gigabyte."""
    options = pyarrow.csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
    try:
        table = pyarrow.csv.read_csv(path, convert_options=options)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return [table[name].to_pylist() for name in columns]


def _chosen(splits: Sequence[str], split: str, place: Path) -> list[int]:
    chosen = [row for row, found in enumerate(splits) if found == split]
    if not chosen:
        raise DataError(f"the metadata in {place} list no image of split '{split}'; it has: {', '.join(set(splits))}")
    return chosen
