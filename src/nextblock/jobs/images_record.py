"""What jobs that make shards of images record of those images, and how they notice that they have changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from nextblock.data.labelled import open_labelled
from nextblock.data.named import NAMED, is_named
from nextblock.data.sources import Source, explain_change, is_local, is_pattern, open_source, write_manifest
from nextblock.errors import ConfigError, DataError, RunError, nearest
from nextblock.jobs.output import say
from nextblock.jobs.record import described

MANIFEST = "data_manifest.txt.gz"


class Named(Protocol):
    """Where images are, as a person typed it; fields of the settings of a job."""

    @property
    def data_root(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def image_column(self) -> str: ...
    @property
    def label_column(self) -> str | None: ...


def open_images(place: str | None, asked: Named, given: Any) -> Source:
    """The images as a source: what stands at `place`, else the Python object `given`.

    Args:
        place: a path, name or hf:NAME, as seen from any folder; None for a Python object.
        asked: split, columns, folder of the data sets.
        given: what was typed, for messages; or the Python object.

    Raises DataError when there is nothing that can be opened.
    """
    spec = given if place is None else place
    if isinstance(spec, str):
        _require_known(spec, spec if given is None else os.fspath(given))
    if isinstance(spec, str) and is_named(spec):
        split = None if asked.split in ("train", "test") else asked.split
        opened = open_labelled(
            spec, root=asked.data_root, train_split=split,
            image_column=asked.image_column, label_column=asked.label_column,
        )  # fmt: skip
        return opened.test if asked.split == "test" else opened.train
    return open_source(spec, split=asked.split, image_column=asked.image_column, label_column=asked.label_column)


def _require_known(spec: str, given: str) -> None:
    """Raise DataError, in the words of what was `given`, when `spec` is nothing that can be opened."""
    if os.path.exists(spec) or is_named(spec) or not is_local(spec) or is_pattern(spec):
        return
    parent, name = os.path.split(spec)
    siblings = os.listdir(parent) if os.path.isdir(parent) else []
    raise DataError(
        f"'{given}' is neither a file or folder here nor a data set's name.{nearest(name, [*NAMED, *siblings])} "
        "`nextblock datasets` lists the names; for the Hugging Face hub write hf:NAME."
    )


def images_record(source: Source) -> dict[str, Any]:
    """The images' names and sizes, and what the shards depend on besides: order, labels, class names."""
    order = hashlib.sha256(repr(source.classes).encode(errors="surrogateescape"))
    for index in range(len(source)):
        order.update(os.fsencode(source.name(index)) + b"\0")
    labels = source.labels()
    if labels is not None:
        order.update(np.asarray(labels).astype("<i8").tobytes())
    return described(source) | {"order_sha256": order.hexdigest()}


def require_same_settings(
    what: str, begun: Mapping[str, object], asked: Mapping[str, object], free: Iterable[str]
) -> None:  # fmt: skip
    """Raise ConfigError, naming them, when settings other than the `free` ones are not those of the beginning.

    `what` names the folder in the message: "the latent cache FOLDER".
    """
    fixed = [name for name in asked if name not in free and begun.get(name) != asked[name]]
    if fixed:
        changed = "; ".join(f"{name} was {begun.get(name)}, now {asked[name]}" for name in fixed)
        raise ConfigError(
            f"{what} was begun with other settings: {changed}. Ask for those of the beginning, or choose another --out."
        )


def require_same_images(folder: Path, begun: Mapping[str, Any], source: Source, what: str) -> None:
    """Raise RunError when the images are not those of `begun`, an `images_record`.

    `what` names the folder in the message: "the latent cache FOLDER".
    """
    now = images_record(source)
    if all(begun[name] == now[name] for name in ("sha256", "order_sha256")):
        return
    manifest = folder / MANIFEST
    if begun["sha256"] == now["sha256"]:
        change = "another order, or other labels or class names"
    else:
        change = explain_change(manifest, source) if manifest.is_file() else f"{now['count']} images"
    raise RunError(
        f"the images are not those that {what} was begun on: {change}. Bring them back, or choose another --out."
    )


def write_manifest_once(folder: Path, source: Source) -> None:
    """The list that `require_same_images` explains a change by; one that is there stays."""
    if (folder / MANIFEST).is_file():
        return
    beside = folder / f".{MANIFEST}.partial"
    write_manifest(source, beside)
    beside.replace(folder / MANIFEST)


def remove_left_overs(folder: Path, files: Iterable[str]) -> None:
    """Remove what a killed process was writing to get `files`, and all that is written beside by one process at a time.

    Other processes may be writing other shards: theirs stay.
    """
    mine = {f".{name}.partial" for name in files}
    for left_over in folder.glob(".*.partial"):
        if left_over.name in mine or not left_over.name.startswith(".shard-"):
            left_over.unlink(missing_ok=True)


def is_whole(name: str, require: Callable[[], object], console: Console) -> bool:
    """Whether `require` raises no DataError; otherwise it is told that the file `name` is made anew."""
    try:
        require()
    except DataError:
        say(console, f"{name} is damaged or missing, and made anew")
        return False
    return True
