"""Making the shards of prepared images: all by one process, or by several that each have a share of the images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from nextblock.data.prepared.about import About
from nextblock.data.prepared.making import Maker
from nextblock.data.prepared.pieces import bad_in_pieces, is_made, pieces, remove_pieces
from nextblock.data.sources import Source
from nextblock.jobs.output import say
from nextblock.jobs.prepared_record import Asked, go_on
from nextblock.jobs.shard_progress import shard_bar, size
from nextblock.jobs.share import Units, stopped
from nextblock.training.run_folder import max_bad_images
from nextblock.training.signals import StopRequest


@dataclass(frozen=True)
class Work:
    """What is to be prepared, where, by how many workers, and until when."""

    folder: Path
    asked: Asked
    source: Source
    workers: int
    console: Console
    stop: StopRequest

    @contextmanager
    def maker(
        self, about: About, doing: str, images: int, done: int,
        alone: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Iterator[Maker]:  # fmt: skip
        """What makes so many `images`, of which some are `done`; raises Stopped, saying how to go on. alone: see
        `Maker`."""
        most = max_bad_images(len(self.source), self.asked.max_bad_fraction)
        try:
            with self.stop, shard_bar(doing, images, done, self.console, _shard_line) as bar:
                start = time.monotonic()
                yield Maker(
                    self.folder, self.source, self.workers, most, on_images=bar.images, on_shard=bar.shard,
                    stop_asked=self.stop, alone=alone,
                )  # fmt: skip
        except KeyboardInterrupt as error:
            advice = "stopped. To go on after the last whole shard, give the same command again: "
            raise stopped(advice + about.command(self.folder), self.stop.received) from error
        say(self.console, f"{(images - done) / max(time.monotonic() - start, 1e-9):,.0f} images/s")

    def tell(self, about: About, images: int, of: str = "") -> None:
        by = f"{self.workers} processes" if self.workers > 1 else "1 process"
        told = f"{about.data['description']}. {images:,} images to prepare{of} by {by}: {about.encoding.told}"
        say(self.console, told)


def make(work: Work, about: About) -> About:
    """Make what `about` lacks, in this process and its workers."""
    if about.index is not None:
        work.console.print("already complete", highlight=False)
        return about
    done = about.images + len(about.bad)
    work.tell(about, about.count - done)
    with work.maker(about, "preparing", about.count, done) as maker:
        return maker.make(about)


def make_share(work: Work, units: Units) -> About:
    """Encode this process's share of the images; make the shards of them where the others' are there, too.

    Returns what is there then: with an index where it is all. Too many broken images stop this share where it meets
    them, counted with those that were found before it started; those of all shares together stop the last one.
    """
    bad = bad_in_pieces(work.folder, len(work.source))  # and damaged pieces are lacking from now on
    mine = units.claim(_lacking(work.folder, len(work.source)))
    lacking = set(_lacking(work.folder, len(work.source)))  # some may have been made before they were this one's
    ranges = [piece for number, piece in enumerate(pieces(len(work.source))) if number in lacking & set(mine)]
    about, images = About.read(work.folder), sum(map(len, ranges))
    if ranges:
        work.tell(about, images, f" ({units.share.told})")
        with work.maker(about, "preparing", images, 0, units.alone) as maker:
            maker.make_pieces(about, ranges, bad)
    if left := _lacking(work.folder, len(work.source)):
        say(work.console, f"{units.share.told} is done; pieces that other processes make: {len(left)}")
        return About.read(work.folder)
    with units.last() as got:
        if got:
            return _make_of_pieces(work, units)
    say(work.console, "another process puts the shards together")
    return About.read(work.folder)


def _make_of_pieces(work: Work, units: Units) -> About:
    about = About.read(work.folder)
    if about.cuts:  # begun by a process that was killed, perhaps
        about = go_on(work.folder, about, work.asked, work.source, work.console)
    if about.index is not None:
        work.console.print("already complete", highlight=False)
    else:
        done = about.images + len(about.bad)
        with work.maker(about, "putting together", about.count, done, units.alone) as maker:
            about = maker.make(about, of_pieces=True)
    remove_pieces(work.folder)
    return about


def _lacking(folder: Path, count: int) -> list[int]:
    """The numbers of the pieces that are to be made: they are not there, nor in a shard."""
    absent = [(number, piece) for number, piece in enumerate(pieces(count)) if not is_made(folder, piece)]
    about = About.read(folder)  # after looking: a piece goes when its images are in a shard that is recorded
    done = about.cuts[-1] if about.cuts else 0
    return [number for number, piece in absent if piece.stop > done]


def _shard_line(about: About) -> str:
    done = f"{about.images + len(about.bad):,} of {about.count:,} images"
    bytes_ = size(sum(record.bytes for record in about.shards.values()))
    return f"{len(about.shards)} shard{'' if len(about.shards) == 1 else 's'}: {done}, {bytes_}"
