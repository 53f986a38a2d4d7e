"""A disk that is full, read-only or broken: a run goes on, or ends with a sentence; what was saved stays."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fork_server import ForkServer
from nextblock.errors import CheckpointError, RunError
from nextblock.jobs.pretrain import pretrain
from nextblock.training import run_folder
from nextblock.training.checkpoint import newest_checkpoint, read_checkpoint, save_checkpoint
from nextblock.training.progress import TrainingProgress
from nextblock.training.run_folder import SAVES_TRIED, RunFolder, read_metrics
from nextblock.training.run_record import claim_folder, write_text
from processes import COMMAND
from recorded_disk import Recorder, recorded
from tiny_run import flags, tiny, write_images

REFUSALS = {
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "read-only": OSError(errno.EROFS, "Read-only file system"),
    "broken": OSError(errno.EIO, "Input/output error"),
}


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((3000,), float(step))}, "step": step}


# --- a save, refused at each of its operations


@pytest.mark.parametrize("refusal", list(REFUSALS))
@pytest.mark.parametrize("steps", [(2, 3), (3, 3)], ids=["next step", "same step"])
def test_a_save_that_is_refused_anywhere_leaves_the_earlier_one(
    tmp_path: Path, refusal: str, steps: tuple[int, int]
) -> None:
    refused = []
    for number in range(100):
        folder = tmp_path / str(number)
        save_checkpoint(folder, steps[0], state(steps[0]) | {"first": True}, 1)
        recorder = Recorder(folder, fails_at=number, error=REFUSALS[refusal])
        said = ""
        try:
            with recorded(recorder):
                save_checkpoint(folder, steps[1], state(steps[1]), 1)
        except CheckpointError as error:
            said = str(error)
        refused.append(bool(said))
        damaged: list[str] = []
        found = newest_checkpoint(folder, damaged.append)[1]
        assert not damaged
        if said:
            assert f"{steps[1]:08d}: {REFUSALS[refusal].strerror}. Earlier checkpoints are untouched." in said
            assert read_checkpoint(folder / f"step-{steps[0]:08d}")["first"]
            assert not list(folder.glob(".*"))
        else:
            assert torch.equal(found["model"]["w"], state(steps[1])["model"]["w"])
        save_checkpoint(folder, 9, state(9), 1)  # sweeps whatever is left
        assert [path.name for path in folder.iterdir()] == ["step-00000009"]
        if recorder.fails_at == number:  # there were no more operations
            break
    # The first one only asks for a folder that is there. The save itself can be refused; what is refused once the new
    # one is whole costs only room.
    count = sum(refused)
    assert 8 <= count < len(refused) - 3
    assert refused == [False] + [True] * count + [False] * (len(refused) - count - 1)


# --- what a run makes of it


@pytest.fixture
def recorder(tmp_path: Path) -> RunFolder:
    claim_folder(tmp_path / "run")
    progress = TrainingProgress(9, console=Console(width=300))
    return RunFolder(tmp_path / "run", images=9, max_bad_fraction=0, progress=progress, saves_tried=SAVES_TRIED)


def refuses(monkeypatch: pytest.MonkeyPatch, name: str = "fsync", refusal: str = "full") -> None:
    def refused(*arguments: Any) -> None:
        raise REFUSALS[refusal]

    monkeypatch.setattr(os, name, refused)


def test_two_refused_saves_are_told_and_the_third_ends_the_run(
    recorder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder.save(1, state(1))
    refuses(monkeypatch)
    recorder.save(2, state(2))
    recorder.save(3, state(3))
    told = capsys.readouterr().out
    assert told.count("WARNING: could not save") == 2
    assert "No space left on device" in told
    assert "ends when 3 in a row cannot be saved (2 so far)" in told
    with pytest.raises(CheckpointError, match=r"step-00000004: No space left"):
        recorder.save(4, state(4))
    assert newest_checkpoint(recorder.path / "checkpoints")[1]["step"] == 1


def test_a_save_that_succeeds_again_forgets_the_refused_ones(
    recorder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.save(1, state(1))
    for step in (2, 3, 5, 6):
        with monkeypatch.context() as patch:
            refuses(patch)
            recorder.save(step, state(step))
            with pytest.raises(CheckpointError, match=f"step-0000000{step}.*--resume {recorder.path}"):
                recorder.require_saved()
        if step == 3:
            recorder.save(4, state(4))
            recorder.require_saved()
    assert newest_checkpoint(recorder.path / "checkpoints")[1]["step"] == 4


def test_the_first_checkpoint_of_a_run_is_not_waited_for(recorder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses(monkeypatch)
    with pytest.raises(CheckpointError, match="No space left"):
        recorder.save(0, state(0))


def test_rows_wait_until_there_is_room(
    recorder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        refuses(patch, "write")
        for step in (1, 2):
            recorder.log({"step": step, "loss": 0.5})
        with pytest.raises(RunError, match=r"metrics\.csv: No space left on device\. The last 2 rows are missing"):
            recorder.require_saved()
    assert "WARNING: cannot write metrics" in capsys.readouterr().out
    assert read_metrics(recorder.path / "metrics.csv") == []
    recorder.log({"step": 3, "loss": 0.25})
    recorder.require_saved()
    assert [(row["step"], row["loss"]) for row in read_metrics(recorder.path / "metrics.csv")] == [
        ("1", "0.5"), ("2", "0.5"), ("3", "0.25"),
    ]  # fmt: skip


@pytest.mark.parametrize("refusal", list(REFUSALS))
def test_a_small_file_that_is_refused_is_told_and_stays(
    tmp_path: Path, refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "result.json", "before")
    with monkeypatch.context() as patch, pytest.raises(RunError, match=REFUSALS[refusal].strerror):
        refuses(patch, refusal=refusal)
        write_text(tmp_path / "result.json", "after")
    assert (tmp_path / "result.json").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def losses(folder: Path) -> list[tuple[str, str]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.csv")]


def test_a_run_goes_on_over_refused_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images")
    sections = tiny(data={"train": str(images)}, training={"epochs": 4, "checkpoint_every_steps": 3})
    sections["watch"]["pictures"] = 0
    pretrain(config="xtra_cifar10", **sections, out=tmp_path / "whole", quiet=True)
    save, count = run_folder.save_checkpoint, 0

    def sometimes(*arguments: Any) -> Path:
        nonlocal count
        count += 1
        if count in (2, 3):
            raise CheckpointError("could not save it: No space left on device.")
        return save(*arguments)

    monkeypatch.setattr(run_folder, "save_checkpoint", sometimes)
    pretrain(config="xtra_cifar10", **sections, out=tmp_path / "run")
    assert capsys.readouterr().out.count("WARNING: could not save it") == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")

    def never_last(folder: Path, step: int, *arguments: Any) -> Path:
        if step == 12:
            raise CheckpointError("could not save it: No space left on device.")
        return save(folder, step, *arguments)

    monkeypatch.setattr(run_folder, "save_checkpoint", never_last)
    with pytest.raises(CheckpointError, match=r"No space left on device\. Make room, then go on .* --resume"):
        pretrain(config="xtra_cifar10", **sections, out=tmp_path / "last", quiet=True)
    assert not (tmp_path / "last" / "exported").exists()
    monkeypatch.setattr(run_folder, "save_checkpoint", save)
    pretrain(resume=tmp_path / "last", quiet=True)
    assert losses(tmp_path / "last") == losses(tmp_path / "whole")


# --- real ones


def limit(pid: int, size: int) -> None:
    """From now on no file of the process can grow beyond `size`: the system says EFBIG."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_real_process_ends_with_a_sentence_when_it_can_save_no_more(server: ForkServer, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    sections = tiny(
        data={"train": images}, training={"epochs": 4000, "checkpoint_every_steps": 1}, watch={"pictures": 0}
    )
    out, log = tmp_path / "run", tmp_path / "log"
    command = ["pretrain", "--config", "xtra_cifar10", *flags(sections), "--watch.every_epochs", "4000"]
    pid = server.start([*command, "--out", str(out)], log)
    while not (out / "metrics.csv").exists() or len(read_metrics(out / "metrics.csv")) < 3:
        assert server.poll(pid) is None, log.read_text()
    limit(pid, 30_000)
    while (code := server.poll(pid)) is None:
        pass
    told = log.read_text()
    assert code == 1, told
    assert "Traceback" not in told
    assert "unexpected" not in told
    assert told.count("WARNING: could not save") == SAVES_TRIED - 1
    assert told.splitlines()[-1].startswith("nextblock: could not save")
    newest, last = newest_checkpoint(out / "checkpoints")[1]["step"], int(losses(out)[-1][0])
    assert newest >= last - SAVES_TRIED


