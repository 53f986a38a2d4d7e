"""The one training loop. Everything that is promised about a run happens here, in order:

step -> skip if not finite -> log -> evaluate -> checkpoint -> stop.

The loop never waits for the device except when it logs. Nothing in it reads a generator with a history: the
global one is set from (seed, step), so the same step draws the same numbers after any restart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule
from torch import Tensor, nn

from nextblock.data.stream import BadSample
from nextblock.errors import RunError
from nextblock.randomness import key
from nextblock.training.optimizer import clipped_step, gradient_norm, set_lr
from nextblock.training.plan import Plan


class NotFinite(RunError):
    """Too many steps in a row had no finite loss and gradient.

    step: the last of them, counted from 0. since: steps done after it, 0 where the weights are still those it met.
    """

    def __init__(self, message: str, step: int, since: int) -> None:
        super().__init__(message)
        self.step, self.since = step, since


Loss = Callable[[nn.Module, Any, int], Tensor]
Evaluate = Callable[[int], dict[str, float]]
Update = Callable[[Fabric, nn.Module, Any, Tensor, Plan, int], tuple[Tensor, Tensor]]


class TrainingBatch(Protocol):
    """What the loop needs of a batch; `loss_of` knows the rest. See `data.stream.Batch`."""

    bad: list[BadSample]

    def to(self, device: torch.device) -> TrainingBatch: ...


class Recorder(Protocol):
    """Where a run's numbers and checkpoints go; see `run_folder.RunFolder`."""

    def step(self, done: int) -> None: ...
    def log(self, row: dict[str, float]) -> None: ...
    def save(self, step: int, state: dict[str, Any]) -> None: ...
    def add_bad_samples(self, bad: list[BadSample]) -> None: ...


@dataclass
class Meters:
    """Sums since the last log and counts since the start, kept on the device and saved with the run.

    loss, norm, steps: of the steps taken since the last reading. skipped: steps that were not, since the start.
    streak: of them, in a row up to now. longest: the longest since the last reading. last_skipped: -1 for none.
    """

    loss: Tensor
    steps: Tensor
    norm: Tensor
    skipped: Tensor
    streak: Tensor
    longest: Tensor
    last_skipped: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> Meters:
        whole = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("steps", "skipped")}
        counts = {name: torch.zeros((), dtype=torch.int64, device=device) for name in ("streak", "longest")}
        sums = {name: torch.zeros((), dtype=torch.float32, device=device) for name in ("loss", "norm")}
        return cls(**whole, **counts, **sums, last_skipped=torch.full((), -1, device=device))

    def update(self, step: int, loss: Tensor, norm: Tensor, good: Tensor) -> None:
        zero = torch.zeros_like(self.loss)
        self.loss += torch.where(good, loss.float(), zero)
        self.norm += torch.where(good, norm.float(), zero)
        self.steps += good
        self.skipped += ~good
        self.streak = torch.where(good, 0, self.streak + 1)
        self.longest = torch.maximum(self.longest, self.streak)
        self.last_skipped = torch.where(good, self.last_skipped, step)

    def read(self) -> dict[str, float]:
        """Means since the last reading (waits for the device), and start the next window."""
        steps = max(1, int(self.steps))
        row = {"loss": float(self.loss) / steps, "grad_norm": float(self.norm) / steps}
        if not int(self.steps):
            row = dict.fromkeys(row, float("nan"))
        for total in (self.loss, self.norm, self.steps):
            total.zero_()
        return row | {"skipped": float(self.skipped)}

    def state(self) -> dict[str, Tensor]:
        return {name: value.cpu().clone() for name, value in vars(self).items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.loss.device))


