"""What is to be drawn of an encoder, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nextblock.errors import ConfigError
from nextblock.evaluation.attention_maps import require_numbers
from nextblock.evaluation.features import FeatureConfig
from nextblock.ordering import Ordering, Pair
from nextblock.xtra.model import Encoder

MOST_IMAGES = 64
MOST_TOKENS = 12
MOST_HEADS = 12  # drawn when none is named

Tokens = str | Sequence[Sequence[int]] | None


@dataclass(frozen=True)
class VisualizeSettings:
    """Numbers from 0 everywhere.

    ordering: the raster-order cells of the encoder on these images; patches when nothing is masked.
    layers, heads: whose attention is drawn, at least one each. tokens: (row, column) of the patches that look; None:
    chosen for each image. features: whose colours and neighbours are shown.
    """

    ordering: Ordering
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    tokens: tuple[Pair, ...] | None
    features: FeatureConfig


def checked_settings(
    encoder: Encoder,
    ordering: Ordering,
    features: FeatureConfig,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    tokens: Tokens,
) -> VisualizeSettings:
    """Fill in what was left out. Raises ConfigError for layers, heads and patches that are not there."""
    config = encoder.config
    if features.last_layers > config.depth:
        raise ConfigError(
            f"--last_layers must be between 1 and the depth ({config.depth}); got {features.last_layers}."
        )
    for layer in layers or ():
        if not 1 <= layer <= config.depth:
            raise ConfigError(f"there is no layer {layer}: the encoder has {config.depth}, numbered from 1.")
    chosen_layers = tuple(dict.fromkeys(layer - 1 for layer in layers or [config.depth]))
    few = np.linspace(0, config.num_heads - 1, min(MOST_HEADS, config.num_heads)).round().astype(int).tolist()
    chosen_heads = tuple(dict.fromkeys(heads or few))
    require_numbers(chosen_heads, config.num_heads, "head")
    patches = None if tokens is None else _patches(tokens, ordering.grid)
    return VisualizeSettings(ordering, chosen_layers, chosen_heads, patches, features)


def _patches(given: Tokens, grid: Pair) -> tuple[Pair, ...]:
    """From "3,4 7,7", or pairs, to patches of the grid, each once."""
    pairs = given.replace(";", " ").split() if isinstance(given, str) else list(given or ())
    found: dict[Pair, None] = {}
    for pair in pairs:
        try:
            row, column = (int(part) for part in (pair.split(",") if isinstance(pair, str) else pair))
        except (TypeError, ValueError):
            raise ConfigError(
                f"--tokens are rows and columns of patches, as in --tokens '3,4 7,7'; got {given!r}."
            ) from None
        if not (0 <= row < grid[0] and 0 <= column < grid[1]):
            raise ConfigError(
                f"there is no patch {row},{column}: the grid has rows 0 to {grid[0] - 1} and columns 0 to "
                f"{grid[1] - 1}."
            )
        found[row, column] = None
    if not 1 <= len(found) <= MOST_TOKENS:
        raise ConfigError(f"--tokens takes 1 to {MOST_TOKENS} patches, as in --tokens '3,4 7,7'; got {len(found)}.")
    return tuple(found)