_CAN_MOUNT = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /tmp"]


@pytest.fixture(scope="module")
def small_disk() -> Callable[[str, str], list[str]]:
    """A command that runs on a disk of its own: (options of its mount, shell script) -> the command."""
    try:
        usable = subprocess.run(_CAN_MOUNT, capture_output=True, check=False).returncode == 0
    except OSError:
        usable = False
    if not usable:
        pytest.skip("this machine lets nobody mount a disk of his own")
    return lambda options, script: ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o {options} none "$0" && {script}']


def test_a_full_and_a_read_only_disk_are_told(small_disk: Callable[[str, str], list[str]], tmp_path: Path) -> None:
    images, disk = write_images(tmp_path / "images"), tmp_path / "disk"
    disk.mkdir()
    command = [*COMMAND, "pretrain", "--config", "xtra_cifar10", *flags(tiny(data={"train": images}))]
    for options, script, said in (
        ("size=200k", '"$@" --out "$0/run"', "No space left on device"),
        ("size=9m", 'mount -o remount,ro "$0" && "$@" --out "$0/run"', "Read-only file system"),
    ):
        done = subprocess.run(
            [*small_disk(options, script), str(disk), *command], capture_output=True, text=True, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 1, done.stdout + done.stderr
        assert said in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert "unexpected" not in done.stderr
