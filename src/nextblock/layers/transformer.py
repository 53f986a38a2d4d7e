"""The pre-norm transformer layer, stochastic depth, and a stack of layers."""

from __future__ import annotations

from collections.abc import Iterator

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


def drop_path(x: Tensor, rate: float, uniforms: Tensor | None) -> Tensor:
    """Stochastic depth: drop the branch `x` [B, ...] of whole samples and scale up the others.

    `uniforms` [B] in [0, 1) decides (dropped when below `rate`); None or a zero rate keeps everything.
    Source: Huang et al., "Deep networks with stochastic depth", arXiv 1603.09382.
    """
    if uniforms is None or rate == 0.0:
        return x
    keep = (uniforms >= rate).to(x.dtype) / (1.0 - rate)
    return x * keep.view(-1, *(1,) * (x.ndim - 1))


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, num_heads: int, mlp_hidden: int, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = SelfAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, mlp_hidden, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, uniforms: Tensor | None = None) -> Tensor:
        """`uniforms` [B, 2] decides the drop path of the two branches; None drops nothing."""
        first, second = (None, None) if uniforms is None else uniforms.unbind(1)
        x = x + drop_path(self.attn(self.norm1(x), mask), self.drop_path_rate, first)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path_rate, second)


class Transformer(nn.Module):
    """A stack of layers whose drop path rises linearly from 0 to `drop_path_rate` over the depth."""

    def __init__(
        self, width: int, depth: int, num_heads: int, mlp_hidden: int, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.layers = nn.ModuleList(TransformerLayer(width, num_heads, mlp_hidden, rate) for rate in rates)

    def outputs(
        self, x: Tensor, mask: Tensor | None = None, uniforms: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the output of every layer, [B, N, D]; `uniforms` [B, depth, 2] decides drop path."""
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, None if uniforms is None else uniforms[:, i])
            yield x

    def forward(self, x: Tensor, mask: Tensor | None = None, uniforms: Tensor | None = None) -> Tensor:
        """The output of the last layer; the input itself when there are none."""
        for x in self.outputs(x, mask, uniforms):  # noqa: B007, B020 - each output is the next input
            pass
        return x
