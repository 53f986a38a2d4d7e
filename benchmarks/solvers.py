"""How often must a generator be asked for images as good as those of 50-step Euler-Maruyama? Every solver, on digits.

    python -m benchmarks.solvers [--seeds 0 1 2] [--out runs/entities] [--quick]

The generators are those of `entities.py`, cells of 4×4 with random context, one for each seed; they are trained when
they are not there, and finished runs and distances are kept: run it again to go on. Each solver of `xar/solvers.py` on
each time grid makes 720 digits without guidance for each number of steps, all from the same (seed, index) noise. Their
Fréchet distance is to the 1,437 training digits, in the features of the one encoder of `entities.py`.

Evaluations are of one entity, counted on the model while it samples; the passes over finished entities, which fill the
cache, are told beside them (three an image, whatever the solver).

"Equal" is stated before looking: 50-step Euler-Maruyama is sampled with five other noise seeds; each gives the mean
distance over the generators, and these a mean and a standard deviation. A solver is equal from the fewest evaluations
on at which, and at every larger number that was tried, its mean distance is at most mean + 2 standard deviations.
Against the cheapest converged Euler the same holds with Euler's own distance at 100 steps in place of the mean.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.entities import SAMPLES, Judge, require_same_options, run_folder, train_arm
from benchmarks.measure import Row, Target, described
from nextblock.data.digits import plain_digits
from nextblock.data.preprocess import Preprocessing, denormalize
from nextblock.evaluation.generation import compare
from nextblock.figures.solvers import draw_solvers
from nextblock.jobs.opening_generator import open_generator
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xar.sampler import sample_latents

STEPS = (2, 3, 4, 5, 7, 10, 15, 20, 30, 50, 100)
NOISE_SEEDS = (1, 2, 3, 4, 5)  # of the reference; every arm is sampled with 0
REFERENCE_STEPS = 50
DEVIATIONS = 2.0
BATCH = 180  # the fastest here; an image does not depend on it
GENERATOR = "cells4"
PREPROCESSING = Preprocessing((8, 8), channels=1)
NAME = "sampling evaluations for the Fréchet distance of 50-step Euler-Maruyama"
ROW = Row(NAME, "evaluations", "cpu", (Target("plain", "<=", 0.5),))
QUICK_SAMPLES = 20
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Score = Callable[[NDArray[np.uint8]], dict[str, float]]


@dataclass(frozen=True)
class Arm:
    """A solver on a time grid, and the numbers of steps it is tried with."""

    solver: str
    grid: str
    steps: tuple[int, ...] = STEPS

    @property
    def name(self) -> str:
        return f"{self.solver}, {self.grid}"


FEW = STEPS[:6]  # grids beside a solver's usual one: up to 10 steps
REFERENCE = Arm("euler_maruyama", "published")
EULER = Arm("euler", "uniform")
ARMS = (
    REFERENCE,
    Arm("multistep", "uniform"),
    EULER,
    Arm("heun", "uniform", STEPS[:9]),  # 59 evaluations
    Arm("multistep", "quadratic", FEW),
    Arm("euler", "quadratic", FEW),
    Arm("heun", "quadratic", FEW),
    Arm("euler_maruyama", "uniform", FEW),
    Arm("euler_maruyama", "quadratic", FEW),
)


@contextmanager
def counted(model: XAR) -> Iterator[Counter[str]]:
    """Count what the model is asked: "entity N" for velocities, "cache" for finished entities that it remembers."""
    calls: Counter[str] = Counter()
    asked, remembered = model.velocities, model.remember

    def velocities(*given: Any, first: int = 0, **options: Any) -> Tensor:
        calls[f"entity {first}"] += 1
        return asked(*given, first=first, **options)

    def remember(*given: Any, **options: Any) -> None:
        calls["cache"] += 1
        remembered(*given, **options)

    model.velocities, model.remember = velocities, remember
    try:
        yield calls
    finally:
        del model.velocities, model.remember  # the class's own again


def sampled(model: XAR, solver: str, grid: str, steps: int, *, noise: int, count: int) -> tuple[Tensor, int, int]:
    """Latents [count, 1, 8, 8] of ten classes in turn, evaluations of each entity, passes that filled the cache.

    Raises RuntimeError if entities or batches were not asked equally often: then there is no one number.
    """
    made, seen = [], set()
    for numbers in torch.arange(count).split(BATCH):
        with counted(model) as calls:
            made.append(
                sample_latents(
                    model, numbers % 10, steps=steps, solver=solver, time_grid=grid, seed=noise, indices=numbers
                )
            )
        cached = calls.pop("cache", 0)
        entities = [calls[f"entity {n}"] for n in range(model.ordering.num_entities)]  # 0 where one was not asked
        seen |= {(number, cached) for number in entities}
    if len(seen) != 1:
        raise RuntimeError(f"entities were evaluated differently often: {sorted(seen)}.")
    evaluations, cached = seen.pop()
    return torch.cat(made), evaluations, cached


def measure(model: XAR, score: Score, arm: Arm, steps: int, *, noise: int, count: int) -> dict[str, Any]:
    """One point of a curve."""
    latents, evaluations, cached = sampled(model, arm.solver, arm.grid, steps, noise=noise, count=count)
    found = score(denormalize(latents, PREPROCESSING).numpy())
    return {"arm": arm.name, "steps": steps, "noise": noise, "evaluations": evaluations, "cache": cached, **found}


def points(arms: Sequence[Arm], reference_steps: int) -> Iterator[tuple[Arm, int, int]]:
    """(arm, steps, noise seed) of everything that is sampled of one generator: the reference, then few steps first."""
    yield from ((REFERENCE, reference_steps, noise) for noise in NOISE_SEEDS)
    yield from sorted(((arm, steps, 0) for arm in arms for steps in arm.steps), key=lambda point: point[1])


def measure_all(
    model: XAR,
    score: Score,
    arms: Sequence[Arm] = ARMS,
    *,
    count: int = SAMPLES,
    reference_steps: int = REFERENCE_STEPS,
    kept: Path | None = None,
) -> list[dict[str, Any]]:
    """Every point of one generator; those in the file `kept` are not made again, new ones are added to it."""
    found = json.loads(kept.read_text()) if kept is not None and kept.is_file() else []
    there = {(point["arm"], point["steps"], point["noise"]) for point in found}
    for arm, steps, noise in points(arms, reference_steps):
        if (arm.name, steps, noise) in there:
            continue
        found.append(measure(model, score, arm, steps, noise=noise, count=count))
        if kept is not None:
            print(found[-1], flush=True)
            kept.write_text(json.dumps(found, indent=1))
    return found


def equal_from(curve: Mapping[int, float], limit: float) -> int | None:
    """The fewest evaluations from which on every distance of a curve is at most `limit`; None when the last is not."""
    found = None
    for evaluations in sorted(curve, reverse=True):
        if curve[evaluations] > limit:
            break
        found = evaluations
    return found


def curves(found: Mapping[str, Sequence[Mapping[str, Any]]], kind: str = "frechet") -> dict[str, dict[int, float]]:
    """Arm -> evaluations -> mean over the generators, of the arms' own noise; points that all generators have."""
    values: dict[str, dict[int, list[float]]] = {}
    for each in found.values():
        for point in each:
            if point["noise"] == 0:
                values.setdefault(point["arm"], {}).setdefault(point["evaluations"], []).append(point[kind])
    return {
        arm: {at: mean(given) for at, given in sorted(points.items()) if len(given) == len(found)}
        for arm, points in values.items()
    }


