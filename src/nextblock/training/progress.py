"""What a person sees while a run trains: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nextblock.errors import shown

QUIET_SECONDS = 15.0


class TrainingProgress:
    """Use as a context manager. Prints nothing when `quiet` (other processes than the first)."""

    def __init__(self, total_steps: int, *, done: int = 0, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console()
        self.total, self.quiet = total_steps, quiet
        self._last_line = float("-inf")
        self._started, self._start_step = time.monotonic(), done
        self._bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task("training", total=total_steps, completed=done, numbers="")

    def __enter__(self) -> TrainingProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, done: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done)

    def show(self, row: dict[str, float]) -> None:
        """A row of metrics: beside the bar, or as a line (the first, the last, and one every 15 s)."""
        if self.quiet:
            return
        numbers = _numbers(row)
        if not numbers:  # it was looked, and there was nothing to measure
            return
        if self._bar:
            self._bar.update(self._task, numbers=numbers)
            if {"knn", "val_loss", "val_top1"} & set(row):
                self._bar.console.print(f"step {int(row['step'])}: {numbers}")
            return
        now, step = time.monotonic(), int(row["step"])
        if step < self.total and now - self._last_line < QUIET_SECONDS:
            return
        self._last_line = now
        seconds = (now - self._started) / max(1, step - self._start_step) * (self.total - step)
        self.console.print(
            f"step {step}/{self.total}  {numbers}  left {_clock(seconds)}", highlight=False, soft_wrap=True
        )

    def note(self, message: str) -> None:
        """A sentence that must not be lost, above the bar."""
        if not self.quiet:
            self.console.print(shown(message, 2000), highlight=False, markup=False)


def _numbers(row: dict[str, float]) -> str:
    shown = [
        ("loss", "loss {:.4f}"), ("val_loss", "val loss {:.4f}"),
        ("ema_val_loss", "with averaged weights {:.4f}"), ("knn", "kNN {:.1f} %"),
        ("val_top1", "validation {:.1f} %"), ("ema_val_top1", "with averaged weights {:.1f} %"),
        ("effective_rank", "rank {:.1f}"), ("lr", "lr {:.2e}"), ("images_per_s", "{:.0f} images/s"),
    ]  # fmt: skip
    parts = [form.format(row[name]) for name, form in shown if name in row]
    if row.get("skipped"):
        parts.append(f"{row['skipped']:.0f} steps skipped")
    if row.get("bad_samples"):
        parts.append(f"{row['bad_samples']:.0f} broken images")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
