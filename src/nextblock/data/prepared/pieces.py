"""Pieces: encoded images of fixed ranges of a source, for shards that are put together later.

Where a shard ends follows from the bytes of all images before it, so several processes cannot each make shards. They
make pieces: in the folder `.pieces`, START-STOP.bin has the contents one behind the other, and START-STOP.json what is
known of each image, written last. One process then makes the shards of them, the same ones as without.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from nextblock.data.stream import BadSample
from nextblock.durable import write_whole
from nextblock.errors import DataError

FOLDER = ".pieces"
IMAGES = 1024  # in a piece


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
    write_whole(_file(folder, piece, ".json"), json.dumps(facts).encode())


def read_images(folder: Path, count: int, first: int) -> Iterator[Image | BadSample]:
    """The images of all pieces from position `first` on, in order.

    Raises DataError for a piece that is lacking or damaged; the latter is removed, to be made anew.
    """
    for piece in pieces(count):
        if piece.stop > first:
            yield from (image for image in _read_piece(folder, piece) if image.position >= first)


def remove_pieces(folder: Path, before: int | None = None) -> None:
    """Remove those of images before this position only; without one, all."""
    if before is None:
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        return
    for file in (folder / FOLDER).glob("*"):
        if int(file.name.lstrip(".").split(".")[0].split("-")[1]) <= before:
            file.unlink(missing_ok=True)


def _read_piece(folder: Path, piece: range) -> Iterator[Image | BadSample]:
    try:
        facts = json.loads(_file(folder, piece, ".json").read_bytes())
        with open(_file(folder, piece, ".bin"), "rb") as file:
            for position, name, *rest in facts:
                if len(rest) == 1:
                    yield BadSample(name, rest[0], position)
                    continue
                label, kind, original_bytes, length, check = rest
                content = file.read(length)
                if zlib.crc32(content) != check:
                    raise ValueError("its content is not what was written")
                yield Image(position, name, label, content, kind, original_bytes)
    except (OSError, ValueError, TypeError) as error:
        _file(folder, piece, ".json").unlink(missing_ok=True)
        raise DataError(
            f"the images {piece.start} to {piece.stop - 1}, encoded for {folder}, cannot be read: {error}. The same "
            "command makes them anew."
        ) from error


def _file(folder: Path, piece: range, ending: str) -> Path:
    return folder / FOLDER / f"{piece.start:09d}-{piece.stop:09d}{ending}"
