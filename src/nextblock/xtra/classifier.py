"""An encoder with a head on it: images to class logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nextblock.errors import ConfigError
from nextblock.portable import Portable
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.heads import HeadKind, make_heads
from nextblock.xtra.model import Encoder


@dataclass(frozen=True)
class LayerMean:
    """Which tokens a head reads: the mean of the outputs of layers `first` .. `last` (from 1), before the final norm.

    bidirectional: every token sees every other one; otherwise the encoder keeps its block-causal mask, as published.
    """

    first: int
    last: int
    bidirectional: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise ConfigError(f"layers are counted from 1, first to last; got {self.first} to {self.last}.")

    @classmethod
    def of_last(cls, count: int, depth: int, bidirectional: bool = False) -> LayerMean:
        """The last `count` layers of `depth`. Raises ConfigError when there are not so many."""
        if not 1 <= count <= depth:
            raise ConfigError(f"last_layers must be between 1 and the encoder's depth {depth}; got {count}.")
        return cls(depth - count + 1, depth, bidirectional)

    @property
    def name(self) -> str:
        layers = f"layer {self.last}" if self.first == self.last else f"layers {self.first}-{self.last}"
        return layers + (" bidirectional" if self.bidirectional else "")


def layer_means(
    encoder: Encoder,
    images: Tensor,
    wanted: Sequence[LayerMean],
    uniforms: Tensor | None = None,
    *,
    pooled: Collection[LayerMean] = (),
) -> dict[LayerMean, Tensor]:
    """Every wanted mean, [B, N, D] in the order of the tokens, from one forward pass for each kind of attention.

    Args:
        encoder, images: [B, C, H, W], normalised.
        wanted: which layers.
        uniforms: [B, depth, 2] decides drop path in training.
        pooled: those of `wanted` whose mean over tokens, [B, D], is enough; no tokens are kept for them.

    Raises ConfigError for layers that the encoder has not.
    """
    depth = encoder.config.depth
    found: dict[LayerMean, Tensor] = {}
    for mean in wanted:
        if mean.last > depth:
            raise ConfigError(f"the encoder has {depth} layers; {mean.name} asks for more.")
    for bidirectional in {mean.bidirectional: None for mean in wanted}:
        mine = {mean for mean in wanted if mean.bidirectional == bidirectional}
        ordering = encoder.ordering_for(images, bidirectional)
        outputs = encoder.layer_outputs(images, ordering, bidirectional=bidirectional, uniforms=uniforms)
        for layer, x in enumerate(outputs, start=1):
            for mean in mine:
                if mean.first <= layer <= mean.last:
                    read = x.mean(1) if mean in pooled else x
                    found[mean] = found[mean] + read if mean in found else read
            if all(mean.last <= layer for mean in mine):
                break
    return {mean: found[mean] / (mean.last - mean.first + 1) for mean in wanted}


@dataclass(frozen=True)
class HeadConfig:
    """A head and what it reads.

    Attributes:
        kind: "linear" or "attentive".
        layers: which of the encoder's layers.
        num_heads, num_queries: of the attentive head.
    """

    kind: HeadKind
    layers: LayerMean
    num_heads: int = 16
    num_queries: int = 1

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HeadConfig:
        return cls(**{**values, "layers": LayerMean(**values["layers"])})


class Classifier(Portable, nn.Module):
    """Encoder and one head: normalised images [B, C, H, W] -> logits [B, classes].

    `classes` are the names by number. Raises ConfigError when head and encoder do not fit.
    """

    def __init__(self, config: XTRAConfig, head: HeadConfig, classes: Sequence[str]) -> None:
        super().__init__()
        self.config, self.head_config, self.classes = config, head, tuple(classes)
        self.encoder = Encoder(config)
        self.head = make_heads(
            head.kind, config.width, len(self.classes), num_heads=head.num_heads, num_queries=head.num_queries
        )
        if head.layers.last > config.depth:
            raise ConfigError(f"the encoder has {config.depth} layers; {head.layers.name} asks for more.")

    def forward(self, images: Tensor, uniforms: Tensor | None = None) -> Tensor:
        tokens = layer_means(self.encoder, images, [self.head_config.layers], uniforms)[self.head_config.layers]
        logits: Tensor = self.head(tokens)[0]
        return logits

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes], float32, summing to 1."""
        return self(images).float().softmax(1)
