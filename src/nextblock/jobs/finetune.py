"""Fine-tune a pre-trained encoder, as a whole, on labelled images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from nextblock.data.labelled import Labelled, open_labelled
from nextblock.errors import ConfigError
from nextblock.jobs.finetune_config import (
    SECTIONS,
    FinetuneConfig,
    FinetuneRecord,
    FinetuneTraining,
    choose_training,
    differences,
    from_values,
)
from nextblock.jobs.finetune_parts import split_training
from nextblock.jobs.finetune_run import Finetuned, FinetuneRun
from nextblock.jobs.opening import open_encoder
from nextblock.jobs.record import where
from nextblock.jobs.starting import new_folder
from nextblock.recipes.config import typed_section
from nextblock.training.launch import launch, pick_device
from nextblock.training.launcher import is_first
from nextblock.training.run_record import read_config, require_free, require_job

# What may differ when a run goes on. Not the passes of a step: BatchNorm and mixing see a whole forward pass.
FREE_ON_RESUME = {
    "finetune.workers", "finetune.max_bad_fraction", "finetune.evaluate_every_epochs", "training.device",
    "training.compile", "training.activation_checkpointing", "training.checkpoint_every_steps",
    "training.checkpoint_every_minutes", "training.keep_checkpoints", "training.max_nonfinite_steps",
}  # fmt: skip

Section = Mapping[str, Any] | None


def finetune(
    *,
    run: str | Path | None = None,
    dataset: Any = None,
    test: Any = None,
    finetune: Section = None,
    training: Section = None,
    data_root: str | Path | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    quiet: bool = False,
) -> Finetuned:
    """Train an encoder together with a head on labelled images, and judge both on test images.

    Args:
        run: a pre-training run or a weights folder; its encoder is what is trained.
        dataset: the labelled images: a benchmark data set's name, a folder, Parquet files, `hf:NAME`; in Python
            also arrays or any source of images.
        test: the test images, where they are not part of `dataset`.
        finetune, training: values of these sections; what is left out is chosen and told.
        data_root: the folder of all benchmark data sets.
        out: the run folder, new or empty; by default a dated one under runs/.
        resume: a fine-tuning run to continue, bit-identically on the same CPU.
        quiet: print nothing.

    The test images are looked at once, at the end, under the average of the weights (the last ones without one).
    Raises ConfigError, DataError, RunError, CheckpointError: with what to do next.
    """
    console = Console(quiet=quiet)
    given = {"finetune": dict(finetune or {}), "training": dict(training or {})}
    if resume is not None:
        return _resume(Path(resume), given, dataset, test, data_root, run, out, console)
    if run is None or dataset is None:
        missing = "a pre-trained run (run)" if run is None else "labelled images (--dataset, a name or a folder)"
        raise ConfigError(f"fine-tuning needs {missing}; or --resume FOLDER continues a run.")
    if out is not None:
        require_free(Path(out))
    opened = open_encoder(run, device="cpu")
    config: FinetuneConfig = typed_section("finetune", given["finetune"], SECTIONS)
    first: FinetuneTraining = typed_section("training", given["training"], SECTIONS)
    data = _open(config, first.seed, dataset, test, data_root)
    settings = _chosen(config, first, data, given["training"], console)
    preprocessing = opened.preprocessing
    if config.resize_px:
        preprocessing = dataclasses.replace(preprocessing, resize_px=config.resize_px)
    record = FinetuneRecord(
        finetune=config, training=settings, run=os.path.abspath(opened.where),
        model=opened.encoder.config.to_dict(), preprocessing=preprocessing.to_dict(),
        **where(dataset, test, data_root),
    )  # fmt: skip
    made = FinetuneRun(record, data, launch(settings), console)
    made.model.encoder.load_state_dict(opened.encoder.state_dict())
    made.require_room()
    folder = new_folder(made.fabric, out, "finetune")
    return made.begin(folder)


def _resume(
    folder: Path,
    given: dict[str, dict[str, Any]],
    dataset: Any,
    test: Any,
    data_root: str | Path | None,
    run: str | Path | None,
    out: str | Path | None,
    console: Console,
) -> Finetuned:
    for name, value in {"run": run, "out": out}.items():
        if value is not None:
            raise ConfigError(f"--resume continues {folder} as it is; leave out {name}.")
    stored = read_config(folder)
    require_job(stored, folder, "finetune")
    before = from_values(stored)
    for name, values in given.items():
        typed_section(name, values, SECTIONS)  # refuses what is not a key of the section
    record = from_values({name: {**section, **given.get(name, {})} for name, section in stored.items()})
    changed = [d for d in differences(before, record) if d[0] not in FREE_ON_RESUME]
    if changed:
        told = "; ".join(f"{name} was {old}, now {new}" for name, old, new in changed)
        raise ConfigError(f"{folder} was started with another configuration: {told}. Leave that out, or start anew.")
    if dataset is None and record.dataset is None:
        raise ConfigError(f"{folder} was started on images given in Python; give them again: dataset=...")
    dataset, test = record.dataset if dataset is None else dataset, record.test if test is None else test
    again: dict[str, Any] = where(dataset, test, data_root or record.data_root)
    record = dataclasses.replace(record, **again)
    data = _open(record.finetune, record.training.seed, dataset, test, record.data_root)
    made = FinetuneRun(record, data, launch(record.training), console)
    return made.go_on(folder)


def _open(config: FinetuneConfig, seed: int, dataset: Any, test: Any, root: str | Path | None) -> Labelled:
    return open_labelled(
        dataset, test=test, root=root, train_split=config.train_split, test_split=config.test_split,
        image_column=config.image_column, label_column=config.label_column, seed=seed,
    )  # fmt: skip


def _chosen(
    config: FinetuneConfig, first: FinetuneTraining, data: Labelled, given: Mapping[str, Any], console: Console
) -> FinetuneTraining:
    """The training section, completed by a choice for these images that is told (by one process)."""
    count = len(split_training(data.train, config, first.seed)[0])
    choice = choose_training(count, pick_device(first.device), given)
    if is_first():
        lines = [f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images, "
                 f"{len(data.classes):,} classes. {data.note}".rstrip(), *choice.reasons]  # fmt: skip
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    settings: FinetuneTraining = typed_section("training", choice.values.get("training", {}) | dict(given), SECTIONS)
    return settings


__all__ = ["SECTIONS", "Finetuned", "finetune"]
