"""A shuffle whose reads stay local: shards are shuffled, and samples within a few shards at a time.

With S shards in windows of G, the shards are put in a random order, each G in a row form a window, and the samples of a
window are permuted together. At most G shards are read at any time; no image of a window is seen before all of the one
before. It is a pure function of (seed, epoch, place), so the stream needs no state for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nextblock.randomness import permutation, shuffled

_KEPT = 2  # epochs whose layout is kept: a batch may lie across two


class _Layout(NamedTuple):
    """One epoch: shards int64 [S] in their order, where each of them begins and ends [S], where windows end [W]."""

    shards: NDArray[np.int64]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    window_ends: NDArray[np.int64]


class Windows:
    """The order of samples that lie in shards one behind the other.

    Args:
        sizes: samples of each shard, int64 [S]; may be 0.
        shards: of a window, at least 1.
    """

    def __init__(self, sizes: ArrayLike, shards: int) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64).reshape(-1)
        if shards < 1 or (self._sizes < 0).any():
            raise ValueError(
                f"a window has at least 1 shard, a shard at least 0 samples; got {shards}, {self._sizes.tolist()}"
            )
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._shards = shards
        self._layouts: dict[tuple[int, int], _Layout] = {}

    def order(self, seed: int, epoch: int, places: ArrayLike) -> NDArray[np.int64]:
        """The sample at each of the `places` [B] of an epoch, int64 [B]. Raises ValueError for a place outside of it.

        Over all places it is a permutation of all samples.
        """
        where = np.asarray(places, dtype=np.int64).reshape(-1)
        layout = self._layout(seed, epoch)
        if len(where) and not 0 <= where.min() <= where.max() < self._sizes.sum():
            raise ValueError(f"places must lie in range({self._sizes.sum()})")
        windows = np.searchsorted(layout.window_ends, where, side="right")
        mixed = np.empty_like(where)
        for window in np.unique(windows).tolist():
            here = windows == window
            begin = int(layout.window_ends[window - 1]) if window else 0
            count = int(layout.window_ends[window]) - begin
            mixed[here] = begin + shuffled(seed, f"epoch{epoch}/window{window}", count, where[here] - begin)
        at = np.searchsorted(layout.ends, mixed, side="right")
        return self._starts[layout.shards[at]] + mixed - layout.begins[at]

    def _layout(self, seed: int, epoch: int) -> _Layout:
        found = self._layouts.get((seed, epoch))
        if found is None:
            shards = permutation(seed, f"epoch{epoch}/shards", len(self._sizes))
            ends = np.cumsum(self._sizes[shards])
            last = np.append(np.arange(self._shards - 1, len(shards) - 1, self._shards), len(shards) - 1)
            found = _Layout(shards, ends - self._sizes[shards], ends, ends[last])
            while len(self._layouts) >= _KEPT:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[seed, epoch] = found
        return found
