"""Several processes start without their framework's talk."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nextblock.errors import RunError
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import launch, one_ends_all

CODE = """
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import launch
fabric = launch(TrainingConfig(device="cpu", devices=2))
if fabric.is_global_zero:
    print(fabric.world_size)
"""


def test_two_processes_start_silently(tmp_path: os.PathLike[str]) -> None:
    script = os.path.join(tmp_path, "script.py")
    with open(script, "w") as file:
        file.write(CODE)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=100
    )
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "2\n")


ORPHAN = """
import os, sys, time
from nextblock.training import launch
from nextblock.training.config import TrainingConfig
launch.LOOK_S = launch.GRACE_S = 0.2
fabric = launch.launch(TrainingConfig(device="cpu", devices=2))
if fabric.is_global_zero:
    fabric.barrier()
    os.kill(os.getpid(), 9)
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
fabric.barrier()
time.sleep(100)  # in no exchange, so that nothing tells it
"""


def test_a_process_ends_after_the_one_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ORPHAN)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", tmp_path / "pid"], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=100,
    )  # fmt: skip
    assert done.returncode == -9
    assert "the process that started this one is gone" in done.stderr  # whose pipe is closed when all are gone
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


def test_a_lost_process_is_told_in_words() -> None:
    fabric = launch(TrainingConfig(device="cpu"))
    with pytest.raises(RuntimeError, match="reset by peer"), one_ends_all(fabric, "Continue."):
        raise RuntimeError("Connection reset by peer")  # of one process alone this is something else

    class Two:
        world_size, global_rank = 2, 1

    with (
        pytest.raises(RunError, match=r"Another of the 2 processes has ended.*process 1 ends as well\. Continue\."),
        one_ends_all(Two(), "Continue."),  # type: ignore[arg-type]
    ):
        raise RuntimeError("[pair.cc:537] Read error [127.0.0.1]:4000: Connection reset by peer. This is typically")
    with pytest.raises(RuntimeError, match="shapes"), one_ends_all(Two(), ""):  # type: ignore[arg-type]
        raise RuntimeError("shapes do not fit")
