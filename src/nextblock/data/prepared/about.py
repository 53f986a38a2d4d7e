"""prepared.json: what prepared images were made of, how, and what there is of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from nextblock.data.prepared.encoding import Encoding
from nextblock.data.prepared.index import IndexRecord
from nextblock.data.prepared.shards import ShardRecord
from nextblock.errors import DataError

FORMAT = 1
ABOUT = "prepared.json"
HASH = "sha256"  # of all else that prepared.json says


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
        values = json.loads(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}))
        return (json.dumps(values | {HASH: _digest(values)}, indent=1) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> About:
        """Raises DataError when there is none that can be understood."""
        path = folder / ABOUT
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise DataError(
                    f"{folder} holds prepared images of format {values['format']}; this version reads {FORMAT}. "
                    "Make them anew with nextblock prepare."
                )
            _require_unchanged(values)
            known = {f.name: values[f.name] for f in dataclasses.fields(cls)}
            return cls(**known | {
                "encoding": Encoding(**values["encoding"]),
                "cuts": tuple(values["cuts"]),
                "options": tuple(values["options"]),
                "shards": {int(number): ShardRecord.from_dict(record) for number, record in values["shards"].items()},
                "index": None if values["index"] is None else IndexRecord(**values["index"]),
            })  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error


def _require_unchanged(values: dict[str, Any]) -> None:
    """Raise ValueError when they are not what was written. What was made before there was a hash has none."""
    said = {name: value for name, value in values.items() if name != HASH}
    names = {"format", *(field.name for field in dataclasses.fields(About))}
    if values.get(HASH, _digest(said)) != _digest(said) or not set(said) <= names:
        raise ValueError("it is not what was written")


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_prepared(path: str | os.PathLike[str]) -> bool:
    """Whether the folder `path` holds prepared images, finished or not."""
    return os.path.isfile(os.path.join(path, ABOUT))
