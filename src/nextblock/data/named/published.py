"""Published accuracies of frozen encoders under the attentive probe, to set one's own beside.

The means are of XTRA's paper. The rows by data set are of AIM's paper (El-Nouby et al., "Scalable Pre-training of
Large Autoregressive Image Models", 2024), whose column names we inferred from the values: each row's mean is the
one that XTRA's paper gives. XTRA itself is published by its mean only, and by ImageNet-1K.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_ORDER = (
    "imagenet1k", "inat18", "cifar10", "cifar100", "food101", "dtd", "pets", "cars", "iwildcam", "camelyon17", "pcam",
    "rxrx1", "eurosat", "fmow", "infograph",
)  # fmt: skip

SUITES = {"xtra15": _ORDER}


@dataclass(frozen=True)
class PublishedRow:
    """One encoder: `mean` over the suite `xtra15` in percent, and what is known by data set."""

    model: str
    mean: float
    source: str
    accuracy: Mapping[str, float] = field(default_factory=dict)

    def mean_of(self, names: Iterable[str]) -> float | None:
        """Over these data sets; None where one of them is not known, or there are none."""
        found = [self.accuracy.get(name) for name in names]
        known = [value for value in found if value is not None]
        return sum(known) / len(known) if known and len(known) == len(found) else None


def _row(text: str) -> dict[str, float]:
    return dict(zip(_ORDER, map(float, text.split()), strict=True))


PUBLISHED = (
    PublishedRow("XTRA-H/14", 76.2, "XTRA's paper", {"imagenet1k": 80.9}),
    PublishedRow(
        "AIM-0.6B DFN-2B+",
        75.6,
        "AIM's paper, column inferred",
        _row("78.5 64.0 97.2 86.8 90.1 80.1 93.0 93.0 57.9 94.3 90.0 7.8 98.4 58.3 45.2"),
    ),
    PublishedRow(
        "MAE-H/14 IN-1K",
        75.3,
        "AIM's paper, column inferred",
        _row("80.9 64.6 97.1 85.8 90.2 78.1 95.0 93.7 58.1 94.2 89.8 5.4 98.1 56.9 42.2"),
    ),
    PublishedRow("AIM-0.6B DFN-2B", 74.5, "XTRA's paper"),
)
