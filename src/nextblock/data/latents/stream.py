"""Training on a latent cache: which latents are seen at a position is a pure function of (seed, position)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nextblock.data.heartbeat import reading
from nextblock.data.latents.cache import LatentCache
from nextblock.data.stream import BadSample, locate
from nextblock.errors import ConfigError
from nextblock.randomness import normals, uniforms
from nextblock.vae import posterior_sample


@dataclass
class LatentBatch:
    """B images as moments, on their way to the model.

    moments: float32 [B, 2C, h, w], mean and log-variance. labels: int64 [B], -1 where there is none. positions: int64
    [B], global sample positions; they stay on the host, where what is drawn from them is drawn. bad: always empty: an
    image that could not be read is not in the cache.
    """

    moments: Tensor
    labels: Tensor
    positions: Tensor
    bad: list[BadSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.moments)

    def pin_memory(self) -> LatentBatch:
        """A copy in page-locked memory (torch's DataLoader calls this by its name)."""
        names = ("moments", "labels", "positions")
        return dataclasses.replace(self, **{name: getattr(self, name).pin_memory() for name in names})

    def to(self, device: torch.device | str) -> LatentBatch:
        """A copy with moments and labels on `device`; does not wait when the memory is pinned."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("moments", "labels")}
        return dataclasses.replace(self, **moved)


class LatentStream:
    """Shuffled and mirrored moments of a cache, for ever. Picklable.

    Epochs are shuffled as the training stream shuffles images. `flip` is the probability of the mirrored moments.
    Raises ConfigError when it is no probability.
    """

    def __init__(self, cache: LatentCache, seed: int, flip: float = 0.5) -> None:
        if not 0 <= flip <= 1:
            raise ConfigError(f"flip must be a probability from 0 to 1, got {flip}")
        self.cache, self.seed, self.flip = cache, seed, flip

    def load(self, positions: Sequence[int]) -> LatentBatch:
        """The samples at `positions` [B], in that order. Raises DataError when a shard is damaged."""
        where = np.asarray(positions, dtype=np.int64)
        reading("a batch of latents")
        _, indices = locate(self.seed, where, len(self.cache))
        flips = uniforms(self.seed, "latents/flip", where, 1)[:, 0] < self.flip
        return LatentBatch(
            moments=torch.from_numpy(self.cache.moments(indices, flips)),
            labels=torch.from_numpy(self.cache.labels[indices]),
            positions=torch.from_numpy(where.copy()),
        )


def latents_of(batch: LatentBatch, seed: int, scale_factor: float, shift_factor: float = 0.0) -> Tensor:
    """Latents float32 [B, C, h, w], shifted and scaled, on the batch's device: a sample of each posterior.

    The noise is a function of (seed, position) alone, drawn on the host.
    """
    _, channels, *sides = batch.moments.shape
    noise = normals(seed, "posterior", batch.positions.numpy(), (channels // 2, *sides))
    if batch.moments.is_cuda:
        noise = noise.pin_memory()
    noise = noise.to(batch.moments.device, non_blocking=True)
    return posterior_sample(batch.moments, noise, scale_factor, shift_factor)
