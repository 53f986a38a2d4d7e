"""WebDataset shards as a source like any other: images are read where they lie in their tars, nothing is unpacked.

Tars may be larger than memory, behind HTTP larger than the disk. Each is indexed once (see `tar_index`); what a source
holds in memory is a few numbers for each tar. The training stream takes the samples in the order of `TarSource.order`,
in which reads stay within a few tars at a time.
"""

from __future__ import annotations

import os
import posixpath
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from nextblock.data.decode import EXTENSIONS
from nextblock.data.sources.protocol import Sample
from nextblock.data.sources.tar_index import Header, Index, Tar, open_index
from nextblock.data.sources.tar_local import LocalTar
from nextblock.data.sources.tar_samples import Wanted
from nextblock.data.sources.tar_web import WebTar
from nextblock.data.windows import Windows
from nextblock.errors import DataError, nearest

WINDOW_SHARDS = 32  # that are shuffled together; part of what the stream is
_INDEXES = 128  # mapped at a time; each is an open file too
_INDEXED_AT_ONCE = 8


class _Shard(NamedTuple):
    title: str
    tar: Tar
    header: Header


class TarSource:
    """The samples with an image of one or more indexed tars, tar by tar. Picklable, cheap to fork.

    Args:
        title: what the description calls it.
        shards: at least one, sorted by their titles, which differ.
        window: so many shards are shuffled together.

    Raises DataError where there is no image.
    """

    classes: tuple[str, ...] | None = None

    def __init__(self, title: str, shards: Sequence[_Shard], wanted: Wanted, window: int) -> None:
        self._shards, self._wanted = tuple(shards), wanted
        sizes = np.array([shard.header.count for shard in shards], dtype=np.int64)
        self._ends: list[int] = np.cumsum(sizes).tolist()
        self.order = Windows(sizes, window).order
        self._labelled = sum(shard.header.labelled for shard in shards)
        self._indexes: OrderedDict[int, Index] = OrderedDict()
        if not len(self):
            raise DataError(_no_image(title, [shard.header for shard in shards], wanted))
        if wanted.label is not None and not self._labelled:
            raise DataError(f"{title}: no sample has the label '{wanted.label}' (a name in .json, or cls).")
        self.description = self._described(title)

    def _described(self, title: str) -> str:
        skipped = sum((Counter(shard.header.skipped) for shard in self._shards), Counter[str]())
        del skipped["folders"]
        told = [f"{len(self)} images in {len(self._shards)} tar{'' if len(self._shards) == 1 else 's'}"]
        told.append("with labels" if self._labelled else "no labels")
        if skipped:
            told.append("left out: " + ", ".join(f"{count} {what}" for what, count in sorted(skipped.items())))
        return f"{title}: {', '.join(told)}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_indexes": OrderedDict()}

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError when the storage fails, or a tar is not the one that was indexed."""
        number, inner = self._at(index)
        shard = self._shards[number]
        offset, length, label = self._index(number).rows[inner].item()
        content = shard.tar.read(offset, length, shard.header.stamp)
        return Sample(content, None if label < 0 else label)

    def name(self, index: int) -> str:
        """The tar, and the name of the image in it."""
        number, inner = self._at(index)
        _, ends, names = self._index(number)
        name = names[ends[inner - 1] if inner else 0 : ends[inner]].tobytes()
        return f"{self._shards[number].title}/{os.fsdecode(name)}"

    def _at(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        number = bisect_right(self._ends, index)
        return number, index - self._ends[number] + self._shards[number].header.count

    def _index(self, number: int) -> Index:
        found = self._indexes.get(number)
        if found is None:
            shard = self._shards[number]
            header, found = open_index(shard.tar, shard.header.stamp, self._wanted, check=False)
            if header != shard.header:
                raise DataError(f"the index of {shard.tar.where} is not the one that this began with. Start again.")
            self._indexes[number] = found
            if len(self._indexes) > _INDEXES:
                self._indexes.popitem(last=False)
        return found

    def labels(self) -> NDArray[np.int64] | None:
        if not self._labelled:
            return None
        return np.concatenate(
            [self._index(number).rows["label"].astype(np.int64) for number in range(len(self._shards))]
        )

    def stamps(self) -> Iterator[str]:
        """When each tar was changed, or its ETag."""
        yield from (shard.header.stamp.version for shard in self._shards)

    def manifest(self) -> Iterator[tuple[str, int]]:
        """The tars, with the SHA-256 of their index: which images lie where, and their labels."""
        for shard in self._shards:
            yield f"{shard.title} index:{shard.header.digest[:16]}", shard.header.stamp.size


def open_tars(
    tars: Sequence[str], title: str, image_column: str = "image", label_column: str | None = None
) -> TarSource:
    """The tars at these paths and addresses, each once, sorted by name; those that have no index yet are read for it.

    `image_column` and `label_column` say which member is the image, and where its label is: see `tar_samples.Wanted`.
    Raises DataError for one that is not there or cannot be used.
    """
    wanted = Wanted(image_column, label_column)
    opened = [WebTar(tar) if is_web(tar) else LocalTar(tar) for tar in dict.fromkeys(tars)]
    titles = _titles([tar.where for tar in opened])
    if len(set(titles)) != len(titles):
        twice = next(name for name, count in Counter(titles).items() if count > 1)
        raise DataError(f"{title} holds two tars called {twice}, and samples are told apart by name.")
    in_order = sorted(zip(titles, opened, strict=True), key=lambda entry: os.fsencode(entry[0]))
    with ThreadPoolExecutor(_INDEXED_AT_ONCE) as pool:
        try:
            indexed = pool.map(lambda entry: _header(entry[1], wanted), in_order)
            # Only where it takes long, and where somebody looks: a log file wants no bar.
            headers = list(tqdm(indexed, "looking into tars", len(in_order), leave=False, disable=None, delay=2))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    shards = [_Shard(name, tar, header) for (name, tar), header in zip(in_order, headers, strict=True)]
    return TarSource(title, shards, wanted, WINDOW_SHARDS)


def is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def _header(tar: Tar, wanted: Wanted) -> Header:
    return open_index(tar, tar.stamp(), wanted)[0]


def _titles(places: Sequence[str]) -> list[str]:
    """The places as seen from the folder that holds them all: where that is does not matter."""
    plain = [place.partition("://")[2] or place.replace(os.sep, "/") for place in places]
    try:
        folder = posixpath.commonpath([posixpath.dirname(place) for place in plain])
    except ValueError:  # some on this machine, some behind HTTP
        return plain
    return [posixpath.relpath(place, folder) for place in plain]


def _no_image(title: str, headers: Sequence[Header], wanted: Wanted) -> str:
    seen = sum((Counter(header.seen) for header in headers), Counter[str]())
    if not seen:
        return f"{title} holds no samples: members such as 0001.jpg and 0001.cls. Accepted: {' '.join(EXTENSIONS)}"
    shown = ", ".join(f"{count} .{extension}" for extension, count in seen.most_common(5))
    if wanted.image == "image":
        return (
            f"{title} holds no image (seen: {shown}). Accepted: {' '.join(EXTENSIONS)}; name another with image_column."
        )
    return f"{title} holds no '.{wanted.extensions[0]}' (seen: {shown}).{nearest(wanted.extensions[0], seen)}"
