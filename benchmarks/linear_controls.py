"""Did a run learn anything? Its features beside random weights and raw pixels, on held-out labelled images.

    python benchmarks/linear_controls.py RUN [--train-images 20000] [--last-layers 1] [--random 3]

Uses the run's own training and validation data. Every row sees the same training images (a fixed random choice) and
all validation images; the strength of the linear classifier is chosen on 15 % of the training images. Prints a table
and writes it as JSON to benchmarks/results/. Rows that the file already holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nextblock.data.loading import evaluation_batches
from nextblock.data.sources import Source
from nextblock.data.stream import Batch
from nextblock.evaluation.features import FeatureConfig, Features, extract, pixel_features
from nextblock.evaluation.knn import knn_accuracy
from nextblock.evaluation.linear import linear_accuracy
from nextblock.jobs.opening import open_model
from nextblock.jobs.run import open_train, open_val
from nextblock.randomness import permutation
from nextblock.recipes.config import typed
from nextblock.training.run_record import read_config
from nextblock.xtra.model import Encoder

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--train-images", type=int, default=20_000)
    parser.add_argument("--last-layers", type=int, default=1)
    parser.add_argument("--random", type=int, default=3)
    parser.add_argument("--controls-only", action="store_true", help="leave the run itself for later")
    options = parser.parse_args()

    opened, config = open_model(options.run), typed(read_config(options.run))
    train, test = open_train(config, {}), open_val(config, {})
    assert test is not None, "the run has no validation data"
    chosen = permutation(0, "linear controls", len(train))[: options.train_images].tolist()
    layers = FeatureConfig(last_layers=options.last_layers)

    def batches(source: Source, indices: list[int] | None) -> Iterator[Batch]:
        return evaluation_batches(source, opened.preprocessing, batch_size=250, indices=indices)

    def measure(name: str, features: Callable[[Iterator[Batch]], Features]) -> dict[str, Any]:
        started = time.monotonic()
        bank, queries = features(batches(train, chosen)), features(batches(test, None))
        (knn,) = knn_accuracy(bank, queries, k=20).values()
        linear = linear_accuracy(bank, queries)
        row = {"name": name, "knn": knn, "linear": linear.accuracy, "seconds": time.monotonic() - started}
        print(row, flush=True)
        return row

    def of(encoder: Encoder) -> Callable[[Iterator[Batch]], Features]:
        return lambda found: extract(encoder, found, opened.preprocessing, layers)

    file = RESULTS / f"linear_controls-{options.run.name}-layers{options.last_layers}.json"
    known = {row["name"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}

    def row(name: str, features: Callable[[], Callable[[Iterator[Batch]], Features]]) -> dict[str, Any]:
        return known.get(name) or measure(name, features())

    def random(seed: int) -> Callable[[Iterator[Batch]], Features]:
        torch.manual_seed(seed)
        return of(Encoder(config.model))

    rows = [row(f"random weights, seed {seed}", partial(random, seed)) for seed in range(options.random)]
    rows.append(row("raw pixels", lambda: lambda found: pixel_features(found, opened.preprocessing)))
    if not options.controls_only:
        rows.append(row(options.run.name, lambda: of(opened.model.encoder)))
    report(file, rows, options, len(chosen), len(test))


def report(
    file: Path, rows: list[dict[str, Any]], options: argparse.Namespace, train_images: int, test_images: int
) -> None:
    table = Table("features", "kNN %", "linear %")
    for row in rows:
        table.add_row(row["name"], f"{row['knn']:.2f}", f"{row['linear']:.2f}")
    Console().print(table)
    about = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "train_images": train_images,
        "test_images": test_images,
        "last_layers": options.last_layers,
    }
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    print(file)


if __name__ == "__main__":
    main()
