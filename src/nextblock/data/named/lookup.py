"""Names of data sets, and where their copies lie on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from nextblock.data.named.dataset import NamedDataset
from nextblock.data.named.table import NAMED
from nextblock.errors import DataError, nearest

ROOT_VARIABLE = "NEXTBLOCK_DATA"
DEFAULT_ROOT = "datasets"


def data_root(root: str | Path | None = None) -> Path:
    """The folder of all data sets: `root`, else what the variable NEXTBLOCK_DATA says, else ./datasets."""
    return Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT).expanduser()


def is_named(text: str) -> bool:
    """Whether a data set has this name."""
    return text in NAMED


def named(name: str) -> NamedDataset:
    """The data set of this name. Raises DataError, with the nearest name, when there is none."""
    if name not in NAMED:
        raise DataError(f"no data set is named '{name}'.{nearest(name, NAMED)} Named are: {', '.join(NAMED)}.")
    return NAMED[name]


def find(name: str, root: str | Path | None = None) -> Path | None:
    """The folder of a data set below the data root, under its usual name, its own or another known one."""
    dataset = named(name)
    candidates = [data_root(root) / folder for folder in (dataset.folder, dataset.name, *dataset.also)]
    return next((path for path in candidates if path.is_dir() and any(path.iterdir())), None)
