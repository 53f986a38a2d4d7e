"""Any number of processes and workers trains on the same samples; one that dies ends all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_generator
from begin_or_continue import sections
from forked_ranks import Ranks
from nextblock.training.checkpoint import list_checkpoints
from nextblock.training.run_folder import read_metrics
from processes import start
from tiny_run import flags, tiny, write_images

BATCH, STEPS = 7, 9  # 26 images: no epoch is a whole number of batches, and no batch a whole number of processes
WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as found:
        yield found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images", per_class=13)


def wanted(kind: str, images: Path) -> dict[str, Any]:
    of = tiny if kind == "xtra" else tiny_generator.tiny
    model = {"drop_path": 0.2, "order": "pseudo_random"} if kind == "xtra" else {}
    training = {"epochs": STEPS * BATCH / 26, "batch_size": BATCH, "per_device_batch": 2, "checkpoint_every_steps": 2}
    return of(
        data={"train": str(images)}, model=model, training=training, watch={"pictures": 0, "every_epochs": 1000}
    )  # fmt: skip


@pytest.fixture(scope="module", params=["xtra", "xar"])
def alone(request: pytest.FixtureRequest, ranks: Ranks, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, without workers."""
    out = tmp_path_factory.mktemp(request.param) / request.param
    trained(ranks, out, images, 1)
    return out


def trained(ranks: Ranks, out: Path, images: Path, world: int, **values: int) -> None:
    arguments = {"kind": out.name, "sections": wanted(out.name, images), "out": str(out), "world": world, **values}
    ranks.run("same_stream:train", world, arguments)


def losses(folder: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["loss"]) for row in read_metrics(folder / "metrics.csv")}


def seen(out: Path) -> dict[int, list[int]]:
    """Step -> the positions that all processes have seen in it, in the order of the processes."""
    found = defaultdict(list)
    for file in sorted(out.parent.glob(f"{out.name}-seen-*.jsonl")):
        for line in file.read_text().splitlines():
            step, positions = json.loads(line)
            found[step] += positions
    return dict(found)


def same(out: Path, alone: Path) -> None:
    """Every step saw its own positions, each once, and the losses are those of one process."""
    assert seen(out) == {step: list(range(step * BATCH, (step + 1) * BATCH)) for step in range(STEPS)}
    assert sorted(losses(alone)) == list(range(1, STEPS + 1))
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.parametrize("world", WORLDS)
def test_any_number_of_processes_sees_the_same_samples(
    ranks: Ranks, alone: Path, images: Path, tmp_path: Path, world: int
) -> None:
    if world == 1:
        same(alone, alone)
        return
    trained(ranks, tmp_path / alone.name, images, world)
    same(tmp_path / alone.name, alone)


def test_other_processes_and_workers_continue_the_same_stream(
    ranks: Ranks, alone: Path, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / alone.name
    for world, workers, stop_after in ((4, 1, 1), (2, 2, 2), (1, 4, 2), (1, 0, 0)):
        trained(ranks, out, images, world, workers=workers, stop_after=stop_after)
    same(out, alone)


def test_one_process_that_is_asked_stops_all(ranks: Ranks, alone: Path, images: Path, tmp_path: Path) -> None:
    """Long before numbers are logged: what a scheduler allows for an end may be less."""
    out, sections = tmp_path / alone.name, wanted(alone.name, images)
    sections["training"] |= {"log_every_steps": 1000, "checkpoint_every_steps": 0}
    arguments = {"kind": alone.name, "sections": sections, "out": str(out), "world": 2}
    ranks.run("same_stream:train", 2, arguments | {"stop_after": 3, "asked_rank": 1})
    assert [path.name for path in list_checkpoints(out / "checkpoints")][-1] == "step-00000004"
    ranks.run("same_stream:train", 2, arguments)
    assert seen(out) == seen(alone)


def test_all_continue_from_the_checkpoint_that_the_first_one_chose(
    ranks: Ranks, alone: Path, images: Path, tmp_path: Path
) -> None:
    """A network file system may show the newest one to some processes later than to others."""
    out = tmp_path / alone.name
    trained(ranks, out, images, 2, stop_after=4)
    arguments = {"kind": out.name, "sections": wanted(out.name, images), "out": str(out), "world": 2}
    with pytest.raises(AssertionError, match=r"process 1 cannot read what the first one read: .*step-0000000\d"):
        ranks.run("same_stream:go_on_with_late_eyes", 2, arguments | {"seen_after_s": 100.0})
    with pytest.raises(AssertionError, match=r"process 1 cannot read what the first one read: .*elsewhere"):
        ranks.run("same_stream:never_seen", 2, arguments)
    ranks.run("same_stream:go_on_with_late_eyes", 2, arguments | {"seen_after_s": 0.4})
    same(out, alone)


# --- a process that dies


def started_ranks(folder: Path) -> dict[int, int]:
    """Rank -> process number of the run in this folder."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0") if process.name.isdigit() else []
            if str(folder) in words and not any("torch.distributed.run" in word for word in words):
                variables = (process / "environ").read_bytes().decode().split("\0")
                rank = next((v.removeprefix("LOCAL_RANK=") for v in variables if v.startswith("LOCAL_RANK=")), "0")
                found[int(rank)] = int(process.name)
        except (OSError, UnicodeDecodeError):  # it has just ended
            continue
    return found


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        if (folder / "metrics.csv").exists() and max(losses(folder), default=0) >= step:
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def killed(process: subprocess.Popen[str], folder: Path, rank: int, step: int) -> None:
    wait_for_step(process, folder, step)
    os.kill(started_ranks(folder)[rank], signal.SIGKILL)


def test_a_process_that_dies_ends_all(images: Path, tmp_path: Path) -> None:
    """Our own launcher, and torchrun, which starts all again: the same command continues the run, exactly."""
    own, again = tmp_path / "own", tmp_path / "again"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    restarted = subprocess.Popen(
        [*torchrun, str(here / "begin_or_continue.py"), str(again), str(images)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )  # fmt: skip
    ended = start(["--config", "xtra_cifar10", *flags(sections(str(images))), "--out", str(own)])
    try:
        killed(restarted, again, 0, 50)
        killed(ended, own, 1, 50)
        dead = time.monotonic()
        output, _ = ended.communicate(timeout=60)
        assert time.monotonic() - dead < 60
        assert ended.returncode != 0
        assert "nextblock: Another of the 2 processes has ended" in output
        assert f"Continue with: nextblock pretrain --resume {own}" in output
        assert "Traceback" not in output
        assert not started_ranks(own)
        told, _ = restarted.communicate(timeout=120)
        assert restarted.returncode == 0, told
        assert f"continuing {again} after step" in told
    finally:
        for process in (ended, restarted):
            for left in (*started_ranks(own).values(), *started_ranks(again).values(), process.pid):
                if process.poll() is None:
                    os.kill(left, signal.SIGKILL)
    early = losses(own)
    assert sorted(losses(again)) == list(range(1, 326))
    assert {step: losses(again)[step] for step in early} == early
