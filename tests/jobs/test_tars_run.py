"""A run on tar shards is killed, and resumed with another number of workers: as if it had never been interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nextblock.errors import RunError
from nextblock.jobs.pretrain import pretrain
from nextblock.training.run_folder import read_metrics
from processes import start
from tiny_run import flags, tiny, write_images


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """40 shards of two images: two windows."""
    import tarfile

    monkeypatch.setenv("NEXTBLOCK_CACHE", str(tmp_path / "cache"))
    files = sorted(write_images(tmp_path / "images", 40).rglob("*.png"))
    (tmp_path / "shards").mkdir()
    for number in range(40):
        with tarfile.open(tmp_path / "shards" / f"train-{number:03d}.tar", "w") as tar:
            for file in files[2 * number : 2 * number + 2]:
                tar.add(file, f"{file.parent.name}_{file.name}")
    return f"{tmp_path}/shards/train-{{000..039}}.tar"


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if (folder / "metrics.csv").exists():
            rows = read_metrics(folder / "metrics.csv")
            if rows and int(rows[-1]["step"]) >= step:
                return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def losses(folder: Path) -> list[tuple[str, str]]:
    return [(row["step"], row["loss"]) for row in read_metrics(folder / "metrics.csv")]


def test_a_killed_run_goes_on_with_other_workers(
    shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = tiny(
        data={"train": shards, "workers": 2},
        training={"epochs": 3, "checkpoint_every_steps": 4},
        watch={"pictures": 0, "every_epochs": 100},
    )
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    killed = start(["--config", "xtra_cifar10", *flags(sections), "--out", str(cut)])
    wait_for_step(killed, cut, 9)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    pretrain(**{**sections, "data": sections["data"] | {"workers": 0}}, config="xtra_cifar10", out=whole, quiet=True)

    pretrain(resume=cut, data={"workers": 1})
    assert f"continuing {cut} after step" in capsys.readouterr().out
    assert losses(cut) == losses(whole)
    assert len(losses(whole)) == 30
    a, b = (load_file(folder / "exported" / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)

    (tmp_path / "shards" / "train-007.tar").write_bytes((tmp_path / "shards" / "train-008.tar").read_bytes())
    with pytest.raises(RunError, match=r"not those that .* 1 added: train-007.tar .* 1 removed: train-007.tar"):
        pretrain(resume=whole, quiet=True)
