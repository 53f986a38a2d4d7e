"""Counter-based randomness: every number drawn is a pure function of (seed, purpose, position).

Nothing here has state, so nothing has to be saved for an exact resume, and the numbers do not depend on the
number of workers or processes. The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", OOPSLA 2014), applied to whole arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_M1 = np.uint64(0xBF58476D1CE4E5B9)
_M2 = np.uint64(0x94D049BB133111EB)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * _M1
        z = (z ^ (z >> np.uint64(27))) * _M2
        return z ^ (z >> np.uint64(31))


def key(seed: int, purpose: str) -> int:
    """A 64-bit key for one purpose of one seed (any integer)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


def hashed(seed: int, purpose: str, positions: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each position; the same shape as `positions` (non-negative integers)."""
    z = np.asarray(positions, dtype=np.uint64)
    with np.errstate(over="ignore"):
        return _mix(_mix(z * _GAMMA + np.uint64(key(seed, purpose))) + _GAMMA)


def uniforms(seed: int, purpose: str, positions: ArrayLike, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each of the positions `[B]`: shape [B, count]."""
    with np.errstate(over="ignore"):
        base = hashed(seed, purpose, positions)[..., None] + np.arange(count, dtype=np.uint64) * _GAMMA
    return (_mix(_mix(base)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(seed: int, purpose: str, positions: ArrayLike, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers for each of the positions `[B]`: float32 [B, *shape], on the CPU.

    Every row comes from a generator of its own, so it is the same to the bit whatever the other rows are.
    """
    seeds = hashed(seed, purpose, positions).reshape(-1) >> np.uint64(1)
    rows = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, own in zip(rows, seeds.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(own))
    return rows


def permutation(seed: int, purpose: str, n: int) -> NDArray[np.int64]:
    """A whole permutation of range(n), for small n (it is sorted in memory)."""
    return np.argsort(hashed(seed, purpose, np.arange(n)), kind="stable")


def shuffled(seed: int, purpose: str, n: int, places: ArrayLike) -> NDArray[np.int64]:
    """Where a random permutation of range(n) sends each of `places`, without building the permutation.

    A four-round Feistel network on the smallest even number of bits that holds n, walked until the value
    falls inside range(n) (cycle walking): constant memory and a few hundred nanoseconds an item at any n.
    Raises ValueError when a place is outside range(n).
    """
    x = np.array(places, dtype=np.uint64).reshape(-1)
    if n < 1 or (x.size and int(x.max()) >= n):
        raise ValueError(f"places must lie in range({n})")
    half = np.uint64(max(1, (int(n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = np.array([key(seed, f"{purpose}/round{r}") for r in range(4)], dtype=np.uint64)
    values, todo = x, np.arange(len(x))
    while len(todo):
        left, right = values >> half, values & low
        for round_key in keys:
            left, right = right, left ^ (_mix(right * _GAMMA + round_key) & low)
        values = (left << half) | right
        x[todo] = values
        outside = values >= n
        values, todo = values[outside], todo[outside]
    return x.astype(np.int64).reshape(np.shape(places))
