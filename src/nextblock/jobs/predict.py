"""Which class is it? The predictions of a trained head, to a file or in memory."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from nextblock.data.loading import default_workers, evaluation_batches
from nextblock.data.preprocess import normalize
from nextblock.data.sources import Source, open_source
from nextblock.data.stream import BadSample, Batch
from nextblock.errors import CheckpointError
from nextblock.evaluation.inference import device_of, inference
from nextblock.jobs.opening import OpenedClassifier, one_or_many, open_classifier, require_positive
from nextblock.jobs.output import new_file, plain, require_some, say, tell_bad, written_whole
from nextblock.training.run_record import read_config

SUFFIXES = (".csv",)
TOP = 5
MOST_SHOWN = 20  # images, in the shell
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the beginning of one


@dataclass
class Predictions:
    """The most probable classes of M images, the first one first.

    names: one per image. classes: names, str [M, k]. probabilities: float32 [M, k], of all classes together 1.
    bad: left out, with reasons.
    """

    names: list[str]
    classes: NDArray[np.str_]
    probabilities: NDArray[np.float32]
    bad: list[BadSample]


def predict(
    *,
    run: str | Path,
    images: Any,
    out: str | Path | None = None,
    top: int = TOP,
    split: str = "test",
    image_column: str | None = None,
    batch_size: int = 64,
    workers: int = -1,
    device: str = "auto",
    quiet: bool = False,
) -> Predictions | Path:
    """Predict the classes of images with a probe or a fine-tuned model.

    Args:
        run: a finished probe or fine-tuning run, or a folder of its exported weights.
        images: image files and folders, Parquet files or hf:NAME; in Python any source of images.
        out: a new .csv file (name, class_1, probability_1, class_2, ...); without it the predictions are returned,
            and those of the first 20 images are shown. Names stand in the file as they are: where one would be a
            formula to a spreadsheet, that is told.
        top: so many classes for each image, the most probable ones.
        split: which split, where the source has several.
        image_column: of tables; the run's own when left out.
        batch_size: images per forward pass.
        workers: loading processes; -1 = chosen from the cores.
        device: "auto", "cpu" or "cuda".
        quiet: print nothing.

    Raises ConfigError, DataError, RunError or CheckpointError; broken images are left out and told.
    """
    require_positive(top=top, batch_size=batch_size)
    console = Console(quiet=quiet)
    target = None if out is None else new_file(out, SUFFIXES)
    opened = open_classifier(run, device)
    source = open_source(one_or_many(images), split=split, image_column=image_column or _image_column(Path(run)))
    known = len(opened.model.classes)
    if top > known and top != TOP:
        told = f"{opened.where} knows {known} classes: all of them are given, not {top}."
        say(console, told)
    loaders = default_workers() if workers < 0 else workers
    batches = evaluation_batches(source, opened.preprocessing, batch_size=batch_size, workers=loaders)
    shown = track(
        batches, total=-(-len(source) // batch_size), description="predicting", console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    parts = _predictions(opened, shown, source, min(top, known))
    if target is None:
        made = _collect(parts)
        tell_bad(console, made.bad)
        _show(console, made)
        return made
    count, formulas, bad = _write_csv(target, parts, min(top, known))
    tell_bad(console, bad)
    if formulas:
        say(
            console, f"{formulas:,} rows hold a name that begins with = + - or @: import them to a spreadsheet as text."
        )
    say(console, f"{count:,} images predicted: {target}")
    return target


def _image_column(run: Path) -> str:
    """The column that the run itself took its images from."""
    stored = read_config(run) if (run / "config.yaml").is_file() else {}
    columns = (section.get("image_column") for section in stored.values() if isinstance(section, Mapping))
    return next((str(column) for column in columns if column), "image")


def _predictions(opened: OpenedClassifier, batches: Iterable[Batch], source: Source, top: int) -> Iterator[Predictions]:
    """Batch by batch, so that memory stays that of one."""
    classes, device = np.array(opened.model.classes), device_of(opened.model)
    for batch in batches:
        found, order = np.zeros((0, top), np.float32), np.zeros((0, top), np.int64)
        if len(batch):
            with inference(opened.model):
                x = normalize(batch.images.to(device), None, opened.preprocessing)
                best = opened.model.probabilities(x).topk(top)  # [B, top]
            found, order = best.values.cpu().numpy(), best.indices.cpu().numpy()
            if not np.isfinite(found).all():
                raise CheckpointError(f"{opened.where} gives numbers that are not finite. Did its training diverge?")
        yield Predictions([source.name(int(i)) for i in batch.indices], classes[order], found, list(batch.bad))


def _collect(parts: Iterable[Predictions]) -> Predictions:
    every = list(parts)
    names = [name for part in every for name in part.names]
    bad = [sample for part in every for sample in part.bad]
    require_some(len(names), bad)
    classes = np.concatenate([part.classes for part in every])
    return Predictions(names, classes, np.concatenate([part.probabilities for part in every]), bad)


def _write_csv(target: Path, parts: Iterable[Predictions], top: int) -> tuple[int, int, list[BadSample]]:
    """How many images, how many rows with a name that is a formula to a spreadsheet, and who was left out."""
    count, formulas, bad = 0, 0, list[BadSample]()
    # surrogateescape: the name of a file need not be UTF-8, and comes out as the bytes that it is.
    with (
        written_whole(target) as beside,
        open(beside, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        rows = csv.writer(file)
        rows.writerow(["name", *(f"{what}_{i}" for i in range(1, top + 1) for what in ("class", "probability"))])
        for part in parts:
            bad += part.bad
            count += len(part.names)
            for name, classes, probabilities in zip(part.names, part.classes, part.probabilities, strict=True):
                pairs = zip(classes, probabilities, strict=True)
                formulas += any(str(text).startswith(FORMULA) for text in (name, *classes))
                rows.writerow([name, *(value for label, p in pairs for value in (label, f"{p:.6g}"))])
        require_some(count, bad)
    return count, formulas, bad


def _show(console: Console, made: Predictions) -> None:
    table = Table(Column("image", overflow="fold"), "most probable classes", box=None)
    for name, classes, probabilities in zip(made.names[:MOST_SHOWN], made.classes, made.probabilities, strict=False):
        said = ", ".join(f"{label} {100 * p:.1f} %" for label, p in zip(classes, probabilities, strict=True))
        table.add_row(plain(name), plain(said))
    console.print(table)
    if len(made.names) > MOST_SHOWN:
        more = len(made.names) - MOST_SHOWN
        say(console, f"and {more:,} more images; all of them to a file: --out FILE.csv")
