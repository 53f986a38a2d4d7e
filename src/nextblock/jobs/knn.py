"""Weighted kNN accuracy of a frozen encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from nextblock.data.labelled import open_labelled
from nextblock.data.loading import default_workers, evaluation_batches
from nextblock.data.selection import few_shot as chosen_few
from nextblock.data.sources import Source, content_digest, fingerprint, open_source
from nextblock.data.sources.views import Subset, known_labels
from nextblock.errors import ConfigError
from nextblock.evaluation.features import FeatureConfig, Features, extract_batches
from nextblock.evaluation.knn import knn_accuracy
from nextblock.jobs.classes import in_classes_of
from nextblock.jobs.opening import OpenedEncoder, open_encoder, require_positive, run_data
from nextblock.jobs.output import say
from nextblock.recipes.config import DataConfig, typed

SECTIONS = {"data": DataConfig}


def knn(
    *,
    run: str | Path,
    dataset: Any = None,
    test: Any = None,
    data_root: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    few_shot: int = 0,
    seed: int = 0,
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
        dataset: the labelled images: a benchmark's name, a folder with train/ and test/ or with one sub-folder for
            each class, Parquet or hf:NAME; in Python also (images, labels) or any source.
        test: the queries, where they are not part of the data set; 20 % are held out where there are none.
        data_root: folder of the benchmark data sets; $NEXTBLOCK_DATA or ./datasets when left out.
        data: instead of a data set, `train` is the bank and `val` the queries; the run's own when left out. Its
            columns and splits hold for a data set as well.
        few_shot: so many images of each class in the bank; 0 = all.
        seed: decides which images are the few, and which are held out.
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
    if few_shot < 0:
        raise ConfigError(f"--few_shot must be 0 (all images) or more; got {few_shot}.")
    console = Console(quiet=quiet)
    opened = open_encoder(run, device)
    if dataset is not None:
        sources = _of_dataset(dataset, test, data_root, dict(data or {}), seed, console)
    else:
        sources = _of_data(Path(run), test, dict(data or {}))
    if few_shot:
        bank = sources["train"]
        sources["train"] = Subset(bank, chosen_few(known_labels(bank), few_shot, seed))
    config = FeatureConfig(last_layers=last_layers, bidirectional=bidirectional)
    features = {name: _features(opened, source, config, batch_size, name, console) for name, source in sources.items()}
    for name, found in features.items():
        if found.bad:
            first = found.bad[0]
            told = f"{name}: {len(found.bad)} broken images left out; the first: {first.name}: {first.reason}"
            say(console, told)
    if _same(sources["train"], sources["val"]):
        say(console, "bank and queries are the same images: every query finds itself")
    queries = in_classes_of(sources["train"], sources["val"], features["val"])
    accuracy = knn_accuracy(features["train"], queries, k=k or [20], temperature=temperature)
    for neighbours, percent in accuracy.items():
        say(console, f"kNN accuracy, k = {neighbours}: {percent:.2f} %")
    told = f"bank {len(features['train']):,} images, {len(queries):,} queries, {opened.where}"
    say(console, told)
    return accuracy


def _same(bank: Source, queries: Source) -> bool:
    """Whether they are the same images; contents are only looked at where names and sizes agree."""
    return fingerprint(bank) == fingerprint(queries) and content_digest(bank) == content_digest(queries)


def _of_dataset(
    dataset: Any, test: Any, root: str | Path | None, data: dict[str, Any], seed: int, console: Console
) -> dict[str, Source]:
    """The bank and the queries of a data set; `data` may name its columns and splits."""
    if data.get("train") is not None or data.get("val") is not None:
        raise ConfigError("give the labelled images as either --dataset or --data.train and --data.val, not both.")
    settings = typed({"data": data}).data
    found = open_labelled(
        dataset, test=test, root=root, seed=seed,
        train_split=settings.train_split if "train_split" in data else None,
        test_split=settings.val_split if "val_split" in data else None,
        image_column=settings.image_column, label_column=settings.label_column,
    )  # fmt: skip
    if found.note:
        say(console, f"{found.name}: {found.note}")
    return {"train": found.train, "val": found.test}


def _of_data(run: Path, test: Any, data: dict[str, Any]) -> dict[str, Source]:
    """The bank and the queries of a `data` section."""
    if test is not None:
        raise ConfigError("--test belongs to a --dataset. The queries of --data.train are --data.val.")
    settings, objects = _data(run, data)
    return {name: _open(settings, objects, name) for name in ("train", "val")}


def _data(run: Path, given: dict[str, Any]) -> tuple[DataConfig, dict[str, Any]]:
    """The given data values, completed from the run's own configuration; sources that are Python objects beside."""
    objects = {n: given.pop(n) for n in ("train", "val") if not isinstance(given.get(n), str | Path | None)}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    stored = dataclasses.asdict(run_data(run))
    return typed({"data": {**stored, **plain}}).data, objects


def _open(config: DataConfig, objects: Mapping[str, Any], name: str) -> Source:
    spec = objects.get(name, getattr(config, name))
    if spec is None:
        raise ConfigError(
            f"kNN needs labelled images: give --dataset NAME, or --data.{name} (train is the bank, val the queries)."
        )
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
