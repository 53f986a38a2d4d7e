"""How good are generated images? Fréchet distance, KID, precision, recall and Inception score of two sets."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from nextblock.data.loading import default_workers
from nextblock.data.sources.views import Subset
from nextblock.errors import ConfigError, RunError
from nextblock.evaluation.extractors import EncoderFeatures, Extractor, InceptionFile, PixelFeatures
from nextblock.evaluation.image_sets import ImageSet, first_shape, open_image_set
from nextblock.jobs.fid_report import Judged, tell, write_judged
from nextblock.jobs.fid_run import FidSettings, judge
from nextblock.jobs.opening import open_encoder, require_positive
from nextblock.randomness import shuffled
from nextblock.training.launch import pick_device
from nextblock.training.run_folder import claim_folder


def fid(
    *,
    samples: Any,
    reference: Any,
    inception: str | Path | None = None,
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
        samples: the images to judge: a folder, an .npz file of samples (arr_0: uint8 [N, H, W, 3]), a benchmark's
            name, Parquet or hf:NAME; in Python also uint8 arrays or any source. For the Fréchet distance alone, an
            .npz file of statistics (mu, sigma).
        reference: real images, or their statistics, named in the same ways.
        inception: features and classes of Inception v3, from the local TorchScript file that papers use
            (inception-2015-12-05.pt); only with these is the distance called FID. Loading a TorchScript file runs
            code from it: use one whose origin you know. Its SHA-256 is told with the result.
        encoder: features of a run's encoder instead, or of a folder of exported weights.
        pixels: the pixels themselves instead, for small images.
        out: a new or empty folder for fid.json; features lie there while they are needed.
        save_stats: a new .npz file for the statistics of the reference, to be named as reference the next time.
        split: of the samples, where there are several.
        reference_split: of the reference.
        image_column: of tables.
        data_root: folder of the benchmark data sets; $NEXTBLOCK_DATA or ./datasets when left out.
        count: take so many images of each set, drawn at random; 0 = all.
        size_px: with --inception or --pixels, bring all images to this size first (shorter side, then the centre);
            0 = the size of the first sample. An encoder has its own preprocessing.
        last_layers: of the encoder; features are the mean over the outputs of so many last layers and over tokens.
        bidirectional: let all tokens of the encoder see each other; by default it keeps its block-causal mask.
        seed: of what is drawn: the images of --count, halves, subsets, splits.
        batch_size: images per forward pass.
        workers: loading processes; -1 = chosen from the cores.
        device: "auto", "cpu" or "cuda".
        quiet: print nothing.

    The floor, the reference against itself, is of two random halves of it. Broken images are left out and told.
    Raises ConfigError, DataError, RunError or CheckpointError.
    """
    require_positive(batch_size=batch_size)
    chosen = [name for name, there in (("inception", inception), ("encoder", encoder), ("pixels", pixels)) if there]
    _check(chosen, size_px, count)
    console, place = Console(quiet=quiet), pick_device(device)
    target = None if save_stats is None else _new_statistics(Path(save_stats))
    folder = None if out is None else Path(out)
    if folder is not None:
        claim_folder(folder)
    how = FidSettings(seed, batch_size, default_workers() if workers < 0 else workers, place)
    with tempfile.TemporaryDirectory(prefix=".features-", dir=folder) as scratch:
        sets = {
            side: _drawn(
                open_image_set(spec, split=part, image_column=image_column, root=data_root, scratch=Path(scratch)),
                side, count, seed,
            )
            for side, spec, part in (("samples", samples, split), ("reference", reference, reference_split))
        }  # fmt: skip
        _check_sets(sets, chosen, target)
        shape = _shape(sets, size_px)
        extractor: Extractor | None = None
        if inception is not None:
            extractor = InceptionFile(inception, place)
        elif encoder is not None:
            extractor = _encoder_features(encoder, place, last_layers, bidirectional)
        elif pixels and shape is not None:
            extractor = PixelFeatures(shape[:2], shape[2])
        judged = judge(sets, extractor, shape and shape[:2], how, Path(scratch), target, console)
    if folder is not None:
        judged = dataclasses.replace(judged, folder=folder)
        write_judged(folder, judged)
    tell(console, judged)
    return judged


def _check(chosen: list[str], size_px: int, count: int) -> None:
    if len(chosen) > 1:
        raise ConfigError(f"one kind of features at a time; got --{' and --'.join(chosen)}.")
    if size_px < 0 or count < 0 or count == 1:
        raise ConfigError(f"--size_px and --count are 0 or more, and one image is no set; got {size_px} and {count}.")
    if size_px and "encoder" in chosen:
        raise ConfigError("--size_px is for --inception and --pixels: an encoder has its own preprocessing.")


def _check_sets(sets: dict[str, ImageSet], chosen: list[str], target: Path | None) -> None:
    """Raise ConfigError when features are needed and none are named, or named and not needed."""
    images = [side for side, found in sets.items() if found.source is not None]
    if images and not chosen:
        raise ConfigError(
            f"In which features? The {' and the '.join(images)} are images. Give --inception FILE (then it is FID), "
            "--encoder RUN, or --pixels for small images."
        )
    if chosen and not images:
        raise ConfigError(f"both sets are statistics, so no features are computed; leave out --{chosen[0]}.")
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


def _drawn(found: ImageSet, side: str, count: int, seed: int) -> ImageSet:
    """`count` random images of the set, in its order; all of it when it has no more, or count is 0."""
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


def _encoder_features(run: str | Path, device: str, last_layers: int, bidirectional: bool) -> EncoderFeatures:
    opened = open_encoder(run, device)
    return EncoderFeatures(
        opened.encoder, opened.preprocessing, os.fspath(run), last_layers=last_layers, bidirectional=bidirectional
    )


__all__ = ["Judged", "fid"]
