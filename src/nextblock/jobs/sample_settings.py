"""What decides the images of a sampling job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nextblock.errors import ConfigError, nearest
from nextblock.xar.sampler import Guidance
from nextblock.xar.solvers import solver_named, time_grid


@dataclass(frozen=True)
class SampleSettings:
    """What decides the images, beside weights and decoder. Image i is of class `classes[i % len(classes)]`.

    Attributes:
        classes: numbers; empty = unconditional.
        n: images.
        batch_size: image i is always made in batch i // batch_size.
        precision: "fp32", or "bf16" autocast.
        state: of the solver, "float64" or "float32".
        known_entities: so many are taken from given images.
        compile: layers are compiled and, on CUDA, passes recorded; it changes how numbers are rounded.

    The others are those of `sample_latents`. Raises ConfigError for values that cannot work.
    """

    classes: tuple[int, ...] = ()
    n: int = 16
    seed: int = 0
    guidance: float = 1.0
    guidance_schedule: str = "linear"
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    steps: int = 50
    solver: str = "euler_maruyama"
    time_grid: str = "auto"
    batch_size: int = 64
    precision: str = "fp32"
    state: str = "float64"
    known_entities: int = 0
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("n", "batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1; got {getattr(self, name)}.")
        if self.precision not in ("fp32", "bf16"):
            hint = nearest(self.precision, ("auto", "fp32", "bf16"))
            raise ConfigError(f"precision must be 'auto', 'fp32' or 'bf16'; got {self.precision!r}.{hint}")
        if self.state not in ("float64", "float32"):
            raise ConfigError(f"state must be 'float64' or 'float32'; got {self.state!r}.")
        if self.guidance != 1 and not self.classes:
            raise ConfigError(
                f"guidance {self.guidance:g} needs a model that knows classes, and this one is unconditional. "
                "Leave out --guidance."
            )
        Guidance(self.guidance, self.guidance_schedule, self.guidance_interval)
        solver_named(self.solver)
        time_grid(self.time_grid, self.steps, self.solver)

    def labels(self, numbers: Sequence[int]) -> Tensor | None:
        """The classes of these images, int64 [B]; None when unconditional."""
        if not self.classes:
            return None
        return torch.tensor([self.classes[number % len(self.classes)] for number in numbers], dtype=torch.int64)

    def for_sampler(self) -> dict[str, Any]:
        """What `sample_latents` takes under the same names."""
        names = (
            "seed", "guidance", "guidance_schedule", "guidance_interval", "steps", "solver", "time_grid",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names} | {"state_dtype": getattr(torch, self.state)}
