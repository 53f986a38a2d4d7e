"""Axial rotary position embeddings: a token is turned by its row and by its column.

Source: Su et al., "RoFormer", arXiv 2104.09864; the axial form on a grid as in xAR's official code.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

THETA = 1e4


def axial_angles(positions: Tensor, head_dim: int, theta: float = THETA) -> Tensor:
    """Angles of every token: [N, 2] (row, column), whole or not -> [N, head_dim] float32.

    The first half of a head's numbers turns with the row, the second with the column; neighbouring numbers make a
    pair and share an angle. `head_dim` must be divisible by 4.
    """
    pairs = head_dim // 4
    frequencies = theta ** -(torch.arange(pairs, dtype=torch.float64, device=positions.device) / pairs)
    angles = positions.double()[:, :, None] * frequencies  # [N, 2, head_dim / 4]
    return repeat(angles, "n side f -> n (side f two)", two=2).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys [B, H, N, D] by angles whose cosines and sines are [N, D]."""
    a, b = rearrange(x, "... (f two) -> two ... f", two=2)
    turned = rearrange(torch.stack((-b, a)), "two ... f -> ... (f two)", two=2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
