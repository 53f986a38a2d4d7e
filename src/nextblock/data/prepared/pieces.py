"""Pieces: encoded images of fixed ranges of a source, for shards that are put together later.

Where a shard ends follows from the bytes of all images before it, so several processes cannot each make shards. They
make pieces: in the folder `.pieces`, START-STOP.bin has the contents one behind the other, and START-STOP.json what is
known of each image, sealed by a hash and written last. One process then makes the shards of them, the same ones as
without.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nextblock.data.shard_folder import read_sealed, sealed
from nextblock.data.stream import BadSample
from nextblock.durable import write_whole
from nextblock.errors import DataError

FOLDER = ".pieces"
_NAME = re.compile(r"\.?\d+-(\d+)\.")
IMAGES = 1024  # in a piece
_FORMAT = 1


class Image(NamedTuple):
    """An image on its way to a shard: position, name and label (-1: none) in the source, what is stored and as what,
    and its bytes there."""

    position: int
    name: str
    label: int
    content: bytes
    kind: str
    original_bytes: int


def pieces(count: int) -> list[range]:
    """The ranges of a source of so many images."""
    return [range(start, min(start + IMAGES, count)) for start in range(0, count, IMAGES)]


def has_pieces(folder: Path) -> bool:
    """Whether pieces were begun there."""
    return (folder / FOLDER).is_dir()


def is_made(folder: Path, piece: range) -> bool:
    """Whether this piece is there, whole."""
    return _file(folder, piece, ".json").is_file()


def write_piece(folder: Path, piece: range, images: Iterable[Image | BadSample]) -> None:
    """Write a piece; it is there when all of it is on disk. Raises OSError when the disk refuses."""
    facts: list[list[object]] = []
    (folder / FOLDER).mkdir(exist_ok=True)
    with open(_file(folder, piece, ".bin"), "wb", buffering=2**20) as file:
        for image in images:
            if isinstance(image, BadSample):
                facts.append([image.position, image.name, image.reason])
                continue
            content = image.content
            kept = [image.kind, image.original_bytes, len(content), zlib.crc32(content)]
            facts.append([image.position, image.name, image.label, *kept])
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    write_whole(_file(folder, piece, ".json"), sealed({"format": _FORMAT, "images": facts}))


def read_images(folder: Path, count: int, first: int) -> Iterator[Image | BadSample]:
    """The images of all pieces from position `first` on, in order.

    Raises DataError for a piece that is lacking or damaged; the latter is removed, to be made anew.
    """
    for piece in pieces(count):
        if piece.stop > first:
            yield from (image for image in _read_piece(folder, piece) if image.position >= first)


def bad_in_pieces(folder: Path, count: int) -> list[BadSample]:
    """The images that are left out of the pieces that are there; a damaged one is removed, to be made anew.

    Reads what is known of all images, a few milliseconds for each piece, and none of the contents.
    """
    bad: list[BadSample] = []
    for piece in pieces(count):
        if is_made(folder, piece):
            try:
                bad += [image for image, _, _ in _known(folder, piece) if isinstance(image, BadSample)]
            except DataError:  # or another process has just put it into a shard
                _file(folder, piece, ".json").unlink(missing_ok=True)
    return bad


def remove_pieces(folder: Path, before: int | None = None) -> None:
    """Remove those of images before this position only; without one, all."""
    if before is None:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        return
    for file in (folder / FOLDER).glob("*"):
        named = _NAME.match(file.name)  # not what a network file system keeps of a file that is still open
        if named and int(named[1]) <= before:
            file.unlink(missing_ok=True)


def _read_piece(folder: Path, piece: range) -> Iterator[Image | BadSample]:
    try:
        known = _known(folder, piece)
        with open(_file(folder, piece, ".bin"), "rb") as file:
            for image, length, check in known:
                if isinstance(image, BadSample):
                    yield image
                    continue
                content = file.read(length)
                if zlib.crc32(content) != check:
                    raise DataError("their contents are not what was written")
                yield image._replace(content=content)
    except (OSError, DataError) as error:
        _file(folder, piece, ".json").unlink(missing_ok=True)
        why = str(error).removesuffix(".")
        raise DataError(
            f"the images {piece.start} to {piece.stop - 1}, encoded for {folder}, cannot be read: {why}. The same "
            "command makes them anew."
        ) from error


def _known(folder: Path, piece: range) -> list[tuple[Image | BadSample, int, int]]:
    """Images without their contents, but with the length and the CRC-32 of these. Raises DataError."""
    with read_sealed(_file(folder, piece, ".json"), ["images"], _FORMAT, "") as values:
        return [_from_facts(*facts) for facts in values["images"]]


def _from_facts(position: int, name: str, *rest: Any) -> tuple[Image | BadSample, int, int]:
    if len(rest) == 1:
        return BadSample(name, rest[0], position), 0, 0
    label, kind, original_bytes, length, check = rest
    return Image(position, name, label, b"", kind, original_bytes), length, check


def _file(folder: Path, piece: range, ending: str) -> Path:
    return folder / FOLDER / f"{piece.start:09d}-{piece.stop:09d}{ending}"
