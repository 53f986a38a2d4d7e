"""Sampling: entity by entity, each denoised from noise given the clean ones before it (arXiv 2502.20388, section 3.3).

Earlier entities are read from a cache of keys and values, filled by one pass over each finished entity at t = 0; the
newest entity may see everything, so no mask is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nextblock.errors import ConfigError, nearest
from nextblock.layers.patches import patchify, unpatchify
from nextblock.ordering import ScalePyramid
from nextblock.randomness import normals
from nextblock.xar.model import XAR
from nextblock.xar.passes import Passes
from nextblock.xar.solvers import solver_named, time_grid

SCHEDULES = ("linear", "constant")

Draws = Sequence[Tensor] | torch.Generator | None
Watch = Callable[[int, int, Callable[[], Tensor]], None]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598): v = v(no class) + scale · (v(class) - v(no class)).

    Attributes:
        scale: 1 = none; more insists on the class; less, down to 0 = as if no class were given, lets go of it.
        schedule: "linear", from 1 at the first entity to `scale` at the last (the official code; a single entity gets
            `scale`), or "constant".
        interval: (low, high); at times outside, nothing is guided (arXiv 2404.07724).
    """

    scale: float = 1.0
    schedule: str = "linear"
    interval: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            hint = nearest(self.schedule, SCHEDULES)
            raise ConfigError(f"guidance_schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}.{hint}")
        if not math.isfinite(self.scale):
            raise ConfigError(f"guidance must be a finite number; got {self.scale!r}.")
        if self.scale < 0:
            raise ConfigError(
                f"guidance must be 0 or more (1 = no guidance, more insists on the class, 0 = as if no class were "
                f"given); got {self.scale:g}."
            )
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            raise ConfigError(f"guidance_interval must be (low, high) inside 0..1; got {self.interval!r}.")

    def of(self, entity: int, entities: int) -> float:
        """The scale of one entity."""
        if self.schedule == "constant" or entities == 1:
            return self.scale
        return 1 + (self.scale - 1) * entity / (entities - 1)


@torch.no_grad()
def sample_latents(
    model: XAR,
    labels: Tensor | None = None,
    *,
    steps: int = 50,
    solver: str = "euler_maruyama",
    guidance: float = 1.0,
    guidance_schedule: str = "linear",
    guidance_interval: Sequence[float] = (0.0, 1.0),
    time_grid: str | Sequence[float] = "auto",
    draws: Draws = None,
    seed: int = 0,
    indices: Sequence[int] | Tensor | None = None,
    count: int | None = None,
    known: Tensor | None = None,
    num_known: int = 0,
    state_dtype: torch.dtype = torch.float64,
    watch: Watch | None = None,
    passes: Passes | None = None,
) -> Tensor:
    """Sample latents: [B, C, H, W] float32, on the model's device. Nothing is dropped, whatever mode the model is in.

    Args:
        model: a trained generator.
        labels: int64 [B]; None for an unconditional model, with `count` images.
        steps: solver steps for each entity.
        solver: "euler_maruyama" (as published), "euler", "heun" or "multistep"; see `solvers`.
        guidance, guidance_schedule, guidance_interval: see `Guidance`.
        time_grid: see `solvers.time_grid`.
        draws: all Gaussian numbers, [B, K, C·p·p] tensors in the order of use (for each entity its start, then one for
            every stochastic step), or a generator; when absent they are drawn for each image from (seed, index) alone.
        seed: of the draws.
        indices: [B] numbers of the images, 0..B-1 when absent: image i is the same whatever is sampled beside it
            (its noise to the bit, the image to rounding).
        count: B, where there are no labels.
        known: [B, C, H, W] latents whose first `num_known` entities are taken; the rest is sampled. Entities later in
            the order cannot condition earlier ones, so only the first ones can be given.
        num_known: see `known`.
        state_dtype: of the solver's state; the model runs in its own precision.
        watch: called as (entity, step, picture) after every step; picture() gives the latents so far, [B, C, H, W]:
            entities not begun are zeros, and of a pyramid the present scale is shown enlarged.
        passes: who runs the model; `FastPasses(model)`, made once, where much is sampled. The numbers are the same to
            rounding.

    Raises ConfigError for what cannot work: guidance without classes, labels out of range, unknown names.
    """
    if passes is not None and passes.made_for is not model:
        raise ValueError("these passes were made for another model")
    guide = Guidance(guidance, guidance_schedule, guidance_interval)
    run = _Run(model, guide, labels, count, state_dtype, passes or Passes(model))
    run.watch = watch
    run.set_draws(draws, seed, indices)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return run.sample(steps, solver, time_grid, known, num_known)
    finally:
        for module, training in modes:
            module.training = training


