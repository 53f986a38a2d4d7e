"""What comes after the last step: a run that was killed there is finished when it is resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from killed import Killed, killed_at
from nextblock.jobs import run as run_module
from nextblock.jobs.pretrain import pretrain


@pytest.mark.parametrize("moment", ["draw_curves_of", "save_pretrained"])
def test_a_run_that_was_killed_after_its_last_step_is_finished(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    copy = shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(copy / "exported")
    curves = copy / "figures" / "curves.png"
    curves.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(run_module, moment, killed_at(0, getattr(run_module, moment)))
        with pytest.raises(Killed):
            pretrain(resume=copy, quiet=True)
    assert not (copy / "exported").exists(), "it would seem finished"
    assert pretrain(resume=copy, quiet=True).finished
    assert (copy / "exported" / "model.safetensors").read_bytes() == (
        run / "exported" / "model.safetensors"
    ).read_bytes()
    with Image.open(curves) as picture:
        picture.load()


def test_a_finished_run_is_left_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draw_curves_of", "save_pretrained"):
        monkeypatch.setattr(run_module, name, killed_at(0, getattr(run_module, name)))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert pretrain(resume=run, quiet=True).finished
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
