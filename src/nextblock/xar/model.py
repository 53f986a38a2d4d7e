"""xAR (arXiv 2502.20388): every entity is denoised by flow matching, given the entities before it.

    noisy tokens -> linear -> + position -> norm -> half the layers -> norm -> linear -> + position
                 -> the other half -> norm -> linear -> velocities

Inside, tokens are entity-major (`ordering.py`). Latents are [B, C, H, W]; in pixel space they are the images.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextblock.errors import ConfigError
from nextblock.flow import noisy, velocity
from nextblock.layers.attention import KVCache
from nextblock.layers.patches import patchify
from nextblock.layers.rope import axial_angles, rotation
from nextblock.mask import block_causal_mask, teacher_forcing_mask
from nextblock.ordering import Ordering
from nextblock.portable import Portable, initialization_is_needed
from nextblock.xar.config import XARConfig
from nextblock.xar.layers import NORM_EPS, Steering, TimeEmbedding, XARLayer
from nextblock.xar.objective import draw_times, entity_loss

INIT_STD = 0.02


def initialize(module: nn.Module) -> None:
    """Set every parameter below `module`.

    =====================================  ==========================================
    parameter                              distribution
    =====================================  ==========================================
    every linear weight                    uniform, Glorot and Bengio (Xavier)
    class and position embeddings          normal, standard deviation 0.02
    every bias                             0
    weights of norms                       1
    =====================================  ==========================================
    """
    if not initialization_is_needed():
        return
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, nn.RMSNorm):
            part.reset_parameters()
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=INIT_STD)
        if isinstance(part, XAR):
            nn.init.normal_(part.position1, std=INIT_STD)
            nn.init.normal_(part.position2, std=INIT_STD)


class XAR(Portable, nn.Module):
    """The generator. `loss` trains it; `sampler.sample_latents` makes images with it.

    Position embeddings are stored by patch coordinate (raster order; scale after scale for a pyramid).
    """

    def __init__(self, config: XARConfig) -> None:
        super().__init__()
        self.config, self.ordering = config, config.entities
        width, hidden = config.width, int(config.width * config.mlp_ratio * 2 / 3)
        self.tokens_in = nn.Linear(config.token_channels, width)
        self.position1 = nn.Parameter(torch.empty(1, self.ordering.num_tokens, width))
        self.norm_in = nn.RMSNorm(width, eps=NORM_EPS)
        self.class_embedding = nn.Embedding(config.num_classes + 1, width)  # the last row: no class
        self.time_embedding = TimeEmbedding(width)
        self.layers = nn.ModuleList(
            XARLayer(width, config.num_heads, hidden, config.dropout, config.attention_dropout)
            for _ in range(config.depth)
        )
        self.norm_middle = nn.RMSNorm(width, eps=NORM_EPS)
        self.middle = nn.Linear(width, width)
        self.position2 = nn.Parameter(torch.empty(1, self.ordering.num_tokens, width))
        self.norm_out = nn.RMSNorm(width, eps=NORM_EPS)
        self.tokens_out = nn.Linear(width, config.token_channels)
        self._make_buffers()
        initialize(self)

    def _make_buffers(self) -> None:
        """What follows from the ordering; never saved."""
        ordering, entity = self.ordering, self.ordering.entity
        cos, sin = rotation(axial_angles(ordering.positions, self.config.width // self.config.num_heads))
        doubled = self.config.context == "clean"
        made = {
            "sequence": ordering.sequence,
            "entity": entity,
            "cos": cos,
            "sin": sin,
            "mask": self._doubled_mask() if doubled else block_causal_mask(entity),
        }
        for name, value in made.items():
            self.register_buffer(name, value, persistent=False)
        self.sequence: Tensor
        self.entity: Tensor
        self.cos: Tensor
        self.sin: Tensor
        self.mask: Tensor

    @property
    def null_label(self) -> int:
        """The label that stands for no class."""
        return self.config.num_classes

    def loss(
        self,
        latents: Tensor,
        labels: Tensor | None = None,
        *,
        times: Tensor | None = None,
        noise: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """Flow matching of every entity given the noisy ones before it, a scalar (arXiv 2502.20388, eq. 3 and 4).

        Args:
            latents: [B, C, H, W].
            labels: int64 [B]; None for an unconditional model.
            times: [B, E] in (0, 1), one for each entity; drawn when absent.
            noise: [B, N, C·p·p] entity-major, or [B, C, H, W] unless the ordering is a pyramid; drawn when absent.
            dropped: bool [B], images shown without their label; drawn in training when absent, none in eval mode.

        Raises ConfigError when shapes do not fit the configuration. The mean is over tokens or entities, as
        `config.loss_mean` says.
        """
        config = self.config
        self._check_latents(latents)
        tokens = patchify(latents, config.patch, self.ordering)  # [B, N, C·p·p]
        if times is None:
            uniforms = torch.rand(len(latents), self.ordering.num_entities, device=latents.device)
            times = draw_times(config, uniforms)
        noise = torch.randn_like(tokens) if noise is None else self._noise_tokens(noise, tokens)
        if tuple(times.shape) != (len(latents), self.ordering.num_entities):
            raise ConfigError(
                f"times must be [B, E] = {[len(latents), self.ordering.num_entities]}; got {list(times.shape)}."
            )
        t = times[:, self.entity, None].to(tokens.dtype)  # [B, N, 1]
        labels = self._labels(labels, len(latents), dropped)
        x = noisy(tokens, noise, t)
        if config.context == "clean":
            clean = self.entity_range(self.ordering.num_entities - 1).start
            both = torch.cat((tokens[:, :clean], x), 1)
            doubled_times = torch.cat((torch.zeros_like(times[:, 1:]), times), 1)
            predicted = self._run(both, doubled_times, labels, self._doubled(), self.mask)[:, clean:]
        else:
            entities = self.ordering.num_entities
            mask = self.mask if entities > 1 else None
            predicted = self._run(x, times, labels, self._part(0, entities), mask)
        return entity_loss(predicted, velocity(tokens, noise), self.ordering, config.loss_mean)

    def forward(
        self,
        latents: Tensor,
        labels: Tensor | None = None,
        times: Tensor | None = None,
        noise: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> Tensor:
        """`loss`, as the module's call, which wrappers (DDP, precision) hook."""
        return self.loss(latents, labels, times=times, noise=noise, dropped=dropped)

    def velocities(
        self,
        tokens: Tensor,
        times: Tensor,
        labels: Tensor | None = None,
        *,
        first: int = 0,
        cache: KVCache | None = None,
        masked: bool = True,
        modulations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The velocities of successive entities: [B, n, C·p·p] -> same.

        Args:
            tokens: noisy (or clean) tokens of entities `first`, `first` + 1, ..., as many as `times` has.
            times: [B, e], the time of each of them.
            labels: int64 [B], `null_label` for no class; None for an unconditional model.
            first: the first entity.
            cache: earlier entities' keys and values, attended to as well; these tokens are written behind them (and
                kept only if `cache.keep` is called).
            masked: entity-causal; False when the tokens are of one entity, which sees everything before it and itself.
            modulations: those of `times` and `labels`, where they are used again and again.
        """
        part = self._part(first, times.shape[1])
        mask = None
        if masked and times.shape[1] > 1:
            seen = slice(0 if cache else part[0].start, part[0].stop)
            mask = block_causal_mask(self.entity)[part[0], seen]
        return self._run(tokens, times, self._labels(labels, len(tokens), None), part, mask, cache, modulations)

    def modulations(self, times: Tensor, labels: Tensor | None = None) -> list[Tensor]:
        """What times [B, e] and labels [B] make of every layer, its scales, shifts and gates: each [B, e, 6·D]."""
        condition = self._condition(times, self._labels(labels, len(times), None))
        return [layer.modulation(condition) for layer in self.layers if isinstance(layer, XARLayer)]

    def remember(
        self,
        tokens: Tensor,
        times: Tensor,
        labels: Tensor | None = None,
        *,
        entity: int,
        cache: KVCache,
        modulations: Sequence[Tensor] | None = None,
    ) -> None:
        """Write the keys and values of one entity's tokens into the cache, as `velocities` does, and nothing beyond."""
        labels, part = self._labels(labels, len(tokens), None), self._part(entity, 1)
        self._through(tokens, times, labels, part, None, cache, modulations, only_remember=True)

    def new_cache(self) -> KVCache:
        """Room for the whole sequence."""
        return KVCache(self.config.depth, self.ordering.num_tokens)

    def entity_range(self, entity: int) -> slice:
        """Where an entity's tokens stand in the sequence."""
        sizes = self.ordering.entity_sizes
        return slice(sum(sizes[:entity]), sum(sizes[: entity + 1]))

    def _part(self, first: int, count: int) -> tuple[slice, Steering, tuple[Tensor, ...]]:
        """Where tokens of these entities stand, who steers them, and their angles and position rows."""
        where = slice(self.entity_range(first).start, self.entity_range(first + count - 1).stop)
        steering = Steering(self.entity[where] - first, self.ordering.entity_sizes[first : first + count])
        return where, steering, (self.cos[where], self.sin[where], self.sequence[where])

    def _doubled(self) -> tuple[slice, Steering, tuple[Tensor, ...]]:
        """The same for the clean sequence, without its last entity, followed by the noisy one."""
        sizes, last = self.ordering.entity_sizes, self.ordering.num_entities - 1
        clean = self.entity_range(last).start
        steering = Steering(torch.cat((self.entity[:clean], self.entity + last)), sizes[:-1] + sizes)
        twice = tuple(torch.cat((x[:clean], x)) for x in (self.cos, self.sin, self.sequence))
        return slice(0, clean + len(self.entity)), steering, twice

    def _doubled_mask(self) -> Tensor:
        """Teacher forcing without the clean version of the last entity, which nobody else sees."""
        entity = self.ordering.entity
        seen = torch.cat((entity < entity[-1], torch.ones_like(entity, dtype=torch.bool)))
        return teacher_forcing_mask(entity)[seen][:, seen]

    def _run(
        self,
        tokens: Tensor,
        times: Tensor,
        labels: Tensor,
        part: tuple[slice, Steering, tuple[Tensor, ...]],
        mask: Tensor | None,
        cache: KVCache | None = None,
        modulations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        x = self._through(tokens, times, labels, part, mask, cache, modulations)
        out: Tensor = self.tokens_out(self.norm_out(x))
        return out

    def _through(
        self,
        tokens: Tensor,
        times: Tensor,
        labels: Tensor,
        part: tuple[slice, Steering, tuple[Tensor, ...]],
        mask: Tensor | None,
        cache: KVCache | None,
        modulations: Sequence[Tensor] | None,
        *,
        only_remember: bool = False,
    ) -> Tensor:
        """The output of the last layer, [B, n, D]; with `only_remember` its input: of it, the cache is filled only."""
        _, steering, (cos, sin, rows) = part
        condition = None if modulations else self._condition(times, labels)
        x = self.norm_in(self.tokens_in(tokens) + self.position1[:, rows])
        half, last = len(self.layers) // 2, len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            if i == half:
                x = self.middle(self.norm_middle(x)) + self.position2[:, rows]
            modulated, place = modulations[i] if modulations else None, (cache, i) if cache else None
            if only_remember and i == last:
                assert place is not None
                assert isinstance(layer, XARLayer)
                layer.remember(x, condition, steering, (cos, sin), place, modulated)
            else:
                x = layer(x, condition, steering, mask, (cos, sin), place, modulated)
        return x

    def _condition(self, times: Tensor, labels: Tensor) -> Tensor:
        """Class and time of every entity, [B, e, D]."""
        return F.silu(self.class_embedding(labels)[:, None] + self.time_embedding(times))

    def _labels(self, labels: Tensor | None, batch: int, dropped: Tensor | None) -> Tensor:
        """[B] rows of the class embedding, some of them the one for no class."""
        device = self.position1.device
        if not self.config.num_classes:
            if labels is not None:
                raise ConfigError("this model is unconditional (num_classes 0); it takes no labels.")
            return torch.zeros(batch, dtype=torch.int64, device=device)
        if labels is None:
            raise ConfigError(f"this model knows {self.config.num_classes} classes and needs labels.")
        if tuple(labels.shape) != (batch,):
            raise ConfigError(f"labels must be [{batch}], one for each image; got {list(labels.shape)}.")
        if labels.device.type == "cpu" and not ((labels >= 0) & (labels <= self.null_label)).all():
            raise ConfigError(  # on another device the look would make the host wait
                f"labels must be 0 to {self.null_label - 1} (or {self.null_label} for no class); got "
                f"{int(labels.min())} to {int(labels.max())}."
            )
        rate = self.config.label_dropout
        if dropped is None and self.training and rate:
            dropped = torch.rand(batch, device=device) < rate
        return labels if dropped is None else torch.where(dropped, self.null_label, labels)

    def _noise_tokens(self, noise: Tensor, tokens: Tensor) -> Tensor:
        if noise.ndim == 4 and isinstance(self.ordering, Ordering):
            self._check_latents(noise, "noise")
            noise = patchify(noise, self.config.patch, self.ordering)
        if noise.shape != tokens.shape:
            raise ConfigError(f"noise must be {list(tokens.shape)}, entity-major; got {list(noise.shape)}.")
        return noise

    def _check_latents(self, latents: Tensor, what: str = "latents") -> None:
        wanted = (self.config.latent_channels, *self.config.latent)
        if latents.ndim != 4 or tuple(latents.shape[1:]) != wanted:
            raise ConfigError(f"{what} must be [B, {', '.join(map(str, wanted))}]; got {list(latents.shape)}.")
