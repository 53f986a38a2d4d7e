"""See it work: learn features of scattered handwritten digits, compare them with what needs no learning, and generate
digits by cells and by patches."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nextblock.data.digits import CANVAS_PX, Digits, scattered_digits
from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.evaluation.features import Features, extract, pixel_features
from nextblock.evaluation.knn import knn_accuracy
from nextblock.evaluation.linear import linear_accuracy
from nextblock.figures.curves import draw_bars, draw_curves
from nextblock.jobs.demo_generator import GUIDANCE, generate_digits
from nextblock.jobs.opening import open_model
from nextblock.jobs.output import say
from nextblock.jobs.pretrain import pretrain
from nextblock.jobs.reconstruct import reconstruct
from nextblock.recipes.config import read_recipe, typed
from nextblock.training.run_record import claim_folder, to_json, write_text
from nextblock.xtra.model import Encoder

RECIPE = "xtra_digits"
PER_ORIGINAL = 5
RANDOM_SEEDS = 3
PICTURED = 6
CHANCE = 10.0

Extract = Callable[[Digits], Features]


def demo(
    *,
    out: str | Path | None = None,
    seed: int = 0,
    compare: bool = False,
    epochs: float | None = None,
    generator_epochs: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Pre-train on scattered digits, measure the features on held-out digits, and generate digits; nothing to download.

    Controls: raw pixels, and the same encoder with random weights (the best of three is told too). Training and
    held-out canvases show different handwritten originals. Then two generators, by cells and by single patches, learn
    the digits; their samples are judged by the Fréchet distance to the real ones in the features of the encoder.

    Args:
        out: a new or empty folder; by default a dated one under runs/.
        seed: of the canvases, the weights and the training.
        compare: also pre-train with single patches as entities (next-patch prediction, as in AIM).
        epochs: passes over the canvases; the recipe's when left out.
        generator_epochs: passes over the digits; the recipe's when left out.
        quiet: print nothing.

    Returns the tables' rows, the seed and the folder; also written to `results.json` there.
    """
    console = Console(quiet=quiet)
    started = time.monotonic()
    folder = Path(out) if out is not None else Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
    claim_folder(folder)
    train, held_out = scattered_digits(seed, PER_ORIGINAL)
    console.print(
        f"{len(train.images):,} canvases of {CANVAS_PX}×{CANVAS_PX} px to learn from, {len(held_out.images):,} of "
        f"other handwriting to judge by. Each shows one digit at a random place and size.",
        highlight=False,
    )
    runs = {"XTRA, cells of 2×2 patches": _train(folder / "cells", {}, train, held_out, seed, epochs, console)}
    if compare:
        patches = {"cell_size": 1, "head_hidden": 128}
        name = "next patch (as in AIM)"
        runs[name] = _train(folder / "patches", patches, train, held_out, seed, epochs, console)
    console.print("measuring features on held-out digits ...", highlight=False)
    rows = [_row(name, train, held_out, _of_run(run)) for name, run in runs.items()]
    rows += _controls(train, held_out, _preprocessing(), seed)
    pictures = _pictures(folder, runs, rows, held_out)
    _tell(console, rows, seed)
    encoder = next(iter(runs.values()))
    generated, sheets = generate_digits(folder, encoder, seed=seed, epochs=generator_epochs, console=console)
    _tell_generated(console, generated)
    found = {"seed": seed, "rows": rows, "generated": generated}
    write_text(folder / "results.json", to_json(found))
    seconds = time.monotonic() - started
    say(console, f"{seconds:.0f} s. Everything is in {folder}; look at")
    for picture in [*pictures, *sheets]:
        say(console, f"  {picture}")
    return found | {"folder": str(folder)}


def _train(
    folder: Path,
    model: dict[str, Any],
    train: Digits,
    held_out: Digits,
    seed: int,
    epochs: float | None,
    console: Console,
) -> Path:
    say(console, f"\npre-training, {'cells' if not model else 'patches'}: {folder}")
    training: dict[str, Any] = {"seed": seed} | ({} if epochs is None else {"epochs": epochs})
    done = pretrain(
        config=RECIPE,
        data={"train": (train.images, train.labels), "val": (held_out.images, held_out.labels), "workers": 0},
        model=model,
        training=training,
        out=folder,
        quiet=console.quiet,
    )
    if done is None or not done.finished:
        raise KeyboardInterrupt  # a half-trained encoder is not to be judged
    return folder


def _preprocessing() -> Preprocessing:
    config = typed(read_recipe(RECIPE))
    return config.data.preprocessing(config.model)


def _batches(digits: Digits, preprocessing: Preprocessing) -> Any:
    return evaluation_batches(open_source((digits.images, digits.labels)), preprocessing, batch_size=256)


def _of_run(folder: Path) -> Extract:
    opened = open_model(folder)
    return lambda digits: extract(opened.model.encoder, _batches(digits, opened.preprocessing), opened.preprocessing)


def _row(name: str, train: Digits, held_out: Digits, features: Extract) -> dict[str, Any]:
    bank, queries = features(train), features(held_out)
    (knn,) = knn_accuracy(bank, queries, k=20).values()
    return {"name": name, "knn": round(knn, 2), "linear": round(linear_accuracy(bank, queries).accuracy, 2)}


def _controls(train: Digits, held_out: Digits, preprocessing: Preprocessing, seed: int) -> list[dict[str, Any]]:
    found = []
    for i in range(RANDOM_SEEDS):
        torch.manual_seed(seed * RANDOM_SEEDS + i)
        encoder = Encoder(typed(read_recipe(RECIPE)).model)

        def random(digits: Digits, encoder: Encoder = encoder) -> Features:
            return extract(encoder, _batches(digits, preprocessing), preprocessing)

        found.append(_row("random weights", train, held_out, random))
    best = {m: max(row[m] for row in found) for m in ("knn", "linear")}
    raw = _row("raw pixels", train, held_out, lambda d: pixel_features(_batches(d, preprocessing), preprocessing))
    return [{"name": f"random weights, best of {RANDOM_SEEDS}", **best, "each": found}, raw]


def _pictures(folder: Path, runs: dict[str, Path], rows: list[dict[str, Any]], held_out: Digits) -> list[Path]:
    first = next(iter(runs.values()))
    drawn = reconstruct(run=first, images=held_out.images, most=PICTURED, out=folder / "reconstructions", quiet=True)
    curves = draw_curves({name: run / "metrics.csv" for name, run in runs.items()}, folder / "curves.png")
    bars = draw_bars(rows, folder / "accuracy.png", title="Features of scattered digits", chance=CHANCE)
    return [Path(bars), Path(curves), drawn / "contact-sheet.png"]


def _tell(console: Console, rows: list[dict[str, Any]], seed: int) -> None:
    table = Table("features", "kNN %", "linear %", title=f"accuracy on held-out digits (seed {seed})")
    for row in rows:
        table.add_row(row["name"], f"{row['knn']:.1f}", f"{row['linear']:.1f}")
    console.print()
    console.print(table)


def _tell_generated(console: Console, rows: list[dict[str, Any]]) -> None:
    title = (
        "generated digits: Fréchet distance × 1000 to the real ones,\nin the features of the encoder above (not FID)"
    )
    table = Table("samples", "distance", "images", title=title)
    for row in rows:
        table.add_row(row["name"], f"{1000 * row['frechet']:.2f}", " / ".join(f"{n:,}" for n in row["images"]))
    console.print()
    console.print(table)
    console.print(
        f"Guidance {GUIDANCE:g}; lower is closer, and the last row is how close real digits come.", highlight=False
    )
