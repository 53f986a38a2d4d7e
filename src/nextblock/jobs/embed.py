"""Features of images, to a file or in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from nextblock.data.loading import default_workers, evaluation_batches
from nextblock.data.sources import Source, open_source
from nextblock.data.stream import BadSample
from nextblock.errors import RunError
from nextblock.evaluation.features import FeatureConfig, Features, extract_batches
from nextblock.jobs.embed_parts import Parts, share_parts
from nextblock.jobs.embedded_file import METADATA, embedded_record, record_of
from nextblock.jobs.opening import one_or_many, open_encoder, require_positive, run_data
from nextblock.jobs.output import new_file, require_some, say, tell_bad, written_whole
from nextblock.jobs.share import Share, Units, my_share, take_own_device

SUFFIXES = (".parquet", ".npz")
SHELL_NEEDS = {"out": "a new .parquet or .npz file for the features"}


@dataclass
class Embedded:
    """names: one per image. features: float32 [M, D], or [M, N, D] when not pooled. bad: left out, with reasons."""

    names: list[str]
    features: NDArray[np.float32]
    bad: list[BadSample]


def embed(
    *,
    run: str | Path,
    images: Any,
    out: str | Path | None = None,
    last_layers: int = 1,
    pool: bool = True,
    final_norm: bool = False,
    bidirectional: bool = False,
    split: str = "train",
    image_column: str | None = None,
    batch_size: int = 64,
    workers: int = -1,
    device: str = "auto",
    quiet: bool = False,
) -> Embedded | Path:
    """Compute the features of images with a pre-trained encoder.

    The processes of a Slurm array or of torchrun embed a share of the images each, and the last one writes the file;
    what was stopped goes on when the same command is given again: see `nextblock.jobs.share`.

    Args:
        run: a run folder, or a folder of exported weights.
        images: image files and folders, Parquet files or hf:NAME; in Python any source of images.
        out: a new .parquet (columns name, features) or .npz file (arrays names, features), which also records the
            encoder and the options; without it the features are returned.
        last_layers: mean over the outputs of so many last layers.
        pool: mean over the tokens of an image: one vector each; else a vector for every patch, raster order.
        final_norm: the tokens after the encoder's final norm instead.
        bidirectional: let all tokens see each other; by default the encoder keeps its block-causal mask.
        split: which split, where the source has several.
        image_column: of tables; the run's own when left out.
        batch_size: images per forward pass.
        workers: loading processes; -1 = chosen from the cores.
        device: "auto", "cpu" or "cuda".
        quiet: print nothing.

    Raises ConfigError, DataError, RunError or CheckpointError; broken images are left out and told.
    """
    require_positive(batch_size=batch_size)
    console = Console(quiet=quiet)
    share = my_share()
    by_parts = out is not None and not share.whole
    target = None if out is None else Path(out) if by_parts and Path(out).exists() else new_file(out, SUFFIXES)
    take_own_device()
    opened = open_encoder(run, device)
    column = image_column or run_data(run).image_column
    source = open_source(one_or_many(images), split=split, image_column=column)
    config = FeatureConfig(last_layers=last_layers, pool=pool, bidirectional=bidirectional, final_norm=final_norm)
    loaders = default_workers() if workers < 0 else workers

    def batches(indices: Sequence[int]) -> Iterator[Features]:
        loaded = evaluation_batches(
            source, opened.preprocessing, batch_size=batch_size, workers=loaders, indices=indices
        )  # fmt: skip
        yield from track(
            extract_batches(opened.encoder, loaded, opened.preprocessing, config), total=-(-len(indices) // batch_size),
            description="embedding", console=console, disable=not console.is_terminal,
        )  # fmt: skip

    if target is None:
        made = _collect(batches(range(len(source))), source)
        tell_bad(console, made.bad)
        return made
    record = record_of(opened, config)
    parts = Parts(target, source, batch_size)
    if by_parts or parts.folder.is_dir():
        return _share(parts, share, batches, record, pool, console)
    _write(target, batches(range(len(source))), source, record, console)
    return target


def _share(
    parts: Parts, share: Share, batches: Callable[[Sequence[int]], Iterator[Features]], record: dict[str, Any],
    pool: bool, console: Console,
) -> Path:  # fmt: skip
    """Embed this process's share of the images; write the file where the others' are there, too."""
    target = parts.target
    with Units(target, share) as units:
        with units.alone():
            if target.exists():
                return _complete(target, record, console)
            parts.begin(record, pool)
        lacking = share_parts(parts, units, batches, f"the same command, with --out {target}")
        with units.last() if not lacking else nullcontext(False) as got:
            if got and not target.exists():
                _write(target, parts.read(), parts.source, record, console)
                parts.remove()
            else:
                left = f" (parts: {lacking})" if lacking else ""
                say(console, f"{share.told} is done; other processes embed the other images{left}")
    return target


def _complete(target: Path, record: dict[str, Any], console: Console) -> Path:
    """Say that a file is there which others have made. Raises RunError when it is of something else."""
    if embedded_record(target) != record:
        raise RunError(f"{target} exists already, of another encoder or options. Choose another --out.")
    say(console, f"already complete: {target}")
    return target


def _write(
    target: Path, batches: Iterable[Features], source: Source, record: Mapping[str, Any], console: Console
) -> None:  # fmt: skip
    if target.suffix == ".parquet":
        bad, count = _write_parquet(target, batches, source, record)
    else:
        made = _collect(batches, source)
        bad, count = made.bad, len(made.names)
        _write_npz(target, made, record)
    tell_bad(console, bad)
    say(console, f"{count:,} images embedded: {target}")


def _collect(batches: Iterable[Features], source: Source) -> Embedded:
    names: list[str] = []
    values: list[NDArray[np.float32]] = []
    bad: list[BadSample] = []
    for batch in batches:
        names += [source.name(int(i)) for i in batch.indices]
        bad += batch.bad
        if len(batch):
            values.append(batch.values)
    require_some(len(names), bad)
    return Embedded(names, np.concatenate(values), bad)


def _write_npz(target: Path, made: Embedded, record: Mapping[str, Any]) -> None:
    about = np.array(json.dumps(record))
    with written_whole(target) as beside, open(beside, "wb") as file:
        np.savez(file, names=np.array(made.names), features=made.features, about=about)


def _write_parquet(
    target: Path, batches: Iterable[Features], source: Source, record: Mapping[str, Any]
) -> tuple[list[BadSample], int]:
    """One row group per batch, so that memory stays that of one batch."""
    bad: list[BadSample] = []
    writer, count = None, 0
    about = {METADATA: json.dumps(record)}
    with written_whole(target) as beside:
        try:
            for batch in batches:
                bad += batch.bad
                if not len(batch.indices):
                    continue
                names = pa.array([source.name(int(i)) for i in batch.indices])
                table = pa.table({"name": names, "features": _nested(batch.values)}, metadata=about)
                writer = writer or pq.ParquetWriter(beside, table.schema)
                writer.write_table(table)
                count += len(names)
        finally:
            if writer:
                writer.close()
        require_some(count, bad)
    return bad, count


def _nested(values: NDArray[np.float32]) -> pa.Array:
    """[M, D] -> M fixed-size lists; [M, N, D] -> M lists of N lists."""
    array = pa.array(values.reshape(-1))
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array
