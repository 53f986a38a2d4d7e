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


def test_a_start_that_was_killed_is_begun_again(server: ForkServer, tmp_path: Path) -> None:
    """By the same command, also one that a launcher gives again and again, until there is a run to go on with."""
    write_images(tmp_path / "images")
    write_images(tmp_path / "val", per_class=4)
    victim, out, log = victims(tmp_path)["xtra"], tmp_path / "run", tmp_path / "log"
    command = [*victim.begin(out), "--resume", "auto"]
    left = set()
    for operation in (6, 12, 18, 22, 26):
        assert ended(server, server.start(command, log, (f"/{out.name}/", operation))) == -signal.SIGKILL, (
            log.read_text()
        )
        left.add(tuple(sorted(path.name for path in out.iterdir())))
        assert not (out / "config.yaml").exists(), f"{operation} operations are too many for this test"
    assert len(left) >= 3, left
    assert ended(server, server.start(command, log)) == 0, log.read_text()


def test_two_processes_do_not_train_in_one_folder(server: ForkServer, tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    write_images(tmp_path / "val", per_class=4)
    victim, out = victims(tmp_path, length=4)["xtra"], tmp_path / "run"
    first = server.start(victim.begin(out), tmp_path / "log")
    while steps(out) < 2:
        assert server.poll(first) is None, (tmp_path / "log").read_text()
    for command in (victim.again(out), [*victim.begin(out), "--resume", "auto"]):
        assert ended(server, server.start(command, tmp_path / "log-2")) == 1
        assert f"another process trains in {out}" in (tmp_path / "log-2").read_text()
    assert server.poll(first) is None, "the first one was to be still at it"
    assert ended(server, first) == 0
    found = [row["step"] for row in read_metrics(out / "metrics.csv")]
    assert len(found) == len(set(found)) > 20
    assert {path.name for path in tmp_path.iterdir()} == {"images", "val", "run", "log", "log-2"}, "no lock is left"


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
