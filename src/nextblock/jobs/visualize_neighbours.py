"""The nearest images of a set: images that are embedded here, or a file written by `nextblock embed`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source, open_source
from nextblock.data.stream import BadSample, Batch
from nextblock.errors import ConfigError
from nextblock.evaluation.features import FeatureConfig, extract_batches
from nextblock.evaluation.similar import NearestImages, Similar
from nextblock.jobs.embedded_file import embedded_parts, embedded_record, is_embedded_file
from nextblock.jobs.opening import OpenedEncoder, one_or_many
from nextblock.jobs.output import say, tell_bad

UNRECORDED = "does not say of which encoder it is: an older nextblock wrote it. Make sure that it is of this one."

Shown = tuple[str, float, NDArray[np.uint8] | None]  # name, cosine, picture


@dataclass(frozen=True)
class Bank:
    """Where neighbours are looked for. images: the pictures, where they are known; file: of features, instead of
    embedding the images. count: of images."""

    images: Source | None
    file: Path | None
    count: int
    description: str


def open_bank(
    among: Any, among_images: Any, k: int, *, split: str, image_column: str, record: Mapping[str, Any],
    console: Console,
) -> Bank:  # fmt: skip
    """A file of features or a source of images. `record`: what the queries' features are of.

    Raises ConfigError when it cannot have k neighbours or is of other features, DataError when nothing usable is there.
    """
    file = Path(among).expanduser() if is_embedded_file(among) else None
    if among_images is not None and file is None:
        raise ConfigError("--among_images are the pictures of a file of features; --among are images already.")
    spec = among_images if file is not None else among
    images = None
    if spec is not None:
        images = open_source(one_or_many(spec), split=split, image_column=image_column)
    if file is not None:
        _require_same(file, record, console)
        count = sum(len(names) for names, _ in embedded_parts(file))
    else:
        assert images is not None
        count = len(images)
    if count < k:
        raise ConfigError(
            f"--among has {count} images, less than --neighbours {k}. Give more images, or a lower number."
        )
    return Bank(images, file, count, str(file) if file is not None else getattr(images, "description", ""))


def _require_same(file: Path, record: Mapping[str, Any], console: Console) -> None:
    """Raise ConfigError when the file's features are not such as the queries', which would then find themselves; a
    file that does not say is told."""
    stored = embedded_record(file)
    if stored is None:
        say(console, f"{file} {UNRECORDED}")
        return
    if stored.get("weights") != record["weights"]:
        raise ConfigError(
            f"{file} holds features of another encoder. Embed the images with this one, or give them as --among "
            "themselves."
        )
    other = [f"{name} {stored.get(name)} there, {value} here" for name, value in record.items()
             if stored.get(name) != value]  # fmt: skip
    if other:
        raise ConfigError(
            f"{file} holds features made with other options: {'; '.join(other)}. Give the same options, or "
            "the images themselves as --among."
        )


def find_neighbours(
    bank: Bank,
    opened: OpenedEncoder,
    queries: Batch,
    config: FeatureConfig,
    k: int,
    *,
    batch_size: int,
    workers: int,
    console: Console,
) -> list[list[Shown]]:
    """The k nearest images to each query, by the cosine of pooled features; a query is not its own neighbour.

    Raises ConfigError when a file's features are of another width.
    """
    features = next(iter(extract_batches(opened.encoder, [queries], opened.preprocessing, config))).values
    nearest = NearestImages(features, k)
    if bank.file is not None:
        for names, values in embedded_parts(bank.file):
            nearest.add(values, names)
    else:
        _embed(bank, opened, queries, config, nearest, batch_size, workers, console)
    found = nearest.found()
    pictures = _pictures(bank, [one for every in found for one in every], opened.preprocessing)
    return [[(one.name, one.cosine, pictures.get(one.index)) for one in every] for every in found]


def _embed(
    bank: Bank, opened: OpenedEncoder, queries: Batch, config: FeatureConfig, nearest: NearestImages,
    batch_size: int, workers: int, console: Console,
) -> None:  # fmt: skip
    """Hand every image of the source to `nearest`, under the number that it has there."""
    assert bank.images is not None
    source, preprocessing = bank.images, opened.preprocessing
    own, bad = _digests(queries), list[BadSample]()
    batches = evaluation_batches(source, preprocessing, batch_size=batch_size, workers=workers)
    shown = track(
        batches, total=-(-len(source) // batch_size), description="embedding", console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    for batch in shown:
        bad += batch.bad
        if len(batch):
            (part,) = extract_batches(opened.encoder, [batch], preprocessing, config)
            theirs = _digests(batch)
            same = np.array([[one == other for other in theirs] for one in own])
            nearest.add(part.values, [source.name(int(i)) for i in batch.indices], same, part.indices.tolist())
    tell_bad(console, bad)


def _digests(batch: Batch) -> list[bytes]:
    """Of each image's pixels: the same picture is the same image, whatever it is called."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in batch.images.numpy()]


def _pictures(bank: Bank, found: Sequence[Similar], preprocessing: Preprocessing) -> dict[int, NDArray[np.uint8]]:
    """The pixels of each, uint8 [H, W, C], by its number in the bank; those of a file are looked up by their names."""
    if bank.images is None or not found:
        return {}
    source = bank.images
    if bank.file is None:
        places = {one.index: one.index for one in found}
    else:
        names = {one.name for one in found}
        known = {name: i for i in range(len(source)) if (name := source.name(i)) in names}
        places = {one.index: known[one.name] for one in found if one.name in known}
    wanted = sorted(set(places.values()))
    read: dict[int, NDArray[np.uint8]] = {}
    for batch in evaluation_batches(source, preprocessing, batch_size=64, indices=wanted):
        read |= dict(zip(batch.indices.tolist(), batch.images.numpy(), strict=True))
    return {index: read[place] for index, place in places.items() if place in read}
