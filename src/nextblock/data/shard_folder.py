"""What folders of shards share, be it latents or prepared images that are in them.

A JSON file says what is there, sealed by a hash of all that it says; shards have the names that their numbers give
them, the length and the hash recorded; bad_samples.csv lists what was left out.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from nextblock.durable import file_sha256, sha256_of, write_whole
from nextblock.errors import DataError, nearest

HASH = "sha256"  # of all else that the JSON file says
BAD_SAMPLES = "bad_samples.csv"


def sealed(values: Mapping[str, Any]) -> bytes:
    """Plain values as a JSON file, with the hash that `read_sealed` compares."""
    return (json.dumps({**values, HASH: sha256_of(dict(values))}, indent=1) + "\n").encode()


@contextmanager
def read_sealed(path: Path, names: Iterable[str], version: int, make_anew: str) -> Iterator[dict[str, Any]]:
    """Hand over the values of a file that `sealed` made: `format` and no others than `names`.

    Whatever damage leads to, here or in what the values are made into, becomes a DataError that names the file. One of
    another format than `version` is a DataError with the advice `make_anew`. Files older than the hash have none.
    """
    try:
        values: dict[str, Any] = json.loads(path.read_text())
        if values["format"] != version:
            raise DataError(f"{path} is of format {values['format']}; this version reads {version}. {make_anew}")
        said = {name: value for name, value in values.items() if name != HASH}
        if values.get(HASH, digest := sha256_of(said)) != digest or not set(said) <= {"format", *names}:
            raise ValueError("it is not what was written")
        yield said
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error


def require_own_name(file: object, name: str) -> None:
    """Raise ValueError when a shard's file is not `name`, which its number gives it: so none lies elsewhere."""
    if file != name:
        raise ValueError(f"a shard's file is {file!r} instead of {name!r}")


def fault_of_size(path: Path, size: int) -> str | None:
    """In what a file differs from one of `size` bytes; None where it does not."""
    try:
        found = path.stat().st_size
    except OSError as error:
        return f"it cannot be read ({(error.strerror or '').lower()})"
    if found == size:
        return None
    return f"it is {'truncated' if found < size else 'too long'}, {found:,} bytes instead of {size:,}"


def fault_of_content(path: Path, size: int, sha256: str) -> str | None:
    """`fault_of_size`, or a hash other than `sha256`. Reads the whole file."""
    fault = fault_of_size(path, size)
    if fault is None and file_sha256(path) != sha256:
        return "its SHA-256 is not the one recorded when it was written"
    return fault


def holds(folder: str | os.PathLike[str], about: str) -> bool:
    """Whether the JSON file `about` is in the folder."""
    return os.path.isfile(os.path.join(folder, about))


def similar_folders(folder: Path) -> str:
    """A hint at folders beside one that does not exist, whose names are nearly its name."""
    if folder.is_dir() or not folder.parent.is_dir():
        return ""
    return nearest(folder.name, [path.name for path in folder.parent.iterdir()])


def known_labels(classes: int | None) -> str:
    """Which labels images may have, for messages, where there are so many classes; None: nobody named them."""
    if classes is None:
        return "negative labels other than -1 (none) mean nothing"
    return f"there {'is 1 class' if classes == 1 else f'are {classes} classes'}, numbered from 0"


def write_bad_samples(folder: Path, bad: Iterable[tuple[str, str, int]]) -> None:
    """List name, reason and position of what is left out; there is no file where nothing is. Raises OSError."""
    rows = list(bad)
    if not rows:
        return
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("name", "reason", "position"), *rows])
    write_whole(folder / BAD_SAMPLES, text.getvalue().encode(errors="surrogateescape"))


def require_few_bad(
    folder: Path, bad: Iterable[tuple[str, str, int]], most: int,
    alone: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:  # fmt: skip
    """Raise DataError when more than `most` images are left out, and list them; `alone` is held while they are, where
    other processes may list theirs."""
    rows = list(bad)
    if len(rows) <= most:
        return
    try:
        with alone():
            write_bad_samples(folder, rows)
        listed = f"They are listed in {folder / BAD_SAMPLES}."
    except OSError as error:
        listed = f"The last one: {rows[-1][0]}: {rows[-1][1]} (no list of them: {error.strerror or error})."
    raise DataError(
        f"{len(rows)} images cannot be decoded, more than the {most} allowed. {listed} Mend or remove them, or raise "
        "max_bad_fraction."
    )
