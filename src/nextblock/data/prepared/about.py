"""prepared.json: what prepared images were made of, how, and what there is of them."""

from __future__ import annotations

import dataclasses
import os
import shlex
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from nextblock.data.prepared.encoding import Encoding
from nextblock.data.prepared.index import IndexRecord
from nextblock.data.prepared.shards import ShardRecord
from nextblock.data.shard_folder import holds, read_sealed, sealed

FORMAT = 1
ABOUT = "prepared.json"


@dataclass(frozen=True)
class About:
    """What prepared.json says.

    Attributes:
        encoding: how the images are kept.
        shard_mb: a shard is closed when its contents have so many MiB.
        data: of the images they are made of: description, count, bytes, sha256 (names and sizes), order_sha256 (names
            in order, labels, class names).
        classes: names by number; None where nobody named them.
        asked: where the images are, and what else was asked for.
        options: of the command, as far as they are not the usual ones.
        made_with: versions of the packages that shape the bytes.
        cuts: the position in the source where each shard ends; also of shards that were damaged and are lacking now.
        shards: by number; while they are being made some may be lacking.
        index: of all shards; None until they are all there.
    """

    encoding: Encoding
    shard_mb: int
    data: dict[str, Any]
    classes: list[str] | None
    asked: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    made_with: dict[str, str] = field(default_factory=dict)
    cuts: tuple[int, ...] = ()
    shards: dict[int, ShardRecord] = field(default_factory=dict)
    index: IndexRecord | None = None

    @property
    def count(self) -> int:
        """Images in the source, broken ones among them."""
        return int(self.data["count"])

    @property
    def in_order(self) -> list[ShardRecord]:
        return [record for _, record in sorted(self.shards.items())]

    @property
    def images(self) -> int:
        """That are stored so far."""
        return sum(record.images for record in self.shards.values())

    @property
    def bad(self) -> list[tuple[str, str, int]]:
        """Name, reason and position of the images that were left out so far."""
        return [sample for record in self.in_order for sample in record.bad]

    def command(self, folder: Path) -> str:
        """That goes on in `folder`."""
        return shlex.join(
            ["nextblock", "prepare", self.asked.get("data") or "DATA", "--out", str(folder), *self.options]
        )

    def lacking(self) -> list[tuple[int, int, int]]:
        """Number, first position and end of the shards that were recorded once and are not there."""
        ranges = enumerate(pairwise((0, *self.cuts)))
        return [(number, start, stop) for number, (start, stop) in ranges if number not in self.shards]

    def with_shards(self, shards: dict[int, ShardRecord], cuts: tuple[int, ...] | None = None) -> About:
        """With these shards, in order, and no index yet."""
        cuts = self.cuts if cuts is None else cuts
        return dataclasses.replace(self, cuts=cuts, shards=dict(sorted(shards.items())), index=None)

    def to_json(self) -> bytes:
        return sealed({"format": FORMAT, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, folder: Path) -> About:
        """Raises DataError when there is none that can be understood."""
        names = [field.name for field in dataclasses.fields(cls)]
        with read_sealed(folder / ABOUT, names, FORMAT, "Make them anew with nextblock prepare.") as values:
            index = values["index"]
            return cls(**{name: values[name] for name in names} | {
                "encoding": Encoding(**values["encoding"]),
                "cuts": tuple(values["cuts"]),
                "options": tuple(values["options"]),
                "shards": {int(n): ShardRecord.from_dict(int(n), record) for n, record in values["shards"].items()},
                "index": None if index is None else IndexRecord(**index),
            })  # fmt: skip


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether the folder `path` holds prepared images, finished or not."""
    return holds(path, ABOUT)
