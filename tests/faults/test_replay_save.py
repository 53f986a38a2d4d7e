"""A kill shows no missing flush. So the saves are recorded, and the power goes after every one of their operations."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nextblock.durable import append_whole, write_whole
from nextblock.errors import CheckpointError
from nextblock.training.checkpoint import newest_checkpoint, save_checkpoint
from nextblock.training.run_record import claim_folder, write_text
from recorded_disk import Operation, Recorder, every_loss_of_power, recorded, tree_of

Save = Callable[[Path, int, dict[str, Any], int], Any]


def state(value: int, version: int = 0) -> dict[str, Any]:
    return {"model": {"w": torch.full((300,), float(value))}, "step": value, "version": version}


def saved_in_turn(folder: Path, states: list[dict[str, Any]], keep: int) -> None:
    for each in states:
        save_checkpoint(folder / "checkpoints", each["step"], each, keep)


def power_goes(
    tmp_path: Path,
    before: list[dict[str, Any]],
    after: dict[str, Any],
    keep: int,
    save: Save = save_checkpoint,
    only: Callable[[Operation], bool] = lambda operation: True,
) -> int:
    """Save `after` where `before` are; wherever the power goes, one of the last two is there. Returns the cases."""
    folder = tmp_path / "run"
    folder.mkdir(parents=True)
    saved_in_turn(folder, before, keep)
    start = tree_of(folder)
    with recorded(Recorder(folder)) as operations:
        save(folder / "checkpoints", after["step"], after, keep)
    played = [operation for operation in operations if only(operation)]
    cases = 0
    for done, found in every_loss_of_power(start, played, tmp_path / "found"):
        cases += 1
        if not before and done < len(played) and _is_empty(found):
            continue
        told: list[str] = []
        _, loaded = newest_checkpoint(found / "checkpoints", told.append)
        assert not told, f"a partial one has a whole one's name after {done} operations: {told}"
        expected = [after] if done == len(played) else [after, *before[-1:]]
        assert any(same(loaded, one) for one in expected), f"after {done} operations: step {loaded['step']}"
        # What goes on from there can save, and that one is then the newest.
        saved_in_turn(found, [state(9)], keep)
        assert same(newest_checkpoint(found / "checkpoints")[1], state(9))
        assert not list((found / "checkpoints").glob(".*"))
    return cases


def _is_empty(found: Path) -> bool:
    try:
        newest_checkpoint(found / "checkpoints")
    except CheckpointError as error:
        return "there is none" in str(error)
    return False


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return (a["step"], a["version"]) == (b["step"], b["version"]) and torch.equal(a["model"]["w"], b["model"]["w"])


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], state(1)),
        ([state(1)], state(2)),
        ([state(1), state(2), state(3)], state(4)),
        ([state(1)], state(1, version=1)),
        ([state(1), state(2)], state(2, version=1)),
    ],
    ids=["first", "second", "more", "same step", "same step of two"],
)
def test_there_is_always_a_whole_checkpoint(
    tmp_path: Path, before: list[dict[str, Any]], after: dict[str, Any], keep: int
) -> None:
    assert power_goes(tmp_path, before, after, keep) > 10


def test_power_may_go_while_the_leftovers_of_a_killed_save_are_swept(tmp_path: Path) -> None:
    """A name that was not flushed comes back: the same step twice, or a folder that was being removed."""
    folder = tmp_path / "run"
    saved_in_turn(folder, [state(1), state(2)], 2)
    kept = folder / "checkpoints"
    shutil.copytree(kept / "step-00000002", kept / "step-00000002.1")
    shutil.copytree(kept / "step-00000001", kept / ".partial-step-00000001")
    (kept / ".partial-step-00000001/state.pt").unlink()
    start = tree_of(folder)
    with recorded(Recorder(folder)) as operations:
        save_checkpoint(kept, 2, state(2, version=1), 2)
    for _, found in every_loss_of_power(start, operations, tmp_path / "found"):
        assert newest_checkpoint(found / "checkpoints")[1]["step"] == 2
    assert [path.name for path in sorted(kept.iterdir())] == ["step-00000001", "step-00000002"]


# --- the test can fail


def in_place(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """As it once was: the older one of the same step goes before the new one has its name."""
    shutil.rmtree(folder / f"step-{step:08d}")
    save_checkpoint(folder, step, state, keep)


def without_content(operation: Operation) -> bool:
    return not (operation.kind == "flush" and operation.path.endswith("state.pt"))


def without_names(operation: Operation) -> bool:
    return not (operation.kind == "flush" and operation.path.endswith("checkpoints"))


def without_their_folder(operation: Operation) -> bool:
    return not (operation.kind == "flush" and ".partial-" in operation.path and not operation.path.endswith("pt"))


@pytest.mark.parametrize("only", [without_content, without_names, without_their_folder])
def test_a_missing_flush_is_found(tmp_path: Path, only: Callable[[Operation], bool]) -> None:
    with pytest.raises((AssertionError, CheckpointError)):
        power_goes(tmp_path, [state(1)], state(2), 1, only=only)


def test_a_folder_whose_name_is_not_flushed_is_found(tmp_path: Path) -> None:
    with pytest.raises((AssertionError, CheckpointError)):
        power_goes(tmp_path, [], state(2), 1, only=lambda o: (o.kind, o.path) != ("flush", ""))


def test_a_removal_before_the_new_name_is_found(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No checkpoint to continue from"):
        power_goes(tmp_path, [state(1)], state(1, version=1), 1, save=in_place)


# --- other files of a run


@pytest.mark.parametrize(
    "write",
    [
        lambda path, text: write_text(path, text.decode()),
        write_whole,
    ],
    ids=["of a run", "plain"],
)
def test_a_small_file_is_the_old_one_or_the_new_one(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "file").write_bytes(b"before")
    start = tree_of(folder)
    with recorded(Recorder(folder)) as operations:
        write(folder / "file", b"what comes after" * 1000)
    for done, found in every_loss_of_power(start, operations, tmp_path / "found"):
        expected = [b"what comes after" * 1000] + [b"before"] * (done < len(operations))
        assert (found / "file").read_bytes() in expected


def test_a_claimed_folder_has_its_name_on_disk(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with recorded(Recorder(tmp_path / "here")) as operations:
        claim_folder(tmp_path / "here" / "runs" / "new")
    *_, (_, found) = every_loss_of_power({}, operations, tmp_path / "found")
    assert (found / "runs" / "new").is_dir()
    for done, found in every_loss_of_power({}, operations, tmp_path / "found"):
        assert done < len(operations) or (found / "runs" / "new").is_dir()


def test_a_row_is_added_whole_or_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = tmp_path / "metrics.csv", os.write
    append_whole(file, b"1,2\n")

    def full(handle: int, content: Any) -> int:
        if len(content) < 4:
            raise OSError(28, "No space left on device")
        return write(handle, bytes(content)[:3])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        append_whole(file, b"3,4,5\n")
    monkeypatch.undo()
    append_whole(file, b"6,7\n")
    assert file.read_bytes() == b"1,2\n6,7\n"
