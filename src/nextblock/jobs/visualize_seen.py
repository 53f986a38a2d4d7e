"""What is computed of the chosen images, ready to be drawn, and the same in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextblock.data.preprocess import normalize
from nextblock.data.stream import Batch
from nextblock.errors import CheckpointError
from nextblock.evaluation.attention_maps import attention_maps, telling_patches
from nextblock.evaluation.cell_sizes import cell_orderings, cosines_of_patches, patch_features, unrelated_cosine
from nextblock.evaluation.inference import device_of
from nextblock.evaluation.pca_maps import ColourBasis, fit_colours
from nextblock.figures.attention import Look
from nextblock.jobs.opening import OpenedEncoder
from nextblock.jobs.visualize_page import Seen
from nextblock.jobs.visualize_settings import VisualizeSettings
from nextblock.mask import block_causal_mask
from nextblock.ordering import Ordering
from nextblock.xtra.model import Encoder


def see(
    opened: OpenedEncoder, settings: VisualizeSettings, batch: Batch, names: list[str], basis: ColourBasis | None,
    about: Mapping[str, Any], batch_size: int,
) -> Seen:  # fmt: skip
    encoder = opened.encoder
    inputs = normalize(batch.images.to(device_of(encoder)), None, opened.preprocessing)
    grid = settings.ordering.grid
    sizes = cell_orderings(grid, encoder.config.cell_size)
    used = Ordering.whole(grid) if settings.features.bidirectional else settings.ordering
    own = next(name for name, ordering in sizes.items() if ordering == used)
    parts = [inputs[start : start + batch_size] for start in range(0, len(inputs), batch_size)]
    features = {
        name: torch.cat([patch_features(encoder, part, ordering, settings.features).cpu() for part in parts])
        for name, ordering in sizes.items()
    }
    if not all(torch.isfinite(x).all() for x in features.values()):
        raise CheckpointError(f"{opened.where} gives numbers that are not finite. Did its training diverge?")
    found = basis or fit_colours(features[own].numpy(), about)
    cosines = cosines_of_patches(features, own)
    shuffled = encoder.config.order != "raster" and not settings.features.bidirectional
    return Seen(
        pixels=batch.images.numpy(),
        names=names,
        settings=settings,
        training_order=encoder.config.orderings()[0] if shuffled and grid == encoder.config.grid else None,
        basis=found,
        given=basis is not None,
        colours={name: found.colours(x).reshape(len(names), *grid, 3) for name, x in features.items()},
        cosines={name: x.reshape(grid).numpy() for name, x in cosines.items()},
        own=own,
        unrelated=unrelated_cosine(features[own]),
        looks=[_looks(encoder, image[None], settings) for image in inputs],
    )


def _looks(encoder: Encoder, image: Tensor, settings: VisualizeSettings) -> dict[int, list[Look]]:
    """One image [1, C, H, W] at a time: all weights of a layer are heads × N² numbers, and few rows are drawn."""
    ordering, bidirectional = settings.ordering, settings.features.bidirectional
    maps = attention_maps(encoder, image, settings.layers, bidirectional=bidirectional)
    chosen = dict.fromkeys(settings.tokens or (), "chosen")
    chosen = chosen or telling_patches(maps[settings.layers[-1]][0], ordering.grid)
    place = ordering.inverse
    visible = torch.ones(place.shape * 2, dtype=torch.bool)
    if not bidirectional:
        visible = block_causal_mask(ordering.entity[place])

    def on_grid(x: Tensor) -> NDArray[Any]:
        return x.reshape(*x.shape[:-1], *ordering.grid).cpu().numpy()

    looks: dict[int, list[Look]] = {}
    for layer, (weights,) in maps.items():  # [heads, N, N]
        looks[layer] = [
            Look(
                patch=patch,
                why=why,
                weights=on_grid(weights[list(settings.heads), at]),
                heads=settings.heads,
                mean=on_grid(weights[:, at].mean(0)),
                visible=on_grid(visible[at]),
            )
            for patch, why in chosen.items()
            for at in [patch[0] * ordering.grid[1] + patch[1]]
        ]
    return looks


def told(run: str | Path, opened: OpenedEncoder, settings: VisualizeSettings, count: int) -> list[str]:
    """The lines under the page's heading."""
    config, grid = opened.encoder.config, settings.ordering.grid
    features = settings.features
    taken = "the last layer" if features.last_layers == 1 else f"the last {features.last_layers} layers (mean)"
    taken += ", after the final norm" if features.final_norm else ""
    height, width = opened.preprocessing.size_px
    return [
        f"{run}: {config.depth} layers, {config.num_heads} heads, width {config.width}, trained with cells of "
        f"{config.ordering.size[0]}×{config.ordering.size[1]} patches.",
        f"{count} images of {height}×{width} px, {grid[0]}×{grid[1]} patches each. Features of {taken}.",
    ]


def numbers(seen: Seen) -> dict[str, Any]:
    """What the pictures were drawn from, in short."""
    near: list[list[dict[str, Any]]] | None = None
    if seen.neighbours is not None:
        near = [[{"name": name, "cosine": cosine} for name, cosine, _ in every] for every in seen.neighbours]
    return {
        "images": seen.names,
        "features": seen.basis.about,
        "explained": np.round(seen.basis.explained, 6).tolist(),
        "cell_size_cosines": {name: float(x.mean()) for name, x in seen.cosines.items()},
        "own_cells": seen.own,
        "unrelated_cosine": seen.unrelated,
        "patches": [[look.patch for look in next(iter(layers.values()))] for layers in seen.looks],
        "neighbours": near,
    }
