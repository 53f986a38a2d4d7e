"""Flow matching on the linear path, as pure functions: t = 0 is data, t = 1 is noise.

    x_t = (1 - t) x + t ε          the path              (xAR, arXiv 2502.20388, eq. 2)
    v   = ε - x                    its velocity dx_t/dt, what a model is trained to give   (eq. 3)

Data and noise can be had back from a point of the path and its velocity, and so can the score ∇ log p_t, which a
stochastic sampler needs (SiT, arXiv 2401.08740, section 2).

Every `t` broadcasts against the tensors it stands beside.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

TimeDistribution = Literal["logit_normal", "uniform"]


def noisy(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The point of the path at time t."""
    return (1 - t) * data + t * noise


def velocity(data: Tensor, noise: Tensor) -> Tensor:
    """The direction from data to noise; the same at every time of the linear path."""
    return noise - data


def data_from(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The data that a point x of the path at time t and its velocity v belong to."""
    return x - t * v


def score_from(x: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The score ∇ log p_t(x) from the velocity, for t > 0: the noise is x + (1 - t) v, the score is -noise / t."""
    return -(x + (1 - t) * v) / t


def sample_times(uniforms: Tensor, distribution: TimeDistribution) -> Tensor:
    """Times strictly inside (0, 1) from uniform numbers in [0, 1), of any shape.

    "logit_normal": the sigmoid of a standard normal number (the official code's choice); "uniform": as they are.
    """
    edge = torch.finfo(torch.float32).eps
    u = uniforms.clamp(edge, 1 - edge)
    return torch.sigmoid(torch.special.ndtri(u)) if distribution == "logit_normal" else u
