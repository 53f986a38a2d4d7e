"""One shard of a latent cache: a safetensors file, written whole or not at all, read through a memory map.

Tensors of a shard with n images: `moments` [n, 2, 2C, h, w], as it is and mirrored; `checks` uint32 [n, 2], the CRC-32
of each of these; `labels` int64 [n], -1 for none; `names` uint8, all names one behind the other; `ends` int64 [n],
where each one ends.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from nextblock.data.shard_folder import fault_of_content, fault_of_size, require_own_name
from nextblock.data.stream import BadSample
from nextblock.durable import file_sha256, flush_file, give_name
from nextblock.errors import DataError

DTYPES: dict[str, tuple[str, type[np.generic]]] = {
    "F16": ("float16", np.float16), "F32": ("float32", np.float32), "I64": ("int64", np.int64),
    "U32": ("uint32", np.uint32), "U8": ("uint8", np.uint8),
}  # fmt: skip

_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
)  # what a damaged header leads to


@dataclass(frozen=True)
class ShardRecord:
    """What latents.json says of a shard.

    sha256: of the whole file. facts_crc32: of all but the moments: its header, checks, labels, names and ends, little
    enough to be compared whenever the cache is opened. bad: images of its range that could not be read.
    """

    file: str
    images: int
    bytes: int
    sha256: str
    facts_crc32: int
    bad: tuple[BadSample, ...] = ()

    @classmethod
    def from_dict(cls, number: int, values: dict[str, Any]) -> ShardRecord:
        """Of shard `number`. Raises ValueError when its file has another name than that number gives it."""
        require_own_name(values["file"], shard_name(number))
        return cls(**{**values, "bad": tuple(BadSample(*sample) for sample in values["bad"])})


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_shard(
    folder: Path,
    number: int,
    moments: NDArray[Any],
    labels: NDArray[np.int64],
    names: Sequence[str],
    bad: Sequence[BadSample],
) -> ShardRecord:
    """Write the file beside, flush it to disk, rename it. Raises OSError when the disk refuses."""
    encoded = [os.fsencode(name) for name in names]
    arrays = {
        "moments": np.ascontiguousarray(moments),
        "checks": np.array([[_check(row) for row in pair] for pair in moments], dtype=np.uint32).reshape(-1, 2),
        "labels": labels,
        "names": np.frombuffer(b"".join(encoded), dtype=np.uint8),
        "ends": np.cumsum([len(name) for name in encoded], dtype=np.int64),
    }
    final = folder / shard_name(number)
    beside = folder / f".{final.name}.partial"
    try:
        beside.touch()
        mode = beside.stat().st_mode  # as the umask has it; safetensors lets nobody but the owner read
        save_file(arrays, beside)
        beside.chmod(mode)
        flush_file(beside)
        record = ShardRecord(
            file=final.name, images=len(labels), bytes=beside.stat().st_size, sha256=file_sha256(beside),
            facts_crc32=_facts_crc32(*_mapped(beside)), bad=tuple(bad),
        )  # fmt: skip
        give_name(beside, final)
    finally:
        beside.unlink(missing_ok=True)
    return record


class Shard:
    """A shard for reading. The file is mapped when first read, and again in every process that gets this object."""

    def __init__(self, folder: Path, record: ShardRecord) -> None:
        self.path, self.record = folder / record.file, record
        self._arrays: dict[str, NDArray[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": {}}  # a pickled memory map would be the whole file

    def require_size(self) -> None:
        """Raise DataError when the file is missing or has not the bytes that were written."""
        if fault := fault_of_size(self.path, self.record.bytes):
            raise self._damaged(fault)

    def require_facts(self) -> None:
        """Raise DataError when something other than the moments is not what was written: labels, names, checks."""
        try:
            found = _facts_crc32(*_mapped(self.path))
        except _UNREADABLE as error:
            raise self._damaged(f"its header cannot be read ({type(error).__name__})") from error
        if found != self.record.facts_crc32:
            raise self._damaged("labels, names or checks of it are not what was written")

    def require_whole(self) -> None:
        """`require_size`, and the SHA-256. Reads the whole file."""
        if fault := fault_of_content(self.path, self.record.bytes, self.record.sha256):
            raise self._damaged(fault)

    def read(self, row: int, flip: bool) -> NDArray[Any]:
        """Moments [2C, h, w] of one image. Raises DataError when they are not those that were written."""
        found = self.array("moments")[row, int(flip)]
        if _check(found) != self.array("checks")[row, int(flip)]:
            raise self._damaged(f"image {row} of it is not what was written")
        return found

    def name(self, row: int) -> str:
        """The image's name in its source."""
        ends = self.array("ends")
        return os.fsdecode(self.array("names")[ends[row - 1] if row else 0 : ends[row]].tobytes())

    def array(self, name: str) -> NDArray[Any]:
        """One tensor of the file, mapped into memory, not read."""
        if not self._arrays:
            try:
                _, self._arrays = _mapped(self.path)
            except _UNREADABLE as error:
                raise self._damaged(f"its header cannot be read ({type(error).__name__})") from error
        return self._arrays[name]

    def _damaged(self, how: str) -> DataError:
        folder = self.path.parent
        return DataError(
            f"{self.path.name} of the latent cache {folder} is damaged: {how}. To make it anew, with the images and "
            f"the VAE at hand: nextblock cache-latents --resume {folder}"
        )


def _check(values: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(values).data)


def _facts_crc32(header: bytes, arrays: Mapping[str, NDArray[Any]]) -> int:
    """CRC-32 of the header, and of all tensors but the moments."""
    found = zlib.crc32(header)
    for name in ("checks", "labels", "names", "ends"):
        found = zlib.crc32(arrays[name].data, found)
    return found


def _mapped(path: Path) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """Header and tensors of a safetensors file: a length (8 bytes), a JSON header of that length, then the numbers."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 100_000:
            raise ValueError("the header is too long")
        header = file.read(length)
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    found = {}
    for name, about in json.loads(header).items():
        start, stop = about["data_offsets"]
        found[name] = data[start:stop].view(DTYPES[about["dtype"]][1]).reshape(about["shape"])
    return header, found
