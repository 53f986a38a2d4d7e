"""Trainings whose samples are written down; every function runs in the processes of one run (`forked_ranks`)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nextblock.jobs import training_run
from nextblock.jobs.generator_run import GeneratorRun
from nextblock.jobs.pretrain import pretrain
from nextblock.jobs.run import Run
from nextblock.jobs.train_generator import train_generator
from nextblock.jobs.training_run import TrainingRun
from nextblock.training.loop import Loss

JOBS: dict[str, Any] = {"xtra": pretrain, "xar": train_generator}
RECIPES = {"xtra": "xtra_cifar10", "xar": "xar_cifar10"}


def train(kind: str, sections: dict[str, Any], out: str, world: int, workers: int = 0, stop_after: int = 0) -> None:
    """Begin the run in `out`, or continue it, with `world` processes; stop after so many steps (0 = at its end)."""
    for of in (Run, GeneratorRun):
        _written_down(of, Path(f"{out}-seen-{os.environ.get('LOCAL_RANK', '0')}.jsonl"))
    if stop_after:
        training_run.StopRequest = lambda: _Stop(stop_after)  # type: ignore[assignment, misc]
    free = {"data": {"workers": workers}, "training": {"device": "cpu", "devices": world}}
    if (Path(out) / "config.yaml").is_file():
        done = JOBS[kind](resume=out, quiet=True, **free)
    else:
        merged = {name: section | free.get(name, {}) for name, section in sections.items()}
        done = JOBS[kind](config=RECIPES[kind], out=out, quiet=True, **merged)
    assert done.finished == (not stop_after)


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
