"""A trained encoder or classifier as a file for other programs, checked against PyTorch on real images."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from sklearn.datasets import load_sample_images
from torch import Tensor

from nextblock.checkpoints.graphs import Exportable, GraphConfig, open_graph, require_format, write_graph
from nextblock.checkpoints.pretrained import preprocessing_text, read_about
from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source, open_source
from nextblock.durable import flush_tree, give_name, make_folder
from nextblock.errors import RunError
from nextblock.jobs.export_card import graph_card
from nextblock.jobs.export_report import BATCHES, Checked, check, described, measure, show, table_rows
from nextblock.jobs.opening import HUB, one_or_many, open_classifier, open_encoder, run_data, weights_in
from nextblock.jobs.output import require_some, tell_bad
from nextblock.training.run_record import job_of, read_config, read_json
from nextblock.xtra.classifier import Classifier
from nextblock.xtra.model import Encoder

PHOTOGRAPHS = "12 parts of the two sample photographs of scikit-learn"


@dataclass
class Exported:
    """A folder with a graph that gave what PyTorch gives.

    difference: the largest, relative to the largest value. rows: of the table: format, size_mb, difference, and the
    median milliseconds a batch by batch size.
    """

    folder: Path
    difference: float
    rows: list[dict[str, Any]]


def export(
    *,
    run: str | Path,
    format: str = "onnx",
    out: str | Path | None = None,
    images: Any = None,
    output: str | None = None,
    last_layers: int = 1,
    final_norm: bool = False,
    bidirectional: bool = False,
    uint8: bool = False,
    split: str = "test",
    image_column: str | None = None,
    quiet: bool = False,
) -> Exported:
    """Write an encoder or a classifier as ONNX or as torch.export's archive, to be used without this package.

    The graph takes any number of images of the one size that the model's preprocessing gives, and is checked on real
    images, in batches of 1, 3 and 8: a difference above 1e-4 of the largest value is an error, and leaves nothing.

    Args:
        run: a run folder, or a folder of exported weights.
        format: "onnx" (for onnxruntime and others) or "torch" (for torch.export.load).
        out: a new folder; by default beside the run's exported weights, as in RUN/exported_onnx, and for weights of
            the hub in the current one, as in NAME_onnx.
        images: to check on: image files and folders, Parquet files or hf:NAME; in Python any source of images. By
            default parts of two photographs that come with scikit-learn.
        output: "tokens" (a vector for every patch, raster order), "pooled" (their mean) or "logits" (of the classes);
            by default the logits of what has a head, else the tokens.
        last_layers: mean over the outputs of so many last layers.
        final_norm: the tokens after the encoder's final norm instead.
        bidirectional: let all tokens see each other; by default the block-causal mask is part of the graph.
        uint8: the graph takes pixels as they are, uint8 [B, H, W, C], and normalises them inside.
        split: which split, where the images have several.
        image_column: of tables; the run's own when left out.
        quiet: print nothing.

    Writes the graph, config.json (names, shapes, mask, hash of the weights), preprocessor_config.json, README.md (how
    to run it), result.json and table.md. Raises ConfigError, DataError, RunError or CheckpointError.
    """
    console = Console(quiet=quiet)
    require_format(format)
    kind, weights = _found(Path(run))
    config = GraphConfig(
        output or ("logits" if kind == "xtra_classifier" else "tokens"), last_layers, final_norm, bidirectional
    )
    folder = _new_folder(out, _named_after(run, weights), format)
    model, preprocessing, where = _opened(run, config.output)
    statistics = (preprocessing.mean or (), preprocessing.std or ()) if uint8 else None
    module = Exportable(model, config, preprocessing.size_px, statistics)
    source = _source(images, split, image_column or run_data(run).image_column, preprocessing.channels)
    pixels = _pixels(source, preprocessing, console)
    with _whole_folder(folder) as beside:
        files = write_graph(module, beside, format)
        graph = open_graph(beside, format, torch.get_num_threads())
        checked = check(module, graph, pixels, preprocessing, where)
        rows = table_rows(module, format, files, checked, measure(module, graph, pixels, preprocessing))
        about = described(module, format, files, Path(run), _sha256(where))
        _write_about(
            beside, about, preprocessing, checked, rows, source.description if images is not None else PHOTOGRAPHS
        )
    show(console, rows, checked, folder, about)
    return Exported(folder, checked.difference, rows)


def _found(run: Path) -> tuple[str, Path | None]:
    """What kind of model is there, and the folder of its weights, if it has one. Raises RunError for a generator."""
    weights = weights_in(run)
    if weights:
        kind = str(read_about(weights).get("model_type"))
    else:
        kind = "xar" if job_of(read_config(run)) == "train-generator" else "xtra"
    if kind == "xar":
        raise RunError(
            f"{run} holds a generator, and generators are not exported: sampling is a loop around the model, not one "
            f"graph. Make images with it: nextblock sample {run}. Encoders and classifiers can be exported."
        )
    return kind, weights


def _opened(run: str | Path, output: str) -> tuple[Encoder | Classifier, Preprocessing, Path]:
    """What gives that output, how images become its input, and where the weights are."""
    if output == "logits":
        classifier = open_classifier(run, device="cpu")
        return classifier.model, classifier.preprocessing, classifier.where
    encoder = open_encoder(run, device="cpu")
    return encoder.encoder, encoder.preprocessing, encoder.where


def _named_after(run: str | Path, weights: Path | None) -> Path:
    """What the new folder lies beside: the weights; for those of the hub, in a cache, a name in the current folder."""
    if str(run).startswith(HUB):
        name, _, _ = str(run).removeprefix(HUB).partition("@")
        return Path(Path(name).name)
    return weights or Path(run) / "exported"


def _new_folder(out: str | Path | None, weights: Path, format: str) -> Path:
    """Where the graph will be. Raises RunError when something is there already."""
    weights = Path(os.path.abspath(weights)) if weights.name in ("", "..") else weights
    folder = weights.with_name(f"{weights.name}_{format}") if out is None else Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder} exists already, and nothing is ever overwritten. Choose another --out.")
    return folder


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to; it is flushed and becomes `folder` when all went well, and is gone
    otherwise."""
    beside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of an export that was killed
        make_folder(beside)
        yield beside
        flush_tree(beside)
        give_name(beside, folder)
    except OSError as error:
        raise RunError(f"cannot write {folder}: {error.strerror or error}. Choose another --out.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _source(images: Any, split: str, column: str, channels: int) -> Source:
    if images is not None:
        return open_source(one_or_many(images), split=split, image_column=column)
    photographs = np.stack(load_sample_images().images)  # [2, 427, 640, 3]
    parts = [photo[r : r + 213, c : c + 213] for photo in photographs for r in (0, 213) for c in (0, 213, 426)]
    # A model of other channels still sees real planes; of 1 channel, what decoding makes of colours.
    planes = range(3) if channels == 1 else [i % 3 for i in range(channels)]
    return open_source(np.stack(parts)[..., list(planes)])


def _pixels(source: Source, preprocessing: Preprocessing, console: Console) -> Tensor:
    """As many images as the check takes, uint8 [M, H, W, C], evenly chosen; of fewer, some several times."""
    count = sum(BATCHES)
    most = min(count, len(source))
    indices = [i * len(source) // most for i in range(most)]
    (batch,) = evaluation_batches(source, preprocessing, batch_size=count, indices=indices)
    tell_bad(console, batch.bad)
    require_some(len(batch), batch.bad)
    return batch.images[torch.arange(count) % len(batch)]


def _sha256(where: Path) -> str:
    """The recorded hash of the weights at `where`: a folder of weights, or a checkpoint of a run still going."""
    if (where / "checkpoint.json").is_file():
        return str(read_json(where / "checkpoint.json", ["sha256"], "Choose another checkpoint.")["sha256"])
    return str(read_about(where)["sha256"])


def _write_about(
    folder: Path,
    about: dict[str, Any],
    preprocessing: Preprocessing,
    checked: Checked,
    rows: list[dict[str, Any]],
    images: str,
) -> None:
    result = {**vars(checked), "images": images, "threads": torch.get_num_threads(), "rows": rows}
    (folder / "preprocessor_config.json").write_text(preprocessing_text(preprocessing.to_dict()))
    for name, values in (("config.json", about), ("result.json", result)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    card, table = graph_card(about, preprocessing, rows, checked)
    (folder / "README.md").write_text(card)
    (folder / "table.md").write_text(table)
