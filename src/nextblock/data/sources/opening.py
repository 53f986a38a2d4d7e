"""`open_source`: from what a person typed to a source."""

from __future__ import annotations

import glob
import os
import re
from typing import Any

import datasets
import numpy as np
import torch

from nextblock.data import prepared
from nextblock.data.decode import EXTENSIONS
from nextblock.data.sources import streamed, table
from nextblock.data.sources.folder import open_files, open_folder
from nextblock.data.sources.memory import ArraySource, ObjectSource
from nextblock.data.sources.protocol import Source
from nextblock.data.sources.splits import HELD_OUT, TRAIN, pick_split
from nextblock.data.sources.tar_names import ENDINGS, expanded, is_tar, require_all, tars_in
from nextblock.data.sources.tars import is_web, open_tars
from nextblock.data.sources.web_connections import plain
from nextblock.errors import DataError, nearest

_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?(@\w+)?")


def open_source(
    spec: Any, *, split: str = "train", image_column: str = "image", label_column: str | None = None
) -> Source:
    """Open a set of images.

    Arguments:
        spec: one of
            a folder of images of any depth (first-level sub-folders are classes when every image is in one;
            sub-folders that are all named train, validation, val or test are splits),
            one image file, or a list of image files and folders,
            a Parquet file, a glob of them, or a folder holding them,
            WebDataset shards: a .tar file, a glob or a list of them, a pattern such as `train-{000..099}.tar`, a folder
            holding them (but no images and no folders), or the same pattern behind http:// or https://,
            a folder made by `nextblock prepare`,
            a folder made by `save_to_disk` of `datasets`,
            `hf:NAME`, `hf:NAME@SPLIT`, `hf:NAME:CONFIG@SPLIT` for a data set on the Hugging Face hub,
            a `datasets.Dataset` or `DatasetDict`,
            `images` or `(images, labels)`, uint8 arrays or tensors [N, H, W] or [N, H, W, C],
            an object with `__len__` and `__getitem__` giving an image, (image, label) or
            {"image": ..., "label": ...},
            a source, which is returned as it is.
        split: which split, where there are several; validation, val and test stand in for each other.
        image_column: the column, or the key, that holds the image; in tars its extension, where it is an unusual one.
        label_column: the one that holds the label; None: `label`, if there is one. In tars, `cls` or a name in `.json`;
            None: `.cls`, else `label` of `.json`.

    Raises DataError when nothing usable is there; the message says what to do.
    """
    if isinstance(spec, Source):
        return spec
    if isinstance(spec, str | os.PathLike):
        return _open_path(os.path.expanduser(os.fspath(spec)), split, image_column, label_column)
    if isinstance(spec, datasets.Dataset | datasets.DatasetDict):
        return table.open_dataset(spec, "dataset", split, image_column, label_column)
    if isinstance(spec, np.ndarray | torch.Tensor):
        return ArraySource(spec)
    if isinstance(spec, tuple) and len(spec) == 2 and isinstance(spec[0], np.ndarray | torch.Tensor):
        return ArraySource(*spec)
    if isinstance(spec, list | tuple) and spec and all(isinstance(item, str | os.PathLike) for item in spec):
        paths = [os.path.expanduser(os.fspath(item)) for item in spec]
        if all(map(is_tar, paths)):
            found = [tar for path in paths for tar in _tars(path)]
            return open_tars(found, f"{len(found)} tars", image_column, label_column)
        for path in paths:
            _require_path(path)
        if all(path.endswith(".parquet") for path in paths):
            return table.open_parquet(paths, f"{len(paths)} Parquet files", split, True, image_column, label_column)
        return open_files(paths)
    if hasattr(spec, "__len__") and hasattr(spec, "__getitem__") and not isinstance(spec, bytes | dict):
        return ObjectSource(spec, image_column, label_column)
    raise DataError(
        f"cannot read images from a {type(spec).__name__}. Give a folder, a list of image files, Parquet files, "
        "tar shards, 'hf:NAME', uint8 arrays, or an object with __len__ and __getitem__."
    )


