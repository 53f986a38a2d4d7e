"""What `nextblock fid` found: on the console and as a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from nextblock.evaluation.generation import KID_SUBSET_SIZE, KID_SUBSETS, NEIGHBOURS, Watch
from nextblock.training.run_record import claim_folder, write_text

FILE = "fid.json"
HIGH_RECALL, NO_PRECISION = 0.9, 0.05
_PRECISION = f"k = {NEIGHBOURS} nearest neighbours, of precision_counts images drawn at random, float64"
_COMPUTED = {
    "frechet": "squared 2-Wasserstein distance of Gaussians, covariance divided by N - 1, float64",
    "kid": f"unbiased, kernel (x.y / D + 1)^3, {KID_SUBSETS} subsets of at most {KID_SUBSET_SIZE} images, float64",
    "precision": _PRECISION,
    "recall": _PRECISION,
}


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
    dimensions, and where both sets are images kid, kid_std, precision, recall, precision_counts, counts; without what
    was not asked for. floor: the same numbers of the reference against itself, in two halves; None for statistics.
    inception_score: mean, std, images; None for other features. notes: what limits the numbers. folder: where they
    were written.
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
    def frechet(self) -> float | None:
        """None where it was not asked for."""
        return self.results.get("frechet")


def notes_on(
    samples: SetReport,
    reference: SetReport,
    results: dict[str, Any],
    floor: dict[str, Any] | None,
    size_px: tuple[int, int] | None,
) -> list[str]:
    """What limits the numbers."""
    notes = []
    frechet_counts = results.get("frechet_counts", [None, None])
    for side, count in zip(("samples", "reference images"), frechet_counts, strict=True):
        if count is not None and count <= results["dimensions"]:
            notes.append(
                f"{count:,} {side} in {results['dimensions']:,} dimensions: their covariance is singular. The Fréchet "
                "distance is not comparable with one of another number of images."
            )
    if "precision_counts" in results and results["precision_counts"] != results["counts"]:
        notes.append(_on_precision(*results["precision_counts"], *results["counts"]))
    if (results.get("recall") or 0) > HIGH_RECALL and (results.get("precision") or 0) < NO_PRECISION:
        notes.append(
            f"Recall is {results['recall']:.2f} though precision is {results['precision']:.2f}: samples that lie far "
            "from each other have wide balls around them, and those hold nearly anything. Recall says little here."
        )
    for side, report in (("samples", samples), ("reference images", reference)):
        if report.of_another_size and size_px:
            notes.append(
                f"{report.of_another_size:,} of the {report.images:,} {side} are not {size_px[0]} x {size_px[1]} "
                "pixels and were resized and cropped: a part of the distance may be that."
            )
    if floor is not None:
        notes.append(_on_floor(frechet_counts[0], floor["counts"], "frechet" in floor))
    elif reference.images is None:
        notes.append("No floor: the reference is statistics, and they cannot be split.")
    return notes


def _on_precision(samples: int, reference: int, all_samples: int, all_reference: int) -> str:
    return (
        f"Precision and recall are of {samples:,} of the {all_samples:,} samples and {reference:,} of the "
        f"{all_reference:,} reference images, drawn at random: their work grows with the square (--precision_count)."
    )


def _on_floor(samples: int | None, halves: Sequence[int], frechet: bool) -> str:
    told = f"The floor is the reference against itself, two random halves of it ({_counts(halves)} images)."
    if not frechet:
        return told
    told += " A Fréchet distance is the larger the fewer the images, "
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
    named = {"frechet": judged.metric, "kid": "KID", "precision": "precision", "recall": "recall"}
    asked = [name for name in named if name in {**(judged.floor or {}), **judged.results}]
    for heading in ("images", *(named[name] for name in asked)):
        table.add_column(heading, justify="right", no_wrap=heading == "KID")
    for what, found in (("samples", judged.results), ("floor", judged.floor)):
        if found is not None:
            table.add_row(what, _counts(found.get("frechet_counts") or found["counts"]), *_cells(found, asked))
    console.print(table)
    if score := judged.inception_score:
        told = f"Inception score of the {score['images']:,} samples: {score['mean']:.2f} ± {score['std']:.2f}"
        console.print(told, highlight=False)
    for note in judged.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    if judged.folder is not None:
        console.print(f"written: {judged.folder / FILE}", highlight=False, markup=False, soft_wrap=True)


def _cells(found: dict[str, Any], asked: Sequence[str]) -> Iterator[str]:
    forms = {"frechet": "{:.4g}", "kid": "{:.3g}", "precision": "{:.3f}", "recall": "{:.3f}"}
    for name in asked:
        value, deviation = found.get(name), found.get("kid_std") if name == "kid" else None
        shown = "-" if value is None else forms[name].format(value)
        yield shown + ("" if deviation is None else f" ± {deviation:.1g}")


def _counts(counts: Sequence[int | None]) -> str:
    return " to ".join("?" if count is None else f"{count:,}" for count in counts)


@contextmanager
def claimed(folder: Path | None) -> Iterator[None]:
    """Hold a new or empty folder; where it was made for nothing, because what follows fails, it is gone again.

    None = there is none to hold. Raises RunError when something is in it.
    """
    if folder is None:
        yield
        return
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        claim_folder(folder)
        yield
    except BaseException:
        with suppress(OSError):  # one that holds something stays
            for path in new:
                path.rmdir()
        raise


def write_judged(folder: Path, judged: Judged) -> None:
    """fid.json: all of it, and how the numbers were computed."""
    values = dataclasses.asdict(judged)
    values["folder"] = str(folder)
    values["computed"] = {name: how for name, how in _COMPUTED.items() if name in judged.results}
    if judged.inception_score is not None:
        values["computed"]["inception_score"] = "10 splits in random order, softmax without the bias of the last layer"
    if judged.floor is not None:
        values["computed"]["floor"] = "two random halves of the reference"
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


__all__ = ["FILE", "Judged", "SetReport", "bars", "claimed", "notes_on", "tell", "write_judged"]
