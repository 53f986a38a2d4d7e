"""A training is asked to stop, by each signal: it saves, says how to go on, and ends as if it had not been stopped."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from fork_server import ForkServer
from nextblock.training.checkpoint import list_checkpoints
from nextblock.training.run_folder import read_metrics
from tiny_run import write_images
from victims import Victim, victims


def ended(server: ForkServer, pid: int) -> int:
    while (code := server.poll(pid)) is None:
        time.sleep(0.005)
    return code


def stopped(
    server: ForkServer, victim: Victim, out: Path, log: Path, number: int, env: dict[str, str]
) -> tuple[int, str]:
    """Exit code and words of a run that is asked to stop after five steps more, at whatever step it is then."""
    pid = server.start(victim.again(out) if victim.begun(out) else victim.begin(out), log, env=env)
    before = steps(out)
    while steps(out) < before + 5:
        assert server.poll(pid) is None, log.read_text()
        time.sleep(0.005)
    os.killpg(pid, number)  # workers too, as a scheduler does
    return ended(server, pid), log.read_text()


def steps(out: Path) -> int:
    file = out / "metrics.csv"
    rows = read_metrics(file) if file.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def test_a_stopped_run_saves_its_last_step_and_goes_on_exactly(server: ForkServer, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    write_images(tmp_path / "val", per_class=4)
    (tmp_path / "bin").mkdir()
    scontrol, asked = tmp_path / "bin/scontrol", tmp_path / "asked"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    scontrol.chmod(0o755)
    job = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "NEXTBLOCK_REQUEUE": "1"}
    victim, out = victims(tmp_path, length=2)["xtra"], tmp_path / "run"
    assert ended(server, server.start(victim.begin(tmp_path / "whole"), tmp_path / "log")) == 0

    for number, code in ((signal.SIGTERM, 143), (signal.SIGUSR1, 138), (signal.SIGINT, 130)):
        got, told = stopped(server, victim, out, tmp_path / f"log-{code}", number, job)
        assert got == code, told
        assert "stopping when this step is done and saved" in told
        assert f"nextblock pretrain --resume {out}" in told
        assert "Traceback" not in told
        assert int(list_checkpoints(out / "checkpoints")[-1].name.removeprefix("step-")) == steps(out)
        assert ("job 77 is in Slurm's queue again" in told) == (number == signal.SIGUSR1)
    assert asked.read_text() == "requeue 77\n"
    assert ended(server, server.start(victim.again(out), tmp_path / "log-end")) == 0
    assert victim.digest(out) == victim.digest(tmp_path / "whole")
