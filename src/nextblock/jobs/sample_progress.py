"""What a person sees while images are made."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET_SECONDS = 15.0


class SampleProgress:
    """What a person sees meanwhile: a bar in a terminal, a line now and then elsewhere. `console` None = nothing."""

    def __init__(self, total: int, done: int, console: Console | None) -> None:
        self.total, self.done, self.console = total, done, console
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if console and console.is_terminal and done < total:
            self._bar = Progress(
                TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), console=console,
            )  # fmt: skip
            self._task = self._bar.add_task("sampling", total=total, completed=done)

    def __enter__(self) -> SampleProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar:
            self._bar.stop()

    def within(self, images: float) -> None:
        """Part of the present batch is done, as if it were so many images."""
        if self._bar:
            self._bar.update(self._task, completed=self.done + images)

    def reached(self, done: int) -> None:
        self.done = done
        if self._bar:
            self._bar.update(self._task, completed=done)
        elif self.console and time.monotonic() - self._last_line > QUIET_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"{done:,} of {self.total:,} images", highlight=False)
