"""One image, one set of weights, another mask: what the size of the cells does to the features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nextblock.errors import ConfigError
from nextblock.evaluation.features import FeatureConfig
from nextblock.evaluation.inference import device_of, inference
from nextblock.ordering import Ordering, Pair
from nextblock.xtra.model import Encoder


def patch_features(encoder: Encoder, images: Tensor, ordering: Ordering, config: FeatureConfig) -> Tensor:
    """The features of every patch under the block-causal mask of `ordering`: float32 [B, N, D], raster order.

    With the encoder's own ordering these are its features; with `Ordering.whole` every patch sees every other one.

    Args:
        encoder: left in the mode it came in.
        images: float [B, C, H, W], normalised.
        ordering: on the grid of these images; decides the mask, so `config.bidirectional` is not looked at.
        config: last_layers and final_norm; features are not pooled.

    Raises ConfigError for more layers than there are.
    """
    depth = encoder.config.depth
    if config.last_layers > depth:
        raise ConfigError(f"last_layers must be between 1 and the depth ({depth}); got {config.last_layers}.")
    with inference(encoder, bf16=False):
        outputs = encoder.layer_outputs(images.to(device_of(encoder)), ordering)
        taken = [x for i, x in enumerate(outputs) if i >= depth - config.last_layers]
        x = torch.stack(taken).mean(0)  # [B, N, D], entity-major
        x = encoder.norm(x) if config.final_norm else x
        return rearrange(ordering.merge(x), "b h w d -> b (h w) d").float()


def cell_orderings(grid: Pair, cell: int | Pair) -> dict[str, Ordering]:
    """Square cells of every size that divides the grid, `cell`, and the whole grid, which is no mask at all.

    From the smallest to the largest, by names such as "2×2"; the whole grid is "no mask".
    """
    sizes = {(k, k) for k in range(1, min(grid) + 1) if not (grid[0] % k or grid[1] % k)}
    own = Ordering.cells(grid, cell)
    found = {f"{k[0]}×{k[1]}": Ordering.cells(grid, k) for k in sorted(sizes | {own.size}, key=lambda k: k[0] * k[1])}
    kept = {name: ordering for name, ordering in found.items() if ordering.num_entities > 1}
    return kept | {"no mask": Ordering.whole(grid)}


def cosines_of_patches(features: Mapping[str, Tensor], own: str) -> dict[str, Tensor]:
    """The cosine of each patch's features [B, N, D] with those in `features[own]`, mean over images: float64 [N]."""
    reference = features[own].double()
    return {name: F.cosine_similarity(x.double(), reference, dim=-1).mean(0) for name, x in features.items()}


def unrelated_cosine(features: Tensor) -> float:
    """The mean cosine of two different patches of [B, N, D]: what a cosine is to be compared with."""
    x = F.normalize(features.double().flatten(0, 1), dim=-1)  # [M, D]
    return float((x.sum(0).square().sum() - x.square().sum()) / (len(x) * (len(x) - 1)))
