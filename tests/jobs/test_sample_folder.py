"""The images of a batch: each there and whole, or not there, whenever the power goes or the disk refuses."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from faults.recorded_disk import Recorder, every_loss_of_power, recorded

from nextblock.errors import RunError
from nextblock.jobs import sample_folder
from nextblock.jobs.sample_folder import SampleFolder

PIXELS = {number: np.full((4, 5, 3), 40 * number, dtype=np.uint8) for number in (1, 2, 4)}


@pytest.fixture
def folder(tmp_path: Path) -> SampleFolder:
    made = SampleFolder(tmp_path / "out", 5)
    made.images.mkdir(parents=True)
    return made


def test_a_batch_is_written(folder: SampleFolder) -> None:
    folder.write_all(PIXELS)
    assert folder.missing() == [0, 3]
    assert all(np.array_equal(folder.read(number), pixels) for number, pixels in PIXELS.items())
    gray = np.full((3, 3, 1), 7, dtype=np.uint8)
    folder.write_all({0: gray})
    assert np.array_equal(folder.read(0), gray)
    assert not list(folder.images.glob(".*"))


def test_no_image_is_ever_there_in_part(folder: SampleFolder, tmp_path: Path) -> None:
    with recorded(Recorder(folder.path)) as operations:
        folder.write_all(PIXELS)
    whole = {path.name: path.read_bytes() for path in folder.images.iterdir()}
    assert len(whole) == 3
    found: set[int] = set()
    for done, place in every_loss_of_power({"images": None}, list(operations), tmp_path / "scratch"):
        there = {path.name: path.read_bytes() for path in (place / "images").glob("[0-9]*")}
        assert there.items() <= whole.items()
        assert len(there) == 3 or done < len(operations)
        found.add(len(there))
    assert found == {0, 1, 2, 3}
    kinds = [operation.kind for operation in operations]
    assert kinds.count("flush") == 4, "three images, and the folder once"
    assert kinds.index("rename") > max(i for i, kind in enumerate(kinds) if kind == "write")


def test_a_disk_that_refuses_leaves_nothing_behind(folder: SampleFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = sample_folder.flush_file

    def full(path: Path) -> None:
        if path.name == ".000002.png.partial":
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    monkeypatch.setattr(sample_folder, "flush_file", full)
    with pytest.raises(RunError, match=r"cannot write to .*images: No space left on device\. What is there is kept"):
        folder.write_all(PIXELS)
    assert not list(folder.images.iterdir())
