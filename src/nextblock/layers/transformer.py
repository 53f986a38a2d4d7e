"""The pre-norm transformer layer, stochastic depth, and a stack of layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextblock.layers.attention import SelfAttention

NORM_EPS = 1e-6


class MLP(nn.Module):
    """Two linear maps with a GELU between them: [..., width] -> [..., out]."""

    def __init__(self, width: int, hidden: int, out: int, *, out_bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, out, bias=out_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path_scales(uniforms: Tensor, rates: Tensor) -> Tensor:
    """What to multiply every branch by: 0 where its path is dropped, else 1 / (1 - rate).

    Args:
        uniforms: [B, depth, 2] in [0, 1); a branch is dropped where its number is below the rate.
        rates: [depth].

    Source: Huang et al., "Deep networks with stochastic depth", arXiv 1603.09382.
    """
    rates = rates.to(uniforms)[:, None]
    return (uniforms >= rates) / (1.0 - rates)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, num_heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, mlp_hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        """`scales` [B, 2] multiplies the two branches (drop path); None leaves them as they are."""
        attended = self.attn(self.norm1(x), mask)
        x = x + (attended if scales is None else attended * scales[:, 0, None, None].to(attended.dtype))
        mapped = self.mlp(self.norm2(x))
        return x + (mapped if scales is None else mapped * scales[:, 1, None, None].to(mapped.dtype))


class Transformer(nn.Module):
    """A stack of layers whose drop path rises linearly from 0 to `drop_path_rate` over the depth."""

    def __init__(self, width: int, depth: int, num_heads: int, mlp_hidden: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TransformerLayer(width, num_heads, mlp_hidden) for _ in range(depth))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.drop_path_rates: Tensor
        self.register_buffer("drop_path_rates", torch.tensor(rates), persistent=False)

    def outputs(self, x: Tensor, mask: Tensor | None = None, uniforms: Tensor | None = None) -> Iterator[Tensor]:
        """Yield every layer's output, [B, N, D]; `uniforms` [B, depth, 2] decides drop path (None: no drop)."""
        scales = None if uniforms is None else drop_path_scales(uniforms, self.drop_path_rates)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, None if scales is None else scales[:, i])
            yield x

    def forward(self, x: Tensor, mask: Tensor | None = None, uniforms: Tensor | None = None) -> Tensor:
        """The output of the last layer; the input itself when there are none."""
        for x in self.outputs(x, mask, uniforms):  # noqa: B007, B020 - each output is the next input
            pass
        return x
