"""The arithmetic of a run: which samples each step, process and forward pass takes, and the learning rate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from nextblock.errors import ConfigError
from nextblock.training.config import TrainingConfig

MAX_WARMUP_FRACTION = 0.2
MOST_STEPS = 1e15  # numbers of steps and positions stay exact


@dataclass(frozen=True)
class Plan:
    """Step s takes the global positions s·B .. (s+1)·B - 1, whatever the number of processes.

    Attributes:
        length: images in the data.
        config: the run's training configuration.
        rank, world: this process and the number of processes.
    """

    length: int
    config: TrainingConfig
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.config.batch_size < self.world:
            raise ConfigError(
                f"training.batch_size {self.config.batch_size} is smaller than the {self.world} processes; "
                f"every process needs at least one image per step."
            )
        if self.config.epochs * self.length / self.config.batch_size > MOST_STEPS:
            raise ConfigError(
                f"training.epochs {self.config.epochs:g} of {self.length:,} images are more than {MOST_STEPS:.0e} "
                "steps."
            )

    @property
    def total_steps(self) -> int:
        return max(1, round(self.config.epochs * self.length / self.config.batch_size))

    @property
    def steps_per_epoch(self) -> float:
        return self.length / self.config.batch_size

    @property
    def log_every(self) -> int:
        return self.config.log_every_steps or max(1, min(50, self.total_steps // 200))

    @property
    def warmup_steps(self) -> float:
        """Steps of the warm-up as it is applied; one shorter than a whole step is none."""
        steps = min(self.config.warmup_epochs * self.steps_per_epoch, MAX_WARMUP_FRACTION * self.total_steps)
        return steps if steps >= 1 else 0.0

    @property
    def largest_pass(self) -> int:
        """Images in the largest forward pass of this process; every step has the same ones."""
        return max(map(len, self.micro_batches(0)))

    def repeats(self) -> str | None:
        """What to tell of a batch that is larger than the data; None where it is not."""
        batch = self.config.batch_size
        if batch <= self.length:
            return None
        return (
            f"training.batch_size is {batch:,}, but there are {self.length:,} images, so images repeat within a batch. "
            f"Set training.batch_size to {self.length} or less."
        )

    def epoch(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step * self.config.batch_size / self.length

    def micro_batches(self, step: int) -> list[range]:
        """The positions of this process at this step, one range for each forward pass.

        Shares of a batch that does not divide differ by one image; the loop weights losses by their images.
        """
        batch = self.config.batch_size
        start = step * batch + self.rank * batch // self.world
        stop = step * batch + (self.rank + 1) * batch // self.world
        most = self.config.per_device_batch or batch
        passes = -(-(stop - start) // most)
        edges = [start + i * (stop - start) // passes for i in range(passes + 1)]
        return [range(a, b) for a, b in itertools.pairwise(edges)]

    def batches(self, start_step: int) -> Iterator[list[int]]:
        """Every forward pass from `start_step` to the end, as lists of positions."""
        for step in range(start_step, self.total_steps):
            yield from (list(positions) for positions in self.micro_batches(step))

    def lr(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, the peak until `decay_from` of the run, then half a cosine to the
        final rate at the last step."""
        peak = self.config.peak_lr
        return self.lr_of(step, peak, self.config.final * peak)

    def lr_of(self, step: int, peak: float, final: float) -> float:
        """The same schedule for any peak and last learning rate."""
        config, total = self.config, self.total_steps
        warmup = self.warmup_steps
        if step < warmup:
            return peak * (config.warmup_start + (1 - config.warmup_start) * step / warmup)
        decay = max(warmup, config.decay_from * total)
        if step < decay:
            return peak
        done = min(1.0, (step - decay) / max(1.0, total - 1 - decay))
        return final + (peak - final) * (1 + math.cos(math.pi * done)) / 2
