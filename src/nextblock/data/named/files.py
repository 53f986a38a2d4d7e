"""Sources from lists: names of image files below a folder, and a class number for each."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nextblock.data.sources.folder import FileSource
from nextblock.errors import DataError


def listed(root: Path, names: Sequence[str], labels: Sequence[int], classes: Sequence[str], title: str) -> FileSource:
    """The files `names`, relative to `root` with '/', in that order. Raises DataError when there is none, or the
    first one is not there: then the list came without its images."""
    if not names:
        raise DataError(f"{title} lists no images in {root}")
    if not (root / names[0]).is_file():
        raise DataError(f"{title} lists {names[0]}, which is not in {root}. Unpack the images there as well.")
    encoded = [os.fsencode(name) for name in names]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    description = f"{title}: {len(names)} image files, {len(classes)} classes"
    numbers = np.array(labels, dtype=np.int32)
    return FileSource(os.fsencode(root), b"".join(encoded), ends, description, tuple(classes), numbers)


def read_lines(path: Path) -> list[str]:
    """Lines of a text file that are neither empty nor a '#' comment. Raises DataError when it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def inner(folder: Path, *wanted: str, tops: Iterable[str]) -> Path | None:
    """`folder`, or the folder of one of the names `tops` in it (an archive's own), where all of `wanted` exist."""
    for place in (folder, *(folder / top for top in tops)):
        if all((place / name).exists() for name in wanted):
            return place
    return None


def classes_by_number(pairs: Iterable[tuple[int, str]]) -> tuple[str, ...]:
    """Class names by number; a number without a name is called by it. Names that repeat get their number behind."""
    names = dict(pairs)
    if not names:
        return ()
    ordered = [names.get(number, str(number)) for number in range(max(names) + 1)]
    counts = Counter(ordered)
    return tuple(f"{name} ({number})" if counts[name] > 1 else name for number, name in enumerate(ordered))
