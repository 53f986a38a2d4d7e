"""Weighted kNN accuracy of a frozen encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from nextblock.data.loading import default_workers, evaluation_batches
from nextblock.data.sources import Source, open_source
from nextblock.errors import ConfigError
from nextblock.evaluation.features import FeatureConfig, Features, extract_batches
from nextblock.evaluation.knn import knn_accuracy
from nextblock.jobs.classes import in_classes_of
from nextblock.jobs.opening import OpenedEncoder, open_encoder, require_positive, run_data
from nextblock.recipes.config import DataConfig, typed

SECTIONS = {"data": DataConfig}


def knn(
    *,
    run: str | Path,
    data: Mapping[str, Any] | None = None,
    k: list[int] | None = None,
    temperature: float = 0.07,
    last_layers: int = 1,
    bidirectional: bool = False,
    batch_size: int = 128,
    device: str = "auto",
    quiet: bool = False,
) -> dict[int, float]:
    """Classify labelled images by their nearest neighbours in feature space; no training.

    Args:
        run: a run folder, or a folder of exported weights.
        data: the labelled images: `train` is the bank, `val` the queries; the run's own when left out.
        k: numbers of neighbours, [20] when left out.
        temperature: of the vote, exp(cosine similarity / temperature).
        last_layers: features are the mean over the outputs of so many last layers and over tokens.
        bidirectional: let all tokens see each other; by default the encoder keeps its block-causal mask.
        batch_size: images per forward pass.
        device: "auto", "cpu" or "cuda".
        quiet: print nothing.

    Returns the accuracy in percent for each k. Raises ConfigError, DataError, RunError or CheckpointError.
    """
    require_positive(batch_size=batch_size)
    console = Console(quiet=quiet)
    opened = open_encoder(run, device)
    settings, objects = _data(Path(run), dict(data or {}))
    sources = {name: _open(settings, objects, name) for name in ("train", "val")}
    config = FeatureConfig(last_layers=last_layers, bidirectional=bidirectional)
    features = {name: _features(opened, source, config, batch_size, name, console) for name, source in sources.items()}
    for name, found in features.items():
        if found.bad:
            first = found.bad[0]
            told = f"{name}: {len(found.bad)} broken images left out; the first: {first.name}: {first.reason}"
            console.print(told, highlight=False, markup=False)
    queries = in_classes_of(sources["train"], sources["val"], features["val"])
    accuracy = knn_accuracy(features["train"], queries, k=k or [20], temperature=temperature)
    for neighbours, percent in accuracy.items():
        console.print(f"kNN accuracy, k = {neighbours}: {percent:.2f} %", highlight=False)
    bank, asked = len(features["train"]), len(queries)
    console.print(f"bank {bank:,} images, {asked:,} queries, {opened.where}", highlight=False, soft_wrap=True)
    return accuracy


def _data(run: Path, given: dict[str, Any]) -> tuple[DataConfig, dict[str, Any]]:
    """The given data values, completed from the run's own configuration; sources that are Python objects beside."""
    objects = {n: given.pop(n) for n in ("train", "val") if not isinstance(given.get(n), str | Path | None)}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    stored = dataclasses.asdict(run_data(run))
    return typed({"data": {**stored, **plain}}).data, objects


def _open(config: DataConfig, objects: Mapping[str, Any], name: str) -> Source:
    spec = objects.get(name, getattr(config, name))
    if spec is None:
        raise ConfigError(f"kNN needs labelled images: give --data.{name} (train is the bank, val the queries).")
    split = config.train_split if name == "train" else config.val_split
    return open_source(spec, split=split, image_column=config.image_column, label_column=config.label_column)


def _features(
    opened: OpenedEncoder, source: Source, config: FeatureConfig, batch_size: int, name: str, console: Console
) -> Features:
    batches = evaluation_batches(source, opened.preprocessing, batch_size=batch_size, workers=default_workers())
    found = extract_batches(opened.encoder, batches, opened.preprocessing, config)
    steps = -(-len(source) // batch_size)
    told = f"features of {name}"
    return Features.joined(
        list(track(found, total=steps, description=told, console=console, disable=not console.is_terminal))
    )
