"""Weights in the layout of the official xAR code, by name table."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from nextblock.checkpoints.name_table import Change, load_by_table, read_tensors
from nextblock.errors import ConfigError
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR


def _raster(table: Tensor, config: XARConfig) -> Tensor:
    """Position rows in the order of the sequence -> in raster order: [1, N, D] -> same."""
    return table[:, config.entities.sequence.argsort()]


def xar_table(depth: int) -> list[tuple[str, str | None, Change | None]]:
    """The rows for a model of `depth` layers: the official halves are counted apart."""
    table: list[tuple[str, str | None, Change | None]] = [
        (r"mask", None, None),
        (r"(?:en|de)coder_blocks\.\d+\.attn\.rope\..*", None, None),
        (r"encoder_pos_embed_learned", "position1", _raster),
        (r"decoder_pos_embed_learned", "position2", _raster),
        (r"class_emb\.weight", "class_embedding.weight", None),
        (r"time_embed\.mlp\.0\.(weight|bias)", r"time_embedding.fc1.\1", None),
        (r"time_embed\.mlp\.2\.(weight|bias)", r"time_embedding.fc2.\1", None),
        (r"z_proj\.(weight|bias)", r"tokens_in.\1", None),
        (r"z_proj_ln\.weight", "norm_in.weight", None),
        (r"encoder_norm\.weight", "norm_middle.weight", None),
        (r"decoder_embed\.(weight|bias)", r"middle.\1", None),
        (r"decoder_norm\.weight", "norm_out.weight", None),
        (r"pred\.(weight|bias)", r"tokens_out.\1", None),
    ]
    for half, first, count in (("encoder", 0, depth // 2), ("decoder", depth // 2, depth - depth // 2)):
        for i in range(count):
            official, ours = rf"{half}_blocks\.{i}", f"layers.{first + i}"
            table += [
                (rf"{official}\.attn\.qkv\.(weight|bias)", rf"{ours}.attn.qkv.\1", None),
                (rf"{official}\.attn\.proj\.(weight|bias)", rf"{ours}.attn.out.\1", None),
                (rf"{official}\.mlp\.fc1_g\.(weight|bias)", rf"{ours}.mlp.gate.\1", None),
                (rf"{official}\.mlp\.fc1_x\.(weight|bias)", rf"{ours}.mlp.value.\1", None),
                (rf"{official}\.mlp\.fc2\.(weight|bias)", rf"{ours}.mlp.out.\1", None),
                (rf"{official}\.ada_lin\.1\.(weight|bias)", rf"{ours}.modulation.\1", None),
            ]
    return table


def load_official_xar(path: str | Path, config: XARConfig) -> XAR:
    """An xAR model with the weights of an official checkpoint, in eval mode.

    Args:
        path: a bare state dict, or what the official training writes; of that, the averaged weights.
        config: the sizes; tensors do not show the number of heads, nor the ordering, which is cells of 8 in every
            official file.

    Raises:
        ConfigError: for ordering "scales", whose position embeddings are others than those of a partition.
        CheckpointError: the file cannot be read, or tensors are missing, unexpected or of another shape; the
            message lists them.
    """
    if config.ordering == "scales":
        raise ConfigError("official xAR weights are for cells; ordering 'scales' has position embeddings of its own.")
    model = XAR(config)
    tensors = read_tensors(path, wrappers=("model_ema", "model", "state_dict"))
    load_by_table(model, tensors, xar_table(config.depth), config, path)
    return model.eval()
