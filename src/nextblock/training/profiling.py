"""Where the time of a training step goes: marks around the loop's own steps, and a trace of a few of them.

A mark says whose the time is from then on, so the parts of a step add up to the step. On CUDA a mark is an event on the
stream: what is measured is the device's own line of time, nothing waits, and a wait for data counts only while the
device stands idle.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile, record_function
from torch.utils.hooks import RemovableHandle

from nextblock.data.stream import BadSample
from nextblock.training.launch import Fabric
from nextblock.training.loop import Loss, Update
from nextblock.training.plan import Plan
from nextblock.training.profile_parts import AFTER, BEFORE, Schedule, StepTime, rooms_of
from nextblock.training.traces import start_trace, stop_trace


class StepProfiler:
    """Stands around the loop's batches, loss and update, and is its recorder; use as a context manager.

    Args:
        model: not wrapped by Fabric.
        device: whose time is measured.
        trace_file: where the trace of the traced steps is written; nowhere when None.
        tell: called after the warm-up with the seconds of its last step, as the host sees them.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        schedule: Schedule,
        trace_file: Path | None,
        tell: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.rooms, self.device, self.schedule = rooms_of(model), device, schedule
        self.phases = (*BEFORE, *(name for name, _, _ in self.rooms), *AFTER)
        self.bad: list[BadSample] = []
        self.skipped = 0
        self._trace_file, self._tell = trace_file, tell
        self._kinds = schedule.kinds()
        self._recorded: list[tuple[str, list[tuple[str, Any]], float]] = []  # kind, marks, waited
        self._marks: list[tuple[str, Any]] = []
        self._begun, self._waited, self._marking = 0.0, 0.0, False
        self._hooks: list[RemovableHandle] = []
        self._trace: profile | None = None
        self._range: record_function | None = None

    def __enter__(self) -> StepProfiler:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._begin(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._unhook()
        self._close_trace(write=error is None)

    # --- what stands around the loop's parts

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The same batches; getting one is "data", moving it "transfer"."""
        while True:
            self.mark("data")
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            self.mark("other")
            if batch is None:
                return
            yield _Timed(batch, self.mark)

    def loss(self, loss_of: Loss) -> Loss:
        """The same loss; what follows it is "backward"."""

        def timed(model: nn.Module, batch: Any, step: int) -> Tensor:
            loss = loss_of(model, batch, step)
            self.mark("backward")
            return loss

        return timed

    def update(self, update: Update) -> Update:
        """The same update, as "optimizer"."""

        def timed(
            fabric: Fabric, model: nn.Module, optimizer: Any, loss: Tensor, plan: Plan, step: int
        ) -> tuple[Tensor, Tensor]:
            self.mark("optimizer")
            found = update(fabric, model, optimizer, loss, plan, step)
            self.mark("other")
            return found

        return timed

    # --- the loop's recorder

    def step(self, done: int) -> None:
        self._marks.append(("end", self._stamp()))
        self._recorded.append((self._kinds[done - 1], self._marks, self._waited))
        if done == self.schedule.warmup:
            self._tell(time.perf_counter() - self._begun)
        self._begin(done)

    def log(self, row: dict[str, float]) -> None:
        """Nothing is written; how many steps were skipped is kept."""
        self.skipped = int(row.get("skipped", 0))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Nothing is kept."""

    def add_bad_samples(self, bad: list[BadSample]) -> None:
        self.bad += bad

    # --- marks

    def mark(self, phase: str) -> None:
        """The time from now on is the phase's."""
        if not self._marking:
            return
        self._marks.append((phase, self._stamp()))
        if self._trace is not None:
            self._close_range()
            self._range = record_function(f"nextblock: {phase}")
            self._range.__enter__()  # type: ignore[no-untyped-call]

    def times(self) -> list[StepTime]:
        """Every step that was done, in order; waits for the device."""
        return [self._time(*recorded) for recorded in self._recorded]

    def _time(self, kind: str, marks: list[tuple[str, Any]], waited: float) -> StepTime:
        total = self._seconds(marks[0][1], marks[-1][1])
        phases: dict[str, float] = defaultdict(float)
        for (phase, start), (_, end) in pairwise(marks):
            phases[phase] += self._seconds(start, end)
        return StepTime(kind, total, {} if kind == "bare" else {p: phases[p] for p in self.phases}, waited)

    def _begin(self, done: int) -> None:
        """Make ready for the step after `done` ones; none of this is in a step's time."""
        kind = self._kinds[done] if done < len(self._kinds) else "none"
        self._marking = kind not in ("bare", "none")
        self._unhook()
        if self._marking:
            self._hook()
        if kind == "traced" and self._trace is None:
            self._trace = start_trace(self.device)
        if kind == "none":
            self._close_trace(write=True)
        self._begun, self._waited = time.perf_counter(), 0.0
        self._marks = [("other", self._stamp())]

    def _hook(self) -> None:
        for name, module, after in self.rooms:

            def begins(*_: Any, name: str = name) -> None:
                self.mark(name)

            self._hooks.append(
                module.register_forward_hook(begins) if after else module.register_forward_pre_hook(begins)
            )

    def _unhook(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _close_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _close_trace(self, *, write: bool) -> None:
        self._close_range()
        if self._trace is not None:
            stop_trace(self._trace, self._trace_file if write else None)
            self._trace = None

    def _stamp(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        """Between two stamps; waits for the device until it is past the second one."""
        if self.device.type != "cuda":
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


class _Timed:
    """A batch whose way to the device is marked; what comes back is the plain batch."""

    def __init__(self, batch: Any, mark: Callable[[str], None]) -> None:
        self.batch, self.mark, self.bad = batch, mark, batch.bad

    def to(self, device: torch.device) -> Any:
        self.mark("transfer")
        moved = self.batch.to(device)
        self.mark("inputs")
        return moved
