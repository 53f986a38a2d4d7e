"""Weighted kNN accuracy of a frozen encoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from nextblock.data.loading import default_workers, evaluation_batches
from nextblock.data.sources import Source, open_source
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.features import FeatureConfig, Features, extract_batches
from nextblock.evaluation.knn import knn_accuracy
from nextblock.jobs.opening import Opened, open_model
from nextblock.recipes.config import DataConfig, typed
from nextblock.training.run_folder import read_config

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
    console = Console(quiet=quiet)
    opened = open_model(run, device)
    settings = _data(Path(run), dict(data or {}))
    sources = {name: _open(settings, name) for name in ("train", "val")}
    config = FeatureConfig(last_layers=last_layers, bidirectional=bidirectional)
    features = {name: _features(opened, source, config, batch_size, name, console) for name, source in sources.items()}
    for name, found in features.items():
        if found.bad:
            first = found.bad[0]
            told = f"{name}: {len(found.bad)} broken images left out; the first: {first.name}: {first.reason}"
            console.print(told, highlight=False, markup=False)
    accuracy = knn_accuracy(features["train"], features["val"], k=k or [20], temperature=temperature)
    for neighbours, percent in accuracy.items():
        console.print(f"kNN accuracy, k = {neighbours}: {percent:.2f} %", highlight=False)
    bank, queries = len(features["train"].labels), len(features["val"].labels)
    console.print(f"bank {bank:,} images, {queries:,} queries, {opened.where}", highlight=False, soft_wrap=True)
    return accuracy


def _data(run: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The given data values, completed from the run's own configuration."""
    objects = {n: given.pop(n) for n in ("train", "val") if not isinstance(given.get(n), str | Path | None)}
    stored = read_config(run).get("data", {}) if (run / "config.yaml").is_file() else {}
    config = typed({"data": {**stored, **{k: str(v) if isinstance(v, Path) else v for k, v in given.items()}}}).data
    return {"config": config, **objects}


def _open(settings: dict[str, Any], name: str) -> Source:
    config: DataConfig = settings["config"]
    spec = settings.get(name, getattr(config, name))
    if spec is None:
        raise ConfigError(f"kNN needs labelled images: give --data.{name} (train is the bank, val the queries).")
    split = config.train_split if name == "train" else config.val_split
    source = open_source(spec, split=split, image_column=config.image_column, label_column=config.label_column)
    if source.labels() is None:
        raise DataError(f"{source.description} has no labels. Use class sub-folders, or name --data.label_column .")
    return source


def _features(
    opened: Opened, source: Source, config: FeatureConfig, batch_size: int, name: str, console: Console
) -> Features:
    batches = evaluation_batches(source, opened.preprocessing, batch_size=batch_size, workers=default_workers())
    found = extract_batches(opened.model.encoder, batches, opened.preprocessing, config)
    steps = -(-len(source) // batch_size)
    told = f"features of {name}"
    return Features.joined(
        list(track(found, total=steps, description=told, console=console, disable=not console.is_terminal))
    )
