"""XTRA's objective: regress the pixels of the next entity (arXiv 2411.15648, section 3).

Statistics and losses are computed in at least float32, whatever the precision of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

VARIANCE_EPS = 1e-6


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def cell_statistics(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each entity over all its pixels and channels: [B, E, P] -> two of [B, E, 1].

    The variance is the unbiased one, plus 1e-6 under the root. An entity of one number has no variance and
    gets a deviation of 1e-3.
    """
    targets = at_least_float32(targets)
    mean = targets.mean(-1, keepdim=True)
    if targets.shape[-1] == 1:
        return mean, torch.full_like(mean, VARIANCE_EPS).sqrt()
    return mean, (targets.var(-1, keepdim=True) + VARIANCE_EPS).sqrt()


def normalize_cells(targets: Tensor) -> Tensor:
    """Each entity's pixels with its own mean and deviation removed: [B, E, P] -> [B, E, P]."""
    mean, deviation = cell_statistics(targets)
    return (at_least_float32(targets) - mean) / deviation


def next_entity_loss(
    predictions: Sequence[Tensor],
    targets: Tensor,
    pixel_loss: Literal["l2", "l1"] = "l2",
) -> Tensor:
    """Mean error per pixel, averaged over the heads.

    Args:
        predictions: for head i, [B, E - 1 - i, P]: the outputs at entities 0, 1, ...
        targets: [B, E, P], every entity's pixels, normalised or not.
        pixel_loss: "l2" or "l1".

    Returns:
        A scalar, at least float32. Head i at entity c is compared with entity c + 1 + i, so the first entity
        is never a target. The paper's formula sums over the pixels of an entity; this is the mean.
    """
    error = F.mse_loss if pixel_loss == "l2" else F.l1_loss
    targets = at_least_float32(targets)
    losses = [error(at_least_float32(p), targets[:, 1 + i :]) for i, p in enumerate(predictions)]
    return torch.stack(losses).mean()
