"""Weights in the layout of the official XTRA code, by name table.

A row of a table is (official name pattern, our name); `None` as our name drops the tensor on purpose. What no
row matches, and what our model needs but the file lacks, raises with the whole lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from nextblock.errors import CheckpointError
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA

Change = Callable[[Tensor, XTRAConfig], Tensor]


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
    return _row(official)[0]


def _row(official: str) -> tuple[str | None, Change | None]:
    for pattern, ours, change in XTRA_TABLE:
        match = re.fullmatch(pattern, official)
        if match:
            return (None if ours is None else match.expand(ours)), change
    raise CheckpointError(f"'{official}' is not a tensor of an official XTRA model.")


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, read without running code from it (`weights_only=True`).

    Takes a bare state dict, a Lightning `.ckpt` ("state_dict") or a DeepSpeed model file ("module").
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No such file: {path}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = _first(error)
        raise CheckpointError(f"{path} is not a PyTorch weights file that can be read safely: {why}") from error
    for wrapper in ("state_dict", "module"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors.")
    return dict(found)


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def load_official_xtra(path: str | Path, config: XTRAConfig) -> XTRA:
    """An XTRA model with the weights of an official checkpoint.

    Args:
        path: a Lightning `.ckpt`, a DeepSpeed model file, or a bare state dict.
        config: the sizes; tensors do not show the number of heads.

    Raises:
        CheckpointError: the file cannot be read, or tensors are missing, unexpected or of another shape; the
            message lists them.
    """
    tensors = read_tensors(path)
    model = XTRA(config)
    expected: dict[str, Any] = model.state_dict()
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    misshaped: list[str] = []
    for name, tensor in tensors.items():
        try:
            ours, change = _row(name)
        except CheckpointError:
            unexpected.append(name)
            continue
        if ours is None:
            continue
        if ours not in expected:
            unexpected.append(name)
            continue
        shape = tuple(tensor.shape)
        try:
            tensor = change(tensor, config) if change else tensor
            fits = tensor.shape == expected[ours].shape
        except Exception:
            fits = False
        if not fits:
            misshaped.append(f"{name} {shape}, expected {tuple(expected[ours].shape)} as {ours}")
        found[ours] = tensor
    missing = [name for name in expected if name not in found]
    if missing or unexpected or misshaped:
        raise CheckpointError(_mismatch(path, missing, unexpected, misshaped))
    model.load_state_dict(found)
    return model


def _mismatch(path: str | Path, missing: list[str], unexpected: list[str], misshaped: list[str]) -> str:
    lines = [f"{path} does not fit this XTRAConfig."]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped)):
        if names:
            lines.append(f"  {title} ({len(names)}): {'; '.join(names)}")
    return "\n".join(lines)
