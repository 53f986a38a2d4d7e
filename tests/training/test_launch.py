"""Several processes start without their framework's talk."""

from __future__ import annotations

import os
import subprocess
import sys

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
