"""`nextblock profile --replay`: a batch that a training gave up on, run again and watched layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from nextblock.data.labelled import Labelled
from nextblock.data.sources import Source, open_source
from nextblock.data.stream import Batch
from nextblock.errors import ConfigError, RunError
from nextblock.jobs.finetune_config import from_values
from nextblock.jobs.finetune_run import FinetuneRun
from nextblock.jobs.profile_config import make_run, read
from nextblock.jobs.training_run import TrainingRun
from nextblock.randomness import key
from nextblock.recipes.config import merge
from nextblock.training.launch import launch
from nextblock.training.launcher import require_alone
from nextblock.training.layer_numbers import LayerNumbers, LayerWatch
from nextblock.training.optimizer import gradient_norm
from nextblock.training.plan import Plan
from nextblock.training.replay import Kept, chosen, read_kept
from nextblock.training.run_record import environment, job_of, read_config, read_environment

ALONE = {"devices": 1, "nodes": 1, "compile": False}


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: of which process, over which rows of the batch, its loss, and what was seen."""

    rank: int
    rows: range
    loss: float
    seen: list[LayerNumbers]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and all(numbers.finite for numbers in self.seen)


@dataclass(frozen=True)
class ImageLoss:
    """Of one image alone: its row, position, name ("" for none), process, loss, and its gradient's norm."""

    row: int
    position: int
    name: str
    rank: int
    loss: float
    grad_norm: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def replayed(folder: Path, given: Mapping[str, Mapping[str, Any]], console: Console) -> dict[str, Any]:
    """Run the batch kept in `folder` again, in one process, and tell what was found; the same as plain values.

    Args:
        given: sections of the recipe that replace what the run had, for example {"training": {"device": "cpu"}}.

    Raises RunError when the folder is none that a training kept, ConfigError for a section that does not fit.
    """
    require_alone("--replay")
    kept = read_kept(folder)
    run = _run_of(folder, kept, given, console)
    try:
        run.model.load_state_dict(kept.weights)
    except RuntimeError as error:
        raise RunError(f"the weights in {folder} are not those of the model in its config.yaml.") from error
    model = run.fabric.setup_module(run.model)
    watch = LayerWatch(run.model)
    weights = [numbers for numbers in watch.weights() if not numbers.finite]
    passes = list(_passes(run, model, kept, watch))
    norm = float(gradient_norm(run.model))
    wrong = [each for each in passes if not each.finite]
    rows = [row for each in wrong or passes for row in each.rows]
    images = list(_images(run, model, kept, rows))
    environment_then = read_environment(folder)
    return {
        "step": kept.step,
        "since": kept.since,
        "images": len(kept.batch),
        "world": kept.world,
        "finite": not wrong and not weights and math.isfinite(norm),
        "loss": sum(each.loss * len(each.rows) for each in passes) / len(kept.batch),
        "grad_norm": norm,
        "weights": [asdict(numbers) for numbers in weights],
        "passes": len(passes),
        "pass": _plain(wrong[0] if wrong else passes[0]),
        "by_image": [asdict(each) | {"finite": each.finite} for each in images],
        "ran_on": environment_then["device"],
        "environment": environment(kept.seed, run.fabric.device.type),
    }


def _plain(one: Pass) -> dict[str, Any]:
    layers = [asdict(numbers) for numbers in one.seen]
    return {"rank": one.rank, "images": len(one.rows), "loss": one.loss, "layers": layers}


# --- the run


def _run_of(folder: Path, kept: Kept, given: Mapping[str, Mapping[str, Any]], console: Console) -> TrainingRun:
    """The run as its job would make it; the kept images stand in for its data."""
    images: Source | None = None
    if isinstance(kept.batch, Batch):
        pixels, labels = kept.batch.images.numpy(), kept.batch.labels.numpy()
        images = open_source((pixels, labels) if (labels >= 0).all() else pixels)
    if job_of(read_config(folder)) == "finetune":
        return _finetuning(folder, kept, images, given, console)
    kind, values = read(folder / "config.yaml", None, merge(given, {"training": ALONE}))
    objects: dict[str, Any] = {}
    if images is not None:
        values = merge(values, {"data": {"train": None, "decoder": "pillow"}})
        objects["train"] = images
    return make_run(kind, values, objects, console, chosen=False, sized=True)


def _finetuning(
    folder: Path, kept: Kept, images: Source | None, given: Mapping[str, Mapping[str, Any]], console: Console
) -> TrainingRun:
    if other := set(given) - {"training"}:
        raise ConfigError(f"a fine-tuning run is replayed with options of training only; leave out {min(other)}.")
    assert images is not None
    record = from_values(merge(read_config(folder), given, {"training": ALONE}))
    record = replace(record, finetune=replace(record.finetune, val_fraction=0.0, few_shot=0))
    classes = tuple(map(str, range(kept.weights["head.bias"].shape[-1])))
    data = Labelled(images, images, classes, None, str(folder), "")
    return FinetuneRun(record, data, launch(record.training), console)


# --- the passes


def _passes(run: TrainingRun, model: nn.Module, kept: Kept, watch: LayerWatch) -> Iterator[Pass]:
    """Every pass of the step, of one process after another; the gradients add up to those of the step."""
    fabric, loss_of, size = run.fabric, run.loss(), len(kept.batch)
    config = replace(run.settings().training, batch_size=size)
    for rank in range(kept.world):
        torch.manual_seed(key(kept.seed, f"step{kept.step}/rank{rank}") >> 1)  # as the loop does
        for positions in Plan(size, config, rank, kept.world).micro_batches(kept.step):
            rows = range(positions.start - kept.step * size, positions.stop - kept.step * size)
            watch.seen.clear()
            with watch:
                with fabric.autocast():
                    loss = loss_of(model, chosen(kept.batch, rows).to(fabric.device), kept.step)
                fabric.backward(loss * (len(rows) / size))
            watch.weight_gradients()
            yield Pass(rank, rows, float(loss.detach()), list(watch.seen))


def _images(run: TrainingRun, model: nn.Module, kept: Kept, rows: list[int]) -> Iterator[ImageLoss]:
    """Each image alone."""
    fabric, loss_of, world, size = run.fabric, run.loss(), kept.world, len(kept.batch)
    shares = [rank for rank in range(world) for _ in range(rank * size // world, (rank + 1) * size // world)]
    model.train(not isinstance(run, FinetuneRun))  # BatchNorm takes one image in eval mode only
    for row in rows:
        model.zero_grad(set_to_none=True)
        with fabric.autocast():
            loss = loss_of(model, chosen(kept.batch, [row]).to(fabric.device), kept.step)
        fabric.backward(loss)
        name = kept.names[row] if kept.names else ""
        norm = float(gradient_norm(run.model))
        yield ImageLoss(row, int(kept.batch.positions[row]), name, shares[row], float(loss.detach()), norm)
    model.zero_grad(set_to_none=True)
