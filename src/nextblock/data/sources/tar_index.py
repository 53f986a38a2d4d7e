"""The index of one tar: read from its headers once, kept in the cache folder, mapped into memory when it is used.

A file of it: a line of JSON (`Header`, and a SHA-256 of it), then, of n samples, n rows of `ROW`, n ends of names, the
names. It is 24 bytes and a name for each sample. It is good for as long as the tar has the size and the time of change
(behind HTTP: the ETag) that it was made from, and is checked against its own SHA-256 whenever a source is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nextblock.data.cache_folder import default_cache
from nextblock.data.sources.tar_members import Read
from nextblock.data.sources.tar_samples import END, ROW, Wanted, samples_of
from nextblock.durable import sha256_of
from nextblock.errors import DataError

FORMAT = 2  # 1 had no hash of its header
_LONGEST_HEADER = 2**20


class Stamp(NamedTuple):
    """What a tar was when it was indexed: bytes, and its time of change in ns or its ETag."""

    size: int
    version: str


class Tar(Protocol):
    """A tar somewhere. Picklable, cheap to fork.

    where: the path or address, as errors call it and the cache knows it.
    """

    where: str

    def stamp(self) -> Stamp:
        """What it is now. Raises DataError when it is not there."""

    def reading(self, stamp: Stamp) -> contextlib.AbstractContextManager[Read]:
        """To read it once from the beginning to the end, leaving things out."""

    def read(self, offset: int, length: int, stamp: Stamp) -> bytes:
        """Exactly these bytes. Raises DataError when it is no longer what `stamp` says, or the storage fails."""


@dataclass(frozen=True)
class Header:
    """What is known of an indexed tar without looking into its index.

    digest: SHA-256 of the rows, ends and names. labelled: samples that have a label. skipped, seen: see `Samples`.
    """

    stamp: Stamp
    count: int
    labelled: int
    name_bytes: int
    digest: str
    skipped: dict[str, int]
    seen: dict[str, int]


class Index(NamedTuple):
    """Of n samples: rows `ROW` [n], ends int64 [n] of the names, names uint8."""

    rows: NDArray[Any]
    ends: NDArray[np.int64]
    names: NDArray[np.uint8]


def changed(where: str) -> DataError:
    """What to say of a tar that is no longer what it was."""
    return DataError(
        f"{where} was changed while it was in use. Bring it back, or when it is written to its end, start a new run."
    )


def open_index(tar: Tar, stamp: Stamp, wanted: Wanted, *, check: bool = True) -> tuple[Header, Index]:
    """The index of `tar` as `stamp` says it is, made where the cache has none.

    check: compare the cached one with its SHA-256, reading all of it. Raises DataError for a tar that cannot be used,
    and when the cache folder cannot be written to.
    """
    asked = json.dumps([tar.where, wanted.image, wanted.label])
    path = default_cache() / "tars" / f"{hashlib.sha256(os.fsencode(asked)).hexdigest()[:32]}.index"
    found = _cached(path, stamp, check)
    if found is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                found = _cached(path, stamp, check) or _made(tar, stamp, wanted, path)
        except OSError as error:
            raise DataError(
                f"cannot keep the index of {tar.where} in {path.parent}: {error.strerror}. Set NEXTBLOCK_CACHE to a "
                "folder that can be written to."
            ) from error
    return found


def _made(tar: Tar, stamp: Stamp, wanted: Wanted, path: Path) -> tuple[Header, Index]:
    with tar.reading(stamp) as read:
        samples = samples_of(read, stamp.size, tar.where, wanted)
    if tar.stamp() != stamp:
        raise changed(tar.where)
    parts = (samples.rows.tobytes(), samples.ends.tobytes(), samples.names)
    digest = hashlib.sha256(b"".join(parts)).hexdigest()
    labelled = int((samples.rows["label"] >= 0).sum())
    seen = dict(samples.seen.most_common(20))
    header = Header(stamp, len(samples.rows), labelled, len(samples.names), digest, dict(samples.skipped), seen)
    values = {"format": FORMAT, **asdict(header)}
    line = json.dumps(values | {"sha256": sha256_of(values)}).encode()
    line = line.ljust(len(line) | 7) + b"\n"  # so that the numbers behind it are aligned
    _write(path, [line, *parts])
    written = _cached(path, stamp, check=False)
    if written is None:
        raise DataError(f"the index {path} is not what was just written. Check the disk.")
    return written


def _write(path: Path, parts: list[bytes]) -> None:
    """Beside, flushed to disk, then renamed."""
    descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _cached(path: Path, stamp: Stamp, check: bool) -> tuple[Header, Index] | None:
    """None where there is none, it is of another state of the tar, or it is damaged."""
    try:
        with open(path, "rb") as file:
            line = file.readline(_LONGEST_HEADER)
        values = json.loads(line)
        if values.pop("sha256") != sha256_of(values) or values.pop("format") != FORMAT:
            return None
        header = Header(**{**values, "stamp": Stamp(*values["stamp"])})
        body = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))[len(line) :]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    whole = header.count * (ROW.itemsize + END.itemsize) + header.name_bytes
    if header.stamp != stamp or len(body) != whole:
        return None
    if check and hashlib.sha256(body.data).hexdigest() != header.digest:
        return None
    return header, _split(body, header.count)


def _split(body: NDArray[np.uint8], count: int) -> Index:
    rows, ends = count * ROW.itemsize, count * (ROW.itemsize + END.itemsize)
    return Index(body[:rows].view(ROW), body[rows:ends].view(END), body[ends:])


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time makes an index, where the system can tell; the others then find it made."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with open(path.with_suffix(".lock"), "wb") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks: then each makes its own
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
