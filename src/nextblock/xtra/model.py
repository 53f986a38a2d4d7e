"""XTRA (arXiv 2411.15648): encoder -> projection -> predictor -> pixels of the next cell.

Inside the models the tokens are entity-major (`ordering.py`); what is handed back is in raster order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nextblock.errors import ConfigError
from nextblock.layers.patches import entity_pixels, patchify, resized_positions
from nextblock.layers.transformer import MLP, NORM_EPS, Transformer
from nextblock.mask import block_causal_mask
from nextblock.ordering import Ordering, as_pair
from nextblock.portable import Portable, initialization_is_needed
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.objective import next_entity_loss, normalize_cells

INIT_STD = 0.02


def initialize(module: nn.Module) -> None:
    """Set every parameter below `module`.

    ============================  =====================================================
    parameter                     distribution
    ============================  =====================================================
    patch embedding, weight       normal, variance 2 / (C·p·p)  (Kaiming, fan-in)
    every other linear weight     truncated normal, standard deviation 0.02
    position embeddings           truncated normal, standard deviation 0.02
    every bias                    0
    LayerNorm weight and bias     1 and 0
    ============================  =====================================================
    """
    if not initialization_is_needed():
        return
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            if name.rsplit(".", 1)[-1] == "patch_embed":
                nn.init.kaiming_normal_(part.weight, mode="fan_in")
            else:
                nn.init.trunc_normal_(part.weight, std=INIT_STD)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.LayerNorm):
            part.reset_parameters()
        if isinstance(part, (Encoder, Predictor)):
            nn.init.trunc_normal_(part.position, std=INIT_STD)


class _OnGrid(nn.Module):
    """Position embeddings and the block-causal mask of tokens that stand on the grid of an image."""

    def __init__(self, config: XTRAConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.position = nn.Parameter(torch.empty(1, config.ordering.num_patches, width))  # raster order
        self.mask: Tensor
        self.register_buffer("mask", block_causal_mask(config.ordering.entity), persistent=False)

    def positions(self, ordering: Ordering) -> Tensor:
        """[1, N, D], entity-major; resized when the grid is not that of training."""
        table = resized_positions(self.position, self.config.grid, ordering.grid)
        return ordering.split(rearrange(table, "1 (h w) d -> 1 h w d", h=ordering.grid[0]))

    def mask_for(self, ordering: Ordering, tokens: int) -> Tensor:
        """[tokens, tokens] bool for the first tokens of the sequence."""
        mask = self.mask
        if ordering.grid != self.config.grid or ordering.entity_size != self.config.ordering.entity_size:
            mask = block_causal_mask(ordering.entity.to(mask.device))
        return mask[:tokens, :tokens].contiguous()


class Encoder(Portable, _OnGrid):
    """A vision transformer under a block-causal mask; what remains after pre-training.

    A token sees its own cell and earlier cells only, after training too (as in the published probes), unless
    `bidirectional=True`. Images of another size than that of training are taken as long as the cells fit
    (with `bidirectional=True`, the patches); position embeddings are then resized.

    Raises ConfigError when an image's size or channels do not fit.
    """

    def __init__(self, config: XTRAConfig) -> None:
        super().__init__(config, config.width)
        hidden = int(config.width * config.mlp_ratio)
        self.patch_embed = nn.Linear(config.channels * config.patch[0] * config.patch[1], config.width)
        self.layers = Transformer(config.width, config.depth, config.num_heads, hidden, config.drop_path)
        self.norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        initialize(self)

    def forward(self, images: Tensor, *, bidirectional: bool = False) -> Tensor:
        """[B, C, H, W] normalised images -> [B, N, D] tokens after the final norm, raster order."""
        ordering = self.ordering_for(images, bidirectional)
        *_, last = self.layer_outputs(images, ordering, bidirectional=bidirectional)
        return _raster(self.norm(last), ordering)

    def features(self, images: Tensor, last_layers: int = 1, *, bidirectional: bool = False) -> Tensor:
        """Mean of the outputs of the last layers, before the final norm: [B, N, D], raster order.

        Raises ConfigError unless 1 <= last_layers <= depth.
        """
        depth = self.config.depth
        if not 1 <= last_layers <= depth:
            raise ConfigError(f"last_layers must be between 1 and the depth ({depth}); got {last_layers}.")
        ordering = self.ordering_for(images, bidirectional)
        total: Tensor | None = None
        for i, x in enumerate(self.layer_outputs(images, ordering, bidirectional=bidirectional)):
            if i >= depth - last_layers:
                total = x if total is None else total + x
        assert total is not None
        return _raster(total / last_layers, ordering)

    def feature_map(
        self, images: Tensor, last_layers: int = 1, *, bidirectional: bool = False, pad: bool = False
    ) -> Tensor:
        """`features` as a picture, for detection, segmentation and other dense tasks: [B, D, h, w].

        Args:
            images: [B, C, H, W], normalised; of any size whose cells fit (with `bidirectional`, whose patches fit).
            last_layers: mean over the outputs of so many last layers, before the final norm.
            bidirectional: no mask: every place of the map knows the whole image.
            pad: take any size: zeros (the mean colour) are added below and on the right until it fits, and the map is
                cut to the patches that hold pixels of the image: h = ceil(H / patch height), w likewise.

        Raises ConfigError when the size does not fit and `pad` is not set.
        """
        height, width = images.shape[-2:]
        (p, q), (k, m) = self.config.patch, (1, 1) if bidirectional else as_pair(self.config.cell_size, "cell_size")
        if pad:
            images = F.pad(images, (0, -width % (q * m), 0, -height % (p * k)))
        x = self.features(images, last_layers, bidirectional=bidirectional)
        x = rearrange(x, "b (h w) d -> b d h w", h=images.shape[-2] // p)
        return x[:, :, : -(-height // p), : -(-width // q)]

    def ordering_for(self, images: Tensor, bidirectional: bool = False) -> Ordering:
        """The raster-order cells of these images; patches when nothing is masked."""
        config, (height, width) = self.config, images.shape[-2:]
        if images.ndim != 4 or images.shape[1] != config.channels:
            raise ConfigError(f"expected images [B, {config.channels}, H, W]; got {tuple(images.shape)}.")
        if height % config.patch[0] or width % config.patch[1]:
            raise ConfigError(f"an image of {height}×{width} px does not divide into patches of {config.patch} px.")
        grid = (height // config.patch[0], width // config.patch[1])
        return Ordering.patches(grid) if bidirectional else Ordering.cells(grid, config.cell_size)

    def layer_outputs(
        self,
        images: Tensor,
        ordering: Ordering,
        *,
        bidirectional: bool = False,
        drop_last: bool = False,
        uniforms: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield every layer's output, [B, n, D], entity-major.

        Args:
            images: [B, C, H, W].
            ordering: on the grid of these images.
            bidirectional: no mask.
            drop_last: leave out the last entity, which no earlier one may see: n = N - entity size.
            uniforms: [B, depth, 2] in [0, 1), decides drop path; drawn in training when absent.
        """
        n = ordering.num_patches - (ordering.entity_size if drop_last else 0)
        x = self.patch_embed(patchify(images, self.config.patch, ordering)[:, :n])
        x = x + self.positions(ordering)[:, :n]
        if uniforms is None and self.training and self.config.drop_path:
            uniforms = torch.rand(len(x), self.config.depth, 2, device=x.device)
        mask = None if bidirectional else self.mask_for(ordering, n)
        active = self.training and self.config.drop_path > 0
        yield from self.layers.outputs(x, mask, uniforms if active else None)


