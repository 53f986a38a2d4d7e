"""The benchmarks on a CUDA device, in sizes that say nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROOT = Path(__file__).parents[2]


def test_every_row_is_measured_on_the_device(tmp_path: Path) -> None:
    tables = ["training_step", "sampling_speed", "probe_sweep"]
    command = [sys.executable, "-m", "benchmarks.bench", "--device", "cuda", "--quick", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--only", *tables], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "speed-cuda-quick.json").read_text())["tables"]
    assert list(found) == tables
    rows = [row for table in found.values() for row in table["rows"]]
    assert all(row["ours"] > 0 and row["met"] in (True, False) for row in rows)
    assert any(row["unit"] == "GiB" for row in rows)
