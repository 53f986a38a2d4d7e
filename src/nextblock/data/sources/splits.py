"""Which split is meant: one rule for Parquet files, saved data sets and the hub."""

from __future__ import annotations

from collections.abc import Iterable

from nextblock.errors import DataError, nearest

TRAIN = "train"
HELD_OUT = ("validation", "val", "test")


def split_candidates(wanted: str) -> tuple[str, ...]:
    """`wanted`, then what may stand in for it: data sets disagree on what their held-out split is called."""
    if wanted not in HELD_OUT:
        return (wanted,)
    return (wanted, *(name for name in HELD_OUT if name != wanted))


def pick_split(wanted: str, available: Iterable[str], where: str) -> str:
    """The split of `available` to use for `wanted`. Raises DataError, listing them, when there is none."""
    names = sorted(available)
    for candidate in split_candidates(wanted):
        if candidate in names:
            return candidate
    raise DataError(f"{where} has no split '{wanted}'; splits: {', '.join(names)}.{nearest(wanted, names)}")
