"""Reading what `nextblock embed` wrote: names and features, part by part, and what the features are of."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from nextblock.errors import DataError
from nextblock.evaluation.feature_cache import weights_digest
from nextblock.evaluation.features import FeatureConfig
from nextblock.jobs.opening import OpenedEncoder

ROWS = 4096  # read at once
COLUMNS = ["name", "features"]
METADATA = "nextblock"  # the key of the record in a table; in an .npz it is the array "about"

Part = tuple[list[str], NDArray[np.float32]]  # names [M], features [M, D]


def is_embedded_file(given: Any) -> bool:
    """Whether it is the path of a file of features, and not one of images: .npz, or Parquet with its two columns.

    Raises DataError for a .parquet file that cannot be read.
    """
    if not isinstance(given, str | os.PathLike):
        return False
    path = Path(given).expanduser()
    if path.suffix == ".parquet" and path.is_file():
        with _readable(path):
            return set(COLUMNS) <= set(pq.read_schema(path).names)
    return path.suffix == ".npz"


def embedded_parts(path: Path) -> Iterator[Part]:
    """Names and pooled features of all images, a few thousand at a time; those of patches are averaged.

    Raises DataError for anything else than what `embed` writes.
    """
    with _readable(path):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                names, features = file["names"], file["features"]
            yield [str(name) for name in names], _pooled(features, len(names), path)
            return
        with pq.ParquetFile(path) as table:
            for batch in table.iter_batches(ROWS, columns=COLUMNS):
                names, features = (batch.column(name) for name in COLUMNS)
                yield names.to_pylist(), _pooled(_array(features, path), len(names), path)


def record_of(opened: OpenedEncoder, config: FeatureConfig) -> dict[str, Any]:
    """What features are of, in plain values: those with another record cannot be compared with them.

    Pooling is no part of it: what is not pooled is averaged when it is read.
    """
    preprocessing = opened.preprocessing.to_dict()
    return {
        "weights": weights_digest(opened.encoder),
        "last_layers": config.last_layers,
        "final_norm": config.final_norm,
        "bidirectional": config.bidirectional,
        **preprocessing,
        "resize_px": opened.preprocessing.shorter_side_px,
    }


def embedded_record(path: Path) -> dict[str, Any] | None:
    """What `record_of` gave when the file was written; None when it holds no such record.

    Raises DataError for anything else than what `embed` writes.
    """
    with _readable(path):
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                text = str(file["about"]) if "about" in file.files else None
        else:
            text = (pq.read_schema(path).metadata or {}).get(METADATA.encode())
        record = None if text is None else json.loads(text)
        if not isinstance(record, dict | None):
            raise ValueError(f"what it says of its features is {record!r}")
        return record


def _array(column: pa.Array, path: Path) -> NDArray[np.float32]:
    """M lists (of lists) of one length each -> [M, D] or [M, N, D]."""
    shape = [len(column)]
    while isinstance(column.type, pa.FixedSizeListType):
        shape.append(column.type.list_size)
        column = column.flatten()  # without the rows that hold nothing: the shape below does not fit then
    if len(column) != np.prod(shape) or not pa.types.is_floating(column.type):
        raise DataError(f"{path}: the column features is not as `nextblock embed` writes it.")
    return column.to_numpy(zero_copy_only=False).reshape(shape)


def _pooled(features: NDArray[Any], count: int, path: Path) -> NDArray[np.float32]:
    if features.ndim not in (2, 3) or len(features) != count or features.dtype.kind != "f":
        raise DataError(
            f"{path}: features must be numbers [M, D] or [M, N, D], with M names; got {features.dtype} "
            f"{list(features.shape)} and {count} names."
        )
    return features.mean(1) if features.ndim == 3 else features


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What a damaged or another file raises, in a sentence."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, pa.ArrowException) as error:
        told = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as features: {told}. Write it with: nextblock embed") from error
