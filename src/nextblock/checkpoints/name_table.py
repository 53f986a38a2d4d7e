"""From the tensors of a foreign file to one of our models, by a table of names.

A row of a table is (foreign name pattern, our name, change); `None` as our name drops the tensor on purpose. What no
row matches, and what our model needs but the file lacks, raises with the whole lists.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextblock.errors import CheckpointError

Change = Callable[[Tensor, Any], Tensor]
Table = Sequence[tuple[str, str | None, Change | None]]


def read_tensors(path: str | Path, wrappers: Sequence[str] = ("state_dict", "module")) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, read without running code from it (`weights_only=True`).

    Takes a bare state dict, or one inside the first of `wrappers` that is there: "state_dict" of a Lightning `.ckpt`,
    "module" of a DeepSpeed model file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"No such file: {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts save their options beside
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        why = _first(error)
        raise CheckpointError(f"{path} is not a PyTorch weights file that can be read safely: {why}") from error
    for wrapper in wrappers:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(f"{path} holds no state dict of tensors.")
    return dict(found)


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def find_row(table: Table, name: str) -> tuple[str | None, Change | None] | None:
    """(our name or None, change) of the row for a foreign name; None when the table has no row for it."""
    for pattern, ours, change in table:
        match = re.fullmatch(pattern, name)
        if match:
            return (None if ours is None else match.expand(ours)), change
    return None


def load_by_table(
    model: nn.Module, tensors: Mapping[str, Tensor], table: Table, config: Any, where: str | Path
) -> None:
    """Fill the model. Raises CheckpointError listing what is missing, unexpected or of another shape."""
    expected: dict[str, Any] = model.state_dict()
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    misshaped: list[str] = []
    for name, tensor in tensors.items():
        row = find_row(table, name)
        if row is not None and row[0] is None:
            continue
        if row is None or row[0] not in expected:
            unexpected.append(name)
            continue
        ours, change = row
        assert ours is not None
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
        raise mismatch(f"{where} does not fit this {type(config).__name__}.", missing, unexpected, misshaped)
    model.load_state_dict(found)


def mismatch(
    told: str, missing: Sequence[str] = (), unexpected: Sequence[str] = (), misshaped: Sequence[str] = ()
) -> CheckpointError:
    """The error that begins with `told` and lists the tensors that do not fit."""
    lines = [told]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped)):
        if names:
            lines.append(f"  {title} ({len(names)}): {'; '.join(names)}")
    return CheckpointError("\n".join(lines))
