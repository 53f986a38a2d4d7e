"""Trainings whose samples are written down; every function runs in the processes of one run (`forked_ranks`)."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nextblock.errors import CheckpointError
from nextblock.jobs import record, training_run
from nextblock.jobs.generator_run import GeneratorRun
from nextblock.jobs.pretrain import pretrain
from nextblock.jobs.run import Run
from nextblock.jobs.train_generator import train_generator
from nextblock.jobs.training_run import TrainingRun
from nextblock.training.checkpoint import list_checkpoints, read_checkpoint
from nextblock.training.loop import Loss

JOBS: dict[str, Any] = {"xtra": pretrain, "xar": train_generator}
RECIPES = {"xtra": "xtra_cifar10", "xar": "xar_cifar10"}


def train(
    kind: str,
    sections: dict[str, Any],
    out: str,
    world: int,
    workers: int = 0,
    stop_after: int = 0,
    asked_rank: int | None = None,
) -> None:
    """Begin the run in `out`, or continue it, with `world` processes; stop after so many steps (0 = at its end).

    asked_rank: only this process is asked to stop; None: all.
    """
    for of in (Run, GeneratorRun):
        _written_down(of, Path(f"{out}-seen-{os.environ.get('LOCAL_RANK', '0')}.jsonl"))
    if stop_after and asked_rank in (None, int(os.environ.get("LOCAL_RANK", "0"))):
        training_run.StopRequest = lambda: _Stop(stop_after)  # type: ignore[assignment, misc]
    free = {"data": {"workers": workers}, "training": {"device": "cpu", "devices": world}}
    if (Path(out) / "config.yaml").is_file():
        done = JOBS[kind](resume=out, quiet=True, **free)
    else:
        merged = {name: section | free.get(name, {}) for name, section in sections.items()}
        done = JOBS[kind](config=RECIPES[kind], out=out, quiet=True, **merged)
    assert done.finished == (not stop_after)


def go_on_with_late_eyes(seen_after_s: float, **arguments: Any) -> None:
    """`train`, where all but the first process see the newest checkpoint so much later, and wait for a second only."""
    record.SEEN_WITHIN_S = 1.0
    if os.environ.get("LOCAL_RANK", "0") != "0":
        born, is_dir = time.monotonic(), Path.is_dir
        newest = list_checkpoints(Path(arguments["out"]) / "checkpoints")[-1]

        def late(path: Path) -> bool:
            return is_dir(path) and (path != newest or time.monotonic() > born + seen_after_s)

        def read(path: Path) -> dict[str, Any]:
            if not late(path):
                raise CheckpointError(f"{path} is not seen here.")
            return read_checkpoint(path)

        Path.is_dir, record.read_checkpoint = late, read  # type: ignore[assignment, attr-defined]
    train(**arguments)


def never_seen(**arguments: Any) -> None:
    """`train`, where all but the first process see no folder of checkpoints."""
    record.SEEN_WITHIN_S = 0.2
    if os.environ.get("LOCAL_RANK", "0") != "0":
        checkpoint_of_all = record.checkpoint_of_all
        training_run.checkpoint_of_all = (  # type: ignore[attr-defined]
            lambda fabric, folder, say: checkpoint_of_all(fabric, folder.with_name("elsewhere"), say)
        )
    train(**arguments)


def _written_down(of: type[TrainingRun], file: Path) -> None:
    """The positions of every forward pass of this process go to the file, with its step."""
    make = of.loss

    def loss(run: TrainingRun) -> Loss:
        inner = make(run)

        def noting(model: nn.Module, batch: Any, step: int) -> Tensor:
            with open(file, "a") as lines:
                lines.write(json.dumps([step, batch.positions.tolist()]) + "\n")
            return inner(model, batch, step)

        return noting

    of.loss = loss  # type: ignore[method-assign]
    of.require_room = lambda run: None  # type: ignore[method-assign] # which asks for a loss too


class _Stop:
    """Asks for a stop after so many steps, on every process."""

    received = 15

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __enter__(self) -> _Stop:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0
