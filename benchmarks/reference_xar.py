"""xAR the plain way; see `reference.py`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.reference import Residual
from nextblock.xar.config import XARConfig


class PlainRMSNorm(nn.Module):
    """Root mean square norm, written out; `learned`: with a weight."""

    def __init__(self, width: int, learned: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        x = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)
        return x if self.weight is None else x * self.weight


def rotary_table(positions: Tensor, head_dim: int) -> Tensor:
    """Angles [N, head_dim] of tokens at (row, column) [N, 2]: half a head turns with the row, half with the column."""
    frequencies = 1e4 ** -(torch.arange(0, head_dim // 2, 2).double() / (head_dim // 2))
    angles = positions.double()[:, :, None] * frequencies
    return angles.repeat_interleave(2, dim=-1).flatten(1).float()


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: [B, H, N, D] by [N, D]."""
    a, b = x[..., ::2], x[..., 1::2]
    across = torch.stack((-b, a), dim=-1).flatten(-2)
    return x * angles.cos().to(x.dtype) + across * angles.sin().to(x.dtype)


class CachedAttention(Residual):
    """Entity-causal attention in training; while sampling, over remembered keys and values as well."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__(width, heads)
        self.dropout = dropout
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def forget(self) -> None:
        self.keys = self.values = None

    def forward(self, x: Tensor, angles: Tensor, entity: Tensor, kept: int, sampling: bool) -> Tensor:
        """`entity` [N] of these tokens; `kept`: how many of them, the first ones, are remembered while sampling."""
        q, k, v = self.split(x)
        q, k = turned(q, angles), turned(k, angles)
        before = 0
        if self.keys is not None and self.values is not None:
            before = self.keys.shape[2]
            k, v = torch.cat((self.keys, k), 2), torch.cat((self.values, v), 2)
        if sampling and kept:
            self.keys, self.values = k[:, :, : before + kept], v[:, :, : before + kept]
        mask = None
        if not sampling or kept:
            seen = entity[:, None] >= entity[None, :]
            mask = torch.cat((torch.ones(len(entity), before, dtype=torch.bool), seen), 1).to(x.device)
        dropout = self.dropout if self.training else 0.0
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout))


class PlainGatedMLP(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x, self.fc2 = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.act, self.drop = nn.GELU(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1_g(x)) * self.fc1_x(x)
        return self.drop(self.fc2(self.drop(x)))


class PlainXARLayer(nn.Module):
    def __init__(self, config: XARConfig, hidden: int) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = PlainRMSNorm(width, learned=False), PlainRMSNorm(width, learned=False)
        self.attn = CachedAttention(width, config.num_heads, config.attention_dropout)
        self.drop = nn.Dropout(config.dropout)
        self.mlp = PlainGatedMLP(width, hidden, config.dropout)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Tensor, condition: Tensor, sizes: Tensor, angles: Tensor, entity: Tensor, kept: int, sampling: bool
    ) -> Tensor:
        """`condition` [B, E, D], one for each entity; its six vectors are copied to the entity's `sizes` tokens."""
        steered = self.ada_lin(condition).repeat_interleave(sizes, dim=1, output_size=x.shape[1])
        gate1, gate2, scale1, scale2, shift1, shift2 = steered.chunk(6, dim=-1)
        attended = self.attn(self.norm1(x) * (1 + scale1) + shift1, angles, entity, kept, sampling)
        x = x + gate1 * self.drop(attended)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PlainTimes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128).to(times.device)
        angles = (times.float() * 1000).long()[..., None].float() * frequencies
        waves = torch.cat((angles.cos(), angles.sin()), -1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class PlainXAR(nn.Module):
    """xAR (arXiv 2502.20388) over a partition into entities of one size; `forward` is the loss of latents."""

    def __init__(self, config: XARConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        ordering = config.entities
        hidden, half = int(width * config.mlp_ratio * 2 / 3), config.depth // 2
        self.sequence, self.entity, self.entities = ordering.sequence, ordering.entity, ordering.num_entities
        self.size = len(self.entity) // self.entities
        self.angles = rotary_table(ordering.positions, width // config.num_heads)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, len(self.entity), width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, len(self.entity), width))
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.time_embed = PlainTimes(width)
        self.z_proj, self.z_proj_ln = nn.Linear(config.token_channels, width), PlainRMSNorm(width, learned=True)
        self.encoder_blocks = nn.ModuleList(PlainXARLayer(config, hidden) for _ in range(half))
        self.encoder_norm, self.decoder_embed = PlainRMSNorm(width, learned=True), nn.Linear(width, width)
        self.decoder_blocks = nn.ModuleList(PlainXARLayer(config, hidden) for _ in range(config.depth - half))
        self.decoder_norm, self.pred = PlainRMSNorm(width, learned=True), nn.Linear(width, config.token_channels)

    def tokens(self, latents: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, C·p·p], entity after entity."""
        (h, w), (p1, p2) = self.config.grid, self.config.patch
        x = latents.reshape(len(latents), -1, h, p1, w, p2).permute(0, 2, 4, 1, 3, 5).reshape(len(latents), h * w, -1)
        return x[:, self.sequence.to(x.device)]

    def latents(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`."""
        (h, w), (p1, p2) = self.config.grid, self.config.patch
        x = tokens[:, self.sequence.argsort().to(tokens.device)]
        return x.reshape(len(x), h, w, -1, p1, p2).permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, h * p1, w * p2)

    def forward(
        self,
        latents: Tensor,
        labels: Tensor,
        times: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """`times` [B, E] and `noise` [B, N, C·p·p] are drawn when absent; labels are dropped in training."""
        tokens = self.tokens(latents)
        if times is None:
            times = torch.sigmoid(torch.randn(len(tokens), self.entities, device=tokens.device))
        if noise is None:
            noise = torch.randn_like(tokens)
        if self.training and self.config.label_dropout:
            dropped = torch.rand(len(labels), device=labels.device) < self.config.label_dropout
            labels = torch.where(dropped, self.config.num_classes, labels)
        t = times.repeat_interleave(self.size, dim=1)[..., None]
        x = (1 - t) * tokens + t * noise
        predicted = self.velocities(x, times, labels, range(self.entities))
        return F.mse_loss(predicted.to(tokens.dtype), noise - tokens)

    def velocities(
        self, x: Tensor, times: Tensor, labels: Tensor, entities: range, kept: int = 0, sampling: bool = False
    ) -> Tensor:
        """[B, n, C·p·p] of the tokens of `entities`, of which the first `kept` tokens are remembered."""
        where = slice(entities.start * self.size, entities.stop * self.size)
        entity, angles = self.entity[where], self.angles[where].to(x.device)
        sizes = torch.full((len(entities),), self.size, device=x.device)
        condition = self.class_emb(labels)[:, None] + self.time_embed(times)
        x = self.z_proj_ln(self.z_proj(x) + self.encoder_pos_embed_learned[:, where])
        for layer in self.encoder_blocks:
            x = layer(x, condition, sizes, angles, entity, kept, sampling)
        x = self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos_embed_learned[:, where]
        for layer in self.decoder_blocks:
            x = layer(x, condition, sizes, angles, entity, kept, sampling)
        return self.pred(self.decoder_norm(x))

    def forget(self) -> None:
        """Empty every layer's memory of keys and values."""
        for layer in (*self.encoder_blocks, *self.decoder_blocks):
            layer.attn.forget()
