"""What a latent cache writes down when it is begun, and what must be the same when it goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console

from nextblock.data.latents.cache import ABOUT, About, is_latent_cache
from nextblock.data.latents.making import with_shards
from nextblock.data.latents.shards import Shard, shard_name
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source
from nextblock.errors import ConfigError, RunError, nearest
from nextblock.jobs.images_record import (
    images_record,
    is_whole,
    remove_left_overs,
    require_same_images,
    require_same_settings,
    write_manifest_once,
)
from nextblock.jobs.record import where
from nextblock.jobs.share import Units
from nextblock.training.run_record import claim_folder
from nextblock.vae import Autoencoder, same_vae

CROP = "adm_center"
_FREE = ("dataset", "vae", "data_root", "max_bad_fraction")  # may change when a cache goes on
_PACKAGES = ("nextblock", "torch", "diffusers", "pillow", "numpy", "safetensors")


@dataclass(frozen=True)
class Asked:
    """What the person asked for; the arguments of `cache_latents`. dataset: None for a Python object."""

    dataset: str | None = None
    vae: str | None = None
    data_root: str | None = None
    image_size_px: int = 256
    split: str = "train"
    image_column: str = "image"
    label_column: str | None = None
    exif_orientation: bool = True
    dtype: str = "float16"
    shard_mb: int = 1024
    max_bad_fraction: float = 0.001

    def __post_init__(self) -> None:
        for name in ("image_size_px", "shard_mb"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1; got {getattr(self, name)!r}.")
        if self.dtype not in ("float16", "float32"):
            raise ConfigError(f"dtype must be 'float16' or 'float32'; got {self.dtype!r}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction must lie between 0 and 1; got {self.max_bad_fraction!r}.")


def read_asked(
    dataset: Any, given: Mapping[str, Any], out: str | Path | None, resume: str | Path | None
) -> tuple[Path, About | None, Asked]:
    """The cache's folder, what is there already (None: nothing), and what is asked, completed from there.

    Raises ConfigError for what is lacking, or contradicts what the cache was begun with.
    """
    if (out is None) == (resume is None):
        raise ConfigError("cache-latents needs --out, a new folder for the cache, or --resume, one that was begun.")
    folder = Path(out if resume is None else resume).expanduser()  # type: ignore[arg-type]
    begun = About.read(folder) if is_latent_cache(folder) else None
    if resume is not None and begun is None:
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise RunError(f"{folder} is no latent cache: it has no {ABOUT}.{nearest(folder.name, siblings)}")
    values = dict(given) | {k: v for k, v in where(dataset, None, given.get("data_root")).items() if k != "test"}
    if "vae" in given:
        values["vae"] = _place(given["vae"])
    stored = Asked(**begun.asked) if begun else None
    if stored and resume is not None:
        values = dataclasses.asdict(stored) | {name: value for name, value in values.items() if value is not None}
    asked = Asked(**values)
    if stored:
        old, new = dataclasses.asdict(stored), dataclasses.asdict(asked)
        require_same_settings(f"the latent cache {folder}", old, new, _FREE)
    if dataset is None and asked.dataset is None:
        again = " again: it was a Python object" if stored else ", the images"
        raise ConfigError(f"cache-latents needs --dataset{again}.")
    if asked.vae is None:
        raise ConfigError("cache-latents needs --vae: the official KL-16 file, or a diffusers folder or hub name.")
    return folder, begun, asked


def _place(vae: str | Path) -> str:
    """A path is made absolute, a name on the hub stays."""
    path = Path(vae).expanduser()
    return str(path.absolute()) if path.exists() else str(vae)


def begin(folder: Path, asked: Asked, source: Source, vae: Autoencoder) -> About:
    """Claim the folder and write down what is made. Raises RunError when something else is in it."""
    for left_over in (".writable", f".{ABOUT}.partial"):  # of a start that was killed
        (folder / left_over).unlink(missing_ok=True)
    claim_folder(folder, "Choose another --out.")
    preprocessing = Preprocessing(
        size_px=(asked.image_size_px,) * 2, resize_px=asked.image_size_px, channels=vae.image_channels,
        mean=(0.5,) * vae.image_channels, std=(0.5,) * vae.image_channels, exif_orientation=asked.exif_orientation,
    )  # fmt: skip
    side = asked.image_size_px // vae.factor
    about = About(
        vae=vae.identity(),
        crop=CROP,
        preprocessing=preprocessing.to_dict(),
        data=images_record(source),
        classes=None if source.classes is None else list(source.classes),
        shape=(2 * vae.latent_channels, side, side),
        dtype=asked.dtype,
        shard_images=0,
        asked=dataclasses.asdict(asked),
        made_with=_versions(),
    )
    about = dataclasses.replace(about, shard_images=max(1, asked.shard_mb * 2**20 // about.bytes_per_image))
    about.write(folder)
    write_manifest_once(folder, source)
    return about


def go_on(
    folder: Path, begun: About, asked: Asked, source: Source, vae: Autoencoder, units: Units, mine: Collection[int],
    console: Console,
) -> About:  # fmt: skip
    """What is there, less those of the shards `mine` that are damaged. Raises RunError when images or VAE are not the
    same."""
    ours = vae.identity()
    if not same_vae(begun.vae, ours):
        difference = _difference(begun.vae, ours)
        raise RunError(
            f"the latent cache {folder} was begun with another VAE: {difference}. Give that one, or choose another "
            "--out."
        )
    require_same_images(folder, begun.data, source, f"the latent cache {folder}")
    shards = {number: Shard(folder, record) for number, record in begun.shards.items() if number in mine}
    lost = {number for number, shard in shards.items() if not is_whole(shard.path.name, shard.require_whole, console)}
    others = "" if units.share.whole else f", as far as they are {units.share.told}"
    told = f"{len(begun.shards) - len(lost)} of {begun.shard_count} shards of {folder} are whole{others}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)
    with units.alone():
        remove_left_overs(folder, [shard_name(number) for number in mine])
        write_manifest_once(folder, source)
        about = dataclasses.replace(About.read(folder), asked=dataclasses.asdict(asked))
        if lost:
            about = with_shards(about, {number: r for number, r in about.shards.items() if number not in lost})
            about.write(folder)  # what is damaged must not look finished while it is made anew
    return about


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    names = ("sha256", "latent_channels", "factor", "scale_factor", "shift_factor")
    short = [(name, str(there.get(name))[:12], str(here.get(name))[:12]) for name in names]
    return ", ".join(f"{name} {a} there, {b} here" for name, a, b in short if a != b)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
