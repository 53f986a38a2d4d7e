"""A kept batch is there whole, also on file systems that cannot flush a folder; a full disk is told."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from nextblock.data.stream import Batch
from nextblock.training.replay import FOLDER, Kept, keep, read_kept


def kept() -> Kept:
    batch = Batch(
        images=torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3),
        labels=torch.tensor([3, -1]),
        flip=torch.tensor([True, False]),
        positions=torch.tensor([8, 9]),
        indices=torch.tensor([5, 0]),
        bad=[],
    )
    return Kept(4, 0, 7, 1, ("a.png", "b.png"), batch, {"w": torch.arange(6.0)})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name in ("config.yaml", "environment.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def folders_cannot(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def refusing(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        flush(handle)

    monkeypatch.setattr(os, "fsync", refusing)


@pytest.mark.parametrize("number", [0, errno.EINVAL, errno.ENOTSUP])
def test_a_batch_comes_back(run: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    if number:
        folders_cannot(number, monkeypatch)
    for _ in range(2):  # the second in place of the first
        folder = keep(run, kept(), lambda partial: (partial / "images.png").write_bytes(b"drawn") and None)
    found = read_kept(folder)
    assert torch.equal(found.batch.images, kept().batch.images)
    assert torch.equal(found.weights["w"], kept().weights["w"])
    assert (found.step, found.seed, found.names) == (4, 7, ("a.png", "b.png"))
    assert [path.name for path in (run / FOLDER).iterdir()] == ["step-00000004"]
    assert (folder / "images.png").read_bytes() == b"drawn"


def test_a_disk_that_refuses_is_told_and_nothing_left(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders_cannot(errno.EIO, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        keep(run, kept())
    assert not list(run.glob(f"{FOLDER}/*"))
