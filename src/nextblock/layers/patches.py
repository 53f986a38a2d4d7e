"""Images to patches and back; position embeddings on a grid of patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nextblock.ordering import AnyOrdering, Ordering, Pair, ScalePyramid


def patchify(images: Tensor, patch: Pair, ordering: AnyOrdering) -> Tensor:
    """[B, C, h*p1, w*p2] -> [B, N, C*p1*p2], entity-major; inside a patch (channel, row, column)."""
    if isinstance(ordering, ScalePyramid):
        return torch.cat([patchify(level, patch, _raster(level, patch)) for level in ordering.levels(images, patch)], 1)
    grid = rearrange(images, "b c (h p1) (w p2) -> b h w c p1 p2", p1=patch[0], p2=patch[1])
    return rearrange(ordering.split(grid), "b n c p1 p2 -> b n (c p1 p2)")


def _raster(images: Tensor, patch: Pair) -> Ordering:
    return Ordering.patches((images.shape[2] // patch[0], images.shape[3] // patch[1]))


def unpatchify(patches: Tensor, patch: Pair, ordering: AnyOrdering) -> Tensor:
    """The inverse of `patchify` (of a pyramid, its last scale): [B, N, C*p1*p2] -> [B, C, h*p1, w*p2]."""
    pixels = rearrange(patches, "b n (c p1 p2) -> b n c p1 p2", p1=patch[0], p2=patch[1])
    return rearrange(ordering.merge(pixels), "b h w c p1 p2 -> b c (h p1) (w p2)")


def entity_pixels(images: Tensor, patch: Pair, ordering: Ordering) -> Tensor:
    """The pixels of each entity, [B, E, C*(k1*p1)*(k2*p2)], in the order (channel, row, column).

    For cells these are the rows and columns of the cell as seen in the image; for subsamples the patches of
    one entity are laid side by side in their own k1×k2 arrangement. Inverse: `entity_images`.
    """
    k1, k2 = ordering.size
    x = patchify(images, patch, ordering)
    pattern = "b (e k1 k2) (c p1 p2) -> b e (c k1 p1 k2 p2)"
    return rearrange(x, pattern, k1=k1, k2=k2, p1=patch[0], p2=patch[1])


def entity_images(pixels: Tensor, patch: Pair, ordering: Ordering) -> Tensor:
    """The inverse of `entity_pixels`: [B, E, C*(k1*p1)*(k2*p2)] -> [B, C, height, width]."""
    k1, k2 = ordering.size
    pattern = "b e (c k1 p1 k2 p2) -> b (e k1 k2) (c p1 p2)"
    x = rearrange(pixels, pattern, k1=k1, k2=k2, p1=patch[0], p2=patch[1])
    return unpatchify(x, patch, ordering)


def resized_positions(embedding: Tensor, grid: Pair, to: Pair) -> Tensor:
    """Position embeddings [1, h*w, D] in raster order, resized (bicubic, antialiased) to another grid.

    Returned unchanged when the grid is the same.
    """
    if grid == to:
        return embedding
    table = rearrange(embedding, "1 (h w) d -> 1 d h w", h=grid[0])
    table = F.interpolate(table.float(), size=to, mode="bicubic", antialias=True, align_corners=False)
    return rearrange(table, "1 d h w -> 1 (h w) d").to(embedding.dtype)
