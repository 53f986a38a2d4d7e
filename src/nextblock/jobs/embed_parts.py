"""Features made by several processes: parts of some batches each, in a folder beside the file that they become.

The batches are those of one process, so the file is the same to the byte.
"""

from __future__ import annotations

import json
import lzma
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nextblock.data.sources import Source
from nextblock.data.stream import BadSample
from nextblock.errors import DataError, RunError
from nextblock.evaluation.features import Features
from nextblock.jobs.images_record import images_record
from nextblock.jobs.output import written_whole
from nextblock.jobs.share import Units, stopped
from nextblock.training.run_record import read_json, to_json, write_text
from nextblock.training.signals import StopRequest

BATCHES = 16  # in a part
ASKED = "asked.json"
_FACTS = ("labels", "indices", "bad")
# What zipfile, its decompressors and numpy raise for damaged files. A change of values only is a BadZipFile: zip files
# hold a CRC-32 of each array.
_DAMAGE = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, SyntaxError, RuntimeError,
           zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError)  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """The parts of the features of `source` in batches of `batch_size`, on their way to the file `target`."""

    target: Path
    source: Source
    batch_size: int

    @property
    def folder(self) -> Path:
        return self.target.with_name(f".{self.target.name}.parts")

    def begin(self, record: Mapping[str, Any], pool: bool) -> None:
        """Write down what the features are of, or find the same. Raises RunError for something else."""
        asked = json.loads(to_json({**record, "pool": pool, "batch_size": self.batch_size,
                                    "batches": BATCHES, "images": images_record(self.source)}))  # fmt: skip
        file = self.folder / ASKED
        if not file.is_file():
            self.folder.mkdir(exist_ok=True)
            write_text(file, to_json(asked))
            return
        before = read_json(file, (), f"Remove {self.folder} to begin anew.")
        changed = [name for name in asked if before.get(name) != asked[name]]
        if changed:
            raise RunError(
                f"{self.target} was begun with other {' and '.join(changed)}: what there is of it lies in "
                f"{self.folder}. Give what was given then, choose another --out, or remove that folder."
            )

    def lacking(self) -> list[int]:
        """The numbers of the parts that are not there."""
        size = BATCHES * self.batch_size
        return [number for number in range(-(-len(self.source) // size)) if not self._file(number).is_file()]

    def make(
        self, mine: Sequence[int], batches: Callable[[Sequence[int]], Iterator[Features]], advice: str
    ) -> None:  # fmt: skip
        """Make these parts; `batches` gives those of the images with these indices. Raises Stopped, with `advice`."""
        stop = StopRequest("this batch is done")
        indices = [index for number in mine for index in self._indices(number)]
        try:
            with stop:
                made = batches(indices)
                for number in mine:
                    some = list(self._counted(islice(made, -(-len(self._indices(number)) // self.batch_size)), stop))
                    self._write(number, some)
        except KeyboardInterrupt as error:
            raise stopped(advice, stop.received) from error

    def read(self) -> Iterator[Features]:
        """The batches of all parts, in order.

        Raises DataError for a part that is lacking or damaged; the latter is removed, to be made anew.
        """
        for number in range(-(-len(self.source) // (BATCHES * self.batch_size))):
            try:
                yield from _batches(self._file(number))
            except _DAMAGE as error:
                self._file(number).unlink(missing_ok=True)
                images = self._indices(number)
                raise DataError(
                    f"the features of images {images.start} to {images.stop - 1}, made for {self.target}, cannot be "
                    f"read: {type(error).__name__}: {error}. The same command makes them anew."
                ) from error

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _counted(self, batches: Iterator[Features], stop: StopRequest) -> Iterator[Features]:
        for batch in batches:
            if stop():
                raise KeyboardInterrupt
            yield batch

    def _indices(self, number: int) -> range:
        size = BATCHES * self.batch_size
        return range(number * size, min((number + 1) * size, len(self.source)))

    def _write(self, number: int, batches: Sequence[Features]) -> None:
        arrays: dict[str, Any] = {"batches": np.array(len(batches))}
        for i, batch in enumerate(batches):
            bad = np.array(json.dumps([list(sample) for sample in batch.bad]))
            values = (batch.values, batch.labels, batch.indices, bad)
            arrays |= dict(zip((f"values{i}", *(f"{name}{i}" for name in _FACTS)), values, strict=True))
        with written_whole(self._file(number)) as beside, open(beside, "wb") as file:
            np.savez(file, **arrays)

    def _file(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.npz"


def _batches(part: Path) -> Iterator[Features]:
    with np.load(part, allow_pickle=False) as file:
        for i in range(int(file["batches"])):
            labels, indices, bad = (file[f"{name}{i}"] for name in _FACTS)
            left_out = [BadSample(*sample) for sample in json.loads(str(bad))]
            yield Features(file[f"values{i}"], labels, indices, left_out)


def share_parts(
    parts: Parts, units: Units, batches: Callable[[Sequence[int]], Iterator[Features]], again: str
) -> int:  # fmt: skip
    """Make this process's share of the parts; returns how many are lacking then, for other processes to make."""
    mine = units.claim(parts.lacking())
    lacking = set(parts.lacking())  # some may have been made before they were this one's
    parts.make([number for number in mine if number in lacking], batches, f"stopped. To go on: {again}")
    return len(parts.lacking())
