"""bad_samples.csv lists exactly the broken images that were wanted, once each, however the run was run."""

from __future__ import annotations

import csv
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nextblock.data.stream import BadSample
from nextblock.errors import DataError
from nextblock.jobs.pretrain import pretrain
from nextblock.training.progress import TrainingProgress
from nextblock.training.run_folder import RunFolder, read_metrics
from processes import finish, start
from tiny_run import flags, tiny, write_images

BROKEN = {
    "left/002.png": "the file is empty",
    "left/007.png": "not an image in an accepted format",
    "top/001.png": "image file is truncated",
    "top/011.png": "not an image in an accepted format",
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("data") / "images")
    contents = [b"", b"GIF, but not really", (folder / "top/001.png").read_bytes()[:900], bytes(500)]
    for name, content in zip(BROKEN, contents, strict=True):
        (folder / name).write_bytes(content)
    return folder


def sections(folder: Path, workers: int = 0, epochs: int = 3) -> dict[str, dict[str, Any]]:
    return tiny(
        data={"train": str(folder), "workers": workers},
        training={"epochs": epochs, "checkpoint_every_steps": 2},
        watch={"pictures": 0, "every_epochs": 100},
    )


@pytest.fixture(scope="module")
def expected(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The list of a run in one process, uninterrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    pretrain(**sections(damaged), config="xtra_cifar10", out=folder, quiet=True)
    return (folder / "bad_samples.csv").read_text()


def test_exactly_the_broken_ones_once_each_with_reason_and_position(expected: str) -> None:
    rows = list(csv.DictReader(expected.splitlines()))
    assert sorted(row["name"] for row in rows) == sorted(BROKEN)
    for row in rows:
        assert BROKEN[row["name"]] in row["reason"]
    assert max(int(row["position"]) for row in rows) < 24  # all are wanted in the first epoch


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_list_the_same(workers: int, damaged: Path, expected: str, tmp_path: Path) -> None:
    pretrain(**sections(damaged, workers), config="xtra_cifar10", out=tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "bad_samples.csv").read_text() == expected


def test_a_killed_and_resumed_run_lists_the_same(damaged: Path, expected: str, tmp_path: Path) -> None:
    arguments = ["--config", "xtra_cifar10", *flags(sections(damaged, workers=1, epochs=20))]
    process = start([*arguments, "--out", str(tmp_path / "cut")])
    metrics = tmp_path / "cut" / "metrics.csv"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and read_metrics(metrics)):  # from the first step on, wherever it is then
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    pretrain(resume=tmp_path / "cut", quiet=True)
    assert (tmp_path / "cut" / "bad_samples.csv").read_text() == expected


def test_two_processes_list_the_same(damaged: Path, expected: str, tmp_path: Path) -> None:
    arguments = ["--config", "xtra_cifar10", *flags(sections(damaged))]
    two = ["--training.devices", "2", "--training.device", "cpu", "--out", str(tmp_path / "two")]
    finish(start([*arguments, *two]))
    rows, wanted = ((tmp_path / "two" / "bad_samples.csv").read_text(), expected)
    assert sorted(rows.splitlines()) == sorted(wanted.splitlines())


def recorder(path: Path, images: int = 100) -> RunFolder:
    progress = TrainingProgress(10, quiet=True)
    return RunFolder(path, images=images, max_bad_fraction=0.001, progress=progress)


def listed(path: Path) -> list[tuple[str, int]]:
    with open(path / "bad_samples.csv", newline="") as lines:
        return [(row["name"], int(row["position"])) for row in csv.DictReader(lines)]


def test_the_cap_stops_a_run_and_says_how_to_go_on(tmp_path: Path) -> None:
    run = recorder(tmp_path)
    run.add_bad_samples([BadSample(f"{i}.png", "broken", i) for i in range(10)])
    run.add_bad_samples([BadSample("3.png", "broken", 103)])  # known
    with pytest.raises(
        DataError, match=r"11 images cannot be decoded, more than the 10 allowed.*data.max_bad_fraction"
    ):
        run.add_bad_samples([BadSample("10.png", "broken", 104)])
    assert listed(tmp_path) == [*((f"{i}.png", i) for i in range(10)), ("10.png", 104)]


def test_a_run_that_the_cap_stopped_does_not_go_on_past_it(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        recorder(tmp_path).add_bad_samples([BadSample(f"{i}.png", "broken", i) for i in range(11)])
    with pytest.raises(DataError, match="11 images cannot be decoded"):
        recorder(tmp_path).add_bad_samples([BadSample("3.png", "broken", 3)])


@pytest.fixture
def of_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunFolder, list[BadSample]]:
    """The first of two processes, and what the other one will have found when they share."""
    other: list[BadSample] = []

    def gather(everyone: list[Any], ours: list[BadSample]) -> None:
        everyone[:] = [list(ours), list(other)]
        other.clear()

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    return recorder(tmp_path), other


ROW = {"step": 1, "samples": 8, "epoch": 0.1}


def test_two_processes_list_in_the_order_of_positions(
    of_two: tuple[RunFolder, list[BadSample]], tmp_path: Path
) -> None:
    run, other = of_two
    run.add_bad_samples([BadSample("a.png", "broken", 2), BadSample("c.png", "broken", 9)])
    other += [BadSample("b.png", "broken", 5), BadSample("a.png", "broken", 12)]
    run.log(dict(ROW))
    assert listed(tmp_path) == [("a.png", 2), ("b.png", 5), ("c.png", 9)]


def test_what_a_checkpoint_has_seen_is_listed(of_two: tuple[RunFolder, list[BadSample]], tmp_path: Path) -> None:
    """Killed after the checkpoint, a run goes on behind it and does not meet these positions again."""
    run, other = of_two
    other.append(BadSample("b.png", "broken", 5))
    run.save(1, {"step": 1, "samples": 8})
    assert listed(tmp_path) == [("b.png", 5)]
