"""Who attends to whom: the attention weights of an encoder's layers, and which patches are worth looking at."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from nextblock.errors import ConfigError
from nextblock.evaluation.inference import device_of, inference
from nextblock.layers.attention import SelfAttention
from nextblock.layers.transformer import TransformerLayer
from nextblock.ordering import Ordering, Pair
from nextblock.xtra.model import Encoder

Patches = dict[Pair, str]  # (row, column) from 0 -> why it was chosen


def attention_maps(
    encoder: Encoder, images: Tensor, layers: Iterable[int], *, bidirectional: bool = False
) -> dict[int, Tensor]:
    """The attention weights of some layers, float32 [B, heads, N, N] each: rows look, columns are seen.

    Both are in raster order. A row sums to 1 and is 0 where the mask forbids to look. Computed from what the layer's
    own attention is given in a forward pass; layers after the last one asked for are not computed.

    Args:
        encoder: left in the mode it came in.
        images: float [B, C, H, W], normalised.
        layers: numbered from 0.
        bidirectional: without the mask.

    Takes B·heads·N²·4 bytes a layer. Raises ConfigError for a layer that is not there and images that do not fit.
    """
    wanted = set(layers)
    require_numbers(wanted, len(encoder.layers.layers), "layer")
    images = images.to(device_of(encoder))
    ordering = encoder.ordering_for(images, bidirectional)
    found: dict[int, Tensor] = {}
    hooks = [
        part.attn.register_forward_pre_hook(partial(_keep, found, number, ordering))
        for number, part in enumerate(encoder.layers.layers)
        if number in wanted and isinstance(part, TransformerLayer)
    ]
    try:
        with inference(encoder, bf16=False):  # of weights as small as 1/N, bfloat16 keeps two digits
            for number, _ in enumerate(encoder.layer_outputs(images, ordering, bidirectional=bidirectional)):
                if number >= max(wanted, default=-1):
                    break
    finally:
        for hook in hooks:
            hook.remove()
    return {number: found[number] for number in sorted(found)}


def attention_weights(attn: SelfAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q·k / sqrt(d)) of every head, float32 [B, heads, N, N], for the tokens x [B, N, D]; mask as in `attn`."""
    q, k, _ = rearrange(attn.qkv(x), "b n (three h d) -> three b h n d", three=3, h=attn.num_heads)
    scores = (q.float() @ k.float().transpose(2, 3)) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)


def _keep(found: dict[int, Tensor], number: int, ordering: Ordering, attn: nn.Module, given: tuple[Any, ...]) -> None:
    """The hook: called with the arguments that the layer hands to its attention."""
    assert isinstance(attn, SelfAttention)
    place = ordering.inverse.to(given[0].device)
    found[number] = attention_weights(attn, *given)[:, :, place][:, :, :, place]


def head_difference(weights: Tensor) -> Tensor:
    """How much the heads differ in where they look, for every patch: [heads, N, N] -> [N], from 0 to 1.

    The mean over heads of the total variation distance between the head's row and the mean row.
    """
    return (weights - weights.mean(0)).abs().sum(-1).mean(0) / 2


def telling_patches(weights: Tensor, grid: Pair, count: int = 3) -> Patches:
    """A few patches to look at: the middle one, then those where heads differ most, apart from each other.

    Args:
        weights: [heads, N, N] of one image.
        grid: patches along (height, width).
        count: at most so many.
    """
    chosen: Patches = {(grid[0] // 2, grid[1] // 2): "the middle"}
    difference = head_difference(weights).reshape(grid).cpu()
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    apart = max(grid) / 4
    for _ in range(count - 1):
        distances = [((rows - r) ** 2 + (columns - c) ** 2).float().sqrt() for r, c in chosen]
        free = torch.stack(distances).amin(0) >= max(1.0, apart)
        if not free.any():
            break
        best = int(difference.masked_fill(~free, -1).argmax())
        chosen[best // grid[1], best % grid[1]] = "heads differ"
    return chosen


def require_numbers(given: Iterable[int], count: int, what: str) -> None:
    """Raise ConfigError for the first number that is not among 0..count-1."""
    for number in given:
        if not 0 <= number < count:
            raise ConfigError(f"there is no {what} {number}: the encoder has {count}, numbered from 0 to {count - 1}.")