@dataclass
class Intervals:
    """When the loop looks up from stepping. Steps are counted from 1; 0 = never."""

    log: int
    evaluate: int = 0
    checkpoint: int = 0
    checkpoint_minutes: float = 0.0
    saved_at: float = field(default_factory=time.monotonic)

    def checkpoint_due(self, done: int, logging: bool, fabric: Fabric) -> bool:
        if self.checkpoint and done % self.checkpoint == 0:
            return True
        if not (logging and self.checkpoint_minutes):
            return False
        late = time.monotonic() - self.saved_at >= self.checkpoint_minutes * 60
        return bool(fabric.broadcast(late)) if fabric.world_size > 1 else late


def train(
    fabric: Fabric,
    model: _FabricModule,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Any],
    loss_of: Loss,
    plan: Plan,
    intervals: Intervals,
    recorder: Recorder,
    *,
    start_step: int = 0,
    meters: Meters | None = None,
    evaluate: Evaluate | None = None,
    update: Update | None = None,
    extra_state: Callable[[], dict[str, Any]] = dict,
    stop_asked: Callable[[], bool] = lambda: False,
) -> int:
    """Train from `start_step` to the end of the plan, or until a stop is asked for; return the steps done.

    Args:
        fabric: launched; `model` and `optimizer` are set up by it.
        batches: this process's forward passes from `start_step` on, as `plan.batches(start_step)` lists them.
        loss_of: (model, batch on the device, step) -> mean loss over the batch's images, a scalar.
        evaluate: called with the steps done, between steps, in eval mode; returns columns to log. Every process
            hands one in, or none does.
        update: takes the gradients to new weights, see `clipped_update`, which it is when absent.
        extra_state: what a checkpoint holds besides `run_state`, for example an average of the weights.

    Raises NotFinite after too many steps in a row without a finite loss and gradient; it is looked at when logging.
    """
    meters = meters or Meters.zeros(fabric.device)
    model.train()
    stop = _TogetherStop(fabric)
    since, images, done = time.monotonic(), 0, start_step
    for step in range(start_step, plan.total_steps):
        torch.manual_seed(key(plan.config.seed, f"step{step}/rank{plan.rank}") >> 1)
        loss = _accumulate(fabric, model, batches, loss_of, plan, step, recorder)
        norm, good = (update or clipped_update)(fabric, model, optimizer, loss, plan, step)
        optimizer.zero_grad(set_to_none=True)
        meters.update(step, loss, norm, good)

        done, images = step + 1, images + plan.config.batch_size
        recorder.step(done)
        last = done == plan.total_steps
        logging = last or done % intervals.log == 0
        stopping = stop(stop_asked())
        row: dict[str, float] = {}
        if logging:
            row = meters.read()
            _guard(meters, plan, done)
            now = time.monotonic()
            row |= {"lr": plan.lr(step), "images_per_s": images / max(now - since, 1e-9)}
            since, images = now, 0
        looking = evaluate is not None and (last or (intervals.evaluate > 0 and done % intervals.evaluate == 0))
        if evaluate and looking:
            model.eval()
            row |= evaluate(done)
            model.train()
            since, images = time.monotonic(), 0
        if logging or looking:  # on every process alike: recording is collective
            recorder.log({"step": done, "samples": done * plan.config.batch_size, "epoch": plan.epoch(done)} | row)
        if last or stopping or intervals.checkpoint_due(done, logging, fabric):
            recorder.save(done, run_state(model, optimizer, meters, plan, done) | extra_state())
            intervals.saved_at = time.monotonic()
        if stopping:
            fabric.barrier()  # nobody leaves before the checkpoint is whole
            break
    stop.settle()
    return done


def clipped_update(
    fabric: Fabric, model: nn.Module, optimizer: Any, loss: Tensor, plan: Plan, step: int
) -> tuple[Tensor, Tensor]:
    """One step at the plan's learning rate, clipped, or none where loss or gradient is not finite.

    Returns the gradient's norm and whether the step was taken, both on the device and the same on all processes.
    """
    set_lr(optimizer, plan.lr(step))
    norm = gradient_norm(model)
    # The square: it is what reaches the optimiser's second moment.
    good = agreed(fabric, torch.isfinite(norm.square()) & torch.isfinite(loss))
    clipped_step(optimizer, norm, good, plan.config.clip_grad_norm)
    return norm, good


