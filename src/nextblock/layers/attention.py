"""Multi-head self-attention, the choice of its kernel, and the cache of keys and values."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nextblock.layers.rope import rotate


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention: [B, H, N, D] queries over [B, H, M, D] keys and values -> [B, H, N, D].

    Without a mask PyTorch may take its flash kernel; a bool mask ([N, M], True = may attend) goes to the
    fused kernels that accept one. `dropout` is the share of attention weights set to 0.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class KVCache:
    """Keys and values of the tokens that later ones may see, for every layer, in room made once.

    A forward pass writes the present tokens behind the kept ones and attends to both; they are kept only when
    `keep` is called afterwards. So a token that is still being denoised leaves no trace.

    Args:
        depth: number of layers.
        tokens: most tokens at once, kept and present.
        rows: the largest batch, if it is known; else that of the first pass, or a larger one before anything is kept.
    """

    def __init__(self, depth: int, tokens: int, rows: int = 0) -> None:
        self.tokens, self.rows, self.length = tokens, rows, 0
        self._keys: list[Tensor | None] = [None] * depth
        self._values: list[Tensor | None] = [None] * depth

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write [B, H, n, D] of the present tokens; return kept and present ones, [B, H, length + n, D].

        A batch smaller than the first one writes and reads its first rows only.
        """
        keys, values = self._room(self._keys, layer, k), self._room(self._values, layer, v)
        end = self.length + k.shape[2]
        keys[: len(k), :, self.length : end] = k
        values[: len(v), :, self.length : end] = v
        return keys[: len(k), :, :end], values[: len(v), :, :end]

    def keep(self, tokens: int) -> None:
        """Count the `tokens` that were written last as kept."""
        self.length += tokens

    def clear(self) -> None:
        """Forget all tokens; the room stays where it is in memory."""
        self.length = 0

    def _room(self, store: list[Tensor | None], layer: int, like: Tensor) -> Tensor:
        room = store[layer]
        if room is None or len(room) < len(like):
            assert self.length == 0, "a batch cannot grow once tokens are kept"
            room = like.new_empty(max(len(like), self.rows), like.shape[1], self.tokens, like.shape[3])
            store[layer] = room
        return room


class SelfAttention(nn.Module):
    """Self-attention with one joint projection for queries, keys and values: [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: tuple[KVCache, int] | None = None,
    ) -> Tensor:
        """`rotation`: see `rope.rotation`, of these tokens; `cache`: with this layer's number, earlier tokens to attend
        to as well."""
        q, k, v = self.projected(x, rotation)
        if cache is not None:
            k, v = cache[0].extend(cache[1], k, v)
        return self.joined(attention(q, k, v, mask, self.dropout if self.training else 0.0))

    def projected(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, H, N, D / H]; the first two turned by `rotation`."""
        qkv = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k, v = qkv
        if rotation is not None:
            q, k = rotate(qkv[:2], *rotation)
        return q, k, v

    def joined(self, attended: Tensor) -> Tensor:
        """The heads' results [B, H, N, D / H] put together and projected: [B, N, D]."""
        out: Tensor = self.out(rearrange(attended, "b h n d -> b n (h d)"))
        return out
