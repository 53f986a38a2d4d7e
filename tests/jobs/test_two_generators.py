"""Two processes train a generator as one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import processes
from nextblock.training.run_folder import read_metrics
from processes import finish
from tiny_generator import tiny
from tiny_run import flags


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return processes.start(arguments, "train-generator")


@pytest.mark.slow  # forked processes do the same in tests/faults
def test_two_processes_give_the_losses_of_one(images: Path, tmp_path: Path) -> None:
    sections = tiny(
        data={"train": images, "val": images},
        model={"dropout": 0.0, "attention_dropout": 0.0},
        training={"epochs": 3, "log_every_steps": 3},
        watch={"pictures": 0, "every_epochs": 0.7},
    )
    arguments = ["--config", "xar_cifar10", *flags(sections)]
    one = start([*arguments, "--out", str(tmp_path / "one")])
    two = start([*arguments, "--training.devices", "2", "--training.device", "cpu", "--out", str(tmp_path / "two")])
    finish(one)
    finish(two)
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    for column in ("loss", "val_loss", "ema_val_loss"):
        found = [[float(row[column]) for row in table if row[column]] for table in rows]
        assert len(found[0]) > 2
        assert found[1] == pytest.approx(found[0], rel=1e-4)
