"""Real processes of the command line."""

from __future__ import annotations

import os
import subprocess
import sys

COMMAND = [sys.executable, "-m", "nextblock.cli"]


def start(arguments: list[str], verb: str = "pretrain") -> subprocess.Popen[str]:
    """In a process group of its own, so that workers are killed with it."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, verb, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=env,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output
