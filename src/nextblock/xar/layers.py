"""The parts of an xAR model: a layer steered by class and time, and the embedding of times."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextblock.layers.attention import KVCache, SelfAttention, attention

NORM_EPS = 1e-6
TIME_STEPS = 1000  # the official embedding of a time: whole thousandths
SINUSOID = 256

Rotation = tuple[Tensor, Tensor]


class GatedMLP(nn.Module):
    """GELU(gate(x)) · value(x), then back to width: [..., width] -> [..., width]."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.out(self.dropout(F.gelu(self.gate(x)) * self.value(x))))


class TimeEmbedding(nn.Module):
    """Times to vectors: [...] in 0..1 -> [..., width].

    A time is rounded to float32, multiplied by 1000 and truncated to a whole number, as in the official code: 0.68 and
    0.6804 are the same time.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(SINUSOID, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, times: Tensor) -> Tensor:
        whole = (times.float() * TIME_STEPS).long()
        half = SINUSOID // 2  # not a buffer: a model cast to bf16 would round it, and angles reach 999 times as far
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device) / half)
        angles = whole[..., None].float() * frequencies
        waves = torch.cat((angles.cos(), angles.sin()), -1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(waves)))


class Steering:
    """Six vectors for every entity, given to each of its tokens: how class and time steer a layer.

    Entities of one size need no copies: the sequence is seen as [B, E, K, D] and the vectors are broadcast.
    """

    def __init__(self, entity: Tensor, sizes: tuple[int, ...]) -> None:
        self.entity, self.entities, self.equal = entity, len(sizes), len(set(sizes)) == 1

    def spread(self, vectors: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, E, D] and tokens [B, N, D] in shapes that broadcast against each other."""
        if self.equal:
            return vectors[:, :, None], torch.unflatten(x, 1, (self.entities, -1))
        return vectors[:, self.entity], x

    def shifted(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x · (1 + scale) + shift."""
        wide_scale, seen = self.spread(scale, x)
        wide_shift, _ = self.spread(shift, x)
        return torch.addcmul(wide_shift, seen, 1 + wide_scale).view(x.shape)

    def gated(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        """x + gate · branch."""
        wide_gate, seen = self.spread(gate, branch)
        base = torch.unflatten(x, 1, (self.entities, -1)) if self.equal else x
        return torch.addcmul(base, wide_gate, seen).view(x.shape)


class XARLayer(nn.Module):
    """A transformer layer whose scales, shifts and gates come from the entity's class and time: [B, N, D] -> same.

    Norms are RMSNorm without weights; the modulation is not zero at the start (as in the official code).
    Source: adaptive layer norm, DiT (arXiv 2212.09748), section 3.2.
    """

    def __init__(self, width: int, num_heads: int, hidden: int, dropout: float, attention_dropout: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.attn = SelfAttention(width, num_heads, attention_dropout)
        self.attn_dropout = nn.Dropout(dropout)
        self.mlp = GatedMLP(width, hidden, dropout)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None,
        steering: Steering,
        mask: Tensor | None,
        rotation: Rotation,
        cache: tuple[KVCache, int] | None,
        modulated: Tensor | None = None,
    ) -> Tensor:
        """`condition` [B, E, D]: SiLU of class and time of every entity; or `modulated` [B, E, 6·D], what `modulation`
        makes of it."""
        if modulated is None:
            modulated = self.modulation(condition)
        q, k, v = self.before(x, modulated, steering, rotation)
        if cache is not None:
            k, v = cache[0].extend(cache[1], k, v)
        attended = attention(q, k, v, mask, self.attn.dropout if self.training else 0.0)
        return self.after(x, attended, modulated, steering)

    def remember(
        self,
        x: Tensor,
        condition: Tensor | None,
        steering: Steering,
        rotation: Rotation,
        cache: tuple[KVCache, int],
        modulated: Tensor | None = None,
    ) -> None:
        """Write keys and values of these tokens into the cache; nothing else of the layer is computed."""
        modulated = self.modulation(condition) if modulated is None else modulated
        cache[0].extend(cache[1], *self.before(x, modulated, steering, rotation)[1:])

    def before(
        self, x: Tensor, modulated: Tensor, steering: Steering, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What comes before attention: queries, keys and values, [B, H, N, D / H]."""
        _, _, scale, _, shift, _ = modulated.chunk(6, -1)
        return self.attn.projected(steering.shifted(self.norm(x), scale, shift), rotation)

    def after(self, x: Tensor, attended: Tensor, modulated: Tensor, steering: Steering) -> Tensor:
        """What comes after attention: the layer's output."""
        gate1, gate2, _, scale, _, shift = modulated.chunk(6, -1)
        x = steering.gated(x, self.attn_dropout(self.attn.joined(attended)), gate1)
        return steering.gated(x, self.mlp(steering.shifted(self.norm(x), scale, shift)), gate2)
