"""Training batches of a data set that is streamed, with an exact resume.

There is no image by number, so what is seen at a position cannot be a function of the position alone. Instead the set
is cut into as many parts as there are loading processes over all ranks. Each reads its part in chunks and permutes
every chunk by (seed, epoch, part, number of the chunk), at its own pace: where parts are not equal, one may be in a
later epoch than another. Where a process is in its part is a few numbers and the place of `datasets` at the beginning
of the chunk: that, of the batches that were really trained on, is what a checkpoint holds. It means something to the
same number of ranks and processes only.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import get_worker_info

from nextblock.data.augment import CropConfig
from nextblock.data.decoders import PILLOW
from nextblock.data.heartbeat import waiting
from nextblock.data.loading import TIMEOUT_S, training_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources.protocol import Sample
from nextblock.data.sources.streamed import Interrupted, StreamedImages
from nextblock.data.sources.streamed_rows import Row
from nextblock.data.stream import Batch, TrainingStream
from nextblock.errors import DataError, RunError
from nextblock.randomness import key, permutation

CHUNK = 1024  # rows that are permuted together, and held in memory by each process
WAITS_S = (1.0, 4.0)  # before what broke off is read again; `datasets` has tries and waits of its own for a network
_PATIENCE_S = 30.0  # what broke off after so long was tried for long enough
_ENDLESS = 2**62


@dataclass(frozen=True)
class Place:
    """Where a process is in its part: `within` rows of chunk number `chunk` of an epoch are used.

    dataset: what `datasets` says of its place at the beginning of the chunk; None at the beginning of the epoch.
    """

    epoch: int = 0
    chunk: int = 0
    within: int = 0
    dataset: dict[str, Any] | None = None


@dataclass(frozen=True)
class Settings:
    """Of a stream; those of a run that goes on must be the same, but for the title: files may have moved.

    passes: batches of a step of this rank, which go round its workers.
    """

    title: str
    shards: int
    seed: int
    chunk: int
    world: int
    workers: int
    passes: int = 1


@dataclass
class _Handed:
    """A batch, and where the process with this number is after it."""

    batch: Batch
    part: int
    place: Place

    def pin_memory(self) -> _Handed:
        return dataclasses.replace(self, batch=self.batch.pin_memory())


class StreamingBatches:
    """One batch for each element of `plan`, a list of global positions; for ever, as far as the set goes. Nothing is
    read, and no process started, before the first one is asked for.

    Args:
        images: what is streamed.
        plan: of this process (rank), from the step on at which `state` was taken.
        seed, crop, preprocessing, decoder: as of `stream.TrainingStream`; what is drawn for a position is the same.
        workers: loading processes of each rank.
        rank, world: this process and the number of processes.
        passes: see `Settings`.
        state: `state_dict` of all ranks, by rank, of the run that goes on; None: a new one.

    Raises RunError when the state is of another number of ranks or workers, of other passes that they take turns with,
    or of another set. Reading raises DataError when the storage fails.
    """

    def __init__(
        self, images: StreamedImages, plan: Iterable[Sequence[int]], *, seed: int, crop: CropConfig,
        preprocessing: Preprocessing, workers: int, rank: int = 0, world: int = 1, chunk: int = CHUNK,
        decoder: str = PILLOW, state: Mapping[int, Mapping[str, Any]] | None = None, pin_memory: bool = False,
        timeout_s: float = TIMEOUT_S, passes: int = 1,
    ) -> None:  # fmt: skip
        self._settings = Settings(images.title, images.shards, seed, chunk, world, workers, passes)
        each = max(1, workers)
        self._batches, self._places = 0, {rank * each + number: Place() for number in range(each)}
        if state is not None:
            own = _checked(state, self._settings, rank)
            self._batches = int(own["batches"])
            self._places = {int(part): Place(**place) for part, place in own["places"].items()}
        taken = _Taken()
        stream = TrainingStream(taken, seed, crop, preprocessing, decoder=decoder)
        parts = _Parts(images, self._settings, stream, taken, dict(self._places), self._batches)
        self._handed = _when_asked(parts, plan, workers=workers, pin_memory=pin_memory, timeout_s=timeout_s)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        handed = next(self._handed)
        self._batches += 1
        self._places[handed.part] = handed.place
        return handed.batch

    def state_dict(self) -> dict[str, Any]:
        """As of the last batch that was given out, however far the processes have read ahead. Plain values."""
        places = {part: dataclasses.asdict(place) for part, place in self._places.items()}
        return {"settings": dataclasses.asdict(self._settings), "batches": self._batches, "places": places}


def _when_asked(parts: _Parts, plan: Iterable[Sequence[int]], **loading: Any) -> Iterator[_Handed]:
    yield from training_batches(parts, plan, **loading)


def _checked(state: Mapping[int, Mapping[str, Any]], now: Settings, rank: int) -> Mapping[str, Any]:
    """The rank's own part of the state."""
    before = Settings(**state.get(rank, next(iter(state.values())))["settings"])
    if (before.world, before.workers) != (now.world, now.workers):
        raise RunError(
            f"{before.title} was streamed to {before.world} processes with {before.workers} workers each, now there "
            f"are {now.world} with {now.workers}. A streamed set goes on exactly with the same numbers only: set "
            f"data.workers to {before.workers} and start {before.world} processes."
        )
    if now.workers > 1 and before.passes != now.passes:
        raise RunError(
            f"{before.title} was streamed to {before.passes} forward passes a step, which the workers took in turns, "
            f"now there are {now.passes}. Set training.per_device_batch to what it was."
        )
    for name in ("shards", "seed", "chunk"):
        was, this = getattr(before, name), getattr(now, name)
        if was != this:
            raise RunError(f"the streamed set is not the one of this run: its {name} was {was}, now {this}.")
    if rank not in state:
        raise RunError(f"the state of the streamed set lacks process {rank} of {now.world}.")
    return state[rank]


