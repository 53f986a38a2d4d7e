"""What a probe does where nobody said: the grid, the augmentation, which images train and which choose."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nextblock.data.labelled import Labelled
from nextblock.data.preprocess import Preprocessing
from nextblock.data.selection import few_shot, held_out
from nextblock.data.sources import Source
from nextblock.data.stream import load_sample
from nextblock.errors import DataError, SampleError
from nextblock.evaluation.probe_config import LRS, ProbeConfig
from nextblock.jobs.opening import OpenedEncoder
from nextblock.training.config import TrainingConfig


def settled(config: ProbeConfig, data: Labelled, opened: OpenedEncoder, device: str) -> tuple[ProbeConfig, list[str]]:
    """The configuration with everything chosen that was left open, and a sentence for each choice."""
    found, told = data.dataset, []
    changes: dict[str, Any] = {}
    if not config.lrs:
        changes["lrs"] = tuple(found.lrs) if found else LRS
    if config.warmup_epochs < 0:
        changes["warmup_epochs"] = found.warmup_epochs if found else 0.0
    if config.augment == "auto":
        changes["augment"] = "none" if device == "cpu" else "published"
        if device == "cpu":
            told.append("augment: none, features are computed once (on a CPU; 'published' asks for augmentation)")
    fitted = replace(config, **changes).fitted(opened.encoder.config.depth, opened.encoder.config.width)
    if fitted.attentive_layers != config.attentive_layers and "attentive" in config.heads:
        told.append(f"attentive_layers: {fitted.attentive_layers[0]}, all that the encoder has")
    if fitted.num_heads != config.num_heads and "attentive" in config.heads:
        told.append(f"num_heads: {fitted.num_heads}, as {config.num_heads} does not divide the encoder's width")
    return fitted, told


def split_rows(labels: NDArray[np.int64], config: ProbeConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and rows to choose by. With few shots, the choice sees no more images than the training."""
    known = np.flatnonzero(labels >= 0)
    if not len(known):
        raise DataError("none of the training images has a label, and a probe needs them.")
    labels = labels[known]
    if config.select == "test":
        rows = few_shot(labels, config.few_shot, config.seed) if config.few_shot else np.arange(len(labels))
        return known[rows], known[:0]
    out = held_out(labels, config.val_fraction, config.seed)
    rows, val = np.flatnonzero(~out), np.flatnonzero(out)
    if config.few_shot:
        rows = rows[few_shot(labels[rows], config.few_shot, config.seed)]
        fewest = int(np.unique(labels[val], return_counts=True)[1].min())
        val = val[few_shot(labels[val], min(config.few_shot, fewest), config.seed)]
    return known[rows], known[val]


def training_config(config: ProbeConfig) -> TrainingConfig:
    """The loop's configuration; learning rates, decay and clipping are each head's own."""
    return TrainingConfig(
        epochs=config.epochs, batch_size=config.batch_size, per_device_batch=config.per_device_batch,
        lr=max(config.lrs), warmup_epochs=config.warmup_epochs, warmup_start=0.1, betas=config.betas,
        precision=config.precision, seed=config.seed, device=config.device, devices=config.devices,
        checkpoint_every_minutes=config.checkpoint_every_minutes,
    )  # fmt: skip


def require_readable(source: Source, preprocessing: Preprocessing) -> None:
    """Raise DataError when none of the first images opens: better now than when all is trained."""
    problem: SampleError | None = None
    for index in range(min(len(source), 50)):
        try:
            load_sample(source, index, preprocessing)
            return
        except SampleError as error:
            problem = problem or error
    raise DataError(f"None of the first images of {source.description} can be read; the first: {problem}")
