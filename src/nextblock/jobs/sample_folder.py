"""The folder of a sampling job: what made it, which images are there, and the sample file made of them.

================  ===================================================================
sample.json       what made the images; nothing else may be added to them
images/           000000.png, 000001.png, ...: each there and whole, or not there
contact-sheet.png the first of them, labelled
entities.gif      how the first few came about
samples.npz       all of them in one file, when asked for
================  ===================================================================
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nextblock.durable import flush_file, flush_folder
from nextblock.errors import RunError
from nextblock.jobs.output import written_whole
from nextblock.training.run_record import claim_folder, read_json, to_json, write_text

RECORD = "sample.json"
WRITTEN_AT_ONCE = 8
_PNG_END = b"IEND\xaeB`\x82"
_MOST_SHOWN = 60  # characters of a value in a message
ADDED = {"settings": {"compile": False}}  # what records did not always tell, and what was meant then


class SampleFolder:
    """Where so many images are, or will be."""

    def __init__(self, path: str | Path, count: int) -> None:
        self.path, self.count = Path(path), count
        self.images = self.path / "images"
        self.sheet, self.animation = self.path / "contact-sheet.png", self.path / "entities.gif"
        self.npz = self.path / "samples.npz"
        self._digits = _digits(count)

    def image(self, number: int) -> Path:
        return self.images / f"{number:0{self._digits}d}.png"

    def missing(self) -> list[int]:
        """The numbers of the images that are not there, or not whole (after a loss of power)."""
        return [number for number in range(self.count) if not _is_whole(self.image(number))]

    def write_all(self, images: Mapping[int, NDArray[np.uint8]]) -> None:
        """Images by their numbers, each uint8 [H, W, C] of 1 or 3 channels: written beside, then flushed, then renamed.

        Several are flushed at once, which a disk answers together. Raises RunError when the file system refuses; what
        is there then is whole.
        """
        beside = {self.images / f".{self.image(number).name}.partial": number for number in images}
        try:
            with ThreadPoolExecutor(WRITTEN_AT_ONCE) as pool:
                list(pool.map(_write_png, beside, (images[number] for number in beside.values())))
            for path, number in beside.items():
                path.replace(self.image(number))
            flush_folder(self.images)
        except OSError as error:
            raise RunError(
                f"cannot write to {self.images}: {error.strerror or error}. What is there is kept: the same "
                "command goes on when that is mended."
            ) from error
        finally:
            with suppress(OSError):  # of a disk that refuses all: what it said first is what is told
                for path in beside:
                    path.unlink(missing_ok=True)

    def read(self, number: int) -> NDArray[np.uint8]:
        """uint8 [H, W, C]."""
        with Image.open(self.image(number)) as image:
            pixels = np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def claim(self, record: Mapping[str, Any]) -> None:
        """Take an empty folder, or go on in one that the same things made, or fewer images of the same.

        Args:
            record: what makes the images, plain values; `settings` and `source` decide whether it is the same.

        Raises RunError when something else is there, naming what differs.
        """
        file = self.path / RECORD
        if file.is_file():
            before = _read(file)
            changed = _differences(before, record)
            if not changed:
                self.images.mkdir(exist_ok=True)
                return
            if self.images.is_dir() and any(self.images.glob("[0-9]*.png")):
                if not _grows(before, record):
                    only_fewer = all(change.startswith("n was ") for change in changed)
                    what = "more images than are asked for" if only_fewer else "images that were made otherwise"
                    raise RunError(
                        f"{self.path} holds {what}: {'; '.join(changed)}. "
                        "Give what was given then, or choose another --out."
                    )
                self._forget_pictures(before)
        else:
            claim_folder(self.path, "Choose another --out.")
        write_text(file, to_json(dict(record)))  # first: a folder with anything else in it, and no record, is not ours
        self.images.mkdir(exist_ok=True)

    def _forget_pictures(self, before: Mapping[str, Any]) -> None:
        """Remove what shows too few images, before the record tells of more: a kill in between leaves it to be drawn.

        The animation shows images of the first batch: where that was full, it shows the same ones again.
        """
        self.sheet.unlink(missing_ok=True)
        if before["settings"]["n"] < before["settings"]["batch_size"]:
            self.animation.unlink(missing_ok=True)

    @property
    def finished(self) -> bool:
        return bool(_read(self.path / RECORD).get("finished"))

    def finish(self, **facts: Any) -> None:
        """Add `facts` to the record."""
        file = self.path / RECORD
        write_text(file, to_json(_read(file) | facts))

    def npz_is_short(self) -> bool:
        """Whether there is a sample file, and it is of other images than all of them: of fewer, before more came."""
        if not self.npz.exists():
            return False
        try:
            with zipfile.ZipFile(self.npz) as archive, archive.open("arr_0.npy") as file:
                np.lib.format.read_magic(file)
                shape, _, _ = np.lib.format.read_array_header_1_0(file)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            return True  # damaged
        return int(shape[0]) != self.count

    def write_npz(self, labels: NDArray[np.int64] | None) -> None:
        """The ADM sample file: arr_0 uint8 [N, H, W, 3] in the images' order, arr_1 int64 [N] (with classes).

        Gray images get three equal channels. One image is in memory at a time.
        """
        height, width = self.read(0).shape[:2]
        with written_whole(self.npz) as beside, zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                _array_header(file, (self.count, height, width, 3), "|u1")
                for number in range(self.count):
                    pixels = self.read(number)
                    file.write(np.ascontiguousarray(np.broadcast_to(pixels, (height, width, 3))).data)
            if labels is not None:
                with archive.open("arr_1.npy", "w", force_zip64=True) as file:
                    _array_header(file, (self.count,), "<i8")
                    file.write(labels.astype("<i8").tobytes())


def _write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Written and flushed."""
    shown = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    # The first level: a third of the time for a few percent more bytes.
    Image.fromarray(shown).save(path, format="png", compress_level=1)
    flush_file(path)


def _digits(count: int) -> int:
    """Of a number in a name, where there are so many images."""
    return max(6, len(str(count - 1)))


def _array_header(file: IO[bytes], shape: tuple[int, ...], kind: str) -> None:
    header = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _is_whole(path: Path) -> bool:
    """Whether the file is there, to the end that every PNG has."""
    try:
        with open(path, "rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            return file.read() == _PNG_END
    except OSError:
        return False


def _read(file: Path) -> dict[str, Any]:
    return read_json(file, ("settings", "source"), "Choose another --out.")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    told = []
    for section in ("settings", "source"):
        old, new = ADDED.get(section, {}) | before[section], json.loads(json.dumps(now[section]))
        told += [
            f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}"
            for name in {**old, **new}
            if old.get(name) != new.get(name)
        ]
    return told


def _grows(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether nothing is asked for but more images, and their names have as many digits as those that are there."""
    old, new = before["settings"].get("n", 0), now["settings"].get("n", 0)
    same = dict(before) | {"settings": before["settings"] | {"n": new}}
    return old < new and _digits(old) == _digits(new) and not _differences(same, now)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
