"""The one idea: an ordering splits a grid of patches into entities and puts the entities in order.

Everything else follows from it: the token sequence, the attention mask (`mask.py`), the prediction targets,
and where each token stands for position embeddings. A sequence here is always *entity-major*: the tokens of
one entity stand next to each other, entities in order.

A 4×4 grid of patches, numbered in raster order::

     0  1 |  2  3        cells of 2×2:      0  1  4  5 |  2  3  6  7 |  8  9 12 13 | 10 11 14 15
     4  5 |  6  7        subsamples of 2×2: 0  2  8 10 |  1  3  9 11 |  4  6 12 14 |  5  7 13 15
    ------+------        patches:           0 | 1 | 2 | ... | 15
     8  9 | 10 11        whole:             0 1 2 ... 15
    12 13 | 14 15

A *pyramid* is the one ordering that is not a partition: its entities are the whole picture at growing sizes::

    scales 1, 2, 4:  1 token | 2×2 tokens | 4×4 tokens

`Ordering` and `ScalePyramid` answer the same questions: `split`, `merge`, `entity`, `positions`, `sequence`.

Sources: XTRA (arXiv 2411.15648) uses cells, with patches as the AIM-style baseline; xAR (arXiv 2502.20388,
section 3) adds subsamples, scales and the whole image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nextblock.errors import ConfigError

Pair = tuple[int, int]
_MOST_TRIED = 10_000  # sizes that are looked through for an advice

# How an entity's size (k1, k2) sits in the grid: neighbouring patches, or patches spaced evenly over the grid.
_SPLIT = {
    "cells": "b (h k1) (w k2) ... -> b (h w) (k1 k2) ...",
    "subsamples": "b (k1 h) (k2 w) ... -> b (h w) (k1 k2) ...",
}
_MERGE = {
    "cells": "b (h w) (k1 k2) ... -> b (h k1) (w k2) ...",
    "subsamples": "b (h w) (k1 k2) ... -> b (k1 h) (k2 w) ...",
}


def as_pair(value: int | Sequence[int], name: str) -> Pair:
    """Return (height, width) from one number or two; ConfigError unless all are whole and positive."""
    both = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in both):
        raise ConfigError(f"{name} must be a positive whole number or (height, width); got {value!r}.")
    return both[0], both[1]


def _check_fit(kind: str, grid: Pair, size: Pair) -> None:
    if not (grid[0] % size[0] or grid[1] % size[1]):
        return
    fits = [k for k in range(1, min(*grid, _MOST_TRIED) + 1) if grid[0] % k == 0 and grid[1] % k == 0]
    below, above = [k for k in fits if k < max(size)][-1:], [k for k in fits if k > max(size)][:1]
    sides = {n // k * k + up for n, k in zip(grid, size, strict=True) for up in (0, k if n % k else 0)}
    raise ConfigError(
        f"{kind} of {size[0]}×{size[1]} do not fit a grid of {grid[0]}×{grid[1]} patches. "
        f"Nearest sizes that fit this grid: {' and '.join(map(str, below + above))}; "
        f"nearest grid sides for this size: {', '.join(map(str, sorted(sides - {0})))}."
    )


@dataclass(frozen=True)
class Ordering:
    """A partition of a grid of patches into equal entities, and the order of the entities.

    Make one with `patches`, `cells`, `subsamples` or `whole`; reorder it with `permuted`. Two orderings that
    give the same sequence are equal and hash alike, however they were made.

    Attributes:
        kind: "cells" (neighbouring patches) or "subsamples" (evenly spaced patches).
        grid: patches per (column, row), that is (height, width) of the grid.
        size: patches per entity, (height, width).
        ranks: the place of each entity; None when the entities stand in raster order.
    """

    kind: Literal["cells", "subsamples"]
    grid: Pair
    size: Pair
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _SPLIT:
            raise ConfigError(f"kind must be 'cells' or 'subsamples'; got {self.kind!r}.")
        grid, size = as_pair(self.grid, "grid"), as_pair(self.size, "size")
        _check_fit(self.kind, grid, size)
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "size", size)
        if size in ((1, 1), grid):  # one patch, or the whole grid: the two kinds are the same partition
            object.__setattr__(self, "kind", "cells")
        if self.ranks is not None:
            ranks = tuple(int(r) for r in self.ranks)
            places = list(range(self.num_entities))
            if sorted(ranks) != places:
                raise ConfigError(
                    f"ranks must hold each of 0..{self.num_entities - 1} once (the new place of every entity); "
                    f"got {len(ranks)} values: {_shown(ranks)}."
                )
            object.__setattr__(self, "ranks", None if list(ranks) == places else ranks)

    @classmethod
    def cells(cls, grid: int | Sequence[int], size: int | Sequence[int]) -> Ordering:
        """Cells of `size` neighbouring patches (one number, or (height, width)), in raster order."""
        return cls("cells", as_pair(grid, "grid"), as_pair(size, "size"))

    @classmethod
    def patches(cls, grid: int | Sequence[int]) -> Ordering:
        """Every patch is an entity, in raster order: next-patch prediction as in iGPT and AIM."""
        return cls.cells(grid, 1)

    @classmethod
    def subsamples(cls, grid: int | Sequence[int], size: int | Sequence[int]) -> Ordering:
        """Entities of `size` patches spread evenly over the grid, one for each offset, offsets in raster order."""
        return cls("subsamples", as_pair(grid, "grid"), as_pair(size, "size"))

    @classmethod
    def whole(cls, grid: int | Sequence[int]) -> Ordering:
        """The whole grid is one entity."""
        return cls.cells(grid, grid)

    def permuted(self, ranks: Iterable[int]) -> Ordering:
        """The same entities in another order: `ranks[e]` is the new place of entity e (as numbered here).

        Raises ConfigError unless `ranks` holds each of 0..num_entities-1 exactly once.
        """
        ranks = tuple(int(rank) for rank in ranks)
        step = replace(self, ranks=ranks)  # checks them
        if self.ranks is None:
            return step
        return replace(self, ranks=tuple(ranks[place] for place in self.ranks))

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: the patches of the grid."""
        return self.num_patches

    @property
    def num_entities(self) -> int:
        return self.num_patches // self.entity_size

    @property
    def entity_size(self) -> int:
        """Tokens per entity; every entity of a partition has the same number."""
        return self.size[0] * self.size[1]

    @property
    def entity_sizes(self) -> tuple[int, ...]:
        """Tokens of each entity, in order."""
        return (self.entity_size,) * self.num_entities

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The raster number of the entity at each place; the inverse of `ranks`."""
        if self.ranks is None:
            return tuple(range(self.num_entities))
        return tuple(sorted(range(self.num_entities), key=self.ranks.__getitem__))

    def split(self, x: Tensor) -> Tensor:
        """From the grid to the sequence: [B, h, w, ...] -> [B, N, ...], entity-major. Inverse: `merge`."""
        self._check_grid(x)
        entities = rearrange(x, _SPLIT[self.kind], k1=self.size[0], k2=self.size[1])  # [B, E, K, ...]
        if self.ranks is not None:
            entities = entities[:, _index(self.order, x.device)]
        return rearrange(entities, "b e k ... -> b (e k) ...")

    def merge(self, x: Tensor) -> Tensor:
        """From the sequence back to the grid: [B, N, ...] -> [B, h, w, ...]. Inverse: `split`."""
        if x.shape[1] != self.num_patches:
            raise ConfigError(f"expected {self.num_patches} tokens for {self}; got shape {tuple(x.shape)}.")
        entities = rearrange(x, "b (e k) ... -> b e k ...", k=self.entity_size)
        if self.ranks is not None:
            entities = entities[:, _index(self.ranks, x.device)]
        return rearrange(entities, _MERGE[self.kind], h=self.grid[0] // self.size[0], k1=self.size[0])

    @cached_property
    def sequence(self) -> Tensor:
        """The raster number of the patch at each place of the sequence: [N] int64, on the CPU."""
        return self.split(torch.arange(self.num_patches).view(1, *self.grid))[0]

    @cached_property
    def inverse(self) -> Tensor:
        """The place in the sequence of each patch, patches in raster order: [N] int64, on the CPU."""
        return torch.argsort(self.sequence)

    @cached_property
    def entity(self) -> Tensor:
        """The entity of each place of the sequence, never decreasing: [N] int64, on the CPU."""
        return torch.arange(self.num_entities).repeat_interleave(self.entity_size)

    @cached_property
    def positions(self) -> Tensor:
        """The (row, column) in the grid of each place of the sequence: [N, 2] int64, on the CPU."""
        return torch.stack((self.sequence // self.grid[1], self.sequence % self.grid[1]), dim=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which `from_dict` makes an equal ordering."""
        ranks = None if self.ranks is None else list(self.ranks)
        return {"kind": self.kind, "grid": list(self.grid), "size": list(self.size), "ranks": ranks}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Ordering:
        ranks = values.get("ranks")
        size, grid = as_pair(values["size"], "size"), as_pair(values["grid"], "grid")
        return cls(values["kind"], grid, size, None if ranks is None else tuple(ranks))

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Ordering:
        return cls.from_dict(json.loads(text))

    def _check_grid(self, x: Tensor) -> None:
        if tuple(x.shape[1:3]) != self.grid:
            raise ConfigError(f"expected [B, {self.grid[0]}, {self.grid[1]}, ...]; got shape {tuple(x.shape)}.")