def is_local(spec: str) -> bool:
    """Whether a text means something on this machine's disks, not on the hub or behind http."""
    return not (spec.startswith(("hf:", streamed.PREFIX)) or is_web(spec))


def is_pattern(spec: str) -> bool:
    """Whether a text stands for several files: *, ?, [...], or {000..099}."""
    return glob.has_magic(spec) or "{" in spec


def _open_path(path: str, split: str, image_column: str, label_column: str | None) -> Source:
    if path.startswith("hf:"):
        return table.open_hub(path, split, image_column, label_column)
    if path.startswith(streamed.PREFIX):
        raise DataError(
            f"{path} is a stream: it has no length and no image by number, which is needed here. hf:NAME fetches a "
            "data set first; `nextblock pretrain` trains on streams."
        )
    if is_tar(path) and (is_web(path) or os.path.isfile(path) or "{" in path):
        return open_tars(_tars(path), plain(path) if is_web(path) else path, image_column, label_column)
    if is_web(path):
        raise DataError(f"{plain(path)} is not called .tar. Of what lies behind http, only tar shards can be read.")
    files, named = [path], True
    if not os.path.exists(path) and glob.has_magic(path):
        files = sorted(glob.glob(path, recursive=True))
        if not files:
            raise DataError(f"no file matches {path}")
    else:
        _require_path(path)
    if os.path.isdir(path):
        if prepared.is_prepared(path):
            return prepared.open_prepared(path)
        if os.path.exists(f"{path}/dataset_dict.json") or os.path.exists(f"{path}/state.json"):
            return table.open_saved(path, split, image_column, label_column)
        # `data/` is where the hub keeps Parquet files
        files, named = glob.glob(f"{glob.escape(path)}/*.parquet"), False
        files = files or glob.glob(f"{glob.escape(path)}/data/*.parquet")
        if not files:
            return _open_folder(path, split, image_column, label_column)
    if all(file.endswith(".parquet") for file in files):
        return table.open_parquet(files, path, split, named, image_column, label_column)
    if all(map(is_tar, files)):
        return open_tars(files, path, image_column, label_column)
    return open_files(files)


def _tars(path: str) -> list[str]:
    """The tars that a path, a pattern with braces or an address stands for."""
    if os.path.exists(path):
        return [path]
    tars = expanded(path)
    if not is_web(path):
        if len(tars) == 1:
            _require_path(tars[0])
        require_all(tars, path)
    return tars


def _open_folder(path: str, split: str, image_column: str, label_column: str | None) -> Source:
    try:
        entries = [entry for entry in os.listdir(path) if not entry.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot read folder {path}: {error.strerror}. Check its permissions.") from error
    has_images = any(entry.lower().endswith(EXTENSIONS) for entry in entries)
    folders = [] if has_images else [entry for entry in entries if os.path.isdir(os.path.join(path, entry))]
    if TRAIN in folders and set(folders) <= {TRAIN, *HELD_OUT}:
        path = os.path.join(path, pick_split(split, folders, path))
    if prepared.is_prepared(path):
        return prepared.open_prepared(path)
    tars = tars_in(path, split)
    return open_tars(tars, path, image_column, label_column) if tars else open_folder(path)


def _require_path(path: str) -> None:
    if os.path.exists(path):
        return
    parent, name = os.path.split(os.path.abspath(path))
    siblings = os.listdir(parent) if os.path.isdir(parent) else []
    hint = nearest(name, siblings)
    if not hint and _HUB_NAME.fullmatch(path) and not path.lower().endswith((*EXTENSIONS, ".parquet", *ENDINGS)):
        hint = f" For a data set on the Hugging Face hub write 'hf:{path}'."
    raise DataError(f"no such file or folder: {path}.{hint}")
