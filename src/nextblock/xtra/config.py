"""Sizes and choices of an XTRA model, checked when made, and the named presets."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nextblock.errors import ConfigError, nearest
from nextblock.ordering import Ordering, Pair, as_pair
from nextblock.randomness import permutation


@dataclass(frozen=True)
class XTRAConfig:
    """Everything that shapes an XTRA model (arXiv 2411.15648).

    Sizes with two sides are one number or (height, width). Four sizes may be left out (0); they are then
    derived by a rule of ours, which meets the published ViT-B/16 where one rule can:
    `projection_hidden` = 4 × width; `predictor_width` = half of width, at least 192 (but never more than
    width); `predictor_heads` = predictor_width / 64, at least 1; `head_hidden` = half of the pixel head's inputs.

    Attributes:
        image_size_px: side of the training images in pixels.
        patch_size_px: side of a patch in pixels.
        cell_size: patches along one side of a cell; 1 is next-patch prediction.
        channels: image channels.
        width: of the encoder's tokens.
        depth: layers of the encoder.
        num_heads: attention heads of the encoder.
        mlp_ratio: hidden width of an encoder layer's MLP, as a multiple of width.
        projection_hidden: hidden width of the MLP between encoder and predictor.
        predictor_width: of the predictor's tokens.
        predictor_depth: layers of the predictor.
        predictor_heads: attention heads of the predictor.
        head_hidden: hidden width of each pixel head.
        num_lookahead: pixel heads; head i (from 0) predicts cell c + 1 + i from the outputs of cell c.
        pixel_loss: "l2" (mean squared error) or "l1" (mean absolute error).
        normalize_targets: regress pixels normalised by the mean and deviation of their own cell.
        order: "raster", or "pseudo_random": K fixed orders of the K cells, no two beginning alike; a trainer
            draws one per step and validation uses the first.
        order_seed: makes the pseudo-random orders.
        drop_path: stochastic depth of the encoder's last layer; rises linearly from 0.
    """

    image_size_px: int | Pair = 256
    patch_size_px: int | Pair = 16
    cell_size: int | Pair = 4
    channels: int = 3
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    projection_hidden: int = 0
    predictor_width: int = 0
    predictor_depth: int = 8
    predictor_heads: int = 0
    head_hidden: int = 0
    num_lookahead: int = 1
    pixel_loss: Literal["l2", "l1"] = "l2"
    normalize_targets: bool = True
    order: Literal["raster", "pseudo_random"] = "raster"
    order_seed: int = 0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        for name in ("image_size_px", "patch_size_px", "cell_size"):
            value = as_pair(getattr(self, name), name)
            object.__setattr__(self, name, value[0] if value[0] == value[1] else value)
        for name in ("channels", "width", "depth", "num_heads", "num_lookahead"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(0 < self.mlp_ratio < math.inf, "mlp_ratio", self.mlp_ratio, "above 0")
        _require(self.predictor_depth >= 0, "predictor_depth", self.predictor_depth, "0 or more")
        _require(0 <= self.drop_path < 1, "drop_path", self.drop_path, "at least 0 and below 1")
        _require(self.pixel_loss in ("l2", "l1"), "pixel_loss", self.pixel_loss, "'l2' or 'l1'")
        known_orders = ("raster", "pseudo_random")
        _require(self.order in known_orders, "order", self.order, "'raster' or 'pseudo_random'")
        self._check_grid()
        self._derive()
        if self.normalize_targets and self.cell_pixels == 1:
            warnings.warn(
                "normalize_targets has nothing to normalise: a cell of one gray pixel has no variance, so every "
                "target is 0 and nothing is learned. Use a larger cell_size or patch_size_px, or "
                "normalize_targets=False.",
                stacklevel=3,
            )
        _check_heads("num_heads", self.num_heads, "width", self.width)
        _check_heads("predictor_heads", self.predictor_heads, "predictor_width", self.predictor_width)

    def _check_grid(self) -> None:
        image, patch = self.image, self.patch
        if image[0] % patch[0] or image[1] % patch[1]:
            near = sorted({side // p * p for side, p in zip(image, patch, strict=True)} - {0})
            up = sorted({-(-side // p) * p for side, p in zip(image, patch, strict=True)})
            raise ConfigError(
                f"image_size_px {self.image_size_px} is not a multiple of patch_size_px {self.patch_size_px}; "
                f"nearest sides that are: {', '.join(map(str, sorted({*near, *up})))}."
            )
        cells = self.ordering.num_entities
        if cells < 2:
            raise ConfigError(
                f"cell_size {self.cell_size} makes the whole {self.grid[0]}×{self.grid[1]} grid one cell; next-cell "
                f"prediction needs at least two. Take a smaller cell_size or a larger image_size_px."
            )
        needed = f"below the number of cells ({cells})"
        _require(self.num_lookahead < cells, "num_lookahead", self.num_lookahead, needed)

    def _derive(self) -> None:
        def fill(name: str, value: int) -> None:
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")

        fill("projection_hidden", 4 * self.width)
        fill("predictor_width", min(self.width, max(192, self.width // 2)))
        fill("predictor_heads", max(1, self.predictor_width // 64))
        fill("head_hidden", max(1, self.ordering.entity_size * self.predictor_width // 2))

    @property
    def image(self) -> Pair:
        """(height, width) of the training images in pixels."""
        return as_pair(self.image_size_px, "image_size_px")

    @property
    def patch(self) -> Pair:
        """(height, width) of a patch in pixels."""
        return as_pair(self.patch_size_px, "patch_size_px")

    @property
    def grid(self) -> Pair:
        """Patches along (height, width)."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def ordering(self) -> Ordering:
        """The cells in raster order."""
        return Ordering.cells(self.grid, self.cell_size)

    @property
    def cell_pixels(self) -> int:
        """Numbers that one pixel head predicts: channels × cell height × cell width."""
        return self.channels * self.ordering.entity_size * self.patch[0] * self.patch[1]

    def orderings(self) -> tuple[Ordering, ...]:
        """The orders that training draws from, the first used by default: one, or K pseudo-random ones.

        Each pseudo-random order starts with another cell, so no two share a prefix.
        """
        base = self.ordering
        if self.order == "raster":
            return (base,)
        cells = base.num_entities
        first = permutation(self.order_seed, "order/first", cells).tolist()
        rests = (permutation(self.order_seed, f"order/{i}", cells).tolist() for i in range(cells))
        orders = ([f, *(c for c in rest if c != f)] for f, rest in zip(first, rests, strict=True))
        return tuple(base.permuted(sorted(range(cells), key=order.__getitem__)) for order in orders)

    def to_dict(self) -> dict[str, Any]:
        """Plain values (JSON) from which `from_dict` makes an equal configuration."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> XTRAConfig:
        """Raises ConfigError for an unknown key, naming the nearest real one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"XTRAConfig has no field '{name}'.{nearest(name, known)}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> XTRAConfig:
        """A named model (`PRESETS`), with any field overridden. Raises ConfigError for an unknown name."""
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ConfigError(f"No preset '{name}'. Presets: {known}.{nearest(name, PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})


_B16: dict[str, Any] = {
    "projection_hidden": 4096,
    "predictor_width": 768,
    "predictor_heads": 6,
    "head_hidden": 6144,
}
_H14: dict[str, Any] = {
    "image_size_px": 224,
    "patch_size_px": 14,
    "projection_hidden": 5120,
    "predictor_width": 640,
    "predictor_heads": 8,
    "head_hidden": 9408,
}

# b16 and h14 are the published models. For ti16, s16 and l16 nothing is published beyond the ViT encoder
# sizes: their predictor and pixel head follow the rule in XTRAConfig, which is ours.
PRESETS: dict[str, dict[str, Any]] = {
    "xtra_ti16": {"width": 192, "depth": 12, "num_heads": 3},
    "xtra_s16": {"width": 384, "depth": 12, "num_heads": 6},
    "xtra_b16": {"width": 768, "depth": 12, "num_heads": 12, **_B16},
    "xtra_l16": {"width": 1024, "depth": 24, "num_heads": 16},
    "xtra_h14": {"width": 1280, "depth": 32, "num_heads": 16, **_H14},
}


def _require(good: bool, name: str, value: object, wanted: str) -> None:
    if not good:
        raise ConfigError(f"{name} must be {wanted}; got {value!r}.")


_MOST_HEADS = 10_000  # that are looked through for an advice


def _check_heads(heads_name: str, heads: int, width_name: str, width: int) -> None:
    if heads < 1 or width % heads:
        fits = [h for h in range(1, min(width, _MOST_HEADS) + 1) if width % h == 0]
        close = sorted(sorted(fits, key=lambda h: abs(h - heads))[:3])
        raise ConfigError(
            f"{width_name} {width} is not divisible by {heads_name} {heads}; nearest that fit: "
            f"{', '.join(map(str, close))}."
        )
