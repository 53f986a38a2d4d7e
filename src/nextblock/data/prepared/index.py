"""The index of all shards in one file that is mapped into memory, so that workers share it and none reads it.

Of N images: N rows of `ROW`, N ends of names, the names; what the shards say of their images, one behind the other.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nextblock.data.prepared.shards import Facts, ShardRecord, damaged, read_facts, split_facts
from nextblock.durable import give_name

INDEX = "index.bin"


@dataclass(frozen=True)
class IndexRecord:
    """What prepared.json says of the index: images, bytes and CRC-32 of the file."""

    images: int
    bytes: int
    crc32: int


def write_index(folder: Path, shards: list[ShardRecord]) -> IndexRecord:
    """Write the index of `shards`, in order, beside, flush it to disk, rename it. Raises OSError when the disk
    refuses."""
    beside = folder / f".{INDEX}.partial"
    check = 0
    try:
        with open(beside, "wb") as file:
            for part in _parts(folder, shards):
                check = zlib.crc32(part, check)
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        give_name(beside, folder / INDEX)
    finally:
        beside.unlink(missing_ok=True)
    return IndexRecord(sum(record.images for record in shards), size, check)


def _parts(folder: Path, shards: list[ShardRecord]) -> Iterator[bytes]:
    # The shards' facts are read three times rather than held: names of ten million images are a gigabyte.
    for record in shards:
        yield read_facts(folder, record).rows.tobytes()
    before = 0
    for record in shards:
        facts = read_facts(folder, record)
        yield (facts.ends + before).tobytes()
        before += len(facts.names)
    for record in shards:
        yield read_facts(folder, record).names.tobytes()


def map_index(folder: Path, record: IndexRecord, check: bool = True) -> Facts:
    """The index, mapped into memory. Raises DataError when it is not what was written; `check` reads all of it."""
    path = folder / INDEX
    try:
        size = path.stat().st_size
        if size != record.bytes:
            raise damaged(folder, INDEX, f"it has {size:,} bytes instead of {record.bytes:,}")
        values = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except (OSError, ValueError) as error:
        raise damaged(folder, INDEX, f"it cannot be read ({error})") from error
    if check and zlib.crc32(values.data) != record.crc32:
        raise damaged(folder, INDEX, "its content is not what was written")
    return split_facts(values, record.images)
