"""Features of a frozen encoder on disk: computed once, then any number of heads is trained on them.

Each set lies in a folder of its own, named by a hash of everything that its numbers depend on (weights, images,
preprocessing, layers, pooling, precision), so that a stale one is never taken. It holds hashes of its files, and a
damaged one is computed anew. Vectors are stored as float32, tokens as float16.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.data.sources import Source, content_digest
from nextblock.data.sources.views import known_labels
from nextblock.data.stream import BadSample, Batch, locate
from nextblock.durable import file_sha256, flush_tree, give_name, make_folder, sha256_of
from nextblock.errors import DataError
from nextblock.evaluation.inference import device_of, inference
from nextblock.xtra.classifier import LayerMean, layer_means
from nextblock.xtra.model import Encoder

FORMAT = 2  # 1 had no hashes
_HASHED = ("values.npy", "indices.npy", "bad.csv")


def weights_digest(encoder: Encoder) -> str:
    """SHA-256 over the names, shapes and numbers of the encoder's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        value = tensor.detach().float().cpu().contiguous().numpy()
        digest.update(f"{name}{value.shape}".encode())
        digest.update(value.data)
    return digest.hexdigest()


@dataclass
class CachedFeatures:
    """M images: `values` by what was read, [M, N, D] float16 tokens or [M, D] float32 means; labels int64 [M]."""

    values: dict[LayerMean, NDArray[Any]]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    bad: list[BadSample]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class FeatureBatch:
    """Inputs of a grid, [B, N, D] or [B, D] float32 each, and labels int64 [B]."""

    inputs: list[Tensor]
    labels: Tensor
    bad: list[BadSample] = field(default_factory=list)

    def to(self, device: torch.device) -> FeatureBatch:
        return FeatureBatch([x.to(device) for x in self.inputs], self.labels.to(device), self.bad)


def feature_batches(
    features: CachedFeatures, order: Sequence[LayerMean], plan: Iterable[Sequence[int]], seed: int, rows: NDArray[Any]
) -> Iterator[FeatureBatch]:
    """Training batches: the rows of `features` among `rows`, shuffled as the training stream shuffles images."""
    for positions in plan:
        _, places = locate(seed, positions, len(rows))
        yield _batch(features, order, rows[places])


def in_order(
    features: CachedFeatures, order: Sequence[LayerMean], rows: NDArray[Any], batch_size: int
) -> Iterator[FeatureBatch]:
    """Batches of these rows, one after the other."""
    for start in range(0, len(rows), batch_size):
        yield _batch(features, order, rows[start : start + batch_size])


def _batch(features: CachedFeatures, order: Sequence[LayerMean], rows: NDArray[Any]) -> FeatureBatch:
    inputs = [torch.from_numpy(features.values[layers][rows].astype(np.float32)) for layers in order]
    return FeatureBatch(inputs, torch.from_numpy(features.labels[rows]))


def cached_features(
    encoder: Encoder,
    source: Source,
    preprocessing: Preprocessing,
    wanted: Mapping[LayerMean, bool],
    batches: Callable[[], Iterable[Batch]],
    *,
    folder: Path,
    limit_gb: float = 20.0,
) -> CachedFeatures:
    """The features of all images of `source`, from disk where they are, else computed in one pass and kept.

    Args:
        encoder: frozen; its device computes.
        wanted: what to read, and whether its tokens are needed (else their mean).
        batches: makes evaluation batches of the whole source, for example with a progress bar.
        folder: of the cache.
        limit_gb: refuse to write more than this.

    Raises DataError when the features are too large for the limit or for the disk, or not finite, or there is no image.
    """
    place = device_of(encoder).type
    common = {"format": FORMAT, "weights": weights_digest(encoder), "data": content_digest(source), "on": place}
    common["preprocessing"] = json.dumps(preprocessing.to_dict(), sort_keys=True)
    keys = {
        layers: hashlib.sha256(json.dumps(common | {"layers": repr(layers), "tokens": tokens}).encode()).hexdigest()
        for layers, tokens in wanted.items()
    }
    folders = {layers: folder / "features" / digest[:24] for layers, digest in keys.items()}
    missing = {layers: wanted[layers] for layers, path in folders.items() if not _is_whole(path)}
    if missing:
        _check_size(encoder, len(source), missing, preprocessing, limit_gb, folder)
        _compute(encoder, source, preprocessing, missing, batches(), folders)
    read = {layers: _read(path) for layers, path in folders.items()}
    values = {layers: value for layers, (value, _) in read.items()}
    indices, bad = next(iter(read.values()))[1]
    for layers, (_, (others, _)) in read.items():
        if not np.array_equal(indices, others):
            raise DataError(
                f"the features in {folders[layers].parent} were kept at times when different images could be read. "
                f"Remove {folders[layers].name} there."
            )
    return CachedFeatures(values, known_labels(source)[indices], indices, bad)  # labels are not part of the key


