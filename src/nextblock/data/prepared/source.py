"""Prepared images as a source like any other.

What was read is checked: when they are opened, the size of all shards and the CRC-32 of the index (places, labels,
names); the CRC-32 of each image whenever it is read (microseconds); and the SHA-256 of whole shards when asked
(`PreparedImages.verify`).
"""

from __future__ import annotations

import os
import time
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nextblock.data.decode import is_transient
from nextblock.data.prepared.about import ABOUT, About, is_prepared
from nextblock.data.prepared.encoding import stored
from nextblock.data.prepared.index import map_index
from nextblock.data.prepared.shards import Facts
from nextblock.data.shard_folder import similar_folders
from nextblock.data.sources.protocol import Sample
from nextblock.errors import DataError, SampleError

OPEN_FILES = 128  # of an image source, of the 1024 that a process usually may have
_ATTEMPTS = 4


def open_prepared(folder: str | os.PathLike[str]) -> PreparedImages:
    """Open prepared images. Raises DataError, saying what to do, where there are none, unfinished or damaged ones."""
    folder = Path(folder).expanduser()
    if not is_prepared(folder):
        hint = similar_folders(folder)
        raise DataError(f"{folder} holds no prepared images: it has no {ABOUT}.{hint} nextblock prepare makes them.")
    about = About.read(folder)
    if about.index is None:
        done = f"{about.images + len(about.bad):,} of {about.count:,} images are done"
        raise DataError(f"the prepared images {folder} are not finished: {done}. Go on with: {about.command(folder)}")
    return PreparedImages(folder, about)


class PreparedImages:
    """N images in shards, with the names and labels that they had. Picklable, cheap to fork; nothing is in memory."""

    def __init__(self, folder: Path, about: About) -> None:
        self.folder, self.about = folder, about
        self.classes: tuple[str, ...] | None = None if about.classes is None else tuple(about.classes)
        self._shards = about.in_order
        self._ends = list(accumulate(record.images for record in self._shards))
        for record in self._shards:
            record.require_size(folder)
        self._facts: Facts | None = self._mapped(check=True)
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        count = len(self.classes or ())
        named = f"{count} class{'' if count == 1 else 'es'}" if count else "no class names"
        side = f"shorter side at most {about.encoding.short_side} px"
        self.description = f"{folder}: {len(self):,} prepared images, {side}, {named}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_facts": None, "_files": OrderedDict()}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Raises SampleError when the image is not what was written, DataError when the storage fails."""
        offset, length, check, label = self._row(index)
        number = bisect_right(self._ends, index)
        content = self._read(number, offset, length)
        if len(content) != length or zlib.crc32(content) != check:
            reason = (
                f"damaged in {self._shards[number].file} of {self.folder}: these are not the bytes that were "
                "written; the command that made them, given again, makes them anew"
            )
            raise SampleError(self.name(index), reason)
        return Sample(stored(content), None if label < 0 else label)

    def name(self, index: int) -> str:
        """The image's name in the source that it was prepared from."""
        self._row(index)
        ends, names = self._index().ends, self._index().names
        return os.fsdecode(names[ends[index - 1] if index else 0 : ends[index]].tobytes())

    def labels(self) -> NDArray[np.int64]:
        return self._index().rows["label"].astype(np.int64)

    def manifest(self) -> Iterator[tuple[str, int]]:
        """The shards, with their SHA-256: everything that an image, its name and its label depend on."""
        for record in self._shards:
            yield f"{record.file} sha256:{record.sha256[:16]}", record.bytes

    def stamps(self) -> Iterator[str]:
        return iter(())  # the manifest is a hash of the content

    def verify(self, watch: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read all shards and compare their SHA-256; `watch(done, total)` after each. Raises DataError for one that
        is damaged."""
        for done, record in enumerate(self._shards, 1):
            record.require_whole(self.folder)
            watch(done, len(self._shards))

    def _index(self) -> Facts:
        if self._facts is None:  # in another process, which was not forked
            self._facts = self._mapped(check=False)
        return self._facts

    def _mapped(self, check: bool) -> Facts:
        assert self.about.index is not None
        return map_index(self.folder, self.about.index, check)

    def _row(self, index: int) -> tuple[int, int, int, int]:
        """Offset, length, CRC-32 and label."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        row: tuple[int, int, int, int] = self._index().rows[index].item()
        return row

    def _read(self, number: int, offset: int, length: int) -> bytes:
        """Tried again (after 0.5, 1, 2 seconds) when the storage hiccups."""
        for attempt in range(_ATTEMPTS):
            try:
                return os.pread(self._file(number).descriptor, length, offset)
            except OSError as error:
                self._files.pop(number, None)
                if is_transient(error) and attempt + 1 < _ATTEMPTS:
                    time.sleep(0.5 * 2**attempt)
                    continue
                path = self.folder / self._shards[number].file
                raise DataError(
                    f"read error on {path}: {error.strerror}. Check the disk or the network file system, then resume."
                ) from error
        raise AssertionError("not reached")

    def _file(self, number: int) -> _OpenFile:
        found = self._files.get(number)
        if found is None:
            found = self._files[number] = _OpenFile(self.folder / self._shards[number].file)
            if len(self._files) > OPEN_FILES:
                self._files.popitem(last=False)
        return found


class _OpenFile:
    """Closed when nobody uses it any more: a thread may be reading what another one no longer keeps."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor") and os is not None:  # it is, when the interpreter ends
            os.close(self.descriptor)
