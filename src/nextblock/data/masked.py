"""Images with masks, to train and to test on: from whatever names them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nextblock.data.named.opening import spelled
from nextblock.data.sources import Source, open_source
from nextblock.data.sources.folder import open_folder
from nextblock.data.sources.protocol import Sample
from nextblock.data.sources.views import Joined, Subset
from nextblock.errors import DataError, nearest
from nextblock.randomness import permutation

IMAGES, MASKS = "images", ("masks", "annotations")
LAYOUTS = "images/ and masks/ with the same names, TRAIN/images and TRAIN/masks, or images/TRAIN and annotations/TRAIN"
CLASSES = "classes.txt"
_TESTS = ("test", "val")
_SHOWN = 3


@dataclass(frozen=True)
class Pairs:
    """Images, and for each the mask of the same number."""

    images: Source
    masks: Source

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: NDArray[np.int64]) -> Pairs:
        return Pairs(Subset(self.images, indices), Subset(self.masks, indices))


@dataclass(frozen=True)
class Masked:
    """Pairs to train on and to test on. classes: names by number, where classes.txt tells them. note: what the person
    should know; empty when there is nothing to say."""

    train: Pairs
    test: Pairs
    classes: tuple[str, ...] | None
    name: str
    note: str


def open_masked(
    spec: Any,
    *,
    test: Any = None,
    train_split: str | None = None,
    test_split: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Masked:
    """Open images and masks.

    Args:
        spec: a folder of images/ and masks/ with the same names (images of any suffix, masks PNG), with or without
            train/ and test/ (or val/) above or below them; annotations/ may stand for masks/. In Python also
            (images [N, H, W, C], masks [N, H, W]) or any sequence of (image, mask).
        test: the test images and masks, where they are not part of `spec`; given in the same ways.
        train_split, test_split: which splits, where there are several.
        test_fraction, seed: how many and which images are held out where there is no test split.

    Masks are not opened. Raises DataError when images and masks do not belong together, naming some.
    """
    splits, classes, name = _find(spec)
    note = ""
    wanted = train_split or (spelled("train", splits) if len(splits) > 1 else next(iter(splits)))
    if wanted is None or wanted not in splits:
        raise _no_split(name, train_split or "train", splits)
    train = _paired(splits[wanted])
    if test is not None:
        others, _, other = _find(test)
        tested = _paired(others[_test_split(others, test_split, other)])
    elif test_split or len(splits) > 1:
        tested = _paired(splits[_test_split({k: v for k, v in splits.items() if k != wanted}, test_split, name)])
    else:
        chosen = _held_out(len(train), test_fraction, seed, "segmentation/test")
        train, tested = train.subset(np.flatnonzero(~chosen)), train.subset(np.flatnonzero(chosen))
        note = f"no test split was given: {test_fraction * 100:g} % of the images were held out"
    return Masked(train, tested, classes, name, note)


def split_pairs(pairs: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the pairs to train on and of those to choose by, a `fraction`. Raises DataError for a single pair."""
    chosen = _held_out(pairs, fraction, seed, "segmentation/validation")
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def _held_out(count: int, fraction: float, seed: int, purpose: str) -> NDArray[np.bool_]:
    """True for a fraction of the images, at least one and never all; by number, as a mask holds several classes."""
    if not 0 < fraction < 1:
        raise DataError(f"the fraction to hold out must lie between 0 and 1; got {fraction:g}.")
    if count < 2:
        raise DataError(f"no image can be held out of {count}: at least two are needed, better many more.")
    chosen = np.zeros(count, dtype=np.bool_)
    chosen[permutation(seed, purpose, count)[: min(max(1, round(fraction * count)), count - 1)]] = True
    return chosen


Found = dict[str, Any]  # split -> (folder of images, folder of masks), or Pairs


def _find(spec: Any) -> tuple[Found, tuple[str, ...] | None, str]:
    """The splits of a spec, class names where they are told, and its name."""
    if isinstance(spec, str | os.PathLike):
        root = Path(spec).expanduser()
        if not root.is_dir():
            siblings = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
            raise DataError(f"no such folder: {root}.{nearest(root.name, siblings)} Wanted is one of {LAYOUTS}.")
        return _layout(root), _class_names(root), root.resolve().name
    if isinstance(spec, tuple) and len(spec) == 2 and all(isinstance(x, np.ndarray | torch.Tensor) for x in spec):
        images, masks = spec
        if len(images) != len(masks):
            raise DataError(f"{len(images)} images and {len(masks)} masks: there must be one mask for each image.")
        return {"all": Pairs(open_source(images), _Items(masks, None))}, None, "arrays"
    if hasattr(spec, "__len__") and hasattr(spec, "__getitem__") and not isinstance(spec, bytes | dict):
        return {"all": Pairs(open_source(_Column(spec, 0)), _Items(spec, 1))}, None, type(spec).__name__
    raise DataError(f"cannot read images and masks from a {type(spec).__name__}. Give a folder of {LAYOUTS}.")


