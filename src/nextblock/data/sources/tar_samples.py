"""From a tar's members to its samples: the WebDataset convention.

Members whose names agree up to the first dot of the base name are one sample; what comes behind that dot says what each
of them is: `dir/0001.jpg`, `dir/0001.cls`, `dir/0001.json`. They may lie anywhere in the tar.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nextblock.data.decode import EXTENSIONS
from nextblock.data.sources.tar_members import DEVICE, FILE, FOLDER, LINK, OTHER, Member, Read, members
from nextblock.errors import DataError, shown

# Where the content of an image begins in its tar, its bytes, and its label (-1: none).
ROW = np.dtype([("offset", "<i8"), ("length", "<u4"), ("label", "<i4")])
END = np.dtype("<i8")

_SKIPPED = {LINK: "links", FOLDER: "folders", DEVICE: "devices", OTHER: "special members"}
_LONGEST_CLS, _LONGEST_JSON, _LONGEST_IMAGE = 64, 2**20, 2**32 - 1
_LARGEST_LABEL = 2**31 - 1
_NO_IMAGE = -1
_HERE = re.compile(rb"(?:\.?/)++")  # at once: a name may have a megabyte of them


class Wanted(NamedTuple):
    """Which member is the image, and where the label is.

    image: an extension such as "jpg" or "left.png"; "image": the first of the accepted ones. label: "cls", or a name in
    `.json`; None: `.cls`, else `label` of `.json`, if there is one.
    """

    image: str = "image"
    label: str | None = None

    @property
    def extensions(self) -> tuple[str, ...]:
        """Without the first dot; the earlier one is taken where a sample has several."""
        accepted = tuple(extension[1:] for extension in EXTENSIONS)
        return accepted if self.image == "image" else (self.image.lstrip(".").lower(),)


class Samples(NamedTuple):
    """Of n samples with an image: rows `ROW` [n], ends `END` [n] of their names, the names (of the image members).

    skipped: why and how many members (or samples) were left out. seen: how often each extension occurs.
    """

    rows: NDArray[np.void]
    ends: NDArray[np.int64]
    names: bytes
    skipped: Counter[str]
    seen: Counter[str]


def samples_of(read: Read, size: int, where: str, wanted: Wanted) -> Samples:
    """Read all headers, and the labels, of a tar of `size` bytes. Raises DataError for one that cannot be used."""
    found = _Found(read, where, wanted)
    for member in members(read, size, where):
        found.add(member)
    return found.samples()


class _Found:
    """The samples so far: number by key, and of each number what is known."""

    def __init__(self, read: Read, where: str, wanted: Wanted) -> None:
        self.read, self.where, self.wanted = read, where, wanted
        self.ranks = {extension: rank for rank, extension in enumerate(wanted.extensions)}
        self.number: dict[bytes, int] = {}
        self.offsets, self.lengths = array("q"), array("q")
        self.labels, self.label_ranks = array("q"), array("b")
        self.image_ranks = array("b")
        self.skipped, self.seen = Counter[str](), Counter[str]()

    def add(self, member: Member) -> None:
        if member.kind != FILE:
            self.skipped[_SKIPPED[member.kind]] += 1
            return
        name = _plain(member.name)
        if b".." in name.split(b"/"):
            self.skipped["names with '..'"] += 1
            return
        folder, slash, base = name.rpartition(b"/")
        stem, dot, extension = base.partition(b".")
        if not stem or not dot:
            self.skipped["hidden files" if dot else "names without a dot"] += 1
            return
        suffix = os.fsdecode(extension).lower()
        self.seen[suffix] += 1
        number = self._number(folder + slash + stem)
        if suffix in self.ranks:
            self._add_image(number, self.ranks[suffix], member)
        if suffix in ("cls", "json"):
            self._add_label(number, suffix, member)

    def _number(self, key: bytes) -> int:
        number = self.number.setdefault(key, len(self.number))
        if number == len(self.offsets):
            for values, start in ((self.offsets, 0), (self.lengths, 0), (self.labels, -1)):
                values.append(start)
            self.label_ranks.append(_NO_IMAGE)
            self.image_ranks.append(_NO_IMAGE)
        return number

    def _add_image(self, number: int, rank: int, member: Member) -> None:
        before = self.image_ranks[number]
        if before == rank:
            raise self._complain(member, "this name is there twice, and samples are told apart by name")
        if member.size > _LONGEST_IMAGE:
            raise self._complain(member, f"an image of {member.size:,} bytes; at most {_LONGEST_IMAGE:,} can be read")
        if before == _NO_IMAGE or rank < before:
            self.offsets[number], self.lengths[number] = member.offset, member.size
            self.image_ranks[number] = rank

    def _add_label(self, number: int, suffix: str, member: Member) -> None:
        if self.wanted.label is None:
            rank = 1 if suffix == "cls" else 0  # .cls is there for nothing else
        elif (self.wanted.label == "cls") == (suffix == "cls"):
            rank = 1
        else:
            return
        if rank <= self.label_ranks[number]:
            return
        label = self._cls(member) if suffix == "cls" else self._json(member)
        if label is None:
            return
        if not -1 <= label <= _LARGEST_LABEL:
            raise self._complain(member, f"the label {label}; a class number lies between 0 and {_LARGEST_LABEL}")
        self.labels[number], self.label_ranks[number] = label, rank

    def _cls(self, member: Member) -> int:
        text = self.read(member.offset, member.size) if member.size <= _LONGEST_CLS else b""
        try:
            return int(text)
        except ValueError as error:
            what = shown(text.decode(errors="replace"))
            raise self._complain(member, f"holds '{what}'; a class number as text is needed") from error

    def _json(self, member: Member) -> int | None:
        """None where there is no such label, or where one that nobody asked for is no number."""
        if member.size > _LONGEST_JSON:
            raise self._complain(member, f"{member.size:,} bytes; at most {_LONGEST_JSON:,} are read for a label")
        try:
            values = json.loads(self.read(member.offset, member.size))
        except (ValueError, RecursionError) as error:
            raise self._complain(member, "cannot be read as JSON") from error
        label = values.get(self.wanted.label or "label") if isinstance(values, dict) else None
        if isinstance(label, int) or label is None:
            return label
        if self.wanted.label is None:
            return None
        raise self._complain(member, f"has the {self.wanted.label} {shown(repr(label))}; a class number is needed")

    def _complain(self, member: Member, what: str) -> DataError:
        name = shown(member.name.decode(errors="replace"))
        return DataError(f"{self.where}, byte {member.header}: {name}: {what}.")

    def samples(self) -> Samples:
        """Those that have an image, in the order in which they begin."""
        ranks = np.array(self.image_ranks, dtype=np.int8)
        chosen = ranks != _NO_IMAGE
        rows = np.empty(int(chosen.sum()), dtype=ROW)
        for field, values in (("offset", self.offsets), ("length", self.lengths), ("label", self.labels)):
            rows[field] = np.array(values, dtype=np.int64)[chosen]
        extensions = [b"." + os.fsencode(extension) for extension in self.ranks]
        names = [key + extensions[rank] for key, rank in zip(self.number, ranks.tolist(), strict=True) if rank >= 0]
        lacking = len(ranks) - len(rows)
        if lacking:
            self.skipped["samples without an image"] += lacking
        ends = np.cumsum([len(name) for name in names], dtype=END)
        return Samples(rows, ends, b"".join(names), self.skipped, self.seen)


def _plain(name: bytes) -> bytes:
    """Without what only says "here", or where it once lay."""
    start = _HERE.match(name)
    return name[start.end() :] if start else name
