from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from close import assert_close
from nextblock.errors import ConfigError
from nextblock.flow import data_from, noisy, score_from, velocity
from nextblock.xar.solvers import SOLVERS, time_grid

MEAN, DEVIATION = 1.5, 0.3


def exact(x: Tensor, t: float) -> Tensor:
    """The velocity E[noise - data | x] where data are Gaussian: known in closed form."""
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    centred = x - (1 - t) * MEAN
    data = MEAN + (1 - t) * DEVIATION**2 / variance * centred
    noise = t / variance * centred
    return noise - data


def solve(solver: str, steps: int, x: Tensor, grid: Any = "uniform") -> Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype)  # noqa: E731
    return SOLVERS[solver](exact, x, time_grid(grid, steps, solver), noise, lambda step, x: None)


def test_path() -> None:
    data, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    x, v = noisy(data, noise, t), velocity(data, noise)
    assert torch.equal(noisy(data, noise, 0 * t), data)
    assert torch.equal(noisy(data, noise, 0 * t + 1), noise)
    assert_close(data_from(x, v, t), data, 1e-12)
    assert_close(score_from(x, v, t), -noise / t, 1e-12)


def test_score_of_a_gaussian() -> None:
    x, t = torch.linspace(-2, 2, 9, dtype=torch.float64), 0.4
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    found = score_from(x, exact(x, t), torch.tensor(t, dtype=torch.float64))
    assert_close(found, -(x - (1 - t) * MEAN) / variance, 1e-9)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_the_error_falls_with_the_order_of_the_solver(solver: str, order: int) -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    truth = MEAN + DEVIATION * x  # the flow of a Gaussian is this line
    errors = [float((solve(solver, steps, x) - truth).abs().max()) for steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine > 0.85 * 2**order


def test_multistep_needs_fewer_evaluations_than_heun_and_euler() -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    truth = MEAN + DEVIATION * x
    error = {s: float((solve(s, n, x) - truth).abs().max()) for s, n in (("multistep", 40), ("euler", 40))}
    heun = float((solve("heun", 20, x) - truth).abs().max())  # 39 evaluations
    assert error["multistep"] < heun < error["euler"]


def test_euler_maruyama_samples_the_distribution() -> None:
    x = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = solve("euler_maruyama", 200, x, "auto")
    assert abs(float(found.mean()) - MEAN) < 0.02
    assert abs(float(found.std()) - DEVIATION) < 0.03
    assert float(torch.corrcoef(torch.stack((x, found)))[0, 1].abs()) < 0.9  # new noise came in on the way


@pytest.mark.parametrize(("solver", "calls"), [("euler", 6), ("heun", 11), ("multistep", 6), ("euler_maruyama", 6)])
def test_evaluations_and_draws(solver: str, calls: int) -> None:
    times, draws = [], []

    def count(x: Tensor, t: float) -> Tensor:
        times.append(t)
        return x

    def noise() -> Tensor:
        draws.append(1)
        return torch.zeros(1)

    seen: list[int] = []
    SOLVERS[solver](count, torch.ones(1), time_grid("auto", 6, solver), noise, lambda step, x: seen.append(step))
    assert len(times) == calls
    assert len(draws) == (5 if solver == "euler_maruyama" else 0)
    assert seen == list(range(6))


def test_time_grids() -> None:
    assert time_grid("auto", 4, "heun") == [1.0, 0.75, 0.5, 0.25, 0.0]
    published = time_grid("auto", 5, "euler_maruyama")
    assert published[0] == 1
    assert math.isclose(published[-2], 0.04)
    assert published[-1] == 0
    assert len(published) == 6
    assert time_grid("auto", 1, "euler_maruyama") == [1.0, 0.0]
    assert time_grid("quadratic", 2, "euler") == [1.0, 0.25, 0.0]
    assert time_grid((1, 0.2, 0), 9, "euler") == [1.0, 0.2, 0.0]
    for wrong in ((1.0, 0.5), (0.5, 0.5, 0.0), (0.0,), (2.0, 0.0), (0.8, 0.0)):
        with pytest.raises(ConfigError, match="fall from"):
            time_grid(wrong, 2, "euler")
