"""A real process is killed in mid-epoch and resumed; another is asked to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from nextblock.training.run_folder import read_metrics
from processes import finish, start
from tiny_run import flags, tiny


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
        model={"drop_path": 0.1, "order": "pseudo_random"},
        training={"epochs": 40, "checkpoint_every_steps": 7},
        watch={"pictures": 0, "every_epochs": 100},
    )
    arguments = ["--config", "xtra_cifar10", *flags(sections)]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    uninterrupted = start([*arguments, "--out", str(whole)])

    killed = start([*arguments, "--out", str(cut)])
    wait_for_step(killed, cut, 20)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()

    stopped = start(["--resume", str(cut)])
    wait_for_step(stopped, cut, 50)
    os.killpg(stopped.pid, signal.SIGINT)
    output, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, output
    assert f"nextblock pretrain --resume {cut}" in output
    assert "Traceback" not in output

    assert f"continuing {cut} after step" in finish(start(["--resume", str(cut)]))
    finish(uninterrupted)
    assert losses(cut) == losses(whole)
    assert len(losses(whole)) == 120
    a, b = (load_file(folder / "exported" / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
