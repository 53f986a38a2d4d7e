"""How many floating-point operations a training step of our models takes, and how many the device can do.

Counted are the matrix products, a multiplication and an addition each being two operations, as is usual for the share
of a device's peak that a model uses. A gradient costs two products for each one forward (for the input and for the
weight), but one where the input needs none. Attention counts every pair of tokens, masked or not: that is what the
kernels with a mask compute. What fused kernels compute twice is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nextblock.errors import ConfigError
from nextblock.xar.config import XARConfig
from nextblock.xar.layers import SINUSOID
from nextblock.xar.model import XAR
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA

CEILING_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # sides of the square products
CEILING_TRIES = 5


@dataclass(frozen=True)
class Flops:
    """Operations for one image.

    Attributes:
        forward: room -> operations of a forward pass.
        no_input_gradient: of those, the products whose input needs no gradient.
    """

    forward: Mapping[str, int]
    no_input_gradient: int

    @property
    def training(self) -> int:
        """Of a forward pass and its backward pass."""
        return 3 * sum(self.forward.values()) - self.no_input_gradient


def model_flops(model: nn.Module) -> Flops:
    """What one image costs in training. Raises ConfigError for a model that is neither XTRA nor xAR."""
    if isinstance(model, XTRA):
        return xtra_flops(model.config)
    if isinstance(model, XAR):
        return xar_flops(model.config)
    raise ConfigError(f"operations are counted for XTRA and XAR; got {type(model).__name__}.")


def xtra_flops(config: XTRAConfig, *, full_sequence: bool = False) -> Flops:
    """XTRA's loss for one image; the rooms are encoder, projection, predictor and heads.

    Args:
        full_sequence: every token of the image, as in the papers' tables and codes; by default what is computed here,
            where the last entity is left out (`XTRA.loss`). Either way head i reads the outputs that predict something.
    """
    ordering = config.ordering
    predicting = ordering.num_entities - 1
    n = ordering.num_patches if full_sequence else predicting * ordering.entity_size
    width, narrow = config.width, config.predictor_width
    patches = _linear(n, config.channels * config.patch[0] * config.patch[1], width)
    layer = _layer(n, width, int(width * config.mlp_ratio))
    rows = sum(predicting - i for i in range(config.num_lookahead))
    inputs = ordering.entity_size * narrow
    forward = {
        "encoder": patches + config.depth * layer,
        "projection": _linear(n, width, config.projection_hidden) + _linear(n, config.projection_hidden, narrow),
        "predictor": config.predictor_depth * _layer(n, narrow, int(narrow * config.mlp_ratio)),
        "heads": _linear(rows, inputs, config.head_hidden) + _linear(rows, config.head_hidden, config.cell_pixels),
    }
    return Flops(forward, no_input_gradient=patches)


def xar_flops(config: XARConfig) -> Flops:
    """xAR's loss for one image, with clean context that of the doubled sequence; the rooms are tokens in (with class
    and time), layers and tokens out."""
    ordering, width = config.entities, config.width
    n, entities = ordering.num_tokens, ordering.num_entities
    if config.context == "clean":
        n, entities = 2 * n - ordering.entity_sizes[-1], 2 * entities - 1
    hidden = int(width * config.mlp_ratio * 2 / 3)
    tokens, waves = _linear(n, config.token_channels, width), _linear(entities, SINUSOID, width)
    layer = _attention(n, width) + 3 * _linear(n, width, hidden) + _linear(entities, width, 6 * width)
    forward = {
        "tokens in": tokens + waves + _linear(entities, width, width),
        "layers": config.depth * layer + _linear(n, width, width),
        "tokens out": _linear(n, width, config.token_channels),
    }
    return Flops(forward, no_input_gradient=tokens + waves)


def xar_sampling_flops(config: XARConfig, steps: int, guided: Sequence[bool]) -> int:
    """What sampling one image costs with a solver of one evaluation a step, as `xar.passes` does it.

    A finished entity is read once more, for its keys and values. What class and time make of the layers is counted once
    for a time: where it is not kept (see `xar.passes`), more is computed than is counted.

    Args:
        steps: of the solver, for each entity.
        guided: for each entity, whether it is run without a class, too.
    """
    width, sizes = config.width, config.entities.entity_sizes
    layers, hidden = config.depth, int(config.width * config.mlp_ratio * 2 / 3)
    total, before = 0, 0
    for entity, n in enumerate(sizes):
        reads, seen = _linear(n, width, 3 * width), before + n
        layer = reads + 2 * _linear(n, width, seen) + _linear(n, width, width) + 3 * _linear(n, width, hidden)
        first, ends = _linear(n, config.token_channels, width) + _linear(n, width, width), config.token_channels
        total += steps * (1 + guided[entity]) * (first + layers * layer + _linear(n, width, ends))
        if entity + 1 < len(sizes):
            total += (1 + any(guided[entity + 1 :])) * (first + (layers - 1) * layer + reads)
        before = seen
    steered = _linear(1, SINUSOID, width) + _linear(1, width, width) + layers * _linear(1, width, 6 * width)
    return total + (1 + any(guided)) * (steps + (len(sizes) > 1)) * steered


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _attention(n: int, width: int) -> int:
    """Queries, keys and values; scores and weighted values of every pair of tokens; the map behind them."""
    return _linear(n, width, 3 * width) + 2 * _linear(n, width, n) + _linear(n, width, width)


def _layer(n: int, width: int, hidden: int) -> int:
    return _attention(n, width) + _linear(n, width, hidden) + _linear(n, hidden, width)


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of a few square matrix products, the best of several tries each."""
    best = 0.0
    for side in CEILING_SIZES[device.type]:
        a = torch.randn(side, side, device=device, generator=_generator(device)).to(dtype)
        b = a.mT.contiguous()
        best = max(best, 2 * side**3 / _fastest(a, b))
    return best


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)  # its own: the run's numbers are not touched


def _fastest(a: torch.Tensor, b: torch.Tensor) -> float:
    """Seconds of one product, the least of several tries."""
    out = torch.mm(a, b)
    least = float("inf")
    for _ in range(CEILING_TRIES):
        _wait(a.device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(a.device)
        least = min(least, time.perf_counter() - start)
    return least


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
