"""A suite of probes is killed in the middle of a data set and run again."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from data_room.benchmark_folders import cifar10, eurosat

from processes import finish, start


@pytest.mark.slow  # forked processes are killed in tests/faults
def test_a_killed_suite_does_not_do_finished_data_sets_again(run: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "datasets", tmp_path / "suite"
    cifar10(root)
    eurosat(root)
    options = (
        "--probe.heads linear --probe.lrs 1e-3 1e-2 --probe.batch_size 2 --probe.workers 0 --probe.val_fraction 0.3"
    )
    arguments = [str(run), "--suite", "xtra15", "--data_root", str(root), *options.split()]
    arguments += [
        "--probe.evaluate_every_epochs",
        "1",
        "--probe.cache",
        str(tmp_path / "cache"),
        "--probe.epochs",
        "150",
    ]
    process = start([*arguments, "--out", str(out)], verb="probe")
    deadline = time.monotonic() + 120
    log = out / "eurosat/heads.csv"
    while not (log.is_file() and len(log.read_text().splitlines()) > 20):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    first = out / "cifar10/result.json"
    before = first.stat().st_mtime_ns
    assert not (out / "eurosat/result.json").exists()
    printed = finish(start([*arguments, "--out", str(out)], verb="probe"))
    assert f"continuing {out}/eurosat after step 0 of" in printed
    assert first.stat().st_mtime_ns == before
    finish(start([*arguments, "--out", str(tmp_path / "whole")], verb="probe"))
    killed, whole = ((folder / "results.jsonl").read_text() for folder in (out, tmp_path / "whole"))
    assert killed == whole
    assert [json.loads(line)["status"] for line in whole.splitlines()].count("done") == 2
