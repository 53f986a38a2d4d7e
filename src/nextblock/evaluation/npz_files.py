"""Files of samples and of statistics in NumPy's .npz format, as evaluations of generators exchange them."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nextblock.data.sources.protocol import Sample
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.frechet import Statistics

# what NumPy and zipfile raise for a file that is damaged, or made to do harm
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, EOFError, SyntaxError, RuntimeError,
              OverflowError, MemoryError, struct.error, tokenize.TokenError, zipfile.BadZipFile,
              zlib.error)  # fmt: skip
SAMPLES = "arr_0"  # of a sample file as ADM's evaluation defined it (arXiv 2105.05233)


class NpzImages:
    """The array arr_0 of an .npz file as a source. Mapped, not read: 50,000 images of 256 px are 10 GB."""

    classes: tuple[str, ...] | None = None

    def __init__(self, path: Path, scratch: Path) -> None:
        self._path, self._file = path, path
        self._map: NDArray[np.uint8] | None = None
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{SAMPLES}.npy")
            if member.compress_type == zipfile.ZIP_STORED:
                with open(path, "rb") as file:
                    file.seek(member.header_offset + 26)
                    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
                    file.seek(name + extra, 1)
                    self._layout = _array_header(file)
            else:
                self._file = _unpacked(archive, member, scratch)
                with open(self._file, "rb") as file:
                    self._layout = _array_header(file)
        _, shape, _, dtype = self._layout
        if dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
            raise DataError(f"{path}: {SAMPLES} must be uint8 [N, H, W, 3] or [N, H, W]; got {dtype} {list(shape)}.")
        if shape[0] < 2 or not all(shape):
            raise DataError(f"{path}: {SAMPLES} is {list(shape)}; a distribution needs two images and wants thousands.")
        self.description = f"{path}: {shape[0]} samples of {shape[1]} x {shape[2]} pixels"
        self._pixels()

    def _pixels(self) -> NDArray[np.uint8]:
        if self._map is None:
            offset, shape, order, dtype = self._layout
            try:
                self._map = np.memmap(self._file, dtype, "r", offset, shape, order)
            except ValueError as error:
                raise DataError(f"{self._path} is truncated: {error}. Write it anew.") from error
        return self._map

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}  # a process of its own maps the file itself

    def __len__(self) -> int:
        return int(self._layout[1][0])

    def __getitem__(self, index: int) -> Sample:
        return Sample(np.array(self._pixels()[index]), None)

    def name(self, index: int) -> str:
        return f"{self._path.name}[{index}]"

    def labels(self) -> NDArray[np.int64] | None:
        return None

    def manifest(self) -> Iterator[tuple[str, int]]:
        yield self._path.name, self._path.stat().st_size


def _unpacked(archive: zipfile.ZipFile, member: zipfile.ZipInfo, scratch: Path) -> Path:
    """The array in a file of its own in `scratch`: a packed one can only be read from its beginning."""
    try:
        with (
            archive.open(member) as packed,
            tempfile.NamedTemporaryFile(dir=scratch, suffix=".npy", delete=False) as file,
        ):
            shutil.copyfileobj(packed, file, 2**20)
    except OSError as error:
        raise DataError(
            f"cannot unpack {archive.filename} to {scratch}: {error.strerror or error}. Give an --out on a disk with "
            f"{member.file_size / 1e9:.2g} GB of room, or write the samples with np.savez, which does not pack."
        ) from error
    return Path(file.name)


def _array_header(file: BinaryIO) -> tuple[int, tuple[int, ...], Any, np.dtype[Any]]:
    """Where the numbers begin, their shape, order and type; `file` stands at the beginning of an .npy file."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return file.tell(), shape, "F" if fortran else "C", dtype


@dataclass(frozen=True)
class KeptStatistics:
    """Statistics from a file. identity: of the features, see `extractors`; size_px: of the images. Each None where the
    file does not say; files of other packages never do."""

    statistics: Statistics
    identity: dict[str, Any] | None
    size_px: tuple[int, int] | None


def array_names(path: Path) -> list[str]:
    """What the file holds. Raises what `zipfile` raises when it is no .npz file."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def write_statistics(path: Path, kept: KeptStatistics) -> None:
    """As an .npz file: mu, sigma, n, and a JSON text of what they are of. `path` is overwritten."""
    about = json.dumps({"features": kept.identity, "size_px": kept.size_px})
    found = kept.statistics
    with open(path, "wb") as file:
        np.savez(file, mu=found.mean, sigma=found.covariance, n=np.int64(found.count or 0), about=np.array(about))


def read_statistics(path: Path) -> KeptStatistics:
    try:
        with np.load(path, allow_pickle=False) as file:
            count = int(file["n"]) if "n" in file else 0
            about = json.loads(str(file["about"])) if "about" in file else {}
            found = Statistics(file["mu"], file["sigma"], count or None)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    size = about.get("size_px")
    return KeptStatistics(found, about.get("features"), tuple(size) if size else None)


def require_same_features(kept: KeptStatistics, identity: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError when the file says that its statistics are of other features, or their width is another."""
    if kept.identity is None:
        return
    names = sorted({*kept.identity, *identity} - {"name", "path"})
    other = [name for name in names if kept.identity.get(name) != identity.get(name)]
    if other:
        told = "; ".join(f"{name} {kept.identity.get(name)} there, {identity.get(name)} here" for name in other)
        raise ConfigError(f"{where} holds statistics of other features: {told}. Compute them anew with --save_stats.")


__all__ = [
    "SAMPLES", "KeptStatistics", "NpzImages", "array_names", "read_statistics", "require_same_features",
    "write_statistics",
]  # fmt: skip