def _check_size(
    encoder: Encoder, images: int, wanted: Mapping[LayerMean, bool], p: Preprocessing, limit_gb: float, folder: Path
) -> None:
    patch = encoder.config.patch
    tokens = (p.size_px[0] // patch[0]) * (p.size_px[1] // patch[1])
    each = [images * encoder.config.width * (2 * tokens if reads else 4) for reads in wanted.values()]
    size_gb = sum(each) / 1e9
    if size_gb > limit_gb:
        raise DataError(
            f"the features of {images:,} images would take {size_gb:,.0f} GB in {folder}, more than the "
            f"{limit_gb:g} allowed (probe.cache_gb). Use linear heads only, or train with augmentation, which keeps "
            "no features (probe.augment published or flip)."
        )


def _compute(
    encoder: Encoder,
    source: Source,
    preprocessing: Preprocessing,
    wanted: Mapping[LayerMean, bool],
    batches: Iterable[Batch],
    folders: Mapping[LayerMean, Path],
) -> None:
    """Fill the folders beside, then rename: what has its final name is whole."""
    device, files = device_of(encoder), {}
    indices: list[NDArray[np.int64]] = []
    bad: list[BadSample] = []
    count = 0
    beside = {layers: folders[layers].with_name(f".{folders[layers].name}.{os.getpid()}") for layers in wanted}
    _sweep(next(iter(folders.values())).parent)
    try:
        for batch in batches:
            bad += batch.bad
            if not len(batch):
                continue
            with inference(encoder):
                images = normalize(batch.images.to(device), None, preprocessing)
                pooled = {layers for layers, tokens in wanted.items() if not tokens}
                means = layer_means(encoder, images, list(wanted), pooled=pooled)
            for layers, tokens in wanted.items():
                x = means[layers].float()
                value = (x.half() if tokens else x).cpu().numpy()
                _require_finite(value)
                if layers not in files:
                    with _writing(beside[layers]):
                        files[layers] = _open_file(beside[layers], (len(source), *value.shape[1:]), value.dtype)
                files[layers][count : count + len(value)] = value
            count += len(batch)
            indices.append(batch.indices.numpy())
        if not count:
            first = f"; the first: {bad[0].name}: {bad[0].reason}" if bad else ""
            raise DataError(f"None of the {len(source)} images could be read{first}.")
        for layers, file in files.items():
            with _writing(beside[layers]):
                file.flush()
                _describe(beside[layers], count, np.concatenate(indices), bad)
                _put(beside[layers], folders[layers])
    finally:
        for path in beside.values():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write features to {folder.parent}: {error.strerror or error}. Choose another --probe.cache."
        ) from error


def _require_finite(value: NDArray[Any]) -> None:
    if not np.isfinite(value).all():
        raise DataError(
            "The encoder's features hold values that are not finite. Did its training diverge? Look at its "
            "metrics.csv, and probe an earlier checkpoint."
        )


def _open_file(folder: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    make_folder(folder)
    file = np.lib.format.open_memmap(folder / "values.npy", mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # a full disk is told now, not by a signal while the map is written
        with open(folder / "values.npy", "r+b") as whole:
            os.posix_fallocate(whole.fileno(), 0, os.path.getsize(whole.name))
    return file


def _put(beside: Path, final: Path) -> None:
    """Rename into place; where another process was faster, its folder, which holds the same, stays."""
    try:
        give_name(beside, final)
    except OSError:
        if not (final / "about.json").is_file():
            raise


def _sweep(folder: Path) -> None:
    """Remove what processes left behind that are no more."""
    for path in folder.glob(".*"):
        number = path.suffix.removeprefix(".")
        if number.isdigit() and not Path(f"/proc/{number}").exists() and Path("/proc/self").exists():
            shutil.rmtree(path, ignore_errors=True)


def _describe(folder: Path, count: int, indices: NDArray[np.int64], bad: Sequence[BadSample]) -> None:
    np.save(folder / "indices.npy", indices)
    with open(folder / "bad.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows(bad)
    about = {"images": count, "format": FORMAT} | {name: file_sha256(folder / name) for name in _HASHED}
    (folder / "about.json").write_text(json.dumps(about | {"sha256": sha256_of(about)}))
    flush_tree(folder)


def _is_whole(folder: Path) -> bool:
    """Whether features are kept there, and are what was written; what is damaged is removed. Reads all of it."""
    if not folder.is_dir():
        return False
    try:
        about = json.loads((folder / "about.json").read_text())
        recorded = about.pop("sha256")
        if recorded == sha256_of(about) and all(file_sha256(folder / name) == about[name] for name in _HASHED):
            return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    return False


def _read(folder: Path) -> tuple[NDArray[Any], tuple[NDArray[np.int64], list[BadSample]]]:
    count = json.loads((folder / "about.json").read_text())["images"]
    values = np.load(folder / "values.npy", mmap_mode="r")[:count]
    with open(folder / "bad.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        bad = [BadSample(name, reason, int(position)) for name, reason, position in csv.reader(file)]
    return values, (np.load(folder / "indices.npy"), bad)
