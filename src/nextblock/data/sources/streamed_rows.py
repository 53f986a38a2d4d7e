"""One row of a streamed set, and what it is called."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nextblock.errors import SampleError

_DIGITS = 16  # of a SHA-256: two of a thousand million rows share them with a probability of 3 %


class Row(NamedTuple):
    """One sample as it came.

    Attributes:
        image: as the data set has it.
        label: class number.
        title: of the set.
        place: where it was met: epoch, part, chunk. Another one in each epoch.
        number: in the chunk.
        others: the other columns of the chunk.
    """

    image: Any
    label: int | None
    title: str
    place: str
    number: int
    others: Mapping[str, Sequence[Any]]

    @property
    def name(self) -> str:
        """What errors call it: where it was met."""
        return f"{self.title} {self.place}[{self.number}]"

    @property
    def content(self) -> bytes | NDArray[Any] | Image.Image:
        """Raises SampleError when the row holds no image."""
        image = self.image["bytes"] if isinstance(self.image, Mapping) else self.image
        if isinstance(image, bytes | np.ndarray | Image.Image):
            return image
        raise SampleError(self.name, "the row holds no image")

    @property
    def lasting_name(self) -> str:
        """What it is called in every epoch, of every number of processes: by what it holds.

        The file's name where it is told, the SHA-256 of the image's bytes, and that of the other columns, which tells
        apart rows whose images are missing or the same.
        """
        told = self.image if isinstance(self.image, Mapping) else {"bytes": self.image}
        image, path = told.get("bytes"), told.get("path")
        parts = [self.title, os.path.basename(path) if isinstance(path, str) else ""]
        if isinstance(image, bytes | np.ndarray):
            parts.append(f"sha256:{_digest(image)}")
        if self.others:
            others = {column: values[self.number] for column, values in self.others.items()}
            parts.append(f"row:{_digest(json.dumps(others, default=_told).encode())}")
        return " ".join(filter(None, parts))


def _digest(content: bytes | NDArray[Any]) -> str:
    plain = content.tobytes() if isinstance(content, np.ndarray) else content
    return hashlib.sha256(plain).hexdigest()[:_DIGITS]


def _told(value: Any) -> str:
    """Of what JSON has no word for; nothing that would be another one the next time, as an address in memory."""
    return _digest(value) if isinstance(value, bytes | np.ndarray) else type(value).__name__
