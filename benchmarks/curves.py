"""A measured curve: medians and quartiles over some size, the exponent fitted to it, and what theory says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.measure import quartiles

# A curve ready for JSON: the fields of About; points of x, median, low, high, expected; slope, theory_slope
Curve = dict[str, Any]


@dataclass(frozen=True)
class About:
    """What a curve is of.

    Attributes:
        name: of the curve, once in all.
        panel: of the picture; curves of one panel have the same x and unit.
        x, unit: what it is over, and what is measured, in which unit.
        theory: what each point should be in proportion to, in words.
        rate: more is better (images/s), so theory's line is a ceiling; otherwise it is a floor.
        note: sizes, and whatever else a reader must know.
    """

    name: str
    panel: str
    x: str
    unit: str
    theory: str
    rate: bool = False
    note: str = ""


def power(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The exponent p of the power law y = a·x^p that is nearest in the logarithms; all numbers above 0.

    Raises ValueError for fewer than two different x.
    """
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    center, level = sum(u) / len(u), sum(v) / len(v)
    square = sum((a - center) ** 2 for a in u)
    if not square:
        raise ValueError(f"an exponent needs two different sizes; got {sorted(set(xs))}.")
    return sum((a - center) * (b - level) for a, b in zip(u, v, strict=True)) / square


def curve(about: About, samples: Mapping[float, Sequence[float]], amounts: Mapping[float, float]) -> Curve:
    """The curve of what was found at every x.

    Args:
        samples: x -> values, one a round. x = 0 (no workers) has no place on a logarithmic axis: it is kept, but is
            outside of the fit and has no expectation.
        amounts: x -> a number that theory says the values are in proportion to.
    """
    found = {x: median(values) for x, values in sorted(samples.items())}
    fitted = [x for x in found if x > 0]
    each = [found[x] / amounts[x] for x in fitted]
    best = max(each) if about.rate else min(each)
    points = []
    for x, middle in found.items():
        low, high = quartiles(samples[x])
        expected = best * amounts[x] if x > 0 else None
        points.append({"x": x, "median": middle, "low": low, "high": high, "expected": expected})
    return {
        **vars(about),
        "points": points,
        "slope": power(fitted, [found[x] for x in fitted]),
        "theory_slope": power(fitted, [amounts[x] for x in fitted]),
    }


def departure(found: Curve) -> tuple[float, float]:
    """The point furthest from theory's line: its x, and what share of the best rate it has, up to 1."""
    shares = []
    for point in found["points"]:
        if point["expected"] is not None:
            share = point["median"] / point["expected"]
            shares.append((share if found["rate"] else 1 / share, point["x"]))
    share, x = min(shares)
    return x, share