class Predictor(_OnGrid):
    """The second, smaller transformer, under the same mask: [B, n, W] -> [B, n, W]."""

    def __init__(self, config: XTRAConfig) -> None:
        width = config.predictor_width
        super().__init__(config, width)
        hidden = int(width * config.mlp_ratio)
        self.layers = Transformer(width, config.predictor_depth, config.predictor_heads, hidden)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Tensor, ordering: Ordering) -> Tensor:
        n = x.shape[1]
        x = x + self.positions(ordering)[:, :n]
        out: Tensor = self.norm(self.layers(x, self.mask_for(ordering, n)))
        return out


class XTRA(Portable, nn.Module):
    """The whole pre-training model. `encoder` is what one keeps."""

    def __init__(self, config: XTRAConfig) -> None:
        super().__init__()
        self.config = config
        cell_tokens = config.ordering.entity_size
        self.encoder = Encoder(config)
        self.projection = MLP(config.width, config.projection_hidden, config.predictor_width, out_bias=False)
        self.predictor = Predictor(config)
        self.heads = nn.ModuleList(
            MLP(cell_tokens * config.predictor_width, config.head_hidden, config.cell_pixels)
            for _ in range(config.num_lookahead)
        )
        self.orderings = config.orderings()
        initialize(self)

    def predict(self, images: Tensor, head: int = 0, ordering: Ordering | None = None) -> Tensor:
        """What head `head` predicts from every cell: [B, K, C·(k·p)²], cells in order.

        Entry c is the prediction of cell c + 1 + head from cells 0..c; each cell is (channel, row, column), in
        units of normalised cells when the model was trained so. The last entries predict nothing that exists.
        """
        if not 0 <= head < len(self.heads):
            raise ConfigError(f"head must be between 0 and {len(self.heads) - 1}; got {head}.")
        x = self._predictor_outputs(images, ordering or self.default_ordering(images), drop_last=False)
        predicted: Tensor = self.heads[head](x)
        return predicted

    def targets(self, images: Tensor, ordering: Ordering | None = None) -> Tensor:
        """The pixels of every cell, [B, K, C·(k·p)²], cells in order, before per-cell normalisation."""
        return entity_pixels(images, self.config.patch, ordering or self.default_ordering(images))

    def loss(self, images: Tensor, ordering: Ordering | None = None, uniforms: Tensor | None = None) -> Tensor:
        """Next-cell regression, a scalar.

        Args:
            images: [B, C, H, W], normalised.
            ordering: the order of the cells; the first configured one when absent. Any ordering whose entities
                have as many tokens as the configured cells will do.
            uniforms: [B, depth, 2] in [0, 1) for drop path; drawn when absent.

        The last entity is left out of the sequence: nothing is predicted from it and nothing earlier sees it,
        so loss and gradients are those of the full sequence.
        """
        ordering = ordering or self.default_ordering(images)
        self._check(ordering)
        x = self._predictor_outputs(images, ordering, drop_last=True, uniforms=uniforms)
        predictions = [head(x[:, : x.shape[1] - i]) for i, head in enumerate(self.heads)]
        targets = self.targets(images, ordering)
        if self.config.normalize_targets:
            targets = normalize_cells(targets)
        return next_entity_loss(predictions, targets, self.config.pixel_loss)

    def forward(self, images: Tensor, order: int = 0, uniforms: Tensor | None = None) -> Tensor:
        """The loss under `orderings[order]`, as the module's call, which wrappers (DDP, precision) hook."""
        return self.loss(images, self.orderings[order], uniforms)

    def default_ordering(self, images: Tensor) -> Ordering:
        """The first configured order; raster-order cells for images of another size than that of training."""
        found = self.encoder.ordering_for(images)
        return self.orderings[0] if found.grid == self.config.grid else found

    def _predictor_outputs(
        self, images: Tensor, ordering: Ordering, *, drop_last: bool, uniforms: Tensor | None = None
    ) -> Tensor:
        """The predictor's tokens of each entity side by side: [B, E, entity size × W]."""
        *_, x = self.encoder.layer_outputs(images, ordering, drop_last=drop_last, uniforms=uniforms)
        x = self.predictor(self.projection(self.encoder.norm(x)), ordering)
        joined: Tensor = rearrange(x, "b (e k) d -> b e (k d)", k=ordering.entity_size)
        return joined

    def _check(self, ordering: Ordering) -> None:
        wanted = self.config.ordering.entity_size
        if ordering.entity_size != wanted:
            raise ConfigError(
                f"the pixel head takes entities of {wanted} tokens; this ordering has {ordering.entity_size}."
            )
        if ordering.num_entities <= len(self.heads):
            raise ConfigError(
                f"{len(self.heads)} pixel heads look that many entities ahead and need more than that; "
                f"this ordering has {ordering.num_entities}."
            )


def _raster(x: Tensor, ordering: Ordering) -> Tensor:
    return rearrange(ordering.merge(x), "b h w d -> b (h w) d")
