"""Stored features belong to these images, in this order, and to no others."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nextblock.data.sources import Joined, Subset, content_digest, open_source


def test_order_and_choice_count() -> None:
    a, b = (open_source(np.full((3, 4, 4, 3), value, np.uint8)) for value in (1, 2))
    assert content_digest(Joined([a, b])) != content_digest(Joined([b, a]))
    assert content_digest(Joined([a, b])) == content_digest(Joined([a, b]))
    assert content_digest(Subset(a, [0, 1])) != content_digest(Subset(a, [1, 0]))


def test_python_objects_are_told_apart_by_what_they_hold() -> None:
    one, two = ([Image.new("RGB", (4, 4), (i, value, 0)) for i in range(3)] for value in (1, 2))
    assert content_digest(open_source(one)) != content_digest(open_source(two))
    assert content_digest(open_source(one)) == content_digest(open_source(list(one)))
    assert content_digest(Subset(open_source(one), [0])) != content_digest(Subset(open_source(two), [0]))


def test_a_file_that_was_rewritten_counts(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i}.bmp")
    before = content_digest(open_source(tmp_path))
    assert content_digest(open_source(tmp_path)) == before
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "1.bmp")
    os.utime(tmp_path / "1.bmp", ns=(0, 12345))
    assert content_digest(open_source(tmp_path)) != before


def test_the_image_column_counts(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    pq.write_table(pa.table({"image": [data], "other": [data]}), tmp_path / "t.parquet")
    first, second = (open_source(tmp_path / "t.parquet", image_column=name) for name in ("image", "other"))
    assert content_digest(first) != content_digest(second)
