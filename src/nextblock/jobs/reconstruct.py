"""Pictures of what an encoder and its predictor expect of the next cell."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import normalize
from nextblock.data.sources import open_source
from nextblock.evaluation.reconstruction import reconstruct as reconstructions
from nextblock.figures.reconstruction import draw_contact_sheet, draw_image
from nextblock.jobs.opening import one_or_many, open_model, require_positive, run_data
from nextblock.jobs.output import require_some, say, tell_bad
from nextblock.training.run_record import claim_folder


def reconstruct(
    *,
    run: str | Path,
    images: Any,
    out: str | Path | None = None,
    most: int = 16,
    split: str = "train",
    image_column: str | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> Path:
    """Draw, for each image: the original, what the model saw, and the next-cell predictions it made.

    Predictions of normalised pixels are shown with the true mean and contrast of their cell put back. What that
    alone gives away is drawn beside them, with the errors of both.

    Args:
        run: a run folder, or a folder of exported weights.
        images: image files and folders, Parquet files or hf:NAME; in Python any source of images.
        out: a new or empty folder; by default a dated one here.
        most: no more than so many images, evenly chosen from the source.
        split: which split, where the source has several.
        image_column: of tables; the run's own when left out.
        device: "auto", "cpu" or "cuda".
        quiet: print nothing.

    Returns the folder: one picture per image, `contact-sheet.png`, and the numbers in `reconstructions.npz`.
    """
    require_positive(most=most)
    console = Console(quiet=quiet)
    opened = open_model(run, device)
    column = image_column or run_data(run).image_column
    source = open_source(one_or_many(images), split=split, image_column=column)
    count = min(most, len(source))
    indices = [i * len(source) // count for i in range(count)]
    batch = next(evaluation_batches(source, opened.preprocessing, batch_size=count, indices=indices))
    tell_bad(console, batch.bad)
    require_some(len(batch), batch.bad)
    folder = Path(out) if out is not None else Path(f"reconstructions-{time.strftime('%Y%m%d-%H%M%S')}")
    claim_folder(folder)
    device_used = next(opened.model.parameters()).device
    with torch.inference_mode():
        inputs = normalize(batch.images.to(device_used), None, opened.preprocessing)
        found = reconstructions(opened.model, inputs, opened.preprocessing)
    found.save(folder / "reconstructions.npz")
    names = [source.name(int(i)) for i in batch.indices]
    for i, name in enumerate(names):
        draw_image(found, i, folder / f"{i:03d}-{Path(name).stem}.png", name)
    draw_contact_sheet(found, names, folder / "contact-sheet.png")
    say(console, f"{len(names)} pictures and contact-sheet.png in {folder}")
    return folder