class _Run:
    """One batch: the model with and without class, its cache, and where numbers come from."""

    def __init__(
        self,
        model: XAR,
        guidance: Guidance,
        labels: Tensor | None,
        count: int | None,
        dtype: torch.dtype,
        passes: Passes,
    ) -> None:
        self.model, self.guidance, self.dtype, self.passes = model, guidance, dtype, passes
        self.device = model.position1.device
        self.ordering = model.ordering
        self.watch: Watch | None = None
        self.labels, self.batch = _checked_labels(model, labels, count, guidance.scale)
        self.done: list[Tensor] = []  # finished entities

    def set_draws(self, draws: Draws, seed: int, indices: Sequence[int] | Tensor | None) -> None:
        places = range(self.batch) if indices is None else [int(i) for i in indices]
        if len(places) != self.batch or min(places) < 0:
            raise ConfigError(f"indices must number the {self.batch} images, from 0; got {list(places)[:8]}.")
        self._given: Iterator[Tensor] | None = None
        self._draw: Callable[[int, int, tuple[int, int]], Tensor]
        if isinstance(draws, torch.Generator):
            generator = draws
            self._draw = lambda entity, i, shape: torch.randn(
                self.batch, *shape, generator=generator, device=generator.device
            )
        elif draws is not None:
            self._given = iter(draws)
            self._draw = self._next_given
        else:
            self._draw = lambda entity, i, shape: normals(seed, f"sample/entity{entity}/draw{i}", places, shape)

    def _next_given(self, entity: int, i: int, shape: tuple[int, int]) -> Tensor:
        assert self._given is not None
        found = next(self._given, None)
        if found is None or tuple(found.shape) != (self.batch, *shape):
            what = "there are no more" if found is None else f"got {list(found.shape)}"
            raise ConfigError(f"draw {i} of entity {entity} must be {[self.batch, *shape]}; {what}.")
        return torch.as_tensor(found)

    def sample(
        self,
        steps: int,
        solver: str,
        grid: str | Sequence[float],
        known: Tensor | None,
        num_known: int,
    ) -> Tensor:
        model, entities = self.model, self.ordering.num_entities
        solve, times = solver_named(solver), time_grid(grid, steps, solver)
        given = self._known_tokens(known, num_known)
        self.passes.begin(self.batch, self.labels, self._guided_from(0), times)
        for entity in range(entities):
            where = model.entity_range(entity)
            if entity < num_known:
                x = given[:, where]
            else:
                x = self._entity(entity, solve, times, (where.stop - where.start, model.config.token_channels))
            self.done.append(x)
            if entity + 1 < entities:
                self._remember(entity, x)
        return unpatchify(torch.cat(self.done, 1).float(), model.config.patch, self.ordering)

    def _entity(self, entity: int, solve: Callable[..., Tensor], times: list[float], shape: tuple[int, int]) -> Tensor:
        """Denoise one entity: [B, K, C·p·p]."""
        drawn = itertools.count()

        def noise() -> Tensor:
            found: Tensor = self._draw(entity, next(drawn), shape)
            if self.device.type == "cuda" and found.device.type == "cpu":
                found = found.pin_memory()  # else the host would wait for all that the device has yet to do
            return found.to(self.device, non_blocking=True).to(self.dtype)

        def seen(step: int, x: Tensor) -> None:
            if self.watch:
                self.watch(entity, step, lambda: self._picture(x))

        return solve(lambda x, t: self._velocity(entity, x, t), noise(), times, noise, seen)

    def _velocity(self, entity: int, x: Tensor, t: float) -> Tensor:
        scale = self.guidance.of(entity, self.ordering.num_entities)
        low, high = self.guidance.interval
        if scale == 1 or not low <= t <= high:
            return self._call(entity, x, t, doubled=False)
        with_class, without = self._call(entity, x, t, doubled=True).chunk(2)
        return without + scale * (with_class - without)

    def _call(self, entity: int, x: Tensor, t: float, *, doubled: bool) -> Tensor:
        """The model's velocities; with `doubled`, those without a class behind them."""
        return self.passes.velocities(entity, x, t, doubled=doubled).to(self.dtype)

    def _remember(self, entity: int, x: Tensor) -> None:
        """One pass over a finished entity at t = 0; without a class too when a later entity is guided."""
        self.passes.remember(entity, x, doubled=self._guided_from(entity + 1))

    def _guided_from(self, entity: int) -> bool:
        """Whether this entity or a later one is guided."""
        entities = self.ordering.num_entities
        return any(self.guidance.of(n, entities) != 1 for n in range(entity, entities))

    def _known_tokens(self, known: Tensor | None, num_known: int) -> Tensor:
        model, entities = self.model, self.ordering.num_entities
        if not 0 <= num_known <= entities or (num_known and known is None):
            raise ConfigError(
                f"num_known must be between 0 and the {entities} entities, with `known` latents; got {num_known}."
            )
        if known is None:
            return torch.empty(0)
        model._check_latents(known, "known")
        if len(known) != self.batch:
            raise ConfigError(f"known must hold {self.batch} latents, one for each image; got {len(known)}.")
        return patchify(known.to(self.device), model.config.patch, self.ordering).to(self.dtype)

    def _picture(self, x: Tensor) -> Tensor:
        """What there is so far, [B, C, H, W]: later entities are zeros; of a pyramid, the scale `x`, enlarged."""
        config, ordering = self.model.config, self.ordering
        if isinstance(ordering, ScalePyramid):
            size = ordering.scales[len(self.done)]
            rows = torch.cat((x.new_zeros(len(x), ordering.num_tokens - x.shape[1], x.shape[2]), x), 1).float()
            small = ScalePyramid(size, (size,))
            image = unpatchify(rows[:, -x.shape[1] :], config.patch, small)
            return F.interpolate(image, config.latent, mode="nearest")
        tokens = torch.cat((*self.done, x), 1).float()
        rest = tokens.new_zeros(len(x), ordering.num_tokens - tokens.shape[1], tokens.shape[2])
        return unpatchify(torch.cat((tokens, rest), 1), config.patch, ordering)


def _checked_labels(model: XAR, labels: Tensor | None, count: int | None, scale: float) -> tuple[Tensor | None, int]:
    classes = model.config.num_classes
    if not classes:
        if scale != 1:
            raise ConfigError("guidance needs a model that knows classes; this one is unconditional. Use guidance 1.")
        if labels is not None:
            raise ConfigError("this model is unconditional; it takes no labels, but `count`.")
        if count is None or count < 1:
            raise ConfigError(f"an unconditional model needs count, at least 1; got {count!r}.")
        return None, count
    if labels is None:
        raise ConfigError(f"this model knows {classes} classes and needs labels.")
    labels = torch.as_tensor(labels, device=model.position1.device)
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        raise ConfigError(
            f"labels must be whole numbers [B], one for each image; got {labels.dtype} {list(labels.shape)}."
        )
    labels = labels.long()
    if count not in (None, len(labels)):
        raise ConfigError(f"count is for models without classes; got {count} beside {len(labels)} labels.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > classes:
        raise ConfigError(f"labels must be 0 to {classes - 1} (or {classes} for no class); got {low} to {high}.")
    return labels, len(labels)
