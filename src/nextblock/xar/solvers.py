"""Solvers: from noise at t = 1 to data at t = 0, along the velocities of a model.

Every solver has one signature, `solver(velocity, x, times, noise, seen)`:

    velocity(x, t) -> the velocity at x and time t (a float), of x's shape
    x              -> the state at times[0]
    times          -> falling, the last one 0
    noise()        -> a new standard normal tensor of x's shape; called by stochastic solvers only
    seen(step, x)  -> told the state after every step

Model evaluations for S steps: euler S, heun 2S - 1, euler_maruyama S, multistep S.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from nextblock.errors import ConfigError, nearest
from nextblock.flow import score_from

Velocity = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]
Seen = Callable[[int, Tensor], None]
Solver = Callable[[Velocity, Tensor, Sequence[float], Noise, Seen], Tensor]

LAST_STOCHASTIC = 0.04  # the official grid: equal steps down to here, then one to 0


def euler(velocity: Velocity, x: Tensor, times: Sequence[float], noise: Noise, seen: Seen) -> Tensor:
    """First order, deterministic."""
    for step, (t, after) in enumerate(pairwise(times)):
        x = x + (after - t) * velocity(x, t)
        seen(step, x)
    return x


def heun(velocity: Velocity, x: Tensor, times: Sequence[float], noise: Noise, seen: Seen) -> Tensor:
    """Second order, two evaluations a step (one in the last, which ends where a model is hardly trained)."""
    for step, (t, after) in enumerate(pairwise(times)):
        slope = velocity(x, t)
        guess = x + (after - t) * slope
        x = guess if after == 0 else x + (after - t) * (slope + velocity(guess, after)) / 2
        seen(step, x)
    return x


def multistep(velocity: Velocity, x: Tensor, times: Sequence[float], noise: Noise, seen: Seen) -> Tensor:
    """Second order with one evaluation a step: Adams-Bashforth with two slopes and steps of any length."""
    before: tuple[float, Tensor] | None = None
    for step, (t, after) in enumerate(pairwise(times)):
        slope, length = velocity(x, t), after - t
        ahead = slope if before is None else slope + (slope - before[1]) * (length / (2 * before[0]))
        x, before = x + length * ahead, (length, slope)
        seen(step, x)
    return x


def euler_maruyama(velocity: Velocity, x: Tensor, times: Sequence[float], noise: Noise, seen: Seen) -> Tensor:
    """Stochastic, as published: dx = (v - w/2 · score) dt + sqrt(w) dW with w(t) = 2t; the last step adds no noise.

    Source: SiT (arXiv 2401.08740), section 2.3, and xAR's official sampler.
    """
    for step, (t, after) in enumerate(pairwise(times)):
        w, v = 2 * t, velocity(x, t)
        drift = v - 0.5 * w * score_from(x, v, t)
        x = x + (after - t) * drift
        if after > 0:
            x = x + math.sqrt(w * (t - after)) * noise().to(x)
        seen(step, x)
    return x


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "euler_maruyama": euler_maruyama,
    "multistep": multistep,
}
TIME_GRIDS = ("auto", "uniform", "published", "quadratic")


def solver_named(name: str) -> Solver:
    """Raises ConfigError for an unknown name, with the nearest."""
    if name not in SOLVERS:
        raise ConfigError(f"No solver '{name}'.{nearest(name, SOLVERS)} Solvers: {', '.join(SOLVERS)}.")
    return SOLVERS[name]


def time_grid(grid: str | Sequence[float], steps: int, solver: str) -> list[float]:
    """The steps + 1 times from 1 to 0.

    "uniform": equal steps. "published": equal steps from 1 to 0.04, then one to 0. "quadratic": squares of equal
    steps, denser near the data. "auto": published for euler_maruyama, else uniform. Or the times themselves.
    Raises ConfigError for an unknown name, steps below 1, or times that do not fall from 1 to 0.
    """
    if not isinstance(grid, str):
        times = [float(t) for t in grid]
        if len(times) < 2 or times[-1] != 0 or times[0] != 1 or not all(a > b for a, b in pairwise(times)):
            raise ConfigError(f"times must fall from 1 to 0; got {times}.")
        return times
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps must be a whole number, at least 1; got {steps!r}.")
    if grid not in TIME_GRIDS:
        raise ConfigError(f"No time grid '{grid}'.{nearest(grid, TIME_GRIDS)} Grids: {', '.join(TIME_GRIDS)}.")
    if grid == "published" or (grid == "auto" and solver == "euler_maruyama"):
        return [*torch.linspace(1.0, LAST_STOCHASTIC, steps, dtype=torch.float64).tolist(), 0.0]
    times = [(steps - i) / steps for i in range(steps + 1)]
    return [t * t for t in times] if grid == "quadratic" else times
