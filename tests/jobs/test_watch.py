"""What is looked at while an encoder trains: a picture for which there is no room costs nothing else."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from nextblock.jobs import watch
from nextblock.jobs.pretrain import pretrain
from nextblock.training.run_folder import read_metrics
from tiny_run import tiny, write_images


def full(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_goes_on_without_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "draw_contact_sheet", full)
    images = write_images(tmp_path / "images")
    sections = tiny(data={"train": str(images), "val": str(images)}, watch={"every_epochs": 1})
    pretrain(config="xtra_cifar10", **sections, out=tmp_path / "run")
    assert capsys.readouterr().out.count("not drawn while training: No space left on device") == 1
    assert all(row["val_loss"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if row["step"] in ("3", "6"))


@pytest.mark.parametrize(("error", "why"), [(full, "No space left on device"), (None, "There is no ")])
def test_curves_that_cannot_be_drawn_are_told(
    error: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if error:
        monkeypatch.setattr(watch, "draw_curves", error)
    told: list[str] = []
    watch.draw_curves_of(tmp_path, told.append)
    assert len(told) == 1
    assert told[0].startswith(f"{tmp_path}/figures/curves.png is not drawn: {why}")
