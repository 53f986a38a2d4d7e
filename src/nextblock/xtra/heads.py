"""Probe heads on an encoder's tokens: linear, and attentive with one learned query.

A module here is a *stack* of G independent heads that read the same tokens; one head is a stack of one. Stacked, a grid
of learning rates costs little more than one head.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from nextblock.errors import ConfigError
from nextblock.xtra.objective import at_least_float32

HeadKind = Literal["linear", "attentive"]
NORM_EPS = 1e-6
QUERY_STD = 0.02


class _Heads(nn.Module):
    """What both kinds share: BatchNorm without affine parameters over the inputs, and a linear map to classes.

    Every head of the stack starts from the same numbers:

    ==================================  ==============================================
    parameter                           distribution
    ==================================  ==============================================
    query                               normal, standard deviation 0.02
    key, value and class weights, bias  uniform within ±1 / sqrt(width)
    ==================================  ==============================================
    """

    def __init__(self, width: int, num_classes: int, count: int = 1) -> None:
        super().__init__()
        if num_classes < 2:
            raise ConfigError(f"a head tells classes apart and needs at least two; got {num_classes}.")
        self.width, self.count = width, count
        self.norm = nn.BatchNorm1d(width, affine=False, eps=NORM_EPS)
        self.weight = nn.Parameter(torch.empty(count, num_classes, width))
        self.bias = nn.Parameter(torch.empty(count, num_classes))

    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw the parameters of one head and give them to every head of the stack."""
        bound = 1 / math.sqrt(self.width)
        for name, parameter in self.named_parameters():
            one = torch.empty(parameter.shape[1:])
            if name == "query":
                one.normal_(0, QUERY_STD, generator=generator)
            else:
                one.uniform_(-bound, bound, generator=generator)
            with torch.no_grad():
                parameter.copy_(one.expand_as(parameter))

    def _logits(self, pooled: Tensor) -> Tensor:
        """[G, B, D] -> [G, B, classes]."""
        return torch.baddbmm(self.bias[:, None], pooled, self.weight.mT)


class LinearHeads(_Heads):
    """Mean over tokens, BatchNorm, linear: [B, N, D] -> [G, B, classes]. Pooled features [B, D] are taken as well."""

    def __init__(
        self, width: int, num_classes: int, count: int = 1, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(width, num_classes, count)
        self.initialize(generator)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled = tokens.mean(1) if tokens.ndim == 3 else tokens
        x: Tensor = self.norm(pooled)
        return self._logits(x.expand(self.count, -1, -1))


class AttentiveHeads(_Heads):
    """BatchNorm over all tokens, attention of learned queries, linear: [B, N, D] -> [G, B, classes].

    The queries are parameters and neither keys nor values have a bias, so the key map can be applied to the query and
    the value map to the attended mean. That is the same function for N / num_heads times less work: no token is
    projected. Several queries are averaged. Source: XTRA's probe, which follows AIM (arXiv 2401.08541).

    Raises ConfigError when `num_heads` does not divide the width.
    """

    def __init__(
        self,
        width: int,
        num_classes: int,
        count: int = 1,
        *,
        num_heads: int = 16,
        num_queries: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_classes, count)
        if num_heads < 1 or width % num_heads:
            fitting = [n for n in range(1, min(width, 32) + 1) if width % n == 0]
            raise ConfigError(
                f"num_heads {num_heads} does not divide the encoder's width {width}; "
                f"these do: {', '.join(map(str, fitting))}."
            )
        if num_queries < 1:
            raise ConfigError(f"num_queries must be at least 1; got {num_queries}.")
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.empty(count, num_queries, width))
        self.key = nn.Parameter(torch.empty(count, width, width))
        self.value = nn.Parameter(torch.empty(count, width, width))
        self.initialize(generator)

    def forward(self, tokens: Tensor) -> Tensor:
        b, n = tokens.shape[:2]
        x = self.norm(tokens.flatten(0, 1)).view(b, n, self.width)
        query = rearrange(self.query, "g q (h d) -> g q h d", h=self.num_heads)
        key = rearrange(self.key, "g (h d) c -> g h d c", h=self.num_heads)
        value = rearrange(self.value, "g (h d) c -> g h d c", h=self.num_heads)
        scale = (self.width // self.num_heads) ** -0.5
        asked = rearrange(torch.einsum("gqhd,ghdc->gqhc", query, key), "g q h c -> c (g q h)") * scale
        weights = at_least_float32(x @ asked).softmax(1).to(x.dtype)  # [B, N, G·Q·H]
        attended = rearrange(weights.mT @ x, "b (g q h) c -> b g q h c", g=self.count, h=self.num_heads)
        attended = attended.mean(2)  # over queries, which the linear maps behind it allow
        pooled = rearrange(torch.einsum("bghc,ghdc->gbhd", attended, value), "g b h d -> g b (h d)")
        return self._logits(pooled)


def make_heads(
    kind: HeadKind,
    width: int,
    num_classes: int,
    count: int = 1,
    *,
    num_heads: int = 16,
    num_queries: int = 1,
    generator: torch.Generator | None = None,
) -> LinearHeads | AttentiveHeads:
    """A stack of `count` heads of one kind. Raises ConfigError for values that cannot work."""
    if kind == "linear":
        return LinearHeads(width, num_classes, count, generator=generator)
    return AttentiveHeads(width, num_classes, count, num_heads=num_heads, num_queries=num_queries, generator=generator)
