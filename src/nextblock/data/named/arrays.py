"""Official layouts that keep pixels in arrays: CIFAR's pickled batches and PatchCamelyon's HDF5 files."""

from __future__ import annotations

import importlib.util
import os
import pickle
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nextblock.data.named.dataset import Columns, Splits
from nextblock.data.named.files import inner
from nextblock.data.sources import Source
from nextblock.data.sources.memory import ArraySource
from nextblock.data.sources.protocol import Sample
from nextblock.errors import DataError

_SIDE_PX = 32


class NamedArrays(ArraySource):
    """uint8 images [N, H, W, C] and labels [N] with class names."""

    def __init__(self, images: Any, labels: Any, classes: tuple[str, ...], title: str) -> None:
        super().__init__(images, labels)
        self.classes = classes
        self.description = f"{title}: {len(self)} images, {len(classes)} classes"


def cifar10(folder: Path, columns: Columns) -> Splits:
    """data_batch_1 ... data_batch_5, test_batch and batches.meta, pickled by Python 2.

    Each batch holds `data` uint8 [N, 3072], the red, green and blue planes of 32×32 px, and `labels`. Learned from
    torchvision's CIFAR10.
    """
    place = inner(folder, "batches.meta", "data_batch_1", tops=("cifar-10-batches-py",))
    if place is None:
        return {}
    splits = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    return {split: partial(_cifar, place, split, files, "CIFAR-10") for split, files in splits.items()}


def cifar100(folder: Path, columns: Columns) -> Splits:
    """train, test and meta, pickled by Python 2; the classes are the fine ones. Learned from torchvision's CIFAR100."""
    place = inner(folder, "meta", "train", "test", tops=("cifar-100-python",))
    if place is None or not (place / "train").is_file():
        return {}
    return {split: partial(_cifar, place, split, [split], "CIFAR-100") for split in ("train", "test")}


def _cifar(place: Path, split: str, files: list[str], title: str) -> Source:
    meta = _unpickled(place / ("meta" if title == "CIFAR-100" else "batches.meta"))
    classes = tuple(map(str, meta.get("fine_label_names", meta.get("label_names", ()))))
    batches = [_unpickled(place / name) for name in files]
    try:
        labels = np.concatenate([np.asarray(b["fine_labels" if "fine_labels" in b else "labels"]) for b in batches])
        data = np.concatenate([np.asarray(batch["data"], dtype=np.uint8) for batch in batches])
        images = data.reshape(-1, 3, _SIDE_PX, _SIDE_PX).transpose(0, 2, 3, 1)  # [N, H, W, C]
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{place / files[0]} is not a batch of {title}: {error}. Unpack the archive again.") from error
    return NamedArrays(np.ascontiguousarray(images), labels, classes, f"{title} {split}")


class _PlainUnpickler(pickle.Unpickler):
    """Builds numbers, texts, lists, dicts and arrays of numbers, and refuses everything else.

    A pickle names the functions to call while it is read; whoever made the file decides them. Those that these files
    need, three of numpy and, where Python 3 wrote them, one that turns text into bytes, are replaced by our own.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module.replace("_core", "core") == "numpy.core.multiarray" and name == "_reconstruct":
            return _PlainArray
        known = {("numpy", "ndarray"): _PlainArray, ("numpy", "dtype"): _PlainDtype, ("_codecs", "encode"): _as_bytes}
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which pickled images do not need")


class _PlainDtype:
    """Stands where a numpy dtype was pickled: `code` is u1, i8 and the like, `order` its byte order."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code, self.order = _as_text(code), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _as_text(state[1])


class _PlainArray:
    """Stands where a numpy array was pickled: made from its shape and its bytes."""

    def __init__(self, *_: Any) -> None:
        self._values: NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_major, raw = state
        if dtype.code.lstrip("<>|=")[:1] not in tuple("biuf"):
            raise pickle.UnpicklingError(f"it holds an array of {dtype.code}, which pickled images do not need")
        values = np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else raw, np.dtype(dtype.code))
        self._values = values.view(values.dtype.newbyteorder(dtype.order)).reshape(shape, order="FC"[not column_major])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self._values, dtype=dtype)


def _as_text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def _as_bytes(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for text in {encoding}")
    return text.encode("latin1")


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        told = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path} was not read: {told}. Unpack the archive again, from its official source.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not a batch of images")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def pcam(folder: Path, columns: Columns) -> Splits:
    """camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5: `x` uint8 [N, 96, 96, 3], `y` [N, 1, 1, 1].

    Learned from torchvision's PCAM. Needs h5py, which is not among our dependencies.
    """
    place = inner(folder, _pcam_file("valid", "y"), tops=("pcam", "pcamv1"))
    if place is None:
        return {}
    written = {"train": "train", "val": "valid", "test": "test"}
    here = {split: word for split, word in written.items() if (place / _pcam_file(word, "x")).is_file()}
    return {split: partial(HDF5Source, place, split, word) for split, word in here.items()}


def _pcam_file(word: str, part: str) -> str:
    return f"camelyonpatch_level_2_split_{word}_{part}.h5"


class HDF5Source:
    """One split of PatchCamelyon. The file is opened anew in each process, at the first image."""

    classes: tuple[str, ...] | None = ("normal", "tumor")

    def __init__(self, place: Path, split: str, word: str) -> None:
        if importlib.util.find_spec("h5py") is None:
            raise DataError(
                f"{place} holds HDF5 files, and h5py is not installed to read them: pip install h5py. A copy as "
                "Parquet or as split folders opens without it."
            )
        self._path, self._split = place / _pcam_file(word, "x"), split
        with _h5(place / _pcam_file(word, "y")) as file:
            self._labels = np.asarray(file["y"]).reshape(-1).astype(np.int64)
        self._images: Any = None
        self._opened_by = 0
        self.description = f"PatchCamelyon {split}: {len(self)} images, 2 classes"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Sample:
        name = self.name(index)
        if self._opened_by != os.getpid():  # a worker must not read through a file that was open before the fork
            self._images, self._opened_by = _h5(self._path)["x"], os.getpid()
        try:
            return Sample(np.asarray(self._images[index]), int(self._labels[index]))
        except OSError as error:
            raise DataError(f"cannot read {name} of {self._path}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None, "_opened_by": 0}

    def name(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        return f"pcam/{self._split}[{index}]"

    def labels(self) -> NDArray[np.int64]:
        return self._labels

    def manifest(self) -> Iterator[tuple[str, int]]:
        yield self._path.name, self._path.stat().st_size


def _h5(path: Path) -> Any:
    try:
        return import_module("h5py").File(path, "r")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}. Unpack the .gz file again.") from error
