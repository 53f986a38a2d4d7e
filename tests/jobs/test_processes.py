"""Two processes with gloo train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextblock.training.run_folder import read_metrics
from processes import finish, start
from tiny_run import flags, tiny


def test_two_processes_give_the_losses_of_one(images: Path, tmp_path: Path) -> None:
    watch = {"pictures": 0, "every_epochs": 9}
    sections = tiny(data={"train": images}, model={"drop_path": 0.2}, training={"epochs": 3}, watch=watch)
    arguments = ["--config", "xtra_cifar10", *flags(sections)]
    one = start([*arguments, "--out", str(tmp_path / "one")])
    two = start([*arguments, "--training.devices", "2", "--training.device", "cpu", "--out", str(tmp_path / "two")])
    finish(one)
    finish(two)
    losses = [[float(r["loss"]) for r in read_metrics(tmp_path / n / "metrics.csv")] for n in ("one", "two")]
    assert len(losses[0]) == 9
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