def _layout(root: Path) -> Found:
    """split -> (folder of images, folder of masks)."""
    inside = {path.name: path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    masks = next((inside[name] for name in MASKS if name in inside), None)
    if IMAGES in inside and masks is not None:
        images = inside[IMAGES]
        below = {path.name for path in masks.iterdir() if path.is_dir()}
        splits = {name: (images / name, masks / name) for name in sorted(below) if (images / name).is_dir()}
        if spelled("train", splits):
            return splits
        return {"all": (images, masks)}
    splits = {}
    for name, path in inside.items():
        own = next((path / each for each in MASKS if (path / each).is_dir()), None)
        if (path / IMAGES).is_dir() and own is not None:
            splits[name] = (path / IMAGES, own)
    if splits:
        return splits
    seen = ", ".join(inside) or "no folders"
    raise DataError(f"{root} holds {seen}; wanted is one of {LAYOUTS}.")


def _test_split(splits: Found, asked: str | None, name: str) -> str:
    if asked:
        found = spelled(asked, splits)
    else:
        found = next((each for test in _TESTS if (each := spelled(test, splits))), None)
        found = found or (next(iter(splits)) if len(splits) == 1 else None)
    if found is None:
        raise _no_split(name, asked or "test or val", splits)
    return found


def _no_split(name: str, wanted: str, splits: Found) -> DataError:
    return DataError(f"{name} has no split '{wanted}' with images and masks; splits: {', '.join(sorted(splits))}.")


def _class_names(root: Path) -> tuple[str, ...] | None:
    """The lines of classes.txt: the first is the name of class 0."""
    file = root / CLASSES
    if not file.is_file():
        return None
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: one class name a line, the first of class 0.") from error
    if len(names) < 2 or len(set(names)) != len(names):
        raise DataError(f"{file} must name two classes or more, one a line, each once; it has {len(names)} lines.")
    return names


def _paired(found: Any) -> Pairs:
    """Images and masks of two folders, matched by their paths without suffix."""
    if isinstance(found, Pairs):
        return found
    images, masks = (open_folder(os.fspath(folder)) for folder in found)
    others = [masks.name(i) for i in range(len(masks)) if not masks.name(i).lower().endswith(".png")]
    if others:
        raise DataError(f"{found[1]}: masks must be PNG files, which keep every value; found {_some(others)}.")
    by_stem, ours = _by_stem(masks, found[1]), _by_stem(images, found[0])
    lacking = [images.name(number) for stem, number in ours.items() if stem not in by_stem]
    if lacking:
        example = found[1] / f"{os.path.splitext(lacking[0])[0]}.png"
        raise DataError(
            f"{len(lacking)} of {len(ours)} images in {found[0]} have no mask: {_some(lacking)}. The mask of the first "
            f"would be {example}."
        )
    surplus = [masks.name(number) for stem, number in by_stem.items() if stem not in ours]
    if surplus:
        raise DataError(f"{len(surplus)} masks in {found[1]} have no image: {_some(surplus)}. Remove them.")
    order = np.array([by_stem[stem] for stem in ours], dtype=np.int64)
    titles = [f"{folder.parent.name}/{folder.name}" for folder in found]  # an image and its mask have the same name
    return Pairs(Joined([images], titles[:1]), Joined([Subset(masks, order)], titles[1:]))


def _by_stem(source: Source, folder: Path) -> dict[str, int]:
    found: dict[str, int] = {}
    for number in range(len(source)):
        stem = os.path.splitext(source.name(number))[0]
        if stem in found:
            raise DataError(f"{folder}: {source.name(found[stem])} and {source.name(number)} have the same name.")
        found[stem] = number
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


class _Column:
    """One part of every item of a sequence of (image, mask)."""

    def __init__(self, items: Any, part: int) -> None:
        self._items, self._part = items, part

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        item = self._items[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise DataError(f"item {index} must be (image, mask); got a {type(item).__name__}.")
        return item[self._part]


class _Items:
    """The masks of a sequence of (image, mask), or of masks alone (`part` None), as a source."""

    classes: tuple[str, ...] | None = None

    def __init__(self, items: Any, part: int | None) -> None:
        self._items = items if part is None else _Column(items, part)
        self.description = f"{len(items)} masks"

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self._items[index], None)

    def name(self, index: int) -> str:
        return f"mask[{index}]"

    def labels(self) -> NDArray[np.int64] | None:
        return None

    def manifest(self) -> Iterator[tuple[str, int]]:
        yield "python:masks", len(self)
