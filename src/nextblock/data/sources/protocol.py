"""What every source of images looks like to the rest of the package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Sample(NamedTuple):
    """One image, not yet decoded (bytes or Pillow) or as uint8 pixels, and its class number if it has one."""

    content: bytes | NDArray[Any] | Image.Image
    label: int | None


@runtime_checkable
class Source(Protocol):
    """A fixed, ordered set of images. Picklable, cheap to fork."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names by number, where they are known."""

    @property
    def description(self) -> str:
        """One line for a log."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Raises SampleError when this one image cannot be read, DataError when the storage fails."""

    def name(self, index: int) -> str:
        """Stable and unique; for a folder the path below its root, with '/'."""

    def labels(self) -> NDArray[np.int64] | None:
        """Class numbers [N], -1 where there is none; None when they are not known without reading the images."""

    def manifest(self) -> Iterator[tuple[str, int]]:
        """Name and size in bytes of everything the source is made of, sorted bytewise by name."""
