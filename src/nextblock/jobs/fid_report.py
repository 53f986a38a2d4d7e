"""What `nextblock fid` found: on the console and as a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from nextblock.evaluation.generation import KID_SUBSET_SIZE, KID_SUBSETS, Watch
from nextblock.training.run_folder import write_text

FILE = "fid.json"
NEIGHBOURS = 3


@dataclass(frozen=True)
class SetReport:
    """One of the two sets. images: how many were used, None for statistics alone. statistics_of: how many images the
    statistics are of that were taken from a file, None where it does not say or there are none."""

    what: str
    images: int | None
    statistics_of: int | None
    left_out: int
    of_another_size: int


@dataclass(frozen=True)
class Judged:
    """Samples against a reference.

    metric: what the distance is called, "FID" or "Fréchet distance". features: which, with their SHA-256; told: in a
    line. size_px: height and width that images were judged at; None for statistics. results: frechet, frechet_counts,
    dimensions, and where both sets are images kid, kid_std, precision, recall, counts. floor: the same numbers of the
    reference against itself, in two halves; None for statistics. inception_score: mean, std, images; None for other
    features. notes: what limits the numbers. folder: where they were written.
    """

    metric: str
    features: dict[str, Any]
    told: str
    samples: SetReport
    reference: SetReport
    size_px: tuple[int, int] | None
    results: dict[str, Any]
    floor: dict[str, Any] | None
    inception_score: dict[str, Any] | None
    notes: list[str]
    environment: dict[str, Any] = field(repr=False)
    folder: Path | None = None

    @property
    def frechet(self) -> float:
        return float(self.results["frechet"])


def notes_on(
    samples: SetReport,
    reference: SetReport,
    results: dict[str, Any],
    floor: dict[str, Any] | None,
    size_px: tuple[int, int] | None,
) -> list[str]:
    """What limits the numbers."""
    notes = []
    width = results["dimensions"]
    for side, count in zip(("samples", "reference images"), results["frechet_counts"], strict=True):
        if count is not None and count <= width:
            notes.append(
                f"{count:,} {side} in {width:,} dimensions: their covariance is singular. The Fréchet distance is not "
                "comparable with one of another number of images."
            )
    for side, report in (("samples", samples), ("reference images", reference)):
        if report.of_another_size and size_px:
            notes.append(
                f"{report.of_another_size:,} of the {report.images:,} {side} are not {size_px[0]} x {size_px[1]} "
                "pixels and were resized and cropped: a part of the distance may be that."
            )
    if floor is not None:
        notes.append(_on_floor(results["frechet_counts"][0], floor["counts"]))
    elif reference.images is None:
        notes.append("No floor: the reference is statistics, and they cannot be split.")
    return notes


def _on_floor(samples: int | None, halves: Sequence[int]) -> str:
    told = (
        f"The floor is the reference against itself, two random halves of it ({_counts(halves)} images). A Fréchet "
        "distance is the larger the fewer the images, "
    )
    if samples is not None and samples < min(halves):
        return told + f"so for {samples:,} samples this floor is too low. --count {samples} takes as many of each set."
    return told + "so with half of them this floor is too high rather than too low."


def tell(console: Console, judged: Judged) -> None:
    """The numbers as a table, each with its number of images, and what to know about them."""
    if not console.is_terminal:
        console.width = max(console.width, 90)
    for name, side in (("samples", judged.samples), ("reference", judged.reference)):
        left_out = f", {side.left_out} left out" if side.left_out else ""
        console.print(f"{name}: {side.what}{left_out}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"in: {judged.told}", highlight=False, markup=False, soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for heading in ("images", judged.metric, "KID", "precision", "recall"):
        table.add_column(heading, justify="right", no_wrap=heading == "KID")
    table.add_row("samples", *_cells(judged.results))
    if judged.floor is not None:
        table.add_row("floor", *_cells(judged.floor))
    console.print(table)
    if score := judged.inception_score:
        told = f"Inception score of the {score['images']:,} samples: {score['mean']:.2f} ± {score['std']:.2f}"
        console.print(told, highlight=False)
    for note in judged.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    if judged.folder is not None:
        console.print(f"written: {judged.folder / FILE}", highlight=False, markup=False, soft_wrap=True)


def _cells(found: dict[str, Any]) -> Iterator[str]:
    yield _counts(found.get("frechet_counts") or found["counts"])
    yield _number(found["frechet"])
    deviation = found.get("kid_std")
    yield _number(found.get("kid"), "{:.3g}") + ("" if deviation is None else f" ± {deviation:.1g}")
    yield from (_number(found.get(name), "{:.3f}") for name in ("precision", "recall"))


def _counts(counts: Sequence[int | None]) -> str:
    return " to ".join("?" if count is None else f"{count:,}" for count in counts)


def _number(value: float | None, form: str = "{:.4g}") -> str:
    return "-" if value is None else form.format(value)


def write_judged(folder: Path, judged: Judged) -> None:
    """fid.json: all of it, and how the numbers were computed."""
    values = dataclasses.asdict(judged)
    values["folder"] = str(folder)
    values["computed"] = {
        "frechet": "squared 2-Wasserstein distance of Gaussians, covariance divided by N - 1, float64",
        "kid": f"unbiased, kernel (x.y / D + 1)^3, {KID_SUBSETS} subsets of at most {KID_SUBSET_SIZE} images, float64",
        "precision and recall": f"k = {NEIGHBOURS} nearest neighbours, all images, float64",
        "inception_score": "10 splits in random order, softmax without the bias of the last layer",
        "floor": "two random halves of the reference",
    }
    write_text(folder / FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def bars(console: Console) -> Iterator[Watch]:
    """A progress bar for each thing that is computed, by its name; in a terminal only."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def watch(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield watch


__all__ = ["FILE", "Judged", "SetReport", "bars", "notes_on", "tell", "write_judged"]
