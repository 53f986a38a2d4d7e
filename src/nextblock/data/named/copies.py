"""Layouts that are the same for every data set: how people keep copies of one."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nextblock.data.named.dataset import Columns, Splits
from nextblock.data.prepared import is_prepared, open_prepared
from nextblock.data.selection import held_out
from nextblock.data.sources import Source
from nextblock.data.sources.folder import open_folder
from nextblock.data.sources.table import TableSource, open_hub, open_parquet, open_saved
from nextblock.data.sources.views import Subset
from nextblock.errors import DataError

# data sets do not agree on these; the first column that is there is taken
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "fine_label", "labels")
SPLIT_WORDS = frozenset(
    f"{prefix}{word}"
    for prefix in ("", "id_", "ood_")
    for word in ("train", "training", "trainval", "val", "valid", "validation", "test", "testing")
)
HELD_OUT_HERE = 0.2

_SHARD = re.compile(r"(\w+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.parquet")
_BY_WORD = re.compile(rf"({'|'.join(sorted(SPLIT_WORDS, key=len, reverse=True))})(?:[-_.].*)?\.parquet")
_CONFIGURATIONS = 16


def parquet(folder: Path, columns: Columns) -> Splits:
    """Parquet files named by their split: train-00000-of-00003.parquet, with or without a digest behind, or
    train.parquet; or folders of a split's name with Parquet files in them.

    They may lie in the folder, in data/, or in the folder of the one configuration. So the Hugging Face hub keeps
    them (learned from its listings).
    """
    title = folder.resolve().name
    return {split: partial(_table, files, f"{title}/{split}", columns) for split, files in _shards(folder).items()}


def prepared(folder: Path, columns: Columns) -> Splits:
    """Folders of a split's name with shards that `nextblock prepare` wrote."""
    inside = [path for path in _folders(folder) if path.name in SPLIT_WORDS and is_prepared(path)]
    return {path.name: partial(open_prepared, path) for path in inside}


def _shards(folder: Path) -> dict[str, list[str]]:
    for place in (folder, folder / "data"):
        if found := _shards_in(place):
            return found
    inside = [path for path in _folders(folder) if path.name not in SPLIT_WORDS]
    # more than a few are the folders of classes, with perhaps a million files to look through
    others = {path.name: _shards_in(path) for path in inside if len(inside) <= _CONFIGURATIONS}
    configurations = {name: found for name, found in others.items() if found}
    if len(configurations) > 1:
        raise DataError(f"{folder} holds several sets of Parquet files: {', '.join(configurations)}. Name one of them.")
    return next(iter(configurations.values()), {})


def _shards_in(place: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(place.glob("*.parquet")):
        if split := _split_of(path.name):
            found.setdefault(split, []).append(str(path))
    for inside in (path for path in _folders(place) if path.name in SPLIT_WORDS and path.name not in found):
        if files := sorted(map(str, inside.glob("*.parquet"))):
            found[inside.name] = files
    return found


def _split_of(name: str) -> str | None:
    if shard := _SHARD.fullmatch(name):
        return shard[1]
    word = _BY_WORD.fullmatch(name)
    return word[1] if word else None


def _table(files: list[str], title: str, columns: Columns) -> TableSource:
    try:
        found = pq.read_schema(files[0]).names
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {files[0]}: {error}") from error
    image, label = usual_columns(columns, found)
    return open_parquet(files, title, "train", True, image, label)


def usual_columns(columns: Columns, found: list[str]) -> tuple[str, str | None]:
    """The columns asked for; where nobody asked, the first of the usual ones that is there."""
    image = columns.image
    if image == IMAGE_COLUMNS[0]:
        image = next((name for name in IMAGE_COLUMNS if name in found), image)
    return image, columns.label or next((name for name in LABEL_COLUMNS if name in found), None)


def saved(folder: Path, columns: Columns) -> Splits:
    """A `DatasetDict` of the library `datasets`, written by `save_to_disk`."""
    try:
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError):
        return {}
    return {split: partial(_saved, folder, split, columns) for split in splits}


def _saved(folder: Path, split: str, columns: Columns) -> TableSource:
    try:
        about = json.loads((folder / split / "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = {}  # the library says what is wrong
    features = about.get("features") or {}
    return open_saved(str(folder), split, *usual_columns(columns, list(features)))


def hub(spec: str, columns: Columns) -> Splits:
    """`hf:NAME` or `hf:NAME:CONFIG`: the splits of a data set on the Hugging Face hub, or of a saved one here."""
    name = spec.removeprefix("hf:")
    if os.path.isdir(name):
        return saved(Path(name), columns)
    name, _, config = name.partition(":")
    try:
        splits = datasets.get_dataset_split_names(name, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        told = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise DataError(f"cannot open {spec}: {told}. Check the name, the network, and access to it.") from error
    return {split: partial(_hub, spec, split, columns) for split in splits}


def _hub(spec: str, split: str, columns: Columns) -> TableSource:
    name, _, config = spec.removeprefix("hf:").partition(":")
    features = datasets.load_dataset_builder(name, config or None).info.features or {}
    return open_hub(f"{spec}@{split}", split, *usual_columns(columns, list(features)))


def split_folders(folder: Path, columns: Columns) -> Splits:
    """train/CLASS/..., and val/CLASS/... or test/CLASS/...: what torchvision calls ImageFolder."""
    inside = [path for path in _folders(folder) if path.name in SPLIT_WORDS and any(_folders(path))]
    return {path.name: partial(_class_folder, path) for path in inside}


def _class_folder(path: Path) -> Source:
    source = open_folder(str(path))
    if source.classes is None:
        raise DataError(f"{path} has images outside of class sub-folders; every image must be in one.")
    return source


def class_folders(folder: Path, columns: Columns) -> Splits:
    """CLASS/... without a split: 20 % of every class are held out as `test`, always the same ones."""
    places = [folder / "2750", folder / "EuroSAT_RGB", folder]  # tops of EuroSAT's archives; the second from memory
    place = next((path for path in places if any(_folders(path))), None)
    if place is None:
        return {}
    return {split: partial(_part, place, split) for split in ("train", "test")}


def _part(place: Path, split: str) -> Source:
    source = _class_folder(place)
    labels = source.labels()
    assert labels is not None  # _class_folder refuses a folder without
    chosen = held_out(labels, HELD_OUT_HERE, seed=0)
    part = Subset(source, np.flatnonzero(chosen if split == "test" else ~chosen))
    part.description += f" ({split}; this copy has no split: {HELD_OUT_HERE * 100:g} % held out, class by class, by us)"
    return part


def infograph_parquet(folder: Path, columns: Columns) -> Splits:
    """Parquet files of all of DomainNet with a column `domain`: the rows of infograph (hub: wltjr1007/DomainNet)."""
    title = folder.resolve().name
    return {split: partial(_of_domain, files, f"{title}/{split}", columns) for split, files in _shards(folder).items()}


def _of_domain(files: list[str], title: str, columns: Columns) -> Source:
    source = _table(files, title, columns)
    if "domain" not in pq.read_schema(files[0]).names:
        return source
    table = datasets.load_dataset("parquet", data_files={"train": files}, split="train")
    feature = table.features["domain"]
    wanted = feature.str2int("infograph") if isinstance(feature, datasets.ClassLabel) else "infograph"
    rows = [row for row, domain in enumerate(table["domain"]) if domain == wanted]
    if not rows:
        raise DataError(f"{source.description}: no row of the domain infograph")
    return Subset(source, rows)


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:  # which tells folders from files without asking for each
            return sorted(Path(entry) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
