"""Axial rotary position embeddings: a token is turned by its row and by its column.

Source: Su et al., "RoFormer", arXiv 2104.09864; the axial form on a grid as in xAR's official code.
"""

from __future__ import annotations

import torch
from einops import repeat
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


def rotation(angles: Tensor) -> tuple[Tensor, Tensor]:
    """What `rotate` takes, from angles [N, D]: cosines, and sines whose sign alternates within a pair; each [N, D]."""
    sign = torch.tensor([-1.0, 1.0]).repeat(angles.shape[-1] // 2)
    return angles.cos(), angles.sin() * sign


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys [..., N, D]: (a, b) -> (a cos - b sin, b cos + a sin) for every pair of numbers."""
    if _pairs_are_complex(x):  # one pass over the numbers instead of four; a compiler makes one of the others too
        turns = torch.complex(cos[..., ::2].to(x.dtype), sin[..., 1::2].to(x.dtype))
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))  # type: ignore[no-untyped-call]
        return torch.view_as_real(pairs * turns).flatten(-2)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # type: ignore[no-untyped-call]
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


def _pairs_are_complex(x: Tensor) -> bool:
    """Whether the pairs lie in memory as complex numbers do, on a device where that is the faster way."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return False
    steps = (x.storage_offset(), *x.stride()[:-1])
    return x.stride(-1) == 1 and all(step % 2 == 0 for step in steps)
