"""What a person sees while shards are made: a bar in a terminal, a line for each shard elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nextblock.jobs.output import say

Record = TypeVar("Record")


class ShardBar(Generic[Record]):
    """`images(count)` after so many more images, `shard(record)` after a whole shard."""

    def __init__(self, console: Console, tell: Callable[[Record], str], progress: Progress | None, task: Any) -> None:
        self.console, self.tell, self.progress, self.task = console, tell, progress, task

    def images(self, count: int) -> None:
        if self.progress:
            self.progress.advance(self.task, count)

    def shard(self, record: Record) -> None:
        if not self.progress:
            say(self.console, self.tell(record))


@contextmanager
def shard_bar(
    doing: str, total: int, done: int, console: Console, tell: Callable[[Record], str]
) -> Iterator[ShardBar[Record]]:
    """A bar of images.

    Args:
        doing: "encoding".
        total, done: images, and how many of them are there already.
        tell: the line for a shard, where there is no terminal.
    """
    if not console.is_terminal:
        yield ShardBar(console, tell, None, None)
        return
    columns = (
        TextColumn(doing), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        yield ShardBar(console, tell, progress, progress.add_task(doing, total=total, completed=done))


def size(count: int) -> str:
    """Bytes, to be read."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
