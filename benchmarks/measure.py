"""How speed is measured here: what is compared runs in turn, round after round, in one process on one machine.

A busy machine so slows all of it alike; a ratio is the median over the rounds of the ratio within a round. `Row` is
what a benchmark hands to `bench.py`: `rows(device, quick) -> list[Row]` in a module of this folder.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import torch

Against = Literal["plain", "second", "limit", "itself"]
Spread = tuple[float, float]  # lower and upper quartile
NOT_MEASURED = "not measured yet"
_OTHERS: tuple[Against, ...] = ("plain", "second", "limit")
_SAID = {"plain": "× plain", "second": "× second", "limit": "of the limit", "itself": ""}


@dataclass(frozen=True)
class Target:
    """What a row is held to: ours over `against` ("itself": ours in its own unit), at least or at most `value`."""

    against: Against
    sign: Literal[">=", "<="]
    value: float

    def __str__(self) -> str:
        share = f"{100 * self.value:g} %" if self.against == "limit" else f"{self.value:g}"
        return f"{self.sign.replace('>=', '≥').replace('<=', '≤')} {share} {_SAID[self.against]}".strip()

    def met_by(self, found: float) -> bool:
        return found >= self.value if self.sign == ">=" else found <= self.value


@dataclass(frozen=True)
class Row:
    """One thing measured.

    Attributes:
        name, unit, device: of what, in which unit (a rate, where more is better, unless a target says otherwise).
        targets: all must be met.
        ours, plain, second, limit: medians; None = there is none, or it was not measured.
        ratios: ours over each of the others, medians of the ratios within a round. One that is absent follows from
            the medians.
        spread: quartiles, of "ours" and so on, and of "ours/plain" and so on.
        note: sizes, and whatever else a reader must know.
    """

    name: str
    unit: str
    device: str
    targets: tuple[Target, ...] = ()
    ours: float | None = None
    plain: float | None = None
    second: float | None = None
    limit: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, Spread] = field(default_factory=dict)
    note: str = ""

    def ratio(self, against: Against) -> float | None:
        """Ours over the other; None where one of the two is missing."""
        if against == "itself" or against in self.ratios:
            return self.ours if against == "itself" else self.ratios[against]
        other = getattr(self, against)
        return None if self.ours is None or not other else self.ours / other

    @property
    def met(self) -> bool | str:
        """Whether all targets are met; "not measured yet" without what one of them needs."""
        found = [(target, self.ratio(target.against)) for target in self.targets]
        if self.ours is None or any(value is None for _, value in found):
            return NOT_MEASURED
        return all(target.met_by(value) for target, value in found if value is not None)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON. `ratio` is against the plain path."""
        return {
            "name": self.name, "unit": self.unit, "device": self.device, "ours": self.ours, "plain": self.plain,
            "second": self.second, "limit": self.limit, "ratio": self.ratio("plain"),
            "ratio_second": self.ratio("second"), "share_of_limit": self.ratio("limit"),
            "target": ", ".join(map(str, self.targets)), "met": self.met, "note": self.note,
            "spread": {name: list(values) for name, values in self.spread.items()},
        }  # fmt: skip


@dataclass(frozen=True)
class Timings:
    """Seconds of every arm in every round."""

    seconds: Mapping[str, Sequence[float]]

    def row(self, row: Row, amounts: Mapping[str, float]) -> Row:
        """`row` filled with rates: each arm named "ours", "plain", "second" or "limit" did `amounts[arm]` a round."""
        rates = {arm: [amounts[arm] / s for s in seconds] for arm, seconds in self.seconds.items()}
        spread = {arm: quartiles(found) for arm, found in rates.items()}
        ratios: dict[str, float] = {}
        for other in _OTHERS:
            if other in rates:
                within = [a / b for a, b in zip(rates["ours"], rates[other], strict=True)]
                ratios[other], spread[f"ours/{other}"] = median(within), quartiles(within)
        medians = {arm: median(found) for arm, found in rates.items()}
        return Row(**{**vars(row), **medians, "ratios": ratios, "spread": spread})


def quartiles(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleaved(arms: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int, device: str) -> Timings:
    """Time every arm once in each round; each round begins with another arm, so that none always runs first."""
    names = list(arms)
    for arm in arms.values():
        for _ in range(warmup):
            arm()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            synchronize(device)
            started = time.perf_counter()
            arms[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - started)
    return Timings(seconds)


def peak_gib(make: Callable[[], Callable[[], object]], steps: int = 2) -> float:
    """Most memory of the CUDA device that an arm takes, in GiB, alone there: made, run a few times, and let go."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    arm = make()
    for _ in range(steps):
        arm()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del arm
    gc.collect()
    torch.cuda.empty_cache()
    return peak / 2**30


def matmul(side: int, dtype: torch.dtype, device: str) -> tuple[Callable[[], object], float]:
    """The ceiling: one square product, and its floating-point operations."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out), 2.0 * side**3


def described(device: str) -> str:
    """The device in words."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{torch.get_num_threads()} threads, {name}"


def run_alone(about: str, rows: Callable[..., list[Row]], *, devices: bool = False, data: Path | None = None) -> None:
    """A table from the shell: measure `rows` and print them.

    Args:
        about: the module's docstring.
        rows: called with the device and whether to be quick; and with the data's folder, where `data` has one.
        devices: it can be asked for --device; otherwise it is of the CPU.
        data: the usual folder.
    """
    from benchmarks.bench import print_rows

    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    if devices:
        parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    if data is not None:
        parser.add_argument("--data", type=Path, default=data)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    more = () if data is None else (options.data,)
    print_rows([row.to_dict() for row in rows(getattr(options, "device", "cpu"), options.quick, *more)])
