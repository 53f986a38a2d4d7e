from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nextblock.errors import CheckpointError
from nextblock.training import checkpoint as module
from nextblock.training.checkpoint import list_checkpoints, newest_checkpoint, read_checkpoint, save_checkpoint


def state(value: float) -> dict[str, object]:
    return {"model": {"w": torch.full((100,), value)}, "step": int(value)}


def test_round_trip_and_pruning(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, state(step), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    path, found = newest_checkpoint(tmp_path)
    assert path.name == "step-00000003"
    assert torch.equal(found["model"]["w"], torch.full((100,), 3.0))


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, state(1), keep=2)
    save_checkpoint(tmp_path, 1, state(5), keep=2)
    assert read_checkpoint(tmp_path / "step-00000001")["step"] == 5


def test_later_ones_that_cannot_be_read_do_not_push_out_the_whole_ones(tmp_path: Path) -> None:
    """A run that went on from step 1, as 7 and 9 are damaged, saves 2: they are not among the newest of it."""
    for step in (1, 7, 9):
        save_checkpoint(tmp_path, step, state(step), keep=3)
    for step in (7, 9):
        (tmp_path / f"step-{step:08d}" / "state.pt").write_bytes(b"")
    save_checkpoint(tmp_path, 2, state(2), keep=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000002"]


def test_the_same_step_twice_is_found_and_the_second_is_newer(tmp_path: Path) -> None:
    """As after a loss of power, before the second has taken the place of the first."""
    save_checkpoint(tmp_path / "b", 1, state(5), keep=2)
    save_checkpoint(tmp_path, 1, state(1), keep=2)
    (tmp_path / "b" / "step-00000001").rename(tmp_path / "step-00000001.1")
    assert newest_checkpoint(tmp_path)[1]["step"] == 5
    (tmp_path / "step-00000001.1" / "state.pt").unlink()
    assert newest_checkpoint(tmp_path)[1]["step"] == 1
    saved = save_checkpoint(tmp_path, 1, state(3), keep=2)
    assert saved == tmp_path / "step-00000001"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert read_checkpoint(saved)["step"] == 3


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "no state", "no record", "empty record", "record of another step"]
)
def test_damage_is_found_and_the_one_before_is_taken(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, 1, state(1), keep=2)
    newest = save_checkpoint(tmp_path, 2, state(2), keep=2)
    file = newest / ("checkpoint.json" if "record" in damage else "state.pt")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-10])
    elif damage == "empty record":
        file.write_text("{}")
    elif damage == "other record":
        file.write_text(file.read_text().replace('"step": 2', '"step": 3'))
    else:
        file.unlink()
    told: list[str] = []
    path, found = newest_checkpoint(tmp_path, told.append)
    assert path.name == "step-00000001"
    assert found["step"] == 1
    assert "step-00000002 is damaged" in told[0]


def test_a_partial_one_is_never_seen(tmp_path: Path) -> None:
    (tmp_path / ".partial-step-00000009").mkdir()
    (tmp_path / "step-9.tmp").mkdir()
    with pytest.raises(CheckpointError, match="there is none"):
        newest_checkpoint(tmp_path)


def test_a_failed_save_leaves_the_earlier_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, state(1), keep=1)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full_disk)
    with pytest.raises(CheckpointError, match=r"No space left on device.*untouched"):
        save_checkpoint(tmp_path, 2, state(2), keep=1)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_checkpoint(tmp_path)[1]["step"] == 1


def test_files_reach_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename comes after both files and their folder are flushed; the outer folder is flushed after it."""
    events: list[str] = []
    flush, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        module.os, "fsync", lambda d: (events.append(os.path.basename(os.readlink(f"/proc/self/fd/{d}"))), flush(d))
    )
    monkeypatch.setattr(Path, "rename", lambda a, b: (events.append("rename"), rename(a, b)))
    save_checkpoint(tmp_path, 1, state(1), keep=1)
    assert events == ["state.pt", "checkpoint.json", ".partial-step-00000001", "rename", tmp_path.name]
