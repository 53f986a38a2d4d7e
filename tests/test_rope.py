"""Every way to rotate gives the same numbers and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from close import assert_close
from nextblock.layers import rope


def table(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    positions = torch.stack((torch.arange(tokens) // 3, torch.arange(tokens) % 3 + 0.5), 1)
    return rope.rotation(rope.axial_angles(positions, dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["joint", "own", "odd offset", "not pairs"])
def test_pairs_as_complex_numbers_are_the_same(
    dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, heads, dim = 6, 2, 8
    if layout == "joint":  # as the projection for queries, keys and values leaves them
        x = torch.randn(2, tokens, 3, heads, dim, dtype=dtype).permute(2, 0, 3, 1, 4)[:2]
    elif layout == "own":
        x = torch.randn(2, heads, tokens, dim, dtype=dtype)
    elif layout == "odd offset":
        x = torch.randn(1 + 2 * heads * tokens * dim, dtype=dtype)[1:].view(2, heads, tokens, dim)
    else:
        x = torch.randn(2, heads, dim, tokens, dtype=dtype).transpose(2, 3)
    x.requires_grad_()
    cos, sin = table(tokens, dim)
    assert rope._pairs_are_complex(x) is (layout in ("joint", "own"))
    turned, push = rope.rotate(x, cos, sin), torch.randn(x.shape, dtype=dtype)
    (gradient,) = torch.autograd.grad(turned, x, push)
    monkeypatch.setattr(rope, "_pairs_are_complex", lambda x: False)
    wanted = rope.rotate(x, cos, sin)
    assert_close(turned, wanted, 1e-6 if dtype == torch.float32 else 1e-12)
    assert_close(gradient, torch.autograd.grad(wanted, x, push)[0], 1e-6 if dtype == torch.float32 else 1e-12)
    assert turned.dtype == dtype


def test_half_precision_is_rotated_as_before() -> None:
    x, (cos, sin) = torch.randn(1, 2, 6, 8), table(6, 8)
    assert not rope._pairs_are_complex(x.bfloat16())
    assert_close(rope.rotate(x.bfloat16(), cos, sin).float(), rope.rotate(x, cos, sin), 2e-2)
