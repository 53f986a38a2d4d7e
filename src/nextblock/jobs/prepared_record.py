"""What prepared images write down when they are begun, and what must be the same when they go on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import features
from rich.console import Console

from nextblock.data.prepared.about import ABOUT, About
from nextblock.data.prepared.encoding import Encoding
from nextblock.data.prepared.index import INDEX, map_index
from nextblock.data.prepared.making import write_about
from nextblock.data.prepared.shards import LARGEST_MB
from nextblock.data.sources import Source
from nextblock.errors import ConfigError
from nextblock.jobs.images_record import images_record, is_whole, require_same_images, write_manifest_once
from nextblock.jobs.record import where
from nextblock.training.run_record import claim_folder

FREE = ("data", "data_root", "max_bad_fraction")  # may change when preparing goes on


@dataclass(frozen=True)
class Asked:
    """What the person asked for besides the encoding; arguments of `prepare`. data: None for a Python object."""

    data: str | None = None
    data_root: str | None = None
    split: str = "train"
    image_column: str = "image"
    label_column: str | None = None
    shard_mb: int = 256
    max_bad_fraction: float = 0.001

    def __post_init__(self) -> None:
        if not 1 <= self.shard_mb <= LARGEST_MB:
            raise ConfigError(f"shard_mb must lie between 1 and {LARGEST_MB}; got {self.shard_mb!r}.")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ConfigError(f"max_bad_fraction must lie between 0 and 1; got {self.max_bad_fraction!r}.")

    @classmethod
    def of(cls, data: Any, data_root: str | Path | None, **more: Any) -> Asked:
        """With paths as they are seen from any folder."""
        place = where(data, None, data_root)
        return cls(data=place["dataset"], data_root=place["data_root"], **more)


def begin(folder: Path, asked: Asked, encoding: Encoding, source: Source) -> About:
    """Claim the folder and write down what is made. Raises RunError when something else is in it."""
    for left_over in (".writable", f".{ABOUT}.partial"):  # of a start that was killed
        (folder / left_over).unlink(missing_ok=True)
    claim_folder(folder, "Choose another --out.")
    about = About(
        encoding=encoding,
        shard_mb=asked.shard_mb,
        data=images_record(source),
        classes=None if source.classes is None else list(source.classes),
        asked=dataclasses.asdict(asked),
        options=_options(asked, encoding),
        made_with=versions(),
    )
    write_about(folder, about)
    write_manifest_once(folder, source)
    return about


def go_on(folder: Path, begun: About, asked: Asked, source: Source, console: Console) -> About:
    """What is there, less what is damaged. Raises RunError when the images are not the same."""
    require_same_images(folder, begun.data, source, str(folder))
    _tell_versions(begun, console)
    whole = {
        number: record
        for number, record in begun.shards.items()
        if is_whole(record.file, partial(record.require_whole, folder), console)
    }
    console.print(
        f"{len(whole)} of {len(begun.cuts)} shards of {folder} are whole", highlight=False, markup=False, soft_wrap=True
    )
    for left_over in folder.glob(".*.partial"):  # nobody else makes shards now
        left_over.unlink(missing_ok=True)
    write_manifest_once(folder, source)
    about = dataclasses.replace(begun, asked=dataclasses.asdict(asked))
    if len(whole) < len(begun.shards) or not _has_index(folder, begun, console):
        about = about.with_shards(whole)
        write_about(folder, about)  # what is damaged must not look finished while it is made anew
    return about


def _options(asked: Asked, encoding: Encoding) -> tuple[str, ...]:
    """Of the command, where they are not the usual ones."""
    given = dataclasses.asdict(asked) | dataclasses.asdict(encoding)
    usual = dataclasses.asdict(Asked()) | dataclasses.asdict(Encoding())
    return tuple(f"--{name}={value}" for name, value in given.items() if name != "data" and value != usual[name])


def versions() -> dict[str, str]:
    """Of what shapes the bytes of a JPEG."""
    codec = features.version("libjpeg_turbo") or features.version("jpg")
    found = {"nextblock": version("nextblock"), "pillow": version("pillow"), "libjpeg": codec or "unknown"}
    return {name: str(value) for name, value in found.items()}


def _tell_versions(begun: About, console: Console) -> None:
    now = versions()
    changed = [name for name in ("pillow", "libjpeg") if begun.made_with.get(name) != now[name]]
    told = ", ".join(f"{name} {begun.made_with.get(name)}, now {now[name]}" for name in changed)
    if changed and begun.index is None:
        console.print(
            f"begun with {told}: images that are still to be made may differ by rounding from what these would give",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip


def _has_index(folder: Path, begun: About, console: Console) -> bool:
    """True also where there is none yet."""
    return begun.index is None or is_whole(INDEX, partial(map_index, folder, begun.index), console)
