"""What is known about one benchmark data set: its protocol, where it comes from, how it lies on a disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nextblock.data.sources import Source

METRICS = ("accuracy", "macro_f1", "mean_per_class")
LR9 = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3, 8e-3, 1e-2)
LR7 = LR9[:7]
LR10 = (*LR9, 1e-1)

Splits = Mapping[str, Callable[[], Source]]
"""What a layout found: the name of each split, and how to open it. Nothing is read before it is opened."""


@dataclass(frozen=True)
class Columns:
    """Columns of a table that hold the image and its label, as asked for. label None: the usual names are tried."""

    image: str = "image"
    label: str | None = None


Layout = Callable[[Path, Columns], Splits]
"""Looks into a folder; gives no splits when the folder is not laid out its way."""


@dataclass(frozen=True)
class NamedDataset:
    """One data set of the frozen-encoder benchmark (XTRA, appendix; AIM, table of the 15 benchmarks).

    name: as it is asked for. title: as papers write it. classes: how many. train_splits, test_split: what XTRA's
    evaluation trains and tests on. metric: the benchmark's own one of `METRICS`; XTRA's published numbers are
    accuracies throughout. batch_size: images of an optimiser step. lrs: learning rates tried. warmup_epochs: of
    100. url: where it comes from. how: how to get it into a layout that opens. hub: a copy on the Hugging Face
    hub. folder: its usual folder below the data root, `also` other ones. layouts: tried in order.
    """

    name: str
    title: str
    classes: int
    train_splits: tuple[str, ...]
    test_split: str
    batch_size: int
    lrs: tuple[float, ...]
    url: str
    how: str
    folder: str
    layouts: tuple[Layout, ...]
    metric: str = "accuracy"
    warmup_epochs: int = 0
    hub: str | None = None
    also: tuple[str, ...] = ()
    tested_on: str = "a fixture"
