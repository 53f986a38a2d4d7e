"""One shard of prepared images: contents one behind the other, then what is known of each.

With n images: the contents; n rows of `ROW`, 16 bytes each; `ends` int64 [n], where each name ends; the names, one
behind the other. All numbers are little-endian. A shard is written whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nextblock.data.shard_folder import fault_of_content, fault_of_size, require_own_name
from nextblock.durable import give_name
from nextblock.errors import DataError

# where in the shard's contents an image begins, its bytes, their CRC-32, and its label (-1: none)
ROW = np.dtype([("offset", "<u4"), ("length", "<u4"), ("crc32", "<u4"), ("label", "<i4")])
END = np.dtype("<i8")
LARGEST_MB = 4095  # an offset has 32 bits


@dataclass(frozen=True)
class ShardRecord:
    """What prepared.json says of a shard.

    content_bytes: of the contents, `bytes` of the whole file. sha256: of the whole file. original_bytes: of its images
    in their source. kinds: how many images are stored as what. bad: images of its range that could not be decoded:
    name, reason, position in the source.
    """

    file: str
    images: int
    content_bytes: int
    bytes: int
    sha256: str
    original_bytes: int
    kinds: dict[str, int] = field(default_factory=dict)
    bad: tuple[tuple[str, str, int], ...] = ()

    @classmethod
    def from_dict(cls, number: int, values: dict[str, Any]) -> ShardRecord:
        """Of shard `number`. Raises ValueError when its file has another name than that number gives it."""
        require_own_name(values["file"], shard_name(number))
        bad = tuple((str(name), str(reason), int(position)) for name, reason, position in values["bad"])
        return cls(**{**values, "bad": bad})

    def require_size(self, folder: Path) -> None:
        """Raise DataError when the file is missing or has not the bytes that were written."""
        if fault := fault_of_size(folder / self.file, self.bytes):
            raise damaged(folder, self.file, fault)

    def require_whole(self, folder: Path) -> None:
        """`require_size`, and the SHA-256. Reads the whole file."""
        if fault := fault_of_content(folder / self.file, self.bytes, self.sha256):
            raise damaged(folder, self.file, fault)


class Facts(NamedTuple):
    """Of n images: rows `ROW` [n], ends int64 [n] of the names, names uint8."""

    rows: NDArray[Any]
    ends: NDArray[np.int64]
    names: NDArray[np.uint8]


def damaged(folder: Path, file: str, how: str) -> DataError:
    """What to say of a file that is not what was written."""
    return DataError(
        f"{file} of the prepared images {folder} is damaged: {how}. The command that made them makes it anew: "
        f"nextblock prepare DATA --out {folder}"
    )


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.bin"


def read_facts(folder: Path, record: ShardRecord) -> Facts:
    """What a shard says of its images."""
    with open(folder / record.file, "rb") as file:
        file.seek(record.content_bytes)
        found = file.read()
    return split_facts(np.frombuffer(found, dtype=np.uint8), record.images)


def split_facts(values: NDArray[np.uint8], images: int) -> Facts:
    """Rows, ends and names of so many images, lying in `values` uint8 in this order; nothing is copied."""
    rows, ends = images * ROW.itemsize, images * (ROW.itemsize + END.itemsize)
    return Facts(values[:rows].view(ROW), values[rows:ends].view(END), values[ends:])


class ShardWriter:
    """Writes a shard beside its place; `finish` puts it there, and a shard that is not finished leaves nothing.

    A context manager. All methods raise OSError when the disk refuses.
    """

    def __init__(self, folder: Path, number: int) -> None:
        self._final = folder / shard_name(number)
        self._beside = folder / f".{self._final.name}.partial"
        self._file = open(self._beside, "wb", buffering=2**20)  # noqa: SIM115 (closed in __exit__)
        self._sha256 = hashlib.sha256()
        self._rows: list[tuple[int, int, int, int]] = []
        self._names, self._ends = bytearray(), array("q")
        self._kinds: dict[str, int] = {}
        self._original_bytes = 0
        self.content_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError:
            if kind is None:
                raise
        finally:
            self._beside.unlink(missing_ok=True)

    def add(self, content: bytes, kind: str, label: int, name: str, original_bytes: int) -> None:
        """The next image."""
        self._rows.append((self.content_bytes, len(content), zlib.crc32(content), label))
        self._names += os.fsencode(name)
        self._ends.append(len(self._names))
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._original_bytes += original_bytes
        self.content_bytes += len(content)
        self._write(content)

    def finish(self, bad: list[tuple[str, str, int]]) -> ShardRecord:
        """Write what is known of the images, flush all to disk, and give the file its name."""
        ends = np.array(self._ends, dtype=END)
        for part in (np.array(self._rows, dtype=ROW).tobytes(), ends.tobytes(), bytes(self._names)):
            self._write(part)
        self._file.flush()
        os.fsync(self._file.fileno())
        record = ShardRecord(
            file=self._final.name, images=len(self._rows), content_bytes=self.content_bytes, bytes=self._file.tell(),
            sha256=self._sha256.hexdigest(), original_bytes=self._original_bytes,
            kinds=dict(sorted(self._kinds.items())), bad=tuple(bad),
        )  # fmt: skip
        give_name(self._beside, self._final)
        return record

    def _write(self, content: bytes) -> None:
        self._sha256.update(content)
        self._file.write(content)
