"""Sources made of other sources: some of the images, several sets as one, classes numbered anew."""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nextblock.data.sources.manifest import stamps_of
from nextblock.data.sources.protocol import Sample, Source
from nextblock.errors import DataError, SampleError


def known_labels(source: Source) -> NDArray[np.int64]:
    """Class numbers int64 [N], -1 where there is none.

    Where the source knows them only with its images, these are read one by one; an image that cannot be read
    counts as one without a label.
    """
    labels = source.labels()
    if labels is not None:
        return labels
    return np.array([_label_of(source, index) for index in range(len(source))], dtype=np.int64)


def _label_of(source: Source, index: int) -> int:
    try:
        label = source[index].label
    except SampleError:
        return -1
    return -1 if label is None else label


def class_names(source: Source) -> tuple[str, ...]:
    """The source's class names; where it has none, the class numbers that occur, in order, as text."""
    if source.classes is not None:
        return source.classes
    labels = known_labels(source)
    return tuple(map(str, np.unique(labels[labels >= 0]).tolist()))


def renumbered(source: Source, classes: Sequence[str]) -> Source:
    """`source` with its classes numbered as in `classes`, matched by name; `source` itself where they are already.

    The classes of a source without names are called by their numbers. Raises DataError, naming them, when images
    are of classes that are not in `classes`.
    """
    labels = known_labels(source)
    used = np.unique(labels[labels >= 0]).tolist()
    named = source.classes or ()
    names = {number: named[number] if number < len(named) else str(number) for number in used}
    lacking = sorted(name for name in names.values() if name not in set(classes))
    if lacking:
        shown = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
        raise DataError(
            f"{source.description}: images of {len(lacking)} classes that are not among the {len(classes)} of the "
            f"training images: {shown}. Classes are matched by name."
        )
    if source.classes == tuple(classes) and source.labels() is not None:
        return source
    place = {name: number for number, name in enumerate(classes)}
    return Relabelled(source, classes, {number: place[name] for number, name in names.items()})


class Subset:
    """The images `indices` [M] of `source`, in that order. Raises DataError for an index that it has not."""

    def __init__(self, source: Source, indices: ArrayLike) -> None:
        self._source = source
        self._indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        outside = self._indices[(self._indices < 0) | (self._indices >= len(source))]
        if len(outside):
            raise DataError(f"image {outside[0]} is outside 0..{len(source) - 1} of {source.description}")
        self.classes = source.classes
        self.description = f"{len(self)} of the images of {source.description}"

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._source[self._at(index)]

    def name(self, index: int) -> str:
        return self._source.name(self._at(index))

    def _at(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        return int(self._indices[index])

    def labels(self) -> NDArray[np.int64] | None:
        labels = self._source.labels()
        return None if labels is None else labels[self._indices]

    def stamps(self) -> Iterator[str]:
        yield hashlib.sha256(self._indices.astype("<i8").tobytes()).hexdigest()
        yield from stamps_of(self._source)

    def manifest(self) -> Iterator[tuple[str, int]]:
        # The whole of the inner source, whose entries need not be images, and one line for what is chosen of it.
        digest = hashlib.sha256(self._indices.astype("<i8").tobytes()).hexdigest()[:16]
        chosen = (f"selection sha256:{digest}", len(self))
        yield from heapq.merge([chosen], self._source.manifest(), key=lambda entry: os.fsencode(entry[0]))


class Joined:
    """Several sources with the same classes, one behind the other. `titles` begin their names: 0, 1, ... if not given.

    Raises DataError when there is none, when titles repeat, and when the classes differ.
    """

    def __init__(self, sources: Sequence[Source], titles: Sequence[str] | None = None) -> None:
        self._sources = tuple(sources)
        self._titles = tuple(titles or map(str, range(len(sources))))
        if not sources or len(set(self._titles)) != len(sources):
            raise DataError(f"joining needs one or more sources with a title each; got {len(sources)}: {self._titles}")
        self.classes = sources[0].classes
        for other in sources[1:]:
            if other.classes != self.classes:
                raise DataError(f"cannot join {sources[0].description} and {other.description}: their classes differ.")
        self._ends = np.cumsum([len(source) for source in sources])
        self.description = " + ".join(source.description for source in sources)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        part, inner = self._at(index)
        return self._sources[part][inner]

    def name(self, index: int) -> str:
        part, inner = self._at(index)
        return f"{self._titles[part]}/{self._sources[part].name(inner)}"

    def _at(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - int(self._ends[part]) + len(self._sources[part])

    def labels(self) -> NDArray[np.int64] | None:
        labels = [source.labels() for source in self._sources]
        known = [part for part in labels if part is not None]
        return np.concatenate(known) if len(known) == len(labels) else None

    def stamps(self) -> Iterator[str]:
        for source in self._sources:
            yield from stamps_of(source)

    def manifest(self) -> Iterator[tuple[str, int]]:
        parts = zip(self._titles, self._sources, strict=True)
        for title, source in sorted(parts, key=lambda part: os.fsencode(f"{part[0]}/")):
            for name, size in source.manifest():
                yield f"{title}/{name}", size


class WithLabels:
    """`source` with the labels int64 [N] given, -1 for none, and `classes` (None: those of `source`)."""

    def __init__(self, source: Source, labels: NDArray[np.int64], classes: Sequence[str] | None = None) -> None:
        if labels.shape != (len(source),):
            raise DataError(f"{source.description}: {list(labels.shape)} labels for {len(source)} images")
        self._source, self._labels = source, labels
        self.classes = source.classes if classes is None else tuple(classes)
        self.description = source.description
        if (order := getattr(source, "order", None)) is not None:
            self.order = order  # see `stream.locate`

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        content = self._source[index].content
        return Sample(content, int(self._labels[index]) if self._labels[index] >= 0 else None)

    def name(self, index: int) -> str:
        return self._source.name(index)

    def labels(self) -> NDArray[np.int64]:
        return self._labels

    def stamps(self) -> Iterator[str]:
        yield from stamps_of(self._source)

    def manifest(self) -> Iterator[tuple[str, int]]:
        return self._source.manifest()


class Relabelled(WithLabels):
    """`source` with `classes`, in which its class number n is `numbers[n]`; a number not named there is no label."""

    def __init__(self, source: Source, classes: Sequence[str], numbers: Mapping[int, int]) -> None:
        before, where = np.unique(known_labels(source), return_inverse=True)
        after = np.array([-1 if n < 0 else numbers.get(n, -1) for n in before.tolist()], dtype=np.int64)
        if len(after) and after.max() >= len(classes):
            raise DataError(f"a class gets the number {after.max()}, but there are {len(classes)} classes")
        super().__init__(source, after[where] if len(source) else before, classes)
