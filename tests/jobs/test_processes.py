"""Two processes with gloo train as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextblock.training.run_folder import read_metrics
from processes import finish, start
from tiny_run import flags, tiny


@pytest.mark.slow  # forked processes do the same in tests/faults
def test_two_processes_give_the_losses_of_one(images: Path, tmp_path: Path) -> None:
    # Looks fall between logs, so that processes which look at nothing must still record with the one that does.
    watch = {"pictures": 0, "every_epochs": 0.7}
    training = {"epochs": 3, "log_every_steps": 3}
    sections = tiny(data={"train": images, "val": images}, model={"drop_path": 0.2}, training=training, watch=watch)
    arguments = ["--config", "xtra_cifar10", *flags(sections)]
    one = start([*arguments, "--out", str(tmp_path / "one")])
    two = start([*arguments, "--training.devices", "2", "--training.device", "cpu", "--out", str(tmp_path / "two")])
    finish(one)
    finish(two)
    rows = [read_metrics(tmp_path / name / "metrics.csv") for name in ("one", "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == ["2", "3", "4", "6", "8", "9"]
    losses = [[float(row["loss"]) for row in table if row["loss"]] for table in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