RESIZES = ("nearest", "area", "bilinear")


@dataclass(frozen=True)
class ScalePyramid:
    """The picture at growing sizes, the last one being the picture itself; every size is an entity.

    A sibling of `Ordering`, not a partition: the sequence is longer than the grid, entities differ in size, and the
    noise of one scale is not that of another. Source: xAR (arXiv 2502.20388), section 3.1, "scale": sizes doubling up
    to the grid, each resized from the picture.

    Attributes:
        grid: patches per (column, row) of the last scale.
        scales: (height, width) in patches of each, growing, the last one equal to the grid; empty: halvings of the
            grid (rounded up) down to 1×1.
        resize: "nearest" (as the paper's pseudo-code), "area" (means) or "bilinear" (antialiased).

    Raises ConfigError for scales that do not grow to the grid.
    """

    grid: Pair
    scales: tuple[Pair, ...] = ()
    resize: Literal["nearest", "area", "bilinear"] = "nearest"

    def __post_init__(self) -> None:
        grid = as_pair(self.grid, "grid")
        scales = tuple(as_pair(scale, "scales") for scale in self.scales) or _halvings(grid)
        grown = all(a != b and a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(scales))
        if scales[-1] != grid or not grown:
            raise ConfigError(
                f"scales must grow and end with the grid of {grid[0]}×{grid[1]} patches; got {list(scales)}. "
                f"Halvings would be {list(_halvings(grid))}."
            )
        if self.resize not in RESIZES:
            raise ConfigError(f"resize must be one of {', '.join(RESIZES)}; got {self.resize!r}.")
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "scales", scales)

    @property
    def num_tokens(self) -> int:
        """Length of the sequence: the patches of all scales."""
        return sum(self.entity_sizes)

    @property
    def num_entities(self) -> int:
        return len(self.scales)

    @property
    def entity_sizes(self) -> tuple[int, ...]:
        """Tokens of each scale, in order."""
        return tuple(h * w for h, w in self.scales)

    def levels(self, images: Tensor, patch: Pair = (1, 1)) -> list[Tensor]:
        """The images [B, C, h·p1, w·p2] at every scale, coarsest first: [B, C, h_i·p1, w_i·p2]."""
        sizes = [(h * patch[0], w * patch[1]) for h, w in self.scales]
        return [images if size == tuple(images.shape[2:]) else self._resized(images, size) for size in sizes]

    def _resized(self, images: Tensor, size: Pair) -> Tensor:
        if self.resize == "bilinear":
            return F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return F.interpolate(images, size, mode=self.resize)

    def split(self, x: Tensor) -> Tensor:
        """From the grid to the sequence: [B, h, w, ...] -> [B, N, ...], scale after scale, each in raster order.

        Every trailing number is resized by itself; pictures of patches are resized as pictures by `levels`.
        """
        if tuple(x.shape[1:3]) != self.grid:
            raise ConfigError(f"expected [B, {self.grid[0]}, {self.grid[1]}, ...]; got shape {tuple(x.shape)}.")
        trailing = x.shape[3:]
        levels = self.levels(x.reshape(*x.shape[:3], -1).movedim(3, 1))
        rows = torch.cat([rearrange(level, "b c h w -> b (h w) c") for level in levels], 1)
        return rows.reshape(*rows.shape[:2], *trailing)

    def merge(self, x: Tensor) -> Tensor:
        """From the sequence back to the grid, which the last scale alone is: [B, N, ...] -> [B, h, w, ...]."""
        if x.shape[1] != self.num_tokens:
            raise ConfigError(f"expected {self.num_tokens} tokens for {self}; got shape {tuple(x.shape)}.")
        return rearrange(x[:, -self.entity_sizes[-1] :], "b (h w) ... -> b h w ...", h=self.grid[0])

    @cached_property
    def sequence(self) -> Tensor:
        """The number of each place in its own order, 0..N-1: [N] int64, on the CPU."""
        return torch.arange(self.num_tokens)

    @cached_property
    def entity(self) -> Tensor:
        """The scale of each place of the sequence, never decreasing: [N] int64, on the CPU."""
        return torch.arange(self.num_entities).repeat_interleave(torch.tensor(self.entity_sizes))

    @cached_property
    def positions(self) -> Tensor:
        """The (row, column) of each patch's centre in the coordinates of the finest grid: [N, 2] float, on the CPU."""
        return torch.cat([_centres(scale, self.grid) for scale in self.scales])

    def to_dict(self) -> dict[str, Any]:
        """Plain values from which `from_dict` makes an equal pyramid."""
        return {"grid": list(self.grid), "scales": [list(scale) for scale in self.scales], "resize": self.resize}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ScalePyramid:
        scales = tuple(as_pair(scale, "scales") for scale in values["scales"])
        return cls(as_pair(values["grid"], "grid"), scales, values["resize"])


AnyOrdering = Ordering | ScalePyramid


def _halvings(grid: Pair) -> tuple[Pair, ...]:
    found = [grid]
    while found[0] != (1, 1):
        found.insert(0, (-(-found[0][0] // 2), -(-found[0][1] // 2)))
    return tuple(found)


def _centres(scale: Pair, grid: Pair) -> Tensor:
    rows, columns = ((torch.arange(s) + 0.5) * (n / s) - 0.5 for s, n in zip(scale, grid, strict=True))
    return torch.cartesian_prod(rows, columns).view(-1, 2)


@lru_cache(maxsize=256)
def _index(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once per device: a new one each step would be a copy from the host."""
    with torch.inference_mode(False):  # one first made for inference must serve training later
        return torch.tensor(values, device=device)


def _shown(values: Sequence[int], most: int = 20) -> str:
    return str(list(values[:most])) + (" ..." if len(values) > most else "")
