from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from close import assert_close
from nextblock.errors import DataError
from nextblock.evaluation.features import Features
from nextblock.jobs import embedded_file
from nextblock.jobs.embed import Embedded, _nested, _write_npz, _write_parquet
from nextblock.jobs.embedded_file import embedded_parts, embedded_record, is_embedded_file

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


def test_what_the_features_are_of_is_read_back(tmp_path: Path) -> None:
    record = {"weights": "ab", "size_px": [16, 16], "final_norm": False}
    made = Embedded(NAMES, features(5, 3), [])
    _write_npz(tmp_path / "x.npz", made, record)
    part = Features(made.features, np.zeros(5, np.int64), np.arange(5))
    source = SimpleNamespace(name=lambda i: NAMES[i])
    _write_parquet(tmp_path / "x.parquet", [part], source, record)  # type: ignore[arg-type]
    for suffix in (".npz", ".parquet"):
        assert embedded_record(tmp_path / f"x{suffix}") == record
        ((names, values),) = embedded_parts(tmp_path / f"x{suffix}")
        assert names == NAMES
        assert np.array_equal(values, made.features)
        assert embedded_record(write(tmp_path / f"without{suffix}", made.features)) is None


@pytest.mark.parametrize("record", ["{", "[1]"])
def test_a_damaged_record_is_told(tmp_path: Path, record: str) -> None:
    np.savez(tmp_path / "x.npz", names=np.array(["a"]), features=np.ones((1, 3)), about=np.array(record))
    table = pa.table({"name": ["a"], "features": _nested(np.ones((1, 3)))})
    pq.write_table(table.replace_schema_metadata({"nextblock": record}), tmp_path / "x.parquet")
    for name in ("x.npz", "x.parquet"):
        with pytest.raises(DataError, match=f"{name} cannot be read as features"):
            embedded_record(tmp_path / name)
