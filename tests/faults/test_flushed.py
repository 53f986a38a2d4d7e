"""What has its name is whole, whenever the power goes: content is flushed first, then the name, then the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nextblock.data.prepared.shards import ShardWriter
from nextblock.jobs.export import _whole_folder
from nextblock.jobs.output import written_whole
from recorded_disk import Recorder, every_loss_of_power, recorded


def a_file(folder: Path) -> None:
    with written_whole(folder / "x") as beside:
        beside.write_text("content")


def a_folder(folder: Path) -> None:
    with _whole_folder(folder / "x") as beside:
        (beside / "y").write_text("content")
        (beside / "deeper").mkdir()
        (beside / "deeper" / "z").write_text("more")


def a_shard(folder: Path) -> None:
    with ShardWriter(folder, 0) as shard:
        shard.add(b"image", "raw", 0, "name", 5)
        shard.finish([])


def shown(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and not str(path.relative_to(folder)).startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("write", [a_file, a_folder, a_shard])
def test_all_or_nothing_after_a_loss_of_power(write: Callable[[Path], None], tmp_path: Path) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    with recorded(Recorder(place)) as operations:
        write(place)
    whole, states = shown(place), set()
    assert whole
    for done, folder in every_loss_of_power({}, list(operations), tmp_path / "scratch"):
        found = shown(folder)
        assert found in ({}, whole)
        assert found == whole or done < len(operations)
        states.add(bool(found))
    assert states == {False, True}


def test_a_name_before_its_content_is_seen(tmp_path: Path) -> None:
    """The test can fail: nothing is flushed."""
    place = tmp_path / "disk"
    place.mkdir()
    with recorded(Recorder(place)) as operations:
        (place / ".x").write_text("content")
        (place / ".x").rename(place / "x")
    found = [shown(folder) for _, folder in every_loss_of_power({}, list(operations), tmp_path / "scratch")]
    assert {"x": b""} in found
