"""Real processes of `prepare`: killed, stopped, and gone on by another number of workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextblock.data.prepared.about import About
from nextblock.data.sources import open_source
from nextblock.jobs.prepare import prepare

SLOW = (
    "import sys, time; from nextblock.data.prepared import making; from nextblock.jobs.prepare import prepare\n"
    "from nextblock.errors import NextblockError; encode = making.encode\n"
    "making.encode = lambda *a: (time.sleep(0.04), encode(*a))[1]\n"
    "try:\n"
    "    prepare(data=sys.argv[1], out=sys.argv[2], workers=int(sys.argv[3]), shard_mb=1)\n"
    "except KeyboardInterrupt as error:\n"
    "    sys.exit(f'{error}')\n"
)
COUNT = 90


def write(folder: Path) -> Path:
    """Noise, of some 60 kB as JPEG: a shard of 1 MiB has about 20 of them."""
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    for i in range(COUNT):
        pixels = generator.integers(0, 256, (240, 240, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i}.bmp")
    return folder


def start(data: Path, out: Path, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, str(data), str(out), str(workers)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], file: Path) -> None:
    deadline = time.monotonic() + 100
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow  # forked processes are killed in tests/faults
def test_killed_and_stopped_jobs_end_with_the_bytes_of_one_that_was_not(tmp_path: Path) -> None:
    data, cut = write(tmp_path / "images"), tmp_path / "cut"

    killed = start(data, cut, workers=2)
    wait_for(killed, cut / "shard-00000.bin")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    there = len(About.read(cut).shards)
    assert there < 4

    stopped = start(data, cut, workers=1)
    wait_for(stopped, cut / "shard-00002.bin")
    os.killpg(stopped.pid, signal.SIGINT)
    _, told = stopped.communicate(timeout=100)
    assert stopped.returncode == 1
    assert [line for line in told.splitlines() if line] == [
        "stopping when a few images are done; Ctrl-C again stops at once",
        "stopped. To go on after the last whole shard, give the same command again: "
        f"nextblock prepare {data} --out {cut} --shard_mb=1",
    ]
    assert there < len(About.read(cut).shards) < 5
    assert not list(cut.glob(".*"))

    prepare(data=data, out=cut, workers=0, shard_mb=1, quiet=True)
    whole = prepare(data=data, out=tmp_path / "whole", workers=2, shard_mb=1, quiet=True)
    assert content(cut) == content(whole)
    assert len(open_source(cut)) == COUNT
    assert sum(name.startswith("shard-") for name in content(cut)) >= 4
