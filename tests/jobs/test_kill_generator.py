"""A process that trains a generator is killed in mid-epoch and resumed; another is asked to stop; two train as one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import processes
from nextblock.training.run_folder import read_metrics
from processes import finish
from tiny_generator import tiny
from tiny_run import flags


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return processes.start(arguments, "train-generator")


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


def test_killed_and_stopped_runs_continue_bit_identically(images: Path, tmp_path: Path) -> None:
    sections = tiny(
        data={"train": images, "workers": 1},
        model={"dropout": 0.1, "attention_dropout": 0.1},
        training={"epochs": 40, "checkpoint_every_steps": 7},
        watch={"pictures": 0, "every_epochs": 100},
    )
    arguments = ["--config", "xar_cifar10", *flags(sections)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted = start([*arguments, "--out", str(whole)])

    killed = start([*arguments, "--out", str(cut)])
    wait_for_step(killed, cut, 20)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()

    stopped = start(["--resume", str(cut)])
    wait_for_step(stopped, cut, 50)
    os.killpg(stopped.pid, signal.SIGTERM)
    output, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 143, output
    assert f"nextblock train-generator --resume {cut}" in output
    assert "Traceback" not in output

    assert f"continuing {cut} after step" in finish(start(["--resume", str(cut)]))
    finish(uninterrupted)
    assert losses(cut) == losses(whole)
    assert len(losses(whole)) == 120
    for name in ("exported", "exported_raw"):
        a, b = (load_file(folder / name / "model.safetensors") for folder in (whole, cut))
        assert all(torch.equal(a[key], b[key]) for key in a)


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
