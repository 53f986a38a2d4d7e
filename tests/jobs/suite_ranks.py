"""A suite of data sets that fail, as each of two processes sees it; for `faults.forked_ranks`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from nextblock.errors import DataError, RunError
from nextblock.jobs import suite
from nextblock.jobs.probe_report import Probed
from nextblock.training import agreement
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import Fabric, launch, on_first_process

NAMES = ("cifar10", "cifar100", "eurosat")
One = Callable[[Fabric, str], None]


def run(out: str, one: One) -> suite.Suite:
    """The suite of NAMES, whose last data set is stopped."""
    suite.SUITES["x"] = NAMES
    suite.find = lambda name, root: Path(name)  # type: ignore[assignment,return-value]
    agreement.AGREE_S = 1.0
    fabric = launch(TrainingConfig(device="cpu", devices=2))

    def probed(name: str, folder: Path, begun: bool) -> Probed:
        one(fabric, name)
        assert name == NAMES[-1]
        return Probed(folder, [], None, finished=False, signal=15)

    return suite.run_suite("x", {"suite": "x"}, None, Path(out), fabric, Console(quiet=True), probed)


def alike(out: str) -> None:
    """Errors that all meet, or that the first tells all, cost no other data set."""

    def one(fabric: Fabric, name: str) -> None:
        fabric.barrier()
        if name == "cifar10":
            raise DataError("no image of it can be read")
        if name == "cifar100":
            on_first_process(fabric, RunError("the disk is full") if fabric.is_global_zero else None)

    rows = run(out, one).rows
    assert [row["status"] for row in rows] == ["failed", "failed", "stopped"]
    assert [row["reason"] for row in rows[:2]] == ["no image of it can be read", "the disk is full"]


def to_the_last(out: str) -> None:
    """Nor a process, where the first has nothing to do any more, and the other has not looked yet."""

    def one(fabric: Fabric, name: str) -> None:
        raise DataError("no image of it can be read")

    if os.environ["LOCAL_RANK"] == "1":
        agreement._POLL_S = 0.3
    assert [row["status"] for row in run(out, one).rows] == ["failed"] * 3


def alone(out: str) -> None:
    """What one process meets alone ends both."""
    begun = time.monotonic()
    rank = -1

    def one(fabric: Fabric, name: str) -> None:
        nonlocal rank
        rank = fabric.global_rank
        assert name == "cifar10", "the next one is not begun"
        for step in range(20):
            if step == 3 and rank == 1:
                raise DataError("a worker died")
            fabric.all_reduce(torch.ones(4))

    told = ended(out, one)
    if rank == 0:
        assert told.startswith("Another of the 2 processes has ended"), told
    else:
        assert told.startswith("cifar10, on process 1 of 2, from 0, and not on all alike: a worker died. So all"), told
    assert told.endswith("The same command goes on with what is there.")
    assert time.monotonic() - begun < 10


def elsewhere(out: str) -> None:
    """The same words after another number of exchanges: they would not find each other any more."""

    def one(fabric: Fabric, name: str) -> None:
        if fabric.is_global_zero:
            dist.all_reduce(torch.ones(4), async_op=True)  # which the other never comes to
        raise DataError("it cannot be read.")

    assert "not on all alike: it cannot be read." in ended(out, one)


def ended(out: str, one: One) -> str:
    try:
        run(out, one)
    except RunError as error:
        return str(error)
    raise AssertionError("the suite went on")
