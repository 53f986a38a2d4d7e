"""Images that are already in Python: arrays, and any object with `__len__` and `__getitem__`."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nextblock.data.decode import is_transient, read_bytes
from nextblock.data.sources.protocol import Sample
from nextblock.errors import DataError, NextblockError, SampleError, nearest


class ArraySource:
    """uint8 images [N, H, W] or [N, H, W, C] (a torch tensor may be [N, C, H, W]), and labels [N] or None."""

    classes: tuple[str, ...] | None = None

    def __init__(self, images: Any, labels: Any = None) -> None:
        self._images = _checked_images(images)
        self._labels = None if labels is None else _checked_labels(labels, len(self._images))
        shape = ", ".join(map(str, self._images.shape))
        self.description = f"array [{shape}] uint8, {'no labels' if labels is None else 'with labels'}"

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._images[index], None if self._labels is None else int(self._labels[index]))

    def name(self, index: int) -> str:
        return f"array[{index}]"

    def labels(self) -> NDArray[np.int64] | None:
        return self._labels

    def manifest(self) -> Iterator[tuple[str, int]]:
        digest = hashlib.sha256(np.ascontiguousarray(self._images).data).hexdigest()[:16]
        shape = ",".join(map(str, self._images.shape))
        yield f"array[{shape}] uint8 sha256:{digest}", int(self._images.nbytes)

    def stamps(self) -> Iterator[str]:
        return iter(())  # the manifest is a hash of the pixels


def _checked_images(images: Any) -> NDArray[np.uint8]:
    is_tensor = isinstance(images, torch.Tensor)
    pixels = images.detach().cpu().numpy() if is_tensor else np.asarray(images)
    if pixels.dtype != np.uint8:
        raise DataError(
            f"images must be uint8 (0..255), got {pixels.dtype}. "
            "Values in 0..1: (images * 255).round() as uint8 is what is wanted."
        )
    if pixels.ndim not in (3, 4):
        raise DataError(f"images must be [N, H, W] or [N, H, W, C], got {list(pixels.shape)}")
    if not pixels.size:
        raise DataError(f"images {list(pixels.shape)} hold no pixels; at least one image is needed")
    return np.moveaxis(pixels, 1, 3) if is_tensor and _channels_first(pixels.shape[1:]) else pixels


def _channels_first(shape: tuple[int, ...]) -> bool:
    """torch's habit: [C, H, W]. Only where it cannot be [H, W, C] as well."""
    return len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 2, 3, 4)


def _checked_labels(labels: Any, count: int) -> NDArray[np.int64]:
    values = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if values.dtype.kind not in "iub" or values.shape != (count,):
        found = f"{values.dtype} {list(values.shape)}"
        raise DataError(f"labels must be integers [{count}], one for each image, got {found}")
    return values.astype(np.int64)


class ObjectSource:
    """Any object whose items are an image, (image, label), or a mapping with an image and perhaps a label.

    An image is encoded bytes, a path, a Pillow image, or a uint8 array [H, W] or [H, W, C]; a torch tensor may
    be [C, H, W]. `classes`, and `targets` or `labels`, are taken from the object where it has them.
    """

    def __init__(self, items: Any, image_column: str = "image", label_column: str | None = None) -> None:
        self._items = items
        self._image_key, self._label_key = image_column, label_column
        self._qualname = type(items).__qualname__
        self._count = len(items)
        if not self._count:
            raise DataError(f"the {self._qualname} given is empty; at least one image is needed")
        names = getattr(items, "classes", None)
        self.classes = tuple(map(str, names)) if isinstance(names, list | tuple) else None
        self.description = f"{self._qualname} object: {self._count} items"
        # A wrong type should be said now, not after the model is built; one broken image is not a wrong type.
        with contextlib.suppress(SampleError):
            self[0]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        name = self.name(index)
        try:
            item = self._items[index]
        except NextblockError:
            raise
        except (OSError, SyntaxError) as error:  # how Pillow says that an image is broken
            if isinstance(error, OSError) and is_transient(error):
                raise DataError(f"{name}: read error: {error}") from error
            raise SampleError(name, str(error).partition("\n")[0]) from error
        except Exception as error:
            raise DataError(f"{name} raised {type(error).__name__}: {error}") from error
        image, label = self._split(item, name)
        return Sample(_checked_content(image, name), _checked_label(label, name))

    def _split(self, item: Any, name: str) -> tuple[Any, Any]:
        if isinstance(item, Mapping):
            for key in (self._image_key, self._label_key):
                if key is not None and key not in item:
                    keys = ", ".join(map(str, item))
                    raise DataError(f"{name} has no '{key}'; it has: {keys}.{nearest(key, map(str, item))}")
            return item[self._image_key], item.get(self._label_key or "label")
        if isinstance(item, tuple | list):
            if len(item) != 2:
                raise DataError(f"{name} must be an image or (image, label), got {len(item)} parts")
            return item[0], item[1]
        return item, None

    def name(self, index: int) -> str:
        return f"{self._qualname}[{index}]"

    def labels(self) -> NDArray[np.int64] | None:
        for attribute in ("targets", "labels"):
            values = getattr(self._items, attribute, None)
            if isinstance(values, list | np.ndarray | torch.Tensor) and len(values) == self._count:
                return _checked_labels(values, self._count)
        return None

    def manifest(self) -> Iterator[tuple[str, int]]:
        yield f"python:{self._qualname}", self._count


def _checked_content(image: Any, name: str) -> bytes | NDArray[Any] | Image.Image:
    if isinstance(image, str | os.PathLike):
        return read_bytes(image, name=name)
    if isinstance(image, torch.Tensor):
        first = _channels_first(tuple(image.shape))
        image = (image.permute(1, 2, 0) if first else image).detach().cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise DataError(f"{name} has {image.dtype} pixels; uint8 (0..255) is needed")
        return image
    if isinstance(image, bytes | Image.Image):
        return image
    raise DataError(
        f"{name} is a {type(image).__name__}; an image is bytes, a path, a PIL image or a uint8 array or tensor"
    )


def _checked_label(label: Any, name: str) -> int | None:
    if label is None:
        return None
    try:
        return int(label)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} has the label {label!r}; a label is a class number or None") from error
