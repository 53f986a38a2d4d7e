"""Sizes and choices of an xAR model, checked when made, and the named presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nextblock.errors import ConfigError, nearest
from nextblock.flow import TimeDistribution
from nextblock.ordering import RESIZES, AnyOrdering, Ordering, Pair, ScalePyramid, as_pair

ENTITIES = ("patches", "cells", "subsamples", "scales", "whole")
CONTEXTS = ("random", "clean", "increasing", "decreasing")
_MOST_TRIED = 10_000  # numbers that are looked through for an advice


@dataclass(frozen=True)
class XARConfig:
    """Everything that shapes an xAR model and its objective (arXiv 2502.20388).

    Sizes with two sides are one number or (height, width). The defaults are xAR-B on 256 px latents.

    Attributes:
        latent_size: (height, width) of the latents; in pixel space, of the images.
        latent_channels: channels of the latents; in pixel space, of the images.
        patch_size: latent pixels along one side of a patch; a patch is a token.
        ordering: what an entity is: "patches" (one each), "cells" (neighbouring patches), "subsamples" (patches
            spread evenly), "scales" (the picture at growing sizes) or "whole" (the picture).
        entity_size: patches along one side of an entity; for cells and subsamples.
        scales: patches along one side of every scale, growing to the grid; empty = halvings down to 1.
        resize: how a scale is made from the picture: "nearest" (the paper's pseudo-code), "area" or "bilinear".
        width: of the tokens.
        depth: layers; the first half is followed by a norm, a linear map and a second position embedding.
        num_heads: attention heads; their width must be divisible by 4.
        mlp_ratio: the gated MLP is two thirds of width times this wide.
        num_classes: labels are 0 to num_classes - 1; 0 = unconditional.
        dropout: after attention and in the MLP.
        attention_dropout: share of attention weights dropped.
        label_dropout: share of training images shown without their label, which guidance needs.
        times: how times are drawn: "logit_normal" (the official code) or "uniform".
        context: what an entity sees of the earlier ones while training: "random" (each noised by a time of its own),
            "clean" (teacher forcing, a doubled sequence), "increasing" (times sorted: later entities are noisier) or
            "decreasing" (earlier ones are).
        loss_mean: over all "tokens" alike (the paper's sum of squares), or over "entities" first, which weighs a
            coarse scale as much as a fine one. They differ for scales only.
    """

    latent_size: int | Pair = 16
    latent_channels: int = 16
    patch_size: int | Pair = 1
    ordering: Literal["patches", "cells", "subsamples", "scales", "whole"] = "cells"
    entity_size: int | Pair = 8
    scales: tuple[int | Pair, ...] = ()
    resize: Literal["nearest", "area", "bilinear"] = "nearest"
    width: int = 768
    depth: int = 16
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    dropout: float = 0.1
    attention_dropout: float = 0.1
    label_dropout: float = 0.1
    times: TimeDistribution = "logit_normal"
    context: Literal["random", "clean", "increasing", "decreasing"] = "random"
    loss_mean: Literal["tokens", "entities"] = "tokens"

    def __post_init__(self) -> None:
        for name in ("latent_size", "patch_size", "entity_size"):
            value = as_pair(getattr(self, name), name)
            object.__setattr__(self, name, value[0] if value[0] == value[1] else value)
        object.__setattr__(self, "scales", tuple(tuple(s) if isinstance(s, list) else s for s in self.scales))
        for name in ("latent_channels", "width", "depth", "num_heads"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(0 < self.mlp_ratio < math.inf, "mlp_ratio", self.mlp_ratio, "above 0")
        _require(self.num_classes >= 0, "num_classes", self.num_classes, "0 (unconditional) or more")
        for name in ("dropout", "attention_dropout", "label_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "at least 0 and below 1")
        choices = {
            "ordering": ENTITIES, "resize": RESIZES, "times": ("logit_normal", "uniform"), "context": CONTEXTS,
            "loss_mean": ("tokens", "entities"),
        }  # fmt: skip
        for name, known in choices.items():
            value = getattr(self, name)
            _require(value in known, name, value, f"one of {', '.join(known)}", nearest(str(value), known))
        self._check_heads()
        self._check_grid()
        _ = self.entities

    def _check_heads(self) -> None:
        if self.width % self.num_heads or self.width // self.num_heads % 4:
            fits = [
                h
                for h in range(1, min(self.width, _MOST_TRIED) + 1)
                if self.width % h == 0 and self.width // h % 4 == 0
            ]
            close = ", ".join(map(str, sorted(sorted(fits, key=lambda h: abs(h - self.num_heads))[:3])))
            advice = f"nearest num_heads that do: {close}" if close else "none does: take a width divisible by 4"
            raise ConfigError(
                f"width {self.width} does not divide into num_heads {self.num_heads} heads whose width is divisible "
                f"by 4; {advice}."
            )

    def _check_grid(self) -> None:
        latent, patch = self.latent, self.patch
        if latent[0] % patch[0] or latent[1] % patch[1]:
            fits = [p for p in range(1, min(*latent, _MOST_TRIED) + 1) if latent[0] % p == 0 and latent[1] % p == 0]
            raise ConfigError(
                f"latent_size {self.latent_size} is not a multiple of patch_size {self.patch_size}; "
                f"patch sizes that divide it: {', '.join(map(str, fits))}."
            )

    @property
    def latent(self) -> Pair:
        """(height, width) of the latents."""
        return as_pair(self.latent_size, "latent_size")

    @property
    def patch(self) -> Pair:
        """(height, width) of a patch in latent pixels."""
        return as_pair(self.patch_size, "patch_size")

    @property
    def grid(self) -> Pair:
        """Patches along (height, width)."""
        return self.latent[0] // self.patch[0], self.latent[1] // self.patch[1]

    @property
    def token_channels(self) -> int:
        """Numbers in a token: latent channels × patch height × patch width."""
        return self.latent_channels * self.patch[0] * self.patch[1]

    @property
    def entities(self) -> AnyOrdering:
        """The ordering that these fields describe. Raises ConfigError when it does not fit the grid."""
        if self.ordering == "scales":
            return ScalePyramid(self.grid, tuple(as_pair(s, "scales") for s in self.scales), self.resize)
        if self.ordering == "patches":
            return Ordering.patches(self.grid)
        if self.ordering == "whole":
            return Ordering.whole(self.grid)
        make = Ordering.cells if self.ordering == "cells" else Ordering.subsamples
        return make(self.grid, as_pair(self.entity_size, "entity_size"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values (JSON) from which `from_dict` makes an equal configuration."""

        def plain(value: Any) -> Any:
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        return {k: plain(v) for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> XARConfig:
        """Raises ConfigError for an unknown key, naming the nearest real one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"XARConfig has no field '{name}'.{nearest(name, known)}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> XARConfig:
        """A named model (`PRESETS`), with any field overridden. Raises ConfigError for an unknown name."""
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ConfigError(f"No preset '{name}'. Presets: {known}.{nearest(name, PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})


# b, l and h are the published models (172.6, 608.4 and 1186.0 million parameters). ti and s are ours, for pixel space
# and small data: an eighth of the images are shown without their label and nothing else is dropped.
_SMALL = {"dropout": 0.0, "attention_dropout": 0.0, "label_dropout": 0.125}
PRESETS: dict[str, dict[str, Any]] = {
    "xar_ti": {"width": 128, "depth": 6, "num_heads": 4, **_SMALL},
    "xar_s": {"width": 256, "depth": 8, "num_heads": 4, **_SMALL},
    "xar_b": {"width": 768, "depth": 16, "num_heads": 12},
    "xar_l": {"width": 1024, "depth": 32, "num_heads": 16},
    "xar_h": {"width": 1280, "depth": 40, "num_heads": 16},
}


def _require(good: bool, name: str, value: object, wanted: str, hint: str = "") -> None:
    if not good:
        raise ConfigError(f"{name} must be {wanted}; got {value!r}.{hint}")
