"""A tar on a disk, or on a network file system."""

from __future__ import annotations

import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from nextblock.data.decode import is_transient
from nextblock.data.sources.tar_index import Stamp, changed
from nextblock.data.sources.tar_members import Read
from nextblock.errors import DataError

OPEN_FILES = 128  # of a process, of the 1024 that it usually may have
TRIES = 4
FIRST_WAIT_S = 0.5
_AHEAD = 4096  # a header, a label and the next header come in one read; an image is not read for its header's sake

T = TypeVar("T")


class LocalTar:
    """The tar `path`."""

    def __init__(self, path: str) -> None:
        self.where = os.path.abspath(path)

    def stamp(self) -> Stamp:
        try:
            status = os.stat(self.where)
        except OSError as error:
            raise DataError(f"cannot read {self.where}: {error.strerror}.") from error
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{self.where} is a folder, a pipe or a device; a tar file is needed.")
        return _stamp_of(status)

    @contextmanager
    def reading(self, stamp: Stamp) -> Iterator[Read]:
        file = _tried(self.where, lambda: _opened(self.where, stamp))
        begin, ahead = 0, b""

        def read(offset: int, length: int) -> bytes:
            nonlocal begin, ahead
            if not begin <= offset <= offset + length <= begin + len(ahead):
                begin = offset
                ahead = _tried(self.where, lambda: os.pread(file.descriptor, max(length, _AHEAD), offset))
            return ahead[offset - begin : offset - begin + length]

        yield read

    def read(self, offset: int, length: int, stamp: Stamp) -> bytes:
        def once() -> bytes:
            try:
                file = _opened(self.where, stamp)
                if _stamp_of(os.fstat(file.descriptor)) != stamp:
                    raise changed(self.where)
                return os.pread(file.descriptor, length, offset)
            except OSError:
                _OPEN.pop((self.where, stamp), None)
                raise

        content = _tried(self.where, once)
        if len(content) != length:
            raise changed(self.where)
        return content


def _stamp_of(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, str(status.st_mtime_ns))


def _tried(where: str, what: Callable[[], T]) -> T:
    """`what()`, tried again (after 0.5, 1, 2 seconds) when the storage hiccups."""
    for attempt in range(TRIES):
        try:
            return what()
        except OSError as error:
            if is_transient(error) and attempt + 1 < TRIES:
                time.sleep(FIRST_WAIT_S * 2**attempt)
                continue
            raise DataError(
                f"read error on {where}: {error.strerror}. Check the disk or the network file system, then resume."
            ) from error
    raise AssertionError("not reached")


class _OpenFile:
    """Closed when nobody uses it any more: a thread may be reading what another one no longer keeps."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


# Reading at an offset leaves a descriptor as it is, so those that a fork takes along serve both processes.
_OPEN: OrderedDict[tuple[str, Stamp], _OpenFile] = OrderedDict()


def _opened(path: str, stamp: Stamp) -> _OpenFile:
    found = _OPEN.get((path, stamp))
    if found is None:
        found = _OPEN[path, stamp] = _OpenFile(path)
        if len(_OPEN) > OPEN_FILES:
            _OPEN.popitem(last=False)
    return found
