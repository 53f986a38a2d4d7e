from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from close import assert_close
from nextblock.errors import DataError
from nextblock.jobs import embedded_file
from nextblock.jobs.embed import _nested
from nextblock.jobs.embedded_file import embedded_parts, is_embedded_file

NAMES = [f"{i}.png" for i in range(5)]


def features(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape).astype(np.float32)


def write(path: Path, values: np.ndarray) -> Path:
    if path.suffix == ".npz":
        np.savez(path, names=np.array(NAMES), features=values)
    else:
        pq.write_table(pa.table({"name": NAMES, "features": _nested(values)}), path, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 3)])
def test_parts_are_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(embedded_file, "ROWS", 2)
    values = features(*shape)
    path = write(tmp_path / f"x{suffix}", values)
    assert is_embedded_file(path)
    parts = list(embedded_parts(path))
    assert [name for names, _ in parts for name in names] == NAMES
    assert_close(np.concatenate([part for _, part in parts]), values if len(shape) == 2 else values.mean(1), 1e-6)
    assert len(parts) == (1 if suffix == ".npz" else 3)


def test_a_table_of_images_is_no_file_of_features(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), tmp_path / "images.parquet")
    assert not is_embedded_file(str(tmp_path / "images.parquet"))
    assert not is_embedded_file(tmp_path)
    assert not is_embedded_file([tmp_path / "x.npz"])


@pytest.mark.parametrize("column", [[[1.0], [2.0, 3.0]], [[1.0], None], ["a", "b"], [[1], [2]], [1.0, 2.0]])
def test_other_columns_are_refused(tmp_path: Path, column: list[object]) -> None:
    pq.write_table(pa.table({"name": ["a", "b"], "features": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet"):
        list(embedded_parts(tmp_path / "x.parquet"))


def test_a_row_without_features_is_refused(tmp_path: Path) -> None:
    column = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    pq.write_table(pa.table({"name": ["a", "b"], "features": column}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="not as"):
        list(embedded_parts(tmp_path / "x.parquet"))
    np.savez(tmp_path / "x.npz", names=np.array(["a"]), features=np.ones((2, 3)))
    with pytest.raises(DataError, match="1 names"):
        list(embedded_parts(tmp_path / "x.npz"))
    np.savez(tmp_path / "pickled.npz", names=np.array(["a"], object), features=np.ones((1, 3)))
    with pytest.raises(DataError, match="cannot be read"):
        list(embedded_parts(tmp_path / "pickled.npz"))
