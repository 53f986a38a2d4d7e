"""Images of any source, to a folder of shards that every job reads faster."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from nextblock.data.prepared.about import About, is_prepared
from nextblock.data.prepared.encoding import Encoding
from nextblock.data.prepared.pieces import has_pieces
from nextblock.data.shard_folder import BAD_SAMPLES
from nextblock.errors import ConfigError, RunError
from nextblock.jobs.images_record import open_images, require_same_settings
from nextblock.jobs.output import say
from nextblock.jobs.prepare_share import Work, make, make_share
from nextblock.jobs.prepared_record import FREE, Asked, begin, go_on
from nextblock.jobs.shard_progress import size
from nextblock.jobs.share import Units, my_share
from nextblock.training.signals import StopRequest

SHELL_NEEDS = {"out": "a new folder for the shards, or one that was begun, to go on"}
LOCK_WAIT_S = 10.0  # so long the workers of a killed process may still be there


def prepare(
    *,
    data: Any,
    out: str | Path | None = None,
    short_side: int = 320,
    quality: int = 90,
    format: Literal["auto", "jpeg", "png", "raw"] = "auto",
    chroma: Literal["4:2:0", "4:4:4"] = "4:2:0",
    split: str = "train",
    data_root: str | Path | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    exif_orientation: bool = True,
    shard_mb: int = 256,
    max_bad_fraction: float = 0.001,
    workers: int = -1,
    quiet: bool = False,
) -> Path:
    """Reduce and encode images anew, once for all training, to shards that load fast; every job reads them.

    Larger images are reduced (Lanczos, antialiased), none is enlarged. Names, labels and class names are kept. Broken
    images are left out and listed in bad_samples.csv. What was stopped, at whatever moment, goes on after its last
    whole shard when the same command is given again; the result is the same to the byte, whatever the number of
    workers. Shards found damaged are made anew.

    The processes of a Slurm array or of torchrun encode a share of the images each, and the last one puts the shards
    together, which needs the disk twice for a while: see `nextblock.jobs.share`.

    Args:
        data: the images: a folder, Parquet file(s), hf:NAME, or the name of a benchmark data set; in Python any source
            of images.
        out: a new folder for the shards, or one that was begun, to go on. Prepare splits one by one into OUT/train,
            OUT/val: then OUT is a data set with splits.
        short_side: the shorter side of the images, in pixels; smaller ones stay as they are. For crops of 256 px, 320
            leaves room.
        quality: of JPEG, 1 to 100.
        format: "auto": JPEG, and raw pixels where the shorter side is below 64 px; "jpeg"; "png", without loss; "raw",
            without loss, the largest and the fastest. Of a JPEG only the part that a crop needs is decoded, but by
            the decoder pillow. With auto and jpeg, a JPEG file that is small enough already, upright and not
            progressive is copied as it is.
        chroma: of JPEG: "4:2:0" keeps colour at half the resolution, "4:4:4" at the full one, larger and slower.
        split: which split, where there are several.
        data_root: folder of the benchmark data sets; $NEXTBLOCK_DATA or ./datasets when left out.
        image_column: the column with the images, in Parquet and hf: data.
        label_column: the column with the labels, in Parquet and hf: data; "label", if there is one, when left out.
        exif_orientation: turn images as their EXIF orientation says.
        shard_mb: MiB of images in a shard.
        max_bad_fraction: stop when more than this part of the images, and more than 10, are broken.
        workers: encoding processes; -1 = one for each core, 0 = none but this one.
        quiet: print nothing.

    Returns the folder; `nextblock.data.prepared.open_prepared` and `open_source` read it. Raises ConfigError, DataError
    or RunError; and when it is stopped by Ctrl-C or SIGTERM, a KeyboardInterrupt that says how to go on.
    """
    if out is None:
        raise ConfigError(f"prepare needs --out: {SHELL_NEEDS['out']}.")
    folder, console = Path(out).expanduser(), Console(quiet=quiet)
    encoding = Encoding(short_side, quality, format, chroma, exif_orientation)
    asked = Asked.of(
        data, data_root, split=split, image_column=image_column, label_column=label_column,
        shard_mb=shard_mb, max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    share = my_share()
    _begun(folder, asked, encoding)
    source = open_images(asked.data, asked, data)
    with Units(folder, share) as units:
        with units.alone():
            there = _begun(folder, asked, encoding)  # perhaps by another process, meanwhile
            if not there:
                begin(folder, asked, encoding, source)
        by_pieces = not share.whole or has_pieces(folder)
        with _alone(folder, shared=by_pieces):
            stop = StopRequest("a few images are done")
            work = Work(folder, asked, source, _processes(workers), console, stop)
            if by_pieces:
                about = make_share(work, units)
            else:
                about = About.read(folder)  # another process may have gone on in between
                about = go_on(folder, about, asked, source, console) if there else about
                about = make(work, about)
    if about.index is not None:
        _tell(folder, about, console)
    return folder


def _begun(folder: Path, asked: Asked, encoding: Encoding) -> About | None:
    """What is there; raises ConfigError where it was begun with other settings."""
    there = About.read(folder) if is_prepared(folder) else None
    if there:
        old, new = there.asked | asdict(there.encoding), asdict(asked) | asdict(encoding)
        require_same_settings(f"the folder of prepared images {folder}", old, new, FREE)
    return there


def _processes(workers: int) -> int:
    """One for each core, as the process that writes has little to do; none besides it where there is one core."""
    if workers >= 0:
        return workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 else 0


@contextmanager
def _alone(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold the folder for this process, or for all that have a share. Raises RunError when another one prepares images
    in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_WAIT_S
        while not _locked(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise RunError(f"another process prepares images in {folder}. Wait for it, or choose another --out.")
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _locked(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems lock no folders
        return True
    return True


def _tell(folder: Path, about: About, console: Console) -> None:
    before = sum(record.original_bytes for record in about.in_order)
    after = sum(record.bytes for record in about.in_order)
    bad = f", {len(about.bad):,} broken ones left out ({BAD_SAMPLES})" if about.bad else ""
    copied = sum(record.kinds.get("copied", 0) for record in about.in_order)
    as_is = f"; {copied:,} copied as they were" if copied else ""
    times = f"{after / before:.2f} times" if before else "from nothing"
    say(console, f"{about.images:,} images{bad}: {size(before)} before, {size(after)} now ({times}{as_is})")
    say(
        console, f"To use them: nextblock pretrain --data.train {folder}; every job reads {folder} as it does a folder."
    )
