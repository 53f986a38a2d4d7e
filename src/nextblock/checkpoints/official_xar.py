"""Weights in the layout of the official xAR code, by name table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from nextblock.checkpoints.foreign_files import read_tensors
from nextblock.checkpoints.name_table import Row, count, load_by_table, require_shapes
from nextblock.checkpoints.sizes import Sizes, completed, ratio_of, require_tokens, square
from nextblock.errors import CheckpointError, ConfigError
from nextblock.layers.rope import THETA
from nextblock.mask import block_causal_mask
from nextblock.portable import weights_follow
from nextblock.xar.config import PRESETS, XARConfig
from nextblock.xar.model import XAR

WRAPPERS = ("model_ema", "model", "state_dict")  # of a training file, the averaged weights
_ROPE = "encoder_blocks.0.attn.rope.freqs"


def _raster(table: Tensor, config: XARConfig) -> Tensor:
    """Position rows in the order of the sequence -> in raster order: [1, N, D] -> same."""
    return table[:, config.entities.sequence.argsort()]


def _sequence(table: Tensor, config: XARConfig) -> Tensor:
    return table[:, config.entities.sequence]


def xar_table(depth: int) -> list[Row]:
    """The rows for a model of `depth` layers: the official halves are counted apart."""
    table = [
        Row("mask", None),
        Row("encoder_blocks.{n}.attn.rope.{any}", None),
        Row("decoder_blocks.{n}.attn.rope.{any}", None),
        Row("encoder_pos_embed_learned", "position1", _raster, _sequence),
        Row("decoder_pos_embed_learned", "position2", _raster, _sequence),
        Row("class_emb.weight", "class_embedding.weight"),
        Row("time_embed.mlp.0.{part}", "time_embedding.fc1.{part}"),
        Row("time_embed.mlp.2.{part}", "time_embedding.fc2.{part}"),
        Row("z_proj.{part}", "tokens_in.{part}"),
        Row("z_proj_ln.weight", "norm_in.weight"),
        Row("encoder_norm.weight", "norm_middle.weight"),
        Row("decoder_embed.{part}", "middle.{part}"),
        Row("decoder_norm.weight", "norm_out.weight"),
        Row("pred.{part}", "tokens_out.{part}"),
    ]
    for half, first, layers in (("encoder", 0, depth // 2), ("decoder", depth // 2, depth - depth // 2)):
        for i in range(layers):
            theirs, ours = f"{half}_blocks.{i}", f"layers.{first + i}"
            table += [
                Row(f"{theirs}.attn.qkv.{{part}}", f"{ours}.attn.qkv.{{part}}"),
                Row(f"{theirs}.attn.proj.{{part}}", f"{ours}.attn.out.{{part}}"),
                Row(f"{theirs}.mlp.fc1_g.{{part}}", f"{ours}.mlp.gate.{{part}}"),
                Row(f"{theirs}.mlp.fc1_x.{{part}}", f"{ours}.mlp.value.{{part}}"),
                Row(f"{theirs}.mlp.fc2.{{part}}", f"{ours}.mlp.out.{{part}}"),
                Row(f"{theirs}.ada_lin.1.{{part}}", f"{ours}.modulation.{{part}}"),
            ]
    return table


def xar_buffers(config: XARConfig) -> dict[str, Tensor]:
    """The tensors of an official state dict that are no parameters, made anew: the mask and the tables of RoPE."""
    entities, side = config.entities.entity, config.width // config.num_heads // 2
    blocked = torch.where(entities[:, None] >= entities[None, :], 0.0, -torch.inf)
    found = {"mask": blocked[None, None]}
    frequencies = 1.0 / (THETA ** (torch.arange(0, side, 2)[: side // 2].float() / side))
    angles = config.entities.positions.float()[:, :, None] * frequencies  # [N, 2, side / 2]
    turned = repeat(angles, "n two f -> n (two f pair)", pair=2)
    for half, layers in (("encoder", config.depth // 2), ("decoder", config.depth - config.depth // 2)):
        for i in range(layers):
            rope = f"{half}_blocks.{i}.attn.rope"
            found |= {
                f"{rope}.freqs": frequencies,
                f"{rope}.freqs_cos": turned.cos(),
                f"{rope}.freqs_sin": turned.sin(),
            }
    return {name: tensor.clone() for name, tensor in found.items()}


def xar_sizes(
    tensors: Mapping[str, Tensor], where: object, given: Mapping[str, Any] | None = None, preset: str | None = None
) -> Sizes:
    """The fields of XARConfig that official tensors show; the rest from `given`, or from the preset that agrees.

    The width of a head shows in the tables of RoPE, the size of an entity in the mask, where the file has them. The
    ordering is cells in every official file, of 8 where nothing shows it.

    Raises CheckpointError when these are not the tensors of an xAR model, and as `sizes.completed`.
    """
    require_shapes(
        tensors,
        {
            "encoder_pos_embed_learned": 3, "z_proj.weight": 2, "class_emb.weight": 2,
            "encoder_blocks.0.mlp.fc1_g.weight": 2,
        },
        f"{where} holds no xAR model in the official layout.",
    )  # fmt: skip
    _, tokens, width = tensors["encoder_pos_embed_learned"].shape
    require_tokens(tokens, where)
    halves = [count(tensors, rf"{half}_blocks\.(\d+)\.") for half in ("encoder", "decoder")]
    shown: dict[str, Any] = {
        "latent_size": square(tokens, "position embeddings", None, where), "patch_size": 1,
        "latent_channels": tensors["z_proj.weight"].shape[1], "width": width, "depth": sum(halves),
        "mlp_ratio": ratio_of(tensors["encoder_blocks.0.mlp.fc1_g.weight"].shape[0], width, 2),
        "num_classes": tensors["class_emb.weight"].shape[0] - 1,
    }  # fmt: skip
    hidden = {"num_heads": ("width", "depth")}
    rope = tensors.get(_ROPE)
    if rope is not None and rope.ndim == 1 and len(rope) and width % (4 * len(rope)) == 0:
        shown["num_heads"] = width // (4 * len(rope))
        hidden = {}
    shown |= _entity_size(tensors, tokens, where)
    presets = {name: XARConfig.preset(name).to_dict() for name in PRESETS}
    published = {"ordering": "cells"} | ({} if "entity_size" in shown else {"entity_size": 8})
    return completed(shown, hidden, given or {}, presets, preset, where, published)


def _entity_size(tensors: Mapping[str, Tensor], tokens: int, where: object) -> dict[str, Any]:
    """What the mask shows, where the file has one: the side of a square entity.

    Raises CheckpointError for a mask that is not that of entities of one size, each seeing itself and earlier ones.
    """
    mask = tensors.get("mask")
    if mask is None:
        return {}
    if mask.shape == (1, 1, tokens, tokens):
        size = int((mask[0, 0, 0] == 0).sum())
        entity = torch.arange(tokens) // max(1, size)
        if size and tokens % size == 0 and torch.equal(mask[0, 0] == 0, block_causal_mask(entity)):
            return {"entity_size": square(size, "tokens in an entity", None, where)}
    raise CheckpointError(f"{where} has a mask {tuple(mask.shape)} that is not entity-causal over {tokens} tokens.")


def load_official_xar(
    path: str | Path, config: XARConfig | None = None, *, preset: str | None = None, **given: Any
) -> XAR:
    """An xAR model with the weights of an official checkpoint, in eval mode.

    Args:
        path: a bare state dict, or what the official training writes; of that, the averaged weights.
        config: the sizes, if not those that the file shows. The ordering is cells of 8 in every official file.
        preset: the named model from which what tensors do not show is taken; the one that agrees by default.
        given: fields of XARConfig that tensors do not show: num_heads, where the file has no tables of RoPE.

    Raises:
        ConfigError: for ordering "scales", whose position embeddings are others than those of a partition.
        CheckpointError: the file cannot be read, something is not shown and not said, or tensors are missing,
            unexpected or of another shape; the message lists them.
    """
    if "scales" in (given.get("ordering"), config.ordering if config else None):
        raise ConfigError("official xAR weights are for cells; ordering 'scales' has position embeddings of its own.")
    tensors = read_tensors(path, WRAPPERS)
    if config is None:
        config = XARConfig(**xar_sizes(tensors, path, given, preset).values)
    with weights_follow():
        model = XAR(config)
    load_by_table(model, tensors, xar_table(config.depth), config, path)
    return model.eval()
