"""Latents of images, to a folder that generators are trained on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from nextblock.checkpoints.vae_files import open_vae
from nextblock.data.latents.cache import About
from nextblock.data.latents.making import Maker, lacking
from nextblock.data.loading import default_workers
from nextblock.data.sources import Source
from nextblock.errors import ConfigError, RunError
from nextblock.jobs.images_record import open_images
from nextblock.jobs.latents_record import Asked, begin, go_on, read_asked
from nextblock.jobs.opening import require_positive
from nextblock.jobs.output import say
from nextblock.jobs.shard_progress import shard_bar, size
from nextblock.jobs.share import Share, Units, my_share, stopped, take_own_device
from nextblock.training.launch import pick_device
from nextblock.training.run_folder import max_bad_images
from nextblock.training.signals import StopRequest
from nextblock.vae import Autoencoder


def cache_latents(
    *,
    dataset: Any = None,
    vae: str | Path | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    image_size_px: int | None = None,
    split: str | None = None,
    data_root: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    exif_orientation: bool | None = None,
    dtype: Literal["float16", "float32"] | None = None,
    shard_mb: int | None = None,
    max_bad_fraction: float | None = None,
    batch_size: int = 32,
    workers: int = -1,
    device: str = "auto",
    quiet: bool = False,
) -> Path:
    """Encode images with a VAE, once for all training: posterior moments of every image and its mirror image.

    Images are cropped as ADM does: halved while the shorter side is at least twice the size, resized (bicubic), the
    centre kept. Broken ones are left out and listed in bad_samples.csv. A cache that was stopped, at whatever moment,
    goes on after its last whole shard when the same command is given again, or with --resume; the result is the same
    to the byte on the same kind of machine. Shards found damaged are made anew.

    The processes of a Slurm array or of torchrun make a share of the shards each: see `nextblock.jobs.share`.

    Args:
        dataset: the images: a folder, Parquet file(s), hf:NAME, or the name of a benchmark data set; in Python any
            source of images. Class names and labels are kept where there are any. Needed for a new cache.
        vae: the official KL-16 file, or a folder or hub name (owner/name) of a diffusers AutoencoderKL. Needed for a
            new cache.
        out: a new folder for the cache, or the same one to go on. Give this or resume.
        resume: a cache that was begun, to go on or to make damaged shards anew; all else is as it was then. Images and
            VAE may be given again where they moved.
        image_size_px: side of the square images, a multiple of the VAE's factor; 256 when left out.
        split: which split of the images, where there are several; "train" when left out.
        data_root: folder of the benchmark data sets; $NEXTBLOCK_DATA or ./datasets when left out.
        image_column: the column with the images, in Parquet and hf: data; "image" when left out.
        label_column: the column with the labels, in Parquet and hf: data; "label", if there is one, when left out.
        exif_orientation: turn images as their EXIF orientation says; yes when left out.
        dtype: of the stored moments, "float16" (the default; half the disk, a relative error of at most 0.0005) or
            "float32".
        shard_mb: MiB of moments in a shard, 1024 when left out; memory needed is about twice that.
        max_bad_fraction: stop when more than this part of the images, and more than 10, are broken; 0.001 when left
            out.
        batch_size: images that are encoded together (a CPU takes fewer at a time); changes the moments by rounding
            only.
        workers: loading processes; -1 = chosen from the cores.
        device: "auto", "cpu" or "cuda".
        quiet: print nothing.

    Returns the folder; `open_latents` reads it. Raises ConfigError, DataError, RunError or CheckpointError; and when
    it is stopped by Ctrl-C or SIGTERM, a KeyboardInterrupt that says how to go on.
    """
    require_positive(batch_size=batch_size)
    given: dict[str, Any] = {
        "vae": vae, "image_size_px": image_size_px, "split": split, "data_root": data_root,
        "image_column": image_column, "label_column": label_column, "exif_orientation": exif_orientation,
        "dtype": dtype, "shard_mb": shard_mb, "max_bad_fraction": max_bad_fraction,
    }  # fmt: skip
    console = Console(quiet=quiet)
    share = my_share()
    read = partial(read_asked, dataset, {k: v for k, v in given.items() if v is not None}, out, resume)
    folder, _, asked = read()
    take_own_device()
    model = _open_vae(asked).to(pick_device(device))
    source = open_images(asked.dataset, asked, dataset)
    with Units(folder, share) as units:
        with units.alone():
            _, begun, asked = read()  # another process may have begun it meanwhile
            about = begun or begin(folder, asked, source, model)
        mine = units.claim(range(about.shard_count))
        if begun:
            about = go_on(folder, begun, asked, source, model, units, mine, console)
        if not about.finished:
            loaders = default_workers() if workers < 0 else workers
            about = _make(folder, about, asked, source, model, batch_size, loaders, units, mine, console)
    _tell(folder, about, share, console)
    return folder


def _open_vae(asked: Asked) -> Autoencoder:
    assert asked.vae is not None
    model = open_vae(asked.vae)
    if not isinstance(model, Autoencoder):
        raise ConfigError("pixel space needs no latents: train the generator on the images themselves.")
    size, factor = asked.image_size_px, model.factor
    if size % factor:
        below, above = size // factor * factor, -(-size // factor) * factor
        near = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(f"image_size_px must be a multiple of {factor} for this VAE; got {size}. Take {near}.")
    return model


def _make(
    folder: Path,
    about: About,
    asked: Asked,
    source: Source,
    model: Autoencoder,
    batch_size: int,
    workers: int,
    units: Units,
    mine: Sequence[int],
    console: Console,
) -> About:
    todo = lacking(about, mine)
    images = sum(min(about.shard_images, len(source) - number * about.shard_images) for number in todo)
    _require_room(folder, about, images, todo, units.share, console)
    stop = StopRequest("this batch is done")
    every = len(source) if units.share.whole else images
    try:
        with stop, shard_bar("encoding", every, every - images, console, _shard_line) as bar:
            maker = Maker(
                folder, source, model, batch_size, workers, max_bad_images(len(source), asked.max_bad_fraction),
                on_images=bar.images, on_shard=bar.shard, stop_asked=stop, numbers=mine, alone=units.alone,
            )  # fmt: skip
            return maker.make(about)
    except KeyboardInterrupt as error:
        advice = f"stopped. To go on after the last whole shard: nextblock cache-latents --resume {folder}"
        raise stopped(advice, stop.received) from error


def _require_room(
    folder: Path, about: About, images: int, todo: Sequence[int], share: Share, console: Console
) -> None:  # fmt: skip
    """Say what will be written. Raises RunError when it is more than the disk has."""
    need, free = images * about.bytes_per_image, shutil.disk_usage(folder).free
    shape, of = " x ".join(map(str, about.shape)), "" if share.whole else f" ({share.told})"
    console.print(
        f"{about.data['description']}. {images:,} to encode{of}: moments {shape}, also mirrored, in {about.dtype}, "
        f"{size(need)} in {len(todo)} shard{'' if len(todo) == 1 else 's'} of {folder}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    if need > free:
        raise RunError(
            f"the latents need {size(need)}, but the disk of {folder} has {size(free)} left. "
            "Make room, or take another --out."
        )


def _tell(folder: Path, about: About, share: Share, console: Console) -> None:
    if not about.finished:
        say(
            console,
            f"{share.told} is done; {_shard_line(about)} of {folder} are there, other processes make the others",
        )
        return
    bad = len(about.bad)
    count = sum(record.images for record in about.shards.values())
    left_out = f", {bad} broken ones left out (bad_samples.csv)" if bad else ""
    console.print(f"{count:,} images cached{left_out}: {folder}", highlight=False, markup=False, soft_wrap=True)


def _shard_line(about: About) -> str:
    return f"{len(about.shards)} of {about.shard_count} shards"
