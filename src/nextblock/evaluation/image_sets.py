"""Sets of images to be judged: whatever names them, a file of samples, or statistics that were kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nextblock.data.decode import decode
from nextblock.data.named import Columns, data_root, find, is_named, named
from nextblock.data.named.opening import find_layout, spelled
from nextblock.data.sources import Source, open_source
from nextblock.data.sources.protocol import Sample
from nextblock.errors import ConfigError, DataError, SampleError, nearest
from nextblock.evaluation.npz_files import SAMPLES, UNREADABLE, KeptStatistics, NpzImages, array_names, read_statistics

SAMPLE_RECORD, SAMPLE_IMAGES = "sample.json", "images"  # in the folder of a sampling job
RUN_RECORD = "config.yaml"  # in the folder of a training job
_TRIES = 100


@dataclass(frozen=True)
class ImageSet:
    """Images, or statistics, or both (as in ADM's reference files: some images, and statistics of all)."""

    description: str
    source: Source | None
    kept: KeptStatistics | None = None


def open_image_set(
    spec: Any,
    *,
    split: str = "train",
    image_column: str = "image",
    root: str | Path | None = None,
    scratch: Path,
) -> ImageSet:
    """Open a set of images for the metrics.

    Args:
        spec: an .npz file with samples (arr_0: uint8 [N, H, W, 3] or [N, H, W]) or with statistics (mu [D], sigma
            [D, D]); a folder that `nextblock sample` made, for its images; the name of a benchmark data set; anything
            else that `open_source` takes.
        split: which one, where there are several.
        root: the folder of the named data sets.
        scratch: a folder; a compressed sample file is unpacked there, to be read image by image.

    Raises DataError, saying what is there instead; ConfigError for the folder of a run.
    """
    if isinstance(spec, str) and is_named(spec):
        source = _open_named(spec, split, image_column, root)
    elif isinstance(spec, str | Path) and str(spec).endswith(".npz"):
        return _open_npz(Path(spec).expanduser(), scratch)
    else:
        images = _images_of(Path(spec).expanduser()) if isinstance(spec, str | Path) else None
        source = open_source(images or spec, split=split, image_column=image_column)
    if len(source) < 2:
        raise DataError(f"{source.description}: one image is not a set; a distribution needs two and wants thousands.")
    return ImageSet(source.description, source)


def _open_named(name: str, split: str, image_column: str, root: str | Path | None) -> Source:
    dataset, folder = named(name), find(name, root)
    if folder is None:
        raise DataError(
            f"{dataset.title} is not on this machine: {data_root(root) / dataset.folder} is not there. {dataset.how} "
            "Another place for all data sets: --data_root, or the variable NEXTBLOCK_DATA."
        )
    splits = find_layout(dataset, folder, Columns(image_column))
    here = spelled(split, splits)
    if here is None:
        raise DataError(f"{name} has no split '{split}'; splits: {', '.join(splits)}.{nearest(split, splits)}")
    return splits[here]()


def _images_of(folder: Path) -> Path | None:
    """Where the images of a sampling job are: beside them lie a contact sheet and an animation, which are no samples.

    None for what is no such folder. Raises ConfigError for a run, whose pictures are none either.
    """
    if (folder / RUN_RECORD).is_file():
        raise ConfigError(
            f"{folder} is the folder of a run, not of images. A generator's images are made first: nextblock sample "
            f"{folder} --out samples. An encoder's run is named with --encoder."
        )
    if not (folder / SAMPLE_RECORD).is_file():
        return None
    images = folder / SAMPLE_IMAGES
    if not images.is_dir():
        raise DataError(f"{folder} was made by nextblock sample, but its folder {images.name} is not there.")
    return images


def _open_npz(path: Path, scratch: Path) -> ImageSet:
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"no such file: {path}.{nearest(path.name, siblings)}")
    try:
        names = array_names(path)
        kept = read_statistics(path) if {"mu", "sigma"} <= set(names) else None
        source = NpzImages(path, scratch) if SAMPLES in names else None
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as an .npz file: {error}. Is it whole?") from error
    if source is None and kept is None:
        raise DataError(
            f"{path} holds {', '.join(names) or 'nothing'}; samples are an array {SAMPLES} (uint8 [N, H, W, 3]), "
            "statistics are mu and sigma."
        )
    described = [] if source is None else [source.description]
    if kept is not None:
        count = "not stated how many" if kept.statistics.count is None else f"{kept.statistics.count}"
        described.append(f"{path}: statistics of {count} images, {kept.statistics.dimensions} dimensions")
    return ImageSet("; ".join(described), source, kept)


class OneSize:
    """`source` decoded; the label of an image says whether it has another size than `size_px` (1) or not (0).

    So a loader's workers count, while they do the work, what will have to be resized.
    """

    classes: tuple[str, ...] | None = None

    def __init__(self, source: Source, size_px: tuple[int, int], channels: int, exif_orientation: bool = True) -> None:
        self._source, self._size, self._channels, self._exif = source, size_px, channels, exif_orientation
        self.description = source.description

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        name = self._source.name(index)
        content = self._source[index].content
        pixels = decode(content, name, channels=self._channels, exif_orientation=self._exif)
        return Sample(pixels, int(pixels.shape[:2] != self._size))

    def name(self, index: int) -> str:
        return self._source.name(index)

    def labels(self) -> NDArray[np.int64] | None:
        return None

    def manifest(self) -> Iterator[tuple[str, int]]:
        return self._source.manifest()


def first_shape(source: Source) -> tuple[int, int, int]:
    """Height, width and channels (1 for gray arrays, else 3) of the first image that can be read.

    Raises DataError when none of the first hundred can.
    """
    last = None
    for index in range(min(len(source), _TRIES)):
        try:
            content = source[index].content
            gray = isinstance(content, np.ndarray) and (content.ndim == 2 or content.shape[2] == 1)
            pixels = decode(content, source.name(index), channels=1 if gray else 3)
        except SampleError as error:
            last = last or error
            continue
        return int(pixels.shape[0]), int(pixels.shape[1]), int(pixels.shape[2])
    raise DataError(f"{source.description}: none of the first images can be decoded; {last}.")


__all__ = ["ImageSet", "OneSize", "first_shape", "open_image_set"]