def reference_of(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[float, float]:
    """Mean and standard deviation, over the other noise seeds, of the reference's mean over the generators."""
    by_noise: dict[int, list[float]] = {}
    for each in found.values():
        for point in each:
            if point["noise"]:
                by_noise.setdefault(point["noise"], []).append(point["frechet"])
    means = [mean(values) for values in by_noise.values()]
    return mean(means), stdev(means)


def judged(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The limits, from where on each arm is equal to either, and the arm that needs the fewest evaluations."""
    centre, deviation = reference_of(found)
    drawn = curves(found)
    euler = drawn[EULER.name]
    own = DEVIATIONS * deviation
    limits = {"euler_maruyama": centre + own, "euler": euler[max(euler)] + own}
    equal = {arm: {to: equal_from(curve, limit) for to, limit in limits.items()} for arm, curve in drawn.items()}
    best = {}
    for to in limits:
        reached = {arm: equal[arm][to] for arm in equal if equal[arm][to] is not None}
        arm = min(reached, key=lambda name: reached[name], default=None)
        best[to] = {"arm": arm, "evaluations": reached.get(arm)}
    return {
        "reference": {"mean": centre, "deviation": deviation, "noise_seeds": len(NOISE_SEEDS)},
        "limits": limits, "equal_from": equal, "fewest": best, "cheapest_euler": equal[EULER.name]["euler"],
        "curves": drawn,
    }  # fmt: skip


def row_of(verdict: Mapping[str, Any], generators: int, samples: int) -> Row:
    """The row of the speed table."""
    fewest, reference = verdict["fewest"]["euler_maruyama"], verdict["reference"]
    told = fewest["arm"] or "no solver is as good"
    itself = verdict["equal_from"].get(REFERENCE.name, {}).get("euler_maruyama", "more")
    note = (
        f"{told}; {generators} generator{'s' * (generators > 1)} of digits, {samples} samples each, "
        f"{reference['noise_seeds']} noise seeds of the reference; the cheapest converged Euler needs "
        f"{verdict['cheapest_euler']} evaluations, Euler-Maruyama itself "
        f"{itself}; the best of {len(verdict['equal_from'])} arms on "
        "the same samples; measured by python -m benchmarks.solvers"
    )
    return replace(ROW, ours=fewest["evaluations"], plain=float(REFERENCE_STEPS), note=note)


def planned(device: str) -> list[Row]:
    """The row without numbers; evaluations are the same on every device, so it is the CPU's."""
    return [ROW] if device == "cpu" else []


def rows(device: str, quick: bool = False, results: Path = RESULTS) -> list[Row]:
    """What the experiment found, from its results; it is run by its own command. `quick`: anew, saying nothing."""
    if device != "cpu":
        return []
    if quick:
        return [row_of(judged({"0": quick_points()}), 1, QUICK_SAMPLES)]
    file = results / "solvers-cpu.json"
    if not file.is_file():
        return [replace(ROW, note="run python -m benchmarks.solvers")]
    found = json.loads(file.read_text())
    return [row_of(found["verdict"], len(found["points"]), found["samples"])]


def quick_points() -> list[dict[str, Any]]:
    """All of it with a generator of random weights, few samples and pixels for features: does it run?"""
    torch.manual_seed(0)
    model = XAR(XARConfig(latent_size=8, latent_channels=1, patch_size=1, entity_size=4, width=16, depth=2,
                          num_heads=2, num_classes=10)).eval()  # fmt: skip
    real = plain_digits(8)[0].images.reshape(-1, 64) / 255
    arms = [replace(arm, steps=(2, 3, 4)) for arm in ARMS]
    return measure_all(
        model,
        lambda images: {"frechet": compare(images.reshape(-1, 64) / 255, real, metrics=("frechet",))["frechet"]},
        arms,
        count=QUICK_SAMPLES,
        reference_steps=4,
    )


def trained_points(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Seed -> every point of its generator."""
    require_same_options(options)
    judge = Judge(options)

    def score(images: NDArray[np.uint8]) -> dict[str, float]:
        read = judge.reader.predict(images.reshape(len(images), -1) / 255) == np.arange(len(images)) % 10
        found = compare(judge.features(images), judge.reference, metrics=("frechet",))
        return {"frechet": found["frechet"], "read": round(100 * float(read.mean()), 2)}

    found = {}
    for seed in options.seeds:
        train_arm(options, GENERATOR, seed)
        folder = run_folder(options, GENERATOR, seed)
        model = open_generator(folder, device=options.device).model
        found[str(seed)] = measure_all(model, score, kept=folder / "solvers.json")
    return found


def report(found: Mapping[str, list[dict[str, Any]]], samples: int, file: Path, figure: Path) -> None:
    """The table, the JSON, the picture."""
    verdict = judged(found)
    table = Table(
        "solver, time grid", "as good as EM, 50 steps", "as Euler, 100 steps", "Fréchet × 1000 by evaluations"
    )
    for arm, curve in verdict["curves"].items():
        equal = [str(each or f"not by {max(curve)}") for each in verdict["equal_from"][arm].values()]
        table.add_row(arm, *equal, "  ".join(f"{at}: {1000 * value:.2f}" for at, value in curve.items()))
    Console(width=150).print(table)
    by_seed = {seed: judged({seed: each}) for seed, each in found.items()}
    for name, each in {"all": verdict, **by_seed}.items():
        centre, deviation = each["reference"]["mean"], each["reference"]["deviation"]
        print(f"{name}: reference {1000 * centre:.3f} ± {1000 * deviation:.3f}, {each['fewest']}, "
              f"cheapest Euler {each['cheapest_euler']}")  # fmt: skip
    about = {"samples": samples, "torch": torch.__version__, "device": described("cpu")}
    kept = ("reference", "limits", "equal_from", "fewest", "cheapest_euler")
    about["by_seed"] = {seed: {name: each[name] for name in kept} for seed, each in by_seed.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about | {"verdict": verdict, "points": found}, indent=1) + "\n")
    equal = {arm: each["euler_maruyama"] for arm, each in verdict["equal_from"].items()}
    lines = (verdict["reference"]["mean"], verdict["limits"]["euler_maruyama"])
    title = f"{len(found)} generator{'s' * (len(found) > 1)} of digits, {samples} samples each"
    print(file, draw_solvers(verdict["curves"], figure, reference=lines, equal=equal, title=title))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.solvers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="runs/entities", help="folder of the generators, shared with entities.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="in sizes that say nothing, into files of its own")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=None, help="docs/solvers.png, or beside the results if quick")
    parser.set_defaults(device="cpu", quiet=True, epochs=20, width=64, depth=4, steps=20)  # those of entities.py
    options = parser.parse_args(argv)
    if options.quick:
        figure = options.figure or options.results / "solvers-quick.png"
        report({"0": quick_points()}, QUICK_SAMPLES, options.results / "solvers-cpu-quick.json", figure)
        return
    figure = options.figure or ROOT / "docs" / "solvers.png"
    report(trained_points(options), SAMPLES, options.results / "solvers-cpu.json", figure)


if __name__ == "__main__":
    main()
