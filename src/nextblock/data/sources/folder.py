"""Image files: a folder of any depth, or a list of files and folders.

A million names are kept as one bytes object and one array of offsets, not as a million Python objects: that
is some 40 MB instead of 150, and worker processes share it instead of copying it page by page when they
touch reference counts.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nextblock.data.decode import EXTENSIONS, read_bytes
from nextblock.data.sources.protocol import Sample
from nextblock.errors import DataError

_SUFFIXES = tuple(extension.encode() for extension in EXTENSIONS)


class FileSource:
    """Image files below `root` (or anywhere, when `root` is empty), in the order given."""

    def __init__(
        self,
        root: bytes,
        names: bytes,
        ends: NDArray[np.int64],
        description: str,
        classes: tuple[str, ...] | None = None,
        labels: NDArray[np.int32] | None = None,
    ) -> None:
        self.classes = classes
        self.description = description
        self._root = root
        self._names = names
        self._ends = ends  # [N + 1], starting with 0
        self._labels = labels  # [N]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Sample:
        name = self._name(index)
        content = read_bytes(os.fsdecode(os.path.join(self._root, name)), name=os.fsdecode(name))
        return Sample(content, None if self._labels is None else int(self._labels[index]))

    def _name(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        return self._names[self._ends[index] : self._ends[index + 1]]

    def name(self, index: int) -> str:
        return os.fsdecode(self._name(index))

    def labels(self) -> NDArray[np.int64] | None:
        return None if self._labels is None else self._labels.astype(np.int64)

    def stamps(self) -> Iterator[str]:
        """When each file was changed, in order."""
        for index in range(len(self)):
            try:
                yield str(os.stat(os.path.join(self._root, self._name(index))).st_mtime_ns)
            except OSError as error:
                yield f"broken: {error.strerror}"

    def manifest(self) -> Iterator[tuple[str, int]]:
        # A folder is sorted already, and sorting sorted names is one pass; a list of files may not be.
        for name in sorted(self._name(index) for index in range(len(self))):
            try:
                size = os.stat(os.path.join(self._root, name)).st_size
            except OSError as error:
                raise DataError(f"cannot read {os.fsdecode(name)}: {error.strerror}") from error
            yield os.fsdecode(name), size


class _Scan:
    """Collects image names below a folder, bytewise sorted, and the first-level folder each one is in."""

    def __init__(self) -> None:
        self.names = bytearray()
        self.ends = array("q", [0])
        self.tops: list[bytes] = []
        self.top_of = array("i")  # index into tops; -1 = directly in the root
        self.ignored: Counter[str] = Counter()

    def walk(self, folder: bytes, prefix: bytes = b"", above: tuple[tuple[int, int], ...] = ()) -> None:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:
            return  # a link that leads back up
        for entry in self._listing(folder):
            if entry.endswith(b"/"):
                if not prefix:
                    self.tops.append(entry[:-1])
                self.walk(os.path.join(folder, entry[:-1]), prefix + entry, (*above, here))
            elif entry.lower().endswith(_SUFFIXES):
                self.names += prefix + entry
                self.ends.append(len(self.names))
                self.top_of.append(len(self.tops) - 1 if prefix else -1)
            else:
                self.ignored[os.fsdecode(os.path.splitext(entry)[1].lower()) or "no extension"] += 1

    def _listing(self, folder: bytes) -> list[bytes]:
        """Names in a folder, sub-folders with a '/' behind: so they sort as the whole paths do."""
        found = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(b"."):
                    self.ignored["hidden"] += 1
                    continue
                try:
                    kind = b"/" if entry.is_dir() else b"" if entry.is_file() else None
                except OSError as error:
                    if error.errno != errno.ELOOP:  # a link that leads to itself is a broken one
                        raise
                    kind = None
                if kind is None:
                    self.ignored["broken link or special file"] += 1
                else:
                    found.append(entry.name + kind)
        return sorted(found)

    def classes(self) -> tuple[tuple[str, ...] | None, NDArray[np.int32] | None]:
        """First-level folder names, sorted, as classes; none when an image lies outside of them."""
        top_of = np.array(self.top_of, dtype=np.int32)
        used = [self.tops[index] for index in np.unique(top_of[top_of >= 0])]
        if not used or top_of.min() < 0:
            return None, None
        ranks = {name: rank for rank, name in enumerate(sorted(used))}
        table = np.array([ranks.get(name, -1) for name in self.tops], dtype=np.int32)
        return tuple(os.fsdecode(name) for name in sorted(used)), table[top_of]


def open_folder(root: str) -> FileSource:
    """Every image below `root`. Raises DataError when it cannot be read or holds none."""
    scan = _Scan()
    try:
        scan.walk(os.fsencode(root))
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename else root
        raise DataError(f"cannot read folder {where}: {error.strerror}. Check its permissions.") from error
    count = len(scan.ends) - 1
    if not count:
        raise DataError(_no_images(root, scan.ignored))
    classes, labels = scan.classes()
    ignored = sum(scan.ignored.values())
    description = f"{root}: {_counted(count, 'image file')}"
    description += f", {_counted(len(classes), 'class', 'es')} (first-level folders)" if classes else ", no labels"
    description += f", {_counted(ignored, 'other file')} ignored" if ignored else ""
    ends = np.array(scan.ends, dtype=np.int64)
    return FileSource(os.fsencode(root), bytes(scan.names), ends, description, classes, labels)


def _counted(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{'' if count == 1 else plural}"


def _no_images(root: str, ignored: Counter[str]) -> str:
    accepted = f"Accepted: {' '.join(EXTENSIONS)}"
    if not ignored:
        return f"{root} is empty. {accepted}"
    seen = ", ".join(f"{count} {extension}" for extension, count in ignored.most_common(5))
    hint = " For Parquet, point at the folder that holds the files." if ".parquet" in ignored else ""
    return f"no image among {sum(ignored.values())} files in {root} (seen: {seen}).{hint} {accepted}"


def open_files(paths: Sequence[str]) -> FileSource:
    """The files named, and all images of the folders named, in order, each once. No labels.

    Raises DataError for a file whose extension is not accepted.
    """
    names: dict[bytes, None] = {}
    for path in paths:
        if os.path.isdir(path):
            inner = open_folder(path)
            names.update(dict.fromkeys(os.fsencode(os.path.join(path, inner.name(i))) for i in range(len(inner))))
        elif path.lower().endswith(EXTENSIONS):
            names[os.fsencode(path)] = None
        else:
            raise DataError(f"{path} has no image extension. Accepted: {' '.join(EXTENSIONS)}")
    ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
    return FileSource(b"", b"".join(names), ends, _counted(len(names), "image file"))
