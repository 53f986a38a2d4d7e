"""Parts of features, on their way to one file: a damaged one is told, removed, and made anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextblock.data.stream import BadSample
from nextblock.errors import DataError
from nextblock.evaluation.features import Features
from nextblock.jobs.embed_parts import BATCHES, Parts

IMAGES, BATCH_SIZE = 40, 2
STOP = BATCHES * BATCH_SIZE  # of the first part


def batches(indices: Sequence[int]) -> Iterator[Features]:
    for start in range(0, len(indices), BATCH_SIZE):
        some = np.array(indices[start : start + BATCH_SIZE])
        bad = [BadSample("b\udcff.png", "empty", 1)] if 1 in some else []
        some = some[some != 1]
        yield Features(np.sin(some[:, None] + np.arange(8.0)).astype(np.float32), some % 3, some, bad)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    source: Any = range(IMAGES)  # only its length is asked for
    made = Parts(tmp_path / "out.npz", source, BATCH_SIZE)
    made.folder.mkdir()
    made.make(made.lacking(), batches, "")
    assert made.lacking() == []
    return made


def plain(features: Iterator[Features]) -> list[Any]:
    return [[each.values.tolist(), each.labels.tolist(), each.indices.tolist(), each.bad] for each in features]


def test_what_is_made_is_read(parts: Parts) -> None:
    assert plain(parts.read()) == plain(batches(range(IMAGES)))


@pytest.mark.parametrize("how", ["a flipped bit", "the end cut off", "gone"])
def test_a_damaged_part_is_told_and_made_anew(parts: Parts, how: str) -> None:
    second = parts.folder / "part-000001.npz"
    content = bytearray(second.read_bytes())
    place = content.find(np.sin(STOP + np.arange(8.0)).astype(np.float32).tobytes())
    assert place > 0
    content[place + 5] ^= 1
    if how == "gone":
        second.unlink()
    else:
        second.write_bytes(content if how == "a flipped bit" else content[: len(content) // 2])
    told = r"features of images 32 to 39, made for .*out\.npz, cannot be read: .* The same command makes them anew\."
    with pytest.raises(DataError, match=told):
        list(parts.read())
    assert parts.lacking() == [1]
    parts.make([1], batches, "")
    assert plain(parts.read()) == plain(batches(range(IMAGES)))


def test_what_the_reader_raises_is_its_own(parts: Parts) -> None:
    with pytest.raises(OSError, match="no room"):
        for _ in parts.read():
            raise OSError("no room")
    assert parts.lacking() == []
