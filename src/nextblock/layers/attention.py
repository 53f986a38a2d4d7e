"""Multi-head self-attention and the choice of its kernel."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: [B, H, N, D] queries over [B, H, M, D] keys and values -> [B, H, N, D].

    Without a mask PyTorch may take its flash kernel; a bool mask ([N, M], True = may attend) goes to the
    fused kernels that accept one.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class SelfAttention(nn.Module):
    """Self-attention with one joint projection for queries, keys and values: [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        x = attention(q, k, v, mask)
        return self.out(rearrange(x, "b h n d -> b n (h d)"))
