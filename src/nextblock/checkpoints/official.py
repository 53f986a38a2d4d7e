"""Weights in the layout of the official XTRA code, by name table."""

from __future__ import annotations

from pathlib import Path

from einops import rearrange
from torch import Tensor

from nextblock.checkpoints.name_table import Change, find_row, load_by_table, read_tensors
from nextblock.errors import CheckpointError
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA


def _flat_patch(weight: Tensor, config: XTRAConfig) -> Tensor:
    """A convolution over patches as a linear map: [D, C, p, p] -> [D, C·p·p]."""
    return rearrange(weight, "d c p1 p2 -> d (c p1 p2)")


def _token_major(weight: Tensor, config: XTRAConfig) -> Tensor:
    """The official head reads (feature, token); ours reads (token, feature), which needs no copy."""
    return rearrange(weight, "out (d k) -> out (k d)", k=config.ordering.entity_size)


_LAYER = [
    (r"{p}\.blocks\.(\d+)\.norm([12])\.(weight|bias)", r"{q}.layers.layers.\1.norm\2.\3", None),
    (r"{p}\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)", r"{q}.layers.layers.\1.attn.qkv.\2", None),
    (r"{p}\.blocks\.(\d+)\.attn\.proj\.(weight|bias)", r"{q}.layers.layers.\1.attn.out.\2", None),
    (r"{p}\.blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)", r"{q}.layers.layers.\1.mlp.\2.\3", None),
    (r"{p}\.norm\.(weight|bias)", r"{q}.norm.\1", None),
    (r"{p}\.pos_embed", r"{q}.position", None),
]


def _stack(official: str, ours: str) -> list[tuple[str, str, Change | None]]:
    return [(p.replace("{p}", official), q.replace("{q}", ours), change) for p, q, change in _LAYER]


XTRA_TABLE: list[tuple[str, str | None, Change | None]] = [
    (r"enc\.patch_embed\.proj\.weight", "encoder.patch_embed.weight", _flat_patch),
    (r"enc\.patch_embed\.proj\.bias", "encoder.patch_embed.bias", None),
    *_stack("enc", "encoder"),
    (r"proj\.mlp\.0\.(weight|bias)", r"projection.fc1.\1", None),
    (r"proj\.mlp\.2\.weight", "projection.fc2.weight", None),
    *_stack("predictor", "predictor"),
    (r"aim_proj\.(\d+)\.mlp\.0\.weight", r"heads.\1.fc1.weight", _token_major),
    (r"aim_proj\.(\d+)\.mlp\.0\.bias", r"heads.\1.fc1.bias", None),
    (r"aim_proj\.(\d+)\.mlp\.2\.(weight|bias)", r"heads.\1.fc2.\2", None),
]


def our_name(official: str) -> str | None:
    """Our parameter for an official one; CheckpointError when the table has no row for it."""
    row = find_row(XTRA_TABLE, official)
    if row is None:
        raise CheckpointError(f"'{official}' is not a tensor of an official XTRA model.")
    return row[0]


def load_official_xtra(path: str | Path, config: XTRAConfig) -> XTRA:
    """An XTRA model with the weights of an official checkpoint.

    Args:
        path: a Lightning `.ckpt`, a DeepSpeed model file, or a bare state dict.
        config: the sizes; tensors do not show the number of heads.

    Raises:
        CheckpointError: the file cannot be read, or tensors are missing, unexpected or of another shape; the
            message lists them.
    """
    model = XTRA(config)
    load_by_table(model, read_tensors(path), XTRA_TABLE, config, path)
    return model