def _accumulate(
    fabric: Fabric,
    model: _FabricModule,
    batches: Iterator[Any],
    loss_of: Loss,
    plan: Plan,
    step: int,
    recorder: Recorder,
) -> Tensor:
    """Backward over the step's forward passes; the mean loss of the global batch as this process sees it."""
    passes = plan.micro_batches(step)
    total = torch.zeros((), device=fabric.device)
    for i, positions in enumerate(passes):
        batch: TrainingBatch = next(batches)
        if batch.bad:
            recorder.add_bad_samples(batch.bad)
        batch = batch.to(fabric.device)
        with fabric.no_backward_sync(model, enabled=fabric.world_size > 1 and i < len(passes) - 1):
            with fabric.autocast():
                loss = loss_of(model, batch, step)
            # Processes are averaged by DDP: weighting by images keeps the loss that of the whole batch.
            loss = loss * (len(positions) * plan.world / plan.config.batch_size)
            fabric.backward(loss)
        total += loss.detach()
    return _reduced(fabric, total)


def _reduced(fabric: Fabric, value: Tensor) -> Tensor:
    """The mean over the processes."""
    if fabric.world_size == 1:
        return value
    mean = fabric.all_reduce(value, reduce_op="mean")
    assert isinstance(mean, Tensor)
    return mean


def agreed(fabric: Fabric, good: Tensor) -> Tensor:
    """True where it is true on every process; any shape."""
    return good if fabric.world_size == 1 else _reduced(fabric, good.float()) == 1.0


def _host_group() -> Any:
    try:
        return dist.new_group(backend="gloo")
    except RuntimeError as error:
        raise RunError(
            f"the machines of this run cannot exchange messages: {error}. Name the network interface that they share, "
            "as in GLOO_SOCKET_IFNAME=eth0."
        ) from error


class _TogetherStop:
    """Whether any process was asked to stop: called at every step with what this one was asked, the same on all.

    Several processes learn it one step later, so that none waits: the question goes from host to host, beside what the
    devices exchange, while the next step is computed.
    """

    def __init__(self, fabric: Fabric) -> None:
        self._hosts = _host_group() if fabric.world_size > 1 else None
        self._asked = torch.zeros((), dtype=torch.int32)
        self._exchange: Any = None

    def __call__(self, asked: bool) -> bool:
        if self._hosts is None:
            return asked
        self.settle()
        answer = bool(self._asked)
        self._asked = torch.tensor(int(asked), dtype=torch.int32)
        self._exchange = dist.all_reduce(self._asked, group=self._hosts, async_op=True)
        return answer

    def settle(self) -> None:
        """Wait for the exchange that is under way: no process may leave before."""
        if self._exchange is not None:
            self._exchange.wait()
            self._exchange = None


def _guard(meters: Meters, plan: Plan, done: int) -> None:
    """Raise NotFinite, on every process alike, where a streak since the last look was too long."""
    longest, step = int(meters.longest), int(meters.last_skipped)
    meters.longest.zero_()  # a streak that goes on is counted on: `streak` is kept
    if longest < plan.config.max_nonfinite_steps:
        return
    first = step * plan.config.batch_size
    raise NotFinite(
        f"The loss or its gradient was not finite for {longest} steps in a row, which left the weights alone. Last "
        f"such batch: step {step}, sample positions {first} to {first + plan.config.batch_size - 1}. Steps before may "
        f"have spoiled the weights: then only a new run helps, with a lower training.lr.",
        step,
        done - step - 1,
    )


def run_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, meters: Meters, plan: Plan, done: int
) -> dict[str, Any]:
    """What a checkpoint holds after `done` steps: all that the next step depends on."""
    inner = getattr(model, "module", model)
    return {
        "model": inner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "meters": meters.state(),
        "step": done,
        "samples": done * plan.config.batch_size,
    }
