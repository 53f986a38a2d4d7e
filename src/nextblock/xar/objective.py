"""xAR's objective: flow matching for every entity, each at a time of its own (arXiv 2502.20388, section 3.2).

Losses are computed in at least float32, whatever the precision of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nextblock.flow import sample_times
from nextblock.ordering import AnyOrdering
from nextblock.xar.config import XARConfig


def draw_times(config: XARConfig, uniforms: Tensor) -> Tensor:
    """The time of every entity of every image, in (0, 1), t = 1 being noise: [B, E] uniform numbers -> [B, E].

    With context "increasing" the times grow along the entities, so that an entity sees less noisy ones before it;
    with "decreasing" they fall.
    """
    times = sample_times(uniforms, config.times)
    if config.context in ("increasing", "decreasing"):
        times = times.sort(dim=1, descending=config.context == "decreasing").values
    return times


def entity_loss(predicted: Tensor, target: Tensor, ordering: AnyOrdering, mean: str) -> Tensor:
    """The mean squared error of [B, N, C] velocities, a scalar.

    mean: "tokens", every number counts alike; "entities", first within each entity, then over them.
    """
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    errors = (predicted.to(dtype) - target.to(dtype)).square()
    if mean == "tokens" or len(set(ordering.entity_sizes)) == 1:
        return errors.mean()
    parts = torch.split(errors, list(ordering.entity_sizes), dim=1)
    return torch.stack([part.mean() for part in parts]).mean()
