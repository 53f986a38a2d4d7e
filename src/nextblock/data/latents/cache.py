"""A folder of posterior moments, to train a generator on: `latents.json` and a few large shards.

What was read is checked: when the cache is opened, the hash of latents.json, the size of all shards and the CRC-32 of
all in them but the moments (labels, names); the CRC-32 of each image's moments whenever they are read (microseconds);
and the SHA-256 of whole shards when asked (`LatentCache.verify`).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nextblock.data.latents.shards import Shard, ShardRecord
from nextblock.data.preprocess import Preprocessing
from nextblock.data.shard_folder import holds, known_labels, read_sealed, sealed, similar_folders
from nextblock.data.stream import BadSample
from nextblock.durable import sha256_of, write_whole
from nextblock.errors import DataError

FORMAT = 2  # 1 had no check of labels and names
ABOUT = "latents.json"
_OF_PREPROCESSING = "preprocessing_sha256"


@dataclass(frozen=True)
class About:
    """What latents.json says.

    Attributes:
        vae: its identity.
        crop: how images became squares; "adm_center".
        preprocessing: of the images; `size_px`, `channels`, `exif_orientation`, `mean`, `std`.
        data: fingerprint of the images: description, count, bytes, sha256 (names and sizes), order_sha256 (names in
            order, labels, class names).
        classes: names by number; None where nobody named them.
        shape: of the moments of one image, (2C, h, w).
        dtype: they are stored in, "float16" or "float32".
        shard_images: images of the source that each shard covers; the last one fewer.
        asked: where images and VAE are, and what else `--resume` needs.
        made_with: versions of the packages that shape the numbers.
        finished: all shards are there.
        shards: by number; while it is being made some may be lacking.
    """

    vae: dict[str, Any]
    crop: str
    preprocessing: dict[str, Any]
    data: dict[str, Any]
    classes: list[str] | None
    shape: tuple[int, int, int]
    dtype: str
    shard_images: int
    asked: dict[str, Any] = field(default_factory=dict)
    made_with: dict[str, str] = field(default_factory=dict)
    finished: bool = False
    shards: dict[int, ShardRecord] = field(default_factory=dict)

    @property
    def shard_count(self) -> int:
        return -(-int(self.data["count"]) // self.shard_images)

    @property
    def bytes_per_image(self) -> int:
        """Of both flips."""
        return 2 * math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def bad(self) -> list[BadSample]:
        """Images that were left out so far."""
        return [sample for record in self.shards.values() for sample in record.bad]

    def write(self, folder: Path) -> None:
        """Write latents.json whole or not at all."""
        values = {"format": FORMAT, _OF_PREPROCESSING: sha256_of({"crop": self.crop, **self.preprocessing})}
        write_whole(folder / ABOUT, sealed(values | dataclasses.asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> About:
        """Raises DataError when there is none that can be understood."""
        names = [field.name for field in dataclasses.fields(cls)]
        anew = "Make it anew with nextblock cache-latents."
        with read_sealed(folder / ABOUT, [*names, _OF_PREPROCESSING], FORMAT, anew) as values:
            shards = {int(n): ShardRecord.from_dict(int(n), record) for n, record in values["shards"].items()}
            known = {name: values[name] for name in names}
            return cls(**known | {"shape": tuple(values["shape"]), "shards": shards})


def is_latent_cache(path: str | os.PathLike[str]) -> bool:
    """Whether the folder `path` is one, finished or not."""
    return holds(path, ABOUT)


def open_latents(folder: str | os.PathLike[str]) -> LatentCache:
    """Open a finished latent cache. Raises DataError, saying what to do, for anything else or a damaged one."""
    folder = Path(folder).expanduser()
    if not is_latent_cache(folder):
        hint = similar_folders(folder)
        raise DataError(f"{folder} is no latent cache: it has no {ABOUT}.{hint} nextblock cache-latents makes one.")
    about = About.read(folder)
    if not about.finished:
        raise DataError(
            f"the latent cache {folder} is not finished: {len(about.shards)} of {about.shard_count} shards are there. "
            f"Go on with: nextblock cache-latents --resume {folder}"
        )
    return LatentCache(folder, about)


def require_known(
    labels: NDArray[np.int64], classes: Sequence[str] | None, name: Callable[[int], str], where: str
) -> None:
    """Raise DataError when one of `labels` [N] is no class: less than -1 (none), or not among `classes`.

    `name(i)` is the image's name; `where` begins the message.
    """
    wrong = labels < -1
    if classes is not None:
        wrong |= labels >= len(classes)
    if not wrong.any():
        return
    first = int(wrong.argmax())
    there = known_labels(None if classes is None else len(classes))
    raise DataError(
        f"{where}: {name(first)} has the label {labels[first]}, but {there}. Mend the labels or the class names of the "
        "images, and make the cache anew with another --out of nextblock cache-latents."
    )


class LatentCache:
    """Moments of N images, each as it is and mirrored. Picklable; nothing is kept in memory but labels."""

    def __init__(self, folder: Path, about: About) -> None:
        self.folder, self.about = folder, about
        self.vae, self.classes, self.shape = about.vae, about.classes, about.shape
        self.preprocessing = Preprocessing.from_dict(about.preprocessing)
        self.image_size_px = self.preprocessing.size_px[0]
        self._shards = [Shard(folder, about.shards[number]) for number in sorted(about.shards)]
        for shard in self._shards:
            shard.require_size()
            shard.require_facts()
            require_known(np.array(shard.array("labels")), about.classes, shard.name, f"{shard.path.name} of {folder}")
        self._ends = np.cumsum([shard.record.images for shard in self._shards])
        self.labels: NDArray[np.int64] = np.concatenate([np.array(shard.array("labels")) for shard in self._shards])
        made_of = [about.vae["sha256"], about.preprocessing, about.classes]
        self.fingerprint = sha256_of([*made_of, *(shard.record.sha256 for shard in self._shards)])
        count = len(about.classes or ())
        named = f"{count} class{'' if count == 1 else 'es'}" if count else "no class names"
        self.description = (
            f"{folder}: latents of {len(self):,} images at {self.image_size_px} px, "
            f"{about.shape[0] // 2} x {about.shape[1]} x {about.shape[2]}, {named}"
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def moments(self, indices: ArrayLike, flips: Sequence[bool] | NDArray[np.bool_]) -> NDArray[np.float32]:
        """Mean and log-variance float32 [B, 2C, h, w] of the images `indices` [B], mirrored where `flips` [B].

        Raises DataError when what is read is not what was written, naming the shard.
        """
        rows = np.asarray(indices, dtype=np.int64)
        out = np.empty((len(rows), *self.shape), dtype=np.float32)
        for place, (index, flip) in enumerate(zip(rows.tolist(), flips, strict=True)):
            shard, row = self._at(index)
            out[place] = shard.read(row, bool(flip))
        return out

    def name(self, index: int) -> str:
        """The image's name in the source that the cache was made of."""
        shard, row = self._at(index)
        return shard.name(row)

    def verify(self, watch: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read all shards and compare their SHA-256; `watch(done, total)` after each. Raises DataError for one that
        is damaged."""
        for done, shard in enumerate(self._shards, 1):
            shard.require_whole()
            watch(done, len(self._shards))

    def _at(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        shard = self._shards[number]
        return shard, index - int(self._ends[number]) + shard.record.images
