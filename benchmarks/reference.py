"""XTRA the plain way, as a paper's implementation is usually written; xAR likewise in `reference_xar.py`.

Our own code, from the papers and `checkpoints/official*.py`: parameters have the official names, so that our weights
load into it, and it computes the same numbers as ours (`tests/benchmarks/test_reference.py`). What makes it plain:

- XTRA keeps its tokens in raster order and runs all cells, also the last one, which nothing is predicted from; pixels
  and tokens are gathered into cells at the end.
- Every layer makes its boolean mask and moves it to the device.
- The predictor runs in float32 whatever the precision (`predictor_fp32`).
- The sampler runs both halves of the guidance always, and glues keys and values together anew at every step.

`reference_steps.py` trains and samples with both.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextblock.xtra.config import XTRAConfig

Pair = tuple[int, int]


class Residual(nn.Module):
    """The part that both models' attentions share: a joint projection, heads, and a projection back."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def join(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).flatten(2))


class MaskedAttention(Residual):
    """Block-causal attention over a raster of patches."""

    def __init__(self, width: int, heads: int, grid: Pair, cell: Pair) -> None:
        super().__init__(width, heads)
        self.grid, self.cell = grid, cell

    def mask(self) -> Tensor:
        """[N, N] bool, True = may attend, made anew in every call."""
        (h, w), (k1, k2) = self.grid, self.cell
        rows, columns = torch.meshgrid(torch.arange(h) // k1, torch.arange(w) // k2, indexing="ij")
        cells = (rows * (w // k2) + columns).flatten()
        return cells[:, None] >= cells[None, :]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        mask = self.mask().to(x.device)
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class PlainMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PlainLayer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, grid: Pair, cell: Pair) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = MaskedAttention(width, heads, grid, cell)
        self.mlp = PlainMLP(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainStack(nn.Module):
    """Position embeddings, layers and a norm; the encoder's has a patch embedding before them."""

    def __init__(self, config: XTRAConfig, width: int, depth: int, heads: int) -> None:
        super().__init__()
        hidden = int(width * config.mlp_ratio)
        cell = config.ordering.size
        self.pos_embed = nn.Parameter(torch.zeros(1, config.ordering.num_patches, width))
        self.blocks = nn.ModuleList(PlainLayer(width, heads, hidden, config.grid, cell) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos_embed
        for layer in self.blocks:
            x = layer(x)
        return self.norm(x)


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, width: int, patch: Pair) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class PlainEncoder(PlainStack):
    def __init__(self, config: XTRAConfig) -> None:
        super().__init__(config, config.width, config.depth, config.num_heads)
        self.patch_embed = PatchEmbed(config.channels, config.width, config.patch)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(self.patch_embed(images))


class Head(nn.Module):
    """Two linear maps with a GELU between them, under the official names."""

    def __init__(self, width: int, hidden: int, out: int, bias: bool) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class PlainXTRA(nn.Module):
    """XTRA (arXiv 2411.15648) over a raster of tokens; `forward` is the loss of [B, C, H, W] normalised images."""

    def __init__(self, config: XTRAConfig, *, predictor_fp32: bool = True) -> None:
        super().__init__()
        self.config, self.predictor_fp32 = config, predictor_fp32
        width = config.predictor_width
        self.enc = PlainEncoder(config)
        self.proj = Head(config.width, config.projection_hidden, width, bias=False)
        self.predictor = PlainStack(config, width, config.predictor_depth, config.predictor_heads)
        self.aim_proj = nn.ModuleList(
            Head(config.ordering.entity_size * width, config.head_hidden, config.cell_pixels, bias=True)
            for _ in range(config.num_lookahead)
        )

    def forward(self, images: Tensor) -> Tensor:
        x = self.proj(self.enc(images))
        full = torch.autocast(images.device.type, enabled=False) if self.predictor_fp32 else nullcontext()
        with full:
            x = self.predictor(x.to(self.predictor.pos_embed.dtype) if self.predictor_fp32 else x)
        x = self.cells(x)
        targets = self.targets(images)
        losses = []
        for i, head in enumerate(self.aim_proj):
            predicted = head(x)  # of all cells; what nothing follows is thrown away
            losses.append(self.error(predicted[:, : -1 - i], targets[:, 1 + i :]))
        return torch.stack(losses).mean()

    def error(self, predicted: Tensor, targets: Tensor) -> Tensor:
        error = F.mse_loss if self.config.pixel_loss == "l2" else F.l1_loss
        return error(predicted.to(targets.dtype), targets)

    def cells(self, x: Tensor) -> Tensor:
        """Tokens [B, N, D] in raster order -> [B, K, D·k·k], feature-major inside a cell."""
        (h, w), (k1, k2) = self.config.grid, self.config.ordering.size
        x = x.reshape(len(x), h // k1, k1, w // k2, k2, -1).permute(0, 1, 3, 5, 2, 4)
        return x.flatten(3).flatten(1, 2).flatten(2)

    def targets(self, images: Tensor) -> Tensor:
        """The pixels of every cell, normalised cell by cell: [B, K, C·height·width]."""
        config = self.config
        side = [k * p for k, p in zip(config.ordering.size, config.patch, strict=True)]
        b, c, height, width = images.shape
        x = images.reshape(b, c, height // side[0], side[0], width // side[1], side[1]).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(b, -1, c * side[0] * side[1])
        if not config.normalize_targets:
            return x
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6) ** 0.5
