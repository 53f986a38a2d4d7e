"""Official layouts that list their images in text, JSON or MATLAB files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from nextblock.data.named.dataset import Columns, Splits
from nextblock.data.named.files import classes_by_number, inner, listed, read_lines
from nextblock.data.sources import Source
from nextblock.errors import DataError


def food101(folder: Path, columns: Columns) -> Splits:
    """images/CLASS/ID.jpg; meta/train.txt and test.txt with lines CLASS/ID, or train.json and test.json.

    The JSON files hold {CLASS: [CLASS/ID, ...]}; they were learned from torchvision's Food101, the text files, which
    hold the same, are from memory.
    """
    place = inner(folder, "images", "meta", tops=("food-101",))
    if place is None:
        return {}
    endings = {split: _first_suffix(place / "meta" / split) for split in ("train", "test")}
    return {split: partial(_food101, place, split, suffix) for split, suffix in endings.items() if suffix}


def _first_suffix(stem: Path) -> str | None:
    return next((suffix for suffix in (".txt", ".json") if stem.with_suffix(suffix).is_file()), None)


def _food101(place: Path, split: str, suffix: str) -> Source:
    path = place / "meta" / f"{split}{suffix}"
    lines = read_lines(path) if suffix == ".txt" else [name for names in _json(path).values() for name in names]
    classes = sorted(entry.name for entry in (place / "images").iterdir() if entry.is_dir())
    return _by_folder(place / "images", [f"{line}.jpg" for line in lines], classes, f"Food-101 {split}")


def dtd(folder: Path, columns: Columns) -> Splits:
    """images/CLASS/NAME.jpg; labels/train1.txt, val1.txt, test1.txt with lines CLASS/NAME.jpg: partition 1 of 10.

    Learned from torchvision's DTD.
    """
    place = inner(folder, "images", "labels/train1.txt", tops=("dtd",))
    if place is None:
        return {}
    lists = {split: place / "labels" / f"{split}1.txt" for split in ("train", "val", "test")}
    return {split: partial(_dtd, place, split, path) for split, path in lists.items() if path.is_file()}


def _dtd(place: Path, split: str, path: Path) -> Source:
    classes = sorted(entry.name for entry in (place / "images").iterdir() if entry.is_dir())
    return _by_folder(place / "images", read_lines(path), classes, f"DTD {split}, partition 1")


def pets(folder: Path, columns: Columns) -> Splits:
    """images/BREED_NUMBER.jpg; annotations/trainval.txt and test.txt with lines 'BREED_NUMBER CLASS SPECIES ID'.

    CLASS counts from 1. Learned from torchvision's OxfordIIITPet.
    """
    place = inner(folder, "images", "annotations/trainval.txt", tops=("oxford-iiit-pet",))
    if place is None:
        return {}
    lists = {split: place / "annotations" / f"{split}.txt" for split in ("trainval", "test")}
    return {split: partial(_pets, place, split) for split, path in lists.items() if path.is_file()}


def _pets(place: Path, split: str) -> Source:
    rows = [line.split() for line in read_lines(place / "annotations" / f"{split}.txt")]
    labels = [int(row[1]) - 1 for row in rows]
    classes = classes_by_number((label, row[0].rpartition("_")[0]) for row, label in zip(rows, labels, strict=True))
    return listed(place / "images", [f"{row[0]}.jpg" for row in rows], labels, classes, f"Oxford-IIIT Pets {split}")


def infograph(folder: Path, columns: Columns) -> Splits:
    """infograph/CLASS/NAME.jpg; infograph_train.txt, infograph_test.txt with lines 'infograph/CLASS/NAME.jpg NUMBER'.

    Learned from public loaders of DomainNet, which agree; the lists may also lie inside infograph/.
    """
    place = inner(folder, "infograph", tops=("domainnet", "DomainNet"))
    if place is None:
        return {}
    beside = place if (place / "infograph_train.txt").is_file() else place / "infograph"
    lists = {split: beside / f"infograph_{split}.txt" for split in ("train", "test")}
    return {split: partial(_infograph, place, split, path) for split, path in lists.items() if path.is_file()}


def _infograph(place: Path, split: str, path: Path) -> Source:
    rows = [line.rpartition(" ") for line in read_lines(path)]
    labels = [int(number) for _, _, number in rows]
    names = [name for name, _, _ in rows]
    classes = classes_by_number((label, name.split("/")[-2]) for name, label in zip(names, labels, strict=True))
    return listed(place, names, labels, classes, f"DomainNet infograph {split}")


def inat18(folder: Path, columns: Columns) -> Splits:
    """train2018.json, val2018.json (images, annotations, categories) beside train_val2018/GROUP/SPECIES/NAME.jpg.

    Learned from the official README of the iNaturalist 2018 competition and public loaders of its JSON files.
    """
    lists = {split: folder / f"{split}2018.json" for split in ("train", "val")}
    return {split: partial(_inat18, folder, split) for split, path in lists.items() if path.is_file()}


def _inat18(folder: Path, split: str) -> Source:
    content = _json(folder / f"{split}2018.json")
    labels = {row["image_id"]: int(row["category_id"]) for row in content["annotations"]}
    names = [row["file_name"] for row in content["images"]]
    numbers = [labels[row["id"]] for row in content["images"]]
    known = ((int(row["id"]), str(row["name"])) for row in content.get("categories", ()))
    classes = classes_by_number([(number, str(number)) for number in numbers] + list(known))
    return listed(folder, names, numbers, classes, f"iNaturalist 2018 {split}")


def cars(folder: Path, columns: Columns) -> Splits:
    """cars_train/, cars_test/; devkit/cars_train_annos.mat, devkit/cars_meta.mat, cars_test_annos_withlabels.mat.

    Learned from torchvision's StanfordCars; class numbers count from 1.
    """
    place = inner(folder, "devkit/cars_meta.mat", tops=("stanford_cars",))
    if place is None:
        return {}
    notes = {"train": place / "devkit/cars_train_annos.mat", "test": place / "cars_test_annos_withlabels.mat"}
    if not notes["test"].is_file():
        notes["test"] = place / "devkit/cars_test_annos_withlabels.mat"
    return {split: partial(_cars, place, split, path) for split, path in notes.items() if path.is_file()}


def _cars(place: Path, split: str, path: Path) -> Source:
    from scipy.io import loadmat  # comes with scikit-learn

    try:
        rows = loadmat(path, squeeze_me=False)["annotations"].ravel()
        classes = [str(name.item()) for name in loadmat(place / "devkit/cars_meta.mat")["class_names"].ravel()]
        names = [str(row["fname"].item()) for row in rows]
        labels = [int(row["class"].item()) - 1 for row in rows]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return listed(place / f"cars_{split}", names, labels, classes, f"Stanford Cars {split}")


def _by_folder(root: Path, names: list[str], classes: list[str], title: str) -> Source:
    """The class of CLASS/NAME is its number among `classes`."""
    numbers = {name: number for number, name in enumerate(classes)}
    unknown = [name for name in names if name.partition("/")[0] not in numbers]
    if unknown:
        raise DataError(f"{title} lists {unknown[0]}, but {root} has no such class folder. Unpack the images there.")
    return listed(root, names, [numbers[name.partition("/")[0]] for name in names], classes, title)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
