"""Features as the rows of a table [N, D] that need not fit into memory: read in blocks, written to a mapped file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.features import Features

BLOCK_ROWS = 2048  # held at once, as float64: 32 MiB at 2,048 dimensions


class Rows(Protocol):
    """What the metrics ask of a table: its shape [N, D] and some of its rows. An array is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class SomeRows:
    """The rows `chosen` int64 [M] of a table, in that order; read when they are asked for."""

    def __init__(self, table: Rows, chosen: NDArray[np.int64]) -> None:
        self._table, self._chosen = table, chosen
        self.shape = (len(chosen), *table.shape[1:])

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any, /) -> Any:
        return self._table[self._chosen[index]]


def as_rows(values: Any, what: str) -> Rows:
    """A table from features, an array, a tensor or another table; `what` names it in errors.

    Raises ConfigError when it is not [N, D], DataError when it has fewer than two rows.
    """
    if isinstance(values, Features):
        values = values.values
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, list | tuple):
        values = np.asarray(values)
    table: Rows = values
    if len(table.shape) != 2:
        raise ConfigError(f"{what} must be features [N, D], one row for each image; got {list(table.shape)}.")
    if len(table) < 2:
        raise DataError(f"{what}: {len(table)} image is not enough; a distribution needs two and wants thousands.")
    return table


def require_same_width(first: Rows, second: Rows) -> None:
    """Raise ConfigError when the dimensions differ."""
    if first.shape[1] != second.shape[1]:
        raise ConfigError(
            f"one set has features of {first.shape[1]} dimensions, the other of {second.shape[1]}. Take both from the "
            "same network, at the same image size."
        )


def block(table: Rows, index: Any) -> NDArray[np.float64]:
    """Some rows as float64 [B, D]. Raises DataError when a number in them is not finite."""
    values = np.asarray(table[index], dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError(
            "there are features that are not finite (NaN or infinite). Did the training of the network that gives them "
            "diverge? Take an earlier checkpoint or another network."
        )
    return values


def in_blocks(table: Rows, rows: int | None = None, first: int = 0) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """The table from row `first` to its end, at most `rows` (BLOCK_ROWS) at a time: where, and the numbers as `block`
    gives them."""
    step = rows or BLOCK_ROWS
    for start in range(first, len(table), step):
        where = slice(start, min(start + step, len(table)))
        yield where, block(table, where)


class RowFile:
    """float32 [N, D] in a file that is mapped into memory; rows are appended, at most `capacity` of them.

    Raises DataError when the disk is full: all of its space is taken at the first row.
    """

    def __init__(self, path: Path, capacity: int) -> None:
        self._path, self._capacity, self._count = path, capacity, 0
        self._file: Any = None

    def append(self, values: NDArray[np.float32]) -> None:
        if self._file is None:
            self._file = self._open(values.shape[1])
        self._file[self._count : self._count + len(values)] = values
        self._count += len(values)

    def written(self) -> NDArray[np.float32]:
        """What has been appended, [M, D], mapped."""
        if self._file is None:
            return np.zeros((0, 0), np.float32)
        self._file.flush()
        return np.load(self._path, mmap_mode="r")[: self._count]

    def _open(self, width: int) -> Any:
        try:
            file = np.lib.format.open_memmap(self._path, mode="w+", dtype=np.float32, shape=(self._capacity, width))
            if hasattr(os, "posix_fallocate"):  # a full disk is told now, not by a signal while the map is written
                with open(self._path, "r+b") as whole:
                    os.posix_fallocate(whole.fileno(), 0, os.path.getsize(self._path))
            return file
        except OSError as error:
            gigabytes = self._capacity * width * 4 / 1e9
            raise DataError(
                f"cannot write {gigabytes:.2g} GB of features to {self._path.parent}: {error.strerror}. Give an --out "
                "on a disk with room: they lie there while they are needed."
            ) from error


__all__ = ["RowFile", "Rows", "SomeRows", "as_rows", "block", "in_blocks", "require_same_width"]