class _Parts:
    """What each loading process has a copy of; a process reads the one part that is its own."""

    def __init__(
        self, images: StreamedImages, settings: Settings, stream: TrainingStream, taken: _Taken,
        places: dict[int, Place], batches: int,
    ) -> None:  # fmt: skip
        self.images, self.settings, self.stream, self.taken = images, settings, stream, taken
        self.places, self.batches = places, batches
        self.reader: _Reader | None = None
        self.failed: Interrupted | None = None

    def load(self, positions: Sequence[int]) -> _Handed:
        if self.failed is not None:  # what a worker reads ahead is not tried again for minutes
            raise self.failed
        try:
            return self._load(positions)
        except Interrupted as error:
            self.failed = error
            raise

    def _load(self, positions: Sequence[int]) -> _Handed:
        if self.reader is None:
            worker = get_worker_info()
            # Batches go round the processes; the first one after a resume belongs to the one whose turn it was.
            turn = (self.batches + (worker.id if worker else 0)) % len(self.places)
            part = min(self.places) + turn
            self.reader = _Reader(self.images, self.settings, part, self.places[part])
        self.taken.rows = dict(zip(positions, self.reader.take(len(positions)), strict=True))
        self.taken.spare = self.reader.rows
        batch = self.stream.load(positions)
        self.taken.name_for_good(batch)
        return _Handed(batch, self.reader.part, self.reader.place)


class _Reader:
    """Reads one part, from a place on."""

    def __init__(self, images: StreamedImages, settings: Settings, part: int, place: Place) -> None:
        self.images, self.settings, self.part, self.place = images, settings, part, place
        self.parts = settings.world * max(1, settings.workers)
        self.rows: list[Row] = []
        self._open()

    def take(self, count: int) -> list[Row]:
        found: list[Row] = []
        while len(found) < count:
            if self.place.within >= len(self.rows):
                self._next_chunk()
            more = self.rows[self.place.within :][: count - len(found)]
            found += more
            self.place = dataclasses.replace(self.place, within=self.place.within + len(more))
        return found

    def _open(self) -> None:
        """At the place: the chunk that it is in is read again if some of it was used."""
        self._begin()
        self.rows = []
        if self.place.within:
            self._read()

    def _begin(self) -> None:
        """At the beginning of the chunk that the place is in."""
        epoch = 1 + (key(self.settings.seed, f"streamed/epoch{self.place.epoch}") >> 34)  # 0 would not shuffle files
        self._dataset = self.images.part(self.part, self.parts, epoch)
        if self.place.dataset is not None:
            self._dataset.load_state_dict(self.place.dataset)
        self._chunks = self._dataset.iter(batch_size=self.settings.chunk)

    def _next_chunk(self) -> None:
        if self.rows:
            state = self._dataset.state_dict()
            self.place = Place(self.place.epoch, self.place.chunk + 1, 0, state)
        if self._read():
            return
        self.place = Place(self.place.epoch + 1)
        self._open()
        if not self._read():
            raise DataError(
                f"{self.images.title} holds no rows for one of its {self.parts} parts, one for each loading process: "
                "set data.workers to fewer."
            )

    def _read(self) -> bool:
        """Read and permute the next chunk; False at the end of the epoch."""
        where = f"epoch{self.place.epoch}/part{self.part}of{self.parts}/chunk{self.place.chunk}"
        rows = self._rows_of(where)
        if rows:
            order = permutation(self.settings.seed, f"streamed/{where}", len(rows))
            self.rows = [rows[number] for number in order.tolist()]
        return bool(rows)

    def _rows_of(self, where: str) -> list[Row]:
        """Of the next chunk, whose reading may break off and is then begun again: the same rows, or an error."""
        for wait_s in WAITS_S:
            start = time.monotonic()
            try:
                return self.images.next_rows(self._chunks, where)
            except Interrupted:
                if time.monotonic() - start > _PATIENCE_S:
                    raise
                waiting(wait_s)
                self._begin()
        return self.images.next_rows(self._chunks, where)


class _Taken:
    """The rows of one batch, as a source whose sample at a position is the row that was taken for it.

    In place of a broken image comes another one of the chunk that was read last.
    """

    classes: tuple[str, ...] | None = None
    description = "streamed rows"

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        self.spare: list[Row] = []

    def __len__(self) -> int:
        return _ENDLESS

    def order(self, seed: int, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        return places

    def _row(self, index: int) -> Row:
        found = self.rows.get(index)
        return self.spare[index % len(self.spare)] if found is None else found

    def __getitem__(self, index: int) -> Sample:
        row = self._row(index)
        return Sample(row.content, row.label)

    def name(self, index: int) -> str:
        return self._row(index).name

    def name_for_good(self, batch: Batch) -> None:
        """Call its broken images what they are called in every epoch: a run counts and lists each once."""
        if batch.bad:
            rows = {row.name: row for row in (*self.rows.values(), *self.spare)}
            batch.bad = [sample._replace(name=rows[sample.name].lasting_name) for sample in batch.bad]

    def labels(self) -> None:
        return None

    def manifest(self) -> Iterator[tuple[str, int]]:
        return iter(())
