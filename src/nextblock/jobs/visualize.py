"""Look at an encoder: its features as colours, its attention, nearest images, the mask, the effect of cell size."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nextblock.data.loading import default_workers, evaluation_batches
from nextblock.data.sources import Source, open_source
from nextblock.data.stream import BadSample, Batch
from nextblock.errors import ConfigError
from nextblock.evaluation.features import FeatureConfig
from nextblock.evaluation.pca_maps import ColourBasis
from nextblock.jobs.embedded_file import record_of
from nextblock.jobs.opening import OpenedEncoder, one_or_many, open_encoder, require_positive, run_data
from nextblock.jobs.output import require_some, say, tell_bad
from nextblock.jobs.visualize_neighbours import UNRECORDED, find_neighbours, open_bank
from nextblock.jobs.visualize_page import draw_page
from nextblock.jobs.visualize_seen import numbers, see, told
from nextblock.jobs.visualize_settings import MOST_IMAGES, Tokens, VisualizeSettings, checked_settings
from nextblock.training.run_record import claim_folder, to_json, write_text

# What colours are of. Not the size of the images: in two sizes the same colour shall mean the same.
COLOURED = ("weights", "last_layers", "final_norm", "bidirectional")


@dataclass(frozen=True)
class Visualized:
    """What was made.

    folder: of everything. page: `index.html`, with all pictures inside. pictures: PNG files. colours: `colours.npz`,
    for `--colours`. numbers: `visualize.json`. names: of the images. bad: left out, with reasons.
    """

    folder: Path
    page: Path
    pictures: list[Path]
    colours: Path
    numbers: Path
    names: list[str]
    bad: list[BadSample]


def visualize(
    *,
    run: str | Path,
    images: Any,
    out: str | Path | None = None,
    count: int = 8,
    last_layers: int = 1,
    final_norm: bool = False,
    bidirectional: bool = False,
    colours: str | Path | None = None,
    layers: list[int] | None = None,
    heads: list[int] | None = None,
    tokens: Tokens = None,
    among: Any = None,
    among_images: Any = None,
    neighbours: int = 5,
    image_size_px: int = 0,
    split: str = "train",
    among_split: str = "train",
    image_column: str | None = None,
    batch_size: int = 64,
    workers: int = -1,
    device: str = "auto",
    quiet: bool = False,
) -> Visualized:
    """Draw what an encoder makes of images: its features as colours, where patches look, the mask, nearest images.

    Layers, heads, rows and columns are numbered from 0.

    Args:
        run: a run folder, or a folder of exported weights.
        images: image files and folders, Parquet files or hf:NAME; in Python any source of images.
        out: a new or empty folder; by default a dated one under runs/.
        count: no more than so many images, evenly chosen from the source.
        last_layers: features are the mean over the outputs of so many last layers.
        final_norm: the tokens after the encoder's final norm instead.
        bidirectional: let all tokens see each other; by default the encoder keeps its block-causal mask.
        colours: the colours.npz of another page, so that the same colour means the same features in both.
        layers: whose attention is drawn, counted from 1; the last one when left out.
        heads: whose attention is drawn beside the mean of all, counted from 0; every one (of more than 12, 12) when
            left out.
        tokens: the patches that look, rows and columns from 0 in quotes, as in '3,4 7,7'; the middle, and where heads
            differ most, when left out.
        among: where nearest images are looked for: images as above, or a file written by embed with the same options.
        among_images: the images that such a file was made of, to show them; else their names alone are shown.
        neighbours: so many nearest images for each.
        image_size_px: use images of this size instead of that of training; the cells must fit.
        split: which split, where the source has several.
        among_split: which split of the images to look among.
        image_column: of tables; the run's own when left out.
        batch_size: images per forward pass.
        workers: loading processes; -1 = chosen from the cores.
        device: "auto", "cpu" or "cuda".
        quiet: print nothing.

    Writes index.html (one file, every picture inside), the pictures, colours.npz and visualize.json (the numbers).
    Raises ConfigError, DataError, RunError or CheckpointError; broken images are left out and told.
    """
    require_positive(count=count, neighbours=neighbours, batch_size=batch_size)
    if count > MOST_IMAGES:
        raise ConfigError(f"--count must be at most {MOST_IMAGES}, to fit on a page; got {count}.")
    console = Console(quiet=quiet)
    opened = _of_size(open_encoder(run, device), image_size_px)
    features = FeatureConfig(last_layers=last_layers, pool=False, bidirectional=bidirectional, final_norm=final_norm)
    settings = _settings(opened, features, layers, heads, tokens)
    record = record_of(opened, features)
    about = {name: record[name] for name in COLOURED}
    basis = _stored_colours(colours, opened, about, console)
    column = image_column or run_data(run).image_column
    source = open_source(one_or_many(images), split=split, image_column=column)
    bank = None
    if among is not None:
        bank = open_bank(
            among, among_images, neighbours, split=among_split, image_column=column, record=record, console=console
        )
    elif among_images is not None:
        raise ConfigError("--among_images are the pictures of a file of features: give that file as --among.")
    folder = Path(out) if out is not None else Path("runs") / f"visualize-{time.strftime('%Y%m%d-%H%M%S')}"
    with _claimed(folder):
        batch = _chosen(source, opened, count, console)
        names = [source.name(int(i)) for i in batch.indices]
        seen = see(opened, settings, batch, names, basis, about, batch_size)
        if bank is not None:
            loaders = default_workers() if workers < 0 else workers
            pooled = dataclasses.replace(features, pool=True)
            seen.neighbours = find_neighbours(
                bank, opened, batch, pooled, neighbours, batch_size=batch_size, workers=loaders, console=console
            )
            seen.bank = f"{bank.count:,} images ({bank.description})"
        seen.about = told(run, opened, settings, len(names))
        seen.basis.save(folder / "colours.npz")
        write_text(folder / "visualize.json", to_json(numbers(seen)))
        page, pictures = draw_page(seen, folder, f"What {Path(run).name} sees")
    say(console, f"{len(pictures)} pictures on one page: {page}")
    return Visualized(folder, page, pictures, folder / "colours.npz", folder / "visualize.json", names, list(batch.bad))


def _of_size(opened: OpenedEncoder, size_px: int) -> OpenedEncoder:
    """The same with images of another size, as much of each being cut away as in training; 0: as it is."""
    if size_px < 0:
        raise ConfigError(f"--image_size_px must be a size in pixels, or 0 for that of training; got {size_px}.")
    if not size_px:
        return opened
    old = opened.preprocessing
    resize_px = max(size_px, round(old.shorter_side_px * size_px / max(old.size_px)))
    new = dataclasses.replace(old, size_px=(size_px, size_px), resize_px=resize_px)
    return dataclasses.replace(opened, preprocessing=new)


def _settings(
    opened: OpenedEncoder, features: FeatureConfig, layers: list[int] | None, heads: list[int] | None, tokens: Tokens
) -> VisualizeSettings:
    preprocessing = opened.preprocessing
    blank = torch.empty(1, preprocessing.channels, *preprocessing.size_px)
    ordering = opened.encoder.ordering_for(blank, features.bidirectional)
    return checked_settings(opened.encoder, ordering, features, layers, heads, tokens)


def _stored_colours(
    path: str | Path | None, opened: OpenedEncoder, about: Mapping[str, Any], console: Console
) -> ColourBasis | None:
    if path is None:
        return None
    basis = ColourBasis.load(path)
    basis.require_fit(opened.encoder.config.width, about, path)
    if "weights" not in basis.about:
        say(console, f"{path} {UNRECORDED}")
    return basis


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Claimed at once, so that a wrong --out is told before the work; gone again when nothing was written."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    claim_folder(folder)
    try:
        yield
    finally:
        for path in made:
            if any(path.iterdir()):
                break
            path.rmdir()


def _chosen(source: Source, opened: OpenedEncoder, count: int, console: Console) -> Batch:
    """Evenly chosen images in one batch; those that are broken are told. Raises DataError when all are."""
    count = min(count, len(source))
    indices = [i * len(source) // count for i in range(count)]
    batch = next(evaluation_batches(source, opened.preprocessing, batch_size=count, indices=indices))
    require_some(len(batch), batch.bad)
    tell_bad(console, batch.bad)
    return batch


__all__ = ["Visualized", "visualize"]
