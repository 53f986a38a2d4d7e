"""The tables of the image pipeline are filled; how fast it is, no test says."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import data_pipeline


def test_both_rows_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_pipeline, "BATCH", 2)
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = rng.integers(0, 256, (330, 340, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg")
    files, shards = data_pipeline.rows("cpu", quick=True, data=tmp_path)
    assert (files.name, shards.name) == (
        "image pipeline, 256 px random crops, one core",
        "the same from prepared shards",
    )
    for row in (files, shards):
        assert isinstance(row.met, bool)
        assert row.plain == files.plain
    assert files.limit
    assert shards.ours != files.ours
    assert "320 px, JPEG quality 90" in shards.note
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]


def test_without_the_images_nothing_is_measured(tmp_path: Path) -> None:
    assert data_pipeline.rows("cuda") == []
    found = data_pipeline.rows("cpu", data=tmp_path / "none")
    assert [(row.ours, str(row.targets[0])) for row in found] == [(None, "≥ 2 × plain"), (None, "≥ 4 × plain")]
