"""How good are generated images? Fréchet distance, KID, precision, recall and Inception score of two sets."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from nextblock.data.loading import default_workers
from nextblock.data.sources.views import Subset
from nextblock.errors import ConfigError, RunError
from nextblock.evaluation.extractors import EncoderFeatures, Extractor, InceptionFile, PixelFeatures
from nextblock.evaluation.generation import METRICS, PRECISION_COUNT, metric_hint, require_precision_count
from nextblock.evaluation.image_sets import ImageSet, first_shape, open_image_set
from nextblock.jobs.fid_report import Judged, claimed, tell, write_judged
from nextblock.jobs.fid_run import FidSettings, judge
from nextblock.jobs.opening import open_encoder, require_positive
from nextblock.randomness import shuffled
from nextblock.training.launch import pick_device

SCORE = "inception_score"
_IS = {"samples": "are", "reference": "is"}


def fid(
    *,
    samples: Any,
    reference: Any,
    inception: str | Path | None = None,
    inception_sha256: str | None = None,
    encoder: str | Path | None = None,
    pixels: bool = False,
    out: str | Path | None = None,
    save_stats: str | Path | None = None,
    split: str = "test",
    reference_split: str = "train",
    image_column: str = "image",
    data_root: str | Path | None = None,
    count: int = 0,
    size_px: int = 0,
    metrics: str = "all",
    precision_count: int = PRECISION_COUNT,
    last_layers: int = 1,
    bidirectional: bool = False,
    seed: int = 0,
    batch_size: int = 64,
    workers: int = -1,
    device: str = "auto",
    quiet: bool = False,
) -> Judged:
    """Judge generated images against real ones: Fréchet distance (FID), KID, precision, recall, Inception score.

    Args:
        samples: the images to judge: a folder, a folder of `nextblock sample`, an .npz file of samples (arr_0: uint8
            [N, H, W, 3]), a benchmark's name, Parquet or hf:NAME; in Python also uint8 arrays or any source. For the
            Fréchet distance alone, an .npz file of statistics (mu, sigma).
        reference: real images, or their statistics, named in the same ways.
        inception: images are compared by features, so give this, encoder or pixels. This is a local TorchScript file
            of Inception v3, the one that papers use (inception-2015-12-05.pt); only with its features is the distance
            called FID. Its SHA-256 is told with the result.
        inception_sha256: the hash of that file, by which you say that you trust it: loading it runs code from it.
        encoder: instead of Inception, the run of a nextblock encoder or a folder of its exported weights.
        pixels: instead of either, the pixels themselves; for small images.
        out: a new or empty folder for fid.json; features lie there while they are needed. Without it the numbers are
            only printed.
        save_stats: a new .npz file to keep the statistics of the reference in. Named as the reference the next time,
            it spares reading the images again.
        split: which split of the samples, where they have several.
        reference_split: which split of the reference, where it has several.
        image_column: the column with the images, in Parquet and hf: data.
        data_root: folder of the benchmark data sets; $NEXTBLOCK_DATA or ./datasets when left out.
        count: take so many images of each set, drawn at random, so that both are equally large; 0 = all. More than a
            set has is refused. Statistics are taken as they are.
        size_px: with inception or pixels, bring all images to this size first (shorter side, then the centre); 0 = the
            size of the first sample. An encoder has its own preprocessing.
        metrics: which numbers, separated by commas: frechet, kid, precision_recall, inception_score; "all" = whatever
            sets and features allow.
        precision_count: precision and recall take at most so many images of each set, drawn at random, as their work
            grows with the square; 0 = all.
        last_layers: of the encoder; features are the mean over the outputs of so many last layers and over tokens.
        bidirectional: let all tokens of the encoder see each other; by default it keeps its block-causal mask.
        seed: of everything drawn at random: images, the subsets of KID, the halves of the floor.
        batch_size: images per forward pass.
        workers: loading processes; -1 = chosen from the cores.
        device: "auto", "cpu" or "cuda".
        quiet: print nothing.

    The floor, the reference against itself, is of two random halves of it. Broken images are left out and told.
    Raises ConfigError, DataError, RunError or CheckpointError.
    """
    require_positive(batch_size=batch_size)
    require_precision_count(precision_count)
    if count < 0 or count == 1:
        raise ConfigError(f"--count is 0 (all) or at least 2, as one image is no set; got {count}.")
    features = _Features(inception, inception_sha256, encoder, pixels, size_px, last_layers, bidirectional)
    how = FidSettings(
        seed, batch_size, default_workers() if workers < 0 else workers, pick_device(device),
        _metrics(metrics, features.kind), precision_count,
    )  # fmt: skip
    target = None if save_stats is None else _new_statistics(Path(save_stats))
    folder = None if out is None else Path(out)
    console, opened = Console(quiet=quiet), partial(open_image_set, image_column=image_column, root=data_root)
    with claimed(folder):
        with tempfile.TemporaryDirectory(prefix=".features-", dir=folder) as scratch:
            place = Path(scratch)
            sets = {
                side: opened(spec, split=part, scratch=place)
                for side, spec, part in (("samples", samples, split), ("reference", reference, reference_split))
            }
            _check_sets(sets, features.kind, metrics, target)
            sets = _drawn(sets, count, seed)
            shape = _shape(sets, size_px)
            extractor = features.extractor(shape, how.device)
            judged = judge(sets, extractor, shape and shape[:2], how, place, target, console)
        if folder is not None:
            judged = dataclasses.replace(judged, folder=folder)
            write_judged(folder, judged)
    tell(console, judged)
    return judged


@dataclass(frozen=True)
class _Features:
    """The features that were asked for; the arguments of `fid`. Raises ConfigError for two kinds at a time."""

    inception: str | Path | None
    inception_sha256: str | None
    encoder: str | Path | None
    pixels: bool
    size_px: int
    last_layers: int
    bidirectional: bool

    def __post_init__(self) -> None:
        if len(self._kinds()) > 1:
            raise ConfigError(f"one kind of features at a time; got --{' and --'.join(self._kinds())}.")
        if self.size_px < 0:
            raise ConfigError(f"--size_px is 0 (that of the first sample) or more; got {self.size_px}.")
        if self.size_px and self.kind == "encoder":
            raise ConfigError("--size_px is for --inception and --pixels: an encoder has its own preprocessing.")

    def _kinds(self) -> list[str]:
        return [name for name in ("inception", "encoder", "pixels") if getattr(self, name)]

    @property
    def kind(self) -> str | None:
        return next(iter(self._kinds()), None)

    def extractor(self, shape: tuple[int, int, int] | None, device: str) -> Extractor | None:
        """What computes them of images of this height, width and channels; None when there are none to compute."""
        if self.inception is not None:
            return InceptionFile(self.inception, device, sha256=self.inception_sha256)
        if self.encoder is not None:
            found = open_encoder(self.encoder, device)
            return EncoderFeatures(
                found.encoder, found.preprocessing, os.fspath(self.encoder),
                last_layers=self.last_layers, bidirectional=self.bidirectional,
            )  # fmt: skip
        return PixelFeatures(shape[:2], shape[2]) if self.pixels and shape is not None else None


def _metrics(asked: str, kind: str | None) -> tuple[str, ...]:
    """The names in a text, of METRICS and SCORE. Raises ConfigError for others, and for what the features lack."""
    if asked == "all":
        return (*METRICS, SCORE) if kind == "inception" else METRICS
    known = (*METRICS, SCORE)
    names = tuple(dict.fromkeys(name.strip() for name in asked.split(",")))
    for name in names:
        if name not in known:
            hint = metric_hint(name, known)
            raise ConfigError(f"no metric is named '{name}'.{hint} There are {', '.join(known)}, and all.")
    if SCORE in names and kind != "inception":
        raise ConfigError("the Inception score needs the classes of --inception FILE.")
    if names == (SCORE,):
        raise ConfigError(f"the Inception score knows no reference; ask for another number beside: frechet,{SCORE}.")
    return names


def _check_sets(sets: dict[str, ImageSet], kind: str | None, metrics: str, target: Path | None) -> None:
    """Raise ConfigError when features are needed and none are named, or named and not needed, or when metrics are
    asked for by name that these sets do not allow."""
    images = [side for side, found in sets.items() if found.source is not None]
    if images and not kind:
        raise ConfigError(
            f"In which features? The {' and the '.join(images)} are images. Give --inception FILE (then it is FID), "
            "--encoder RUN, or --pixels for small images."
        )
    if kind and not images:
        raise ConfigError(f"both sets are statistics, so no features are computed; leave out --{kind}.")
    for name in () if metrics == "all" else _metrics(metrics, kind):
        for side in {"frechet": (), SCORE: ("samples",)}.get(name, tuple(sets)):
            if side not in images:
                sides = "both sets" if name != SCORE else "the samples"
                raise ConfigError(f"{name} needs images of {sides}, and the {side} is statistics. Leave it out.")
    if target is not None and sets["reference"].source is None:
        raise ConfigError("--save_stats keeps the statistics of reference images; this reference is statistics.")


def _new_statistics(path: Path) -> Path:
    if path.suffix != ".npz":
        raise ConfigError(f"--save_stats must end in .npz; got {path.name}.")
    if path.exists():
        raise RunError(f"{path} exists already and is not overwritten. Choose another --save_stats.")
    if not path.parent.is_dir():
        raise RunError(f"The folder {path.parent} does not exist. Make it, or choose another --save_stats.")
    return path


def _drawn(sets: dict[str, ImageSet], count: int, seed: int) -> dict[str, ImageSet]:
    """`count` random images of each set, in its order; all when count is 0. Statistics stay as they are.

    Raises ConfigError when a set has fewer.
    """
    sizes = {side: len(found.source) for side, found in sets.items() if found.source is not None}
    few = {side: size for side, size in sizes.items() if size < count}
    if few:
        told = " and ".join(f"the {side} {_IS[side]} {size:,} images" for side, size in few.items())
        raise ConfigError(
            f"--count {count} takes as many images of each set, but {told}. Take at most {min(few.values())}, or 0 for "
            "all of both."
        )
    return {side: _some(found, side, count, seed) for side, found in sets.items()}


def _some(found: ImageSet, side: str, count: int, seed: int) -> ImageSet:
    total = 0 if found.source is None else len(found.source)
    if found.source is None or not 0 < count < total:
        return found
    chosen = np.sort(shuffled(seed, f"fid/{side}", total, np.arange(count)))
    source = Subset(found.source, chosen)
    return dataclasses.replace(found, source=source, description=f"{count} of {total} images: {found.description}")


def _shape(sets: dict[str, ImageSet], size_px: int) -> tuple[int, int, int] | None:
    """Height, width and channels that images are judged at: of the first sample, else of the first reference image.

    The channels are those that the pixels are compared in. None when there are no images.
    """
    source = next((found.source for found in sets.values() if found.source is not None), None)
    if source is None:
        return None
    height, width, channels = first_shape(source)
    kept = sets["samples"].kept
    if sets["samples"].source is None and kept is not None and kept.size_px is not None:
        height, width = kept.size_px
    return (size_px or height, size_px or width, channels)


__all__ = ["Judged", "fid"]
