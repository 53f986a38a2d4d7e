"""Between the tensors of a foreign file and those of our models, both ways, by one table of names.

A row says how the others name a tensor, how we do, and how its numbers are laid out there; `None` as our name drops the
tensor on purpose. What no row matches, and what our model needs but the file lacks, raises with the whole lists.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextblock.errors import CheckpointError, shown

MOST_TOLD = 500  # names in a list of an error
Change = Callable[[Tensor, Any], Tensor]
HOLES = {"n": r"\d+", "one_or_two": "[12]", "part": "weight|bias", "any": ".*",
         "running": "running_mean|running_var|num_batches_tracked"}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One kind of tensor: `theirs` and `ours` are names with holes, "enc.blocks.{n}.norm{one_or_two}.{part}".

    ours: None drops the tensor on purpose. change: their numbers to ours, given the configuration; back: its inverse.
    """

    theirs: str
    ours: str | None
    change: Change | None = None
    back: Change | None = None

    def translate(self, name: str) -> str | None:
        """Our name for one of theirs that this row matches; None when it is dropped."""
        holes = _filled(self.theirs, name)
        assert holes is not None
        return None if self.ours is None else self.ours.format(**holes)


Table = Sequence[Row]


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"{(\w+)}", template)
    return re.compile("".join(f"(?P<{p}>{HOLES[p]})" if i % 2 else re.escape(p) for i, p in enumerate(parts)))


def _filled(template: str, name: str) -> dict[str, str] | None:
    """What stands in the holes when the name is of this form."""
    match = _pattern(template).fullmatch(name)
    return match.groupdict() if match else None


def find_row(table: Table, name: str) -> Row | None:
    """The row for a foreign name; None when the table has none."""
    return next((row for row in table if _filled(row.theirs, name) is not None), None)


def load_by_table(
    model: nn.Module, tensors: Mapping[str, Tensor], table: Table, config: Any, where: str | Path
) -> list[str]:
    """Fill the model; returns the foreign names that were dropped on purpose.

    Raises CheckpointError listing what is missing, unexpected or of another shape.
    """
    expected: dict[str, Any] = model.state_dict()
    found: dict[str, Tensor] = {}
    dropped: list[str] = []
    unexpected: list[str] = []
    misshaped: list[str] = []
    for name, tensor in tensors.items():
        row = find_row(table, name)
        ours = row.translate(name) if row else None
        if row is not None and ours is None:
            dropped.append(name)
        elif row is None or ours is None or ours not in expected:
            unexpected.append(name)
        else:
            changed = _changed(row.change, tensor, config)
            if changed is None or changed.shape != expected[ours].shape:
                wanted = tuple(expected[ours].shape)
                misshaped.append(f"{name} {tuple(tensor.shape)}, expected {wanted} as {ours}")
            found[ours] = tensor if changed is None else changed
    missing = [their_name(table, name) for name in expected if name not in found]
    if missing or unexpected or misshaped:
        raise mismatch(f"{where} does not fit a model of these sizes.", missing, unexpected, misshaped)
    model.load_state_dict(found)
    return dropped


def _changed(change: Change | None, tensor: Tensor, config: Any) -> Tensor | None:
    """The tensor laid out anew; None when its shape does not allow it."""
    try:
        return change(tensor, config) if change else tensor
    except Exception:  # of einops or torch, for a shape that cannot be
        return None


def their_name(table: Table, ours: str) -> str:
    """Their name for one of ours; ours where no row makes it."""
    for row in table:
        holes = None if row.ours is None else _filled(row.ours, ours)
        if holes is not None:
            return row.theirs.format(**holes)
    return ours


def foreign_tensors(tensors: Mapping[str, Tensor], table: Table, config: Any) -> dict[str, Tensor]:
    """The way back: our tensors under their names and in their layout, in the order of the table.

    Raises CheckpointError for a tensor of ours that no row makes.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for row in table:
            holes = None if row.ours is None else _filled(row.ours, name)
            if holes is not None:
                found[row.theirs.format(**holes)] = (row.back(tensor, config) if row.back else tensor).contiguous()
                break
        else:
            raise CheckpointError(f"'{name}' has no counterpart in the official layout.")
    return found


def without_prefix(tensors: Mapping[str, Tensor], prefixes: Iterable[str]) -> tuple[dict[str, Tensor], str]:
    """The tensors without the first of `prefixes` that all their names begin with, and that prefix ("" for none)."""
    prefix = next((p for p in prefixes if tensors and all(name.startswith(p) for name in tensors)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, prefix


def count(names: Iterable[str], pattern: str) -> int:
    """How many numbers stand in the first group of `pattern`; they must be 0, 1, 2, ... without a gap.

    Raises CheckpointError otherwise: a model of so many layers would be made for a few names.
    """
    found = {match[1] for name in names if (match := re.match(pattern, name))}
    if missing := {str(i) for i in range(len(found))} - found:
        raise CheckpointError(
            f"the names that match {pattern} do not count from 0 without a gap: {shown(min(missing))} is missing."
        )
    return len(found)


def require_shapes(tensors: Mapping[str, Tensor], dimensions: Mapping[str, int], told: str) -> None:
    """Raise CheckpointError unless the tensors from which sizes are read are there, with so many dimensions each."""
    missing = [name for name in dimensions if name not in tensors]
    odd = [f"{n} {tuple(tensors[n].shape)}" for n, d in dimensions.items() if n in tensors and tensors[n].ndim != d]
    if missing or odd:
        raise mismatch(told, missing, misshaped=odd)


DTYPES = ("float16", "bfloat16")  # which float32 holds exactly


def other_dtypes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The kinds of number that float32 replaces here, by name; {"*": ...} when all tensors have the same one.

    Raises CheckpointError for numbers that float32 cannot hold.
    """
    kinds = {name: str(t.dtype).removeprefix("torch.") for name, t in tensors.items() if t.is_floating_point()}
    if wrong := sorted(set(kinds.values()) - {"float32", *DTYPES}):
        raise CheckpointError(
            f"numbers of kind {', '.join(wrong)} cannot be kept here, where weights are float32. Convert them to "
            f"float32 and save the file again."
        )
    if len(set(kinds.values())) == 1:
        (kind,) = set(kinds.values())
        return {} if kind == "float32" else {"*": kind}
    return {name: kind for name, kind in kinds.items() if kind != "float32"}


def with_dtypes(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """The inverse of `other_dtypes` after conversion to float32."""

    def cast(name: str, tensor: Tensor) -> Tensor:
        kind = dtypes.get(name, dtypes.get("*"))
        if kind is not None and kind not in DTYPES:
            raise CheckpointError(
                f"config.json asks for numbers of kind '{shown(kind)}'; known are {', '.join(DTYPES)}."
            )
        return tensor.to(getattr(torch, kind)) if kind and tensor.is_floating_point() else tensor

    return {name: cast(name, tensor) for name, tensor in tensors.items()}


def mismatch(
    told: str, missing: Sequence[str] = (), unexpected: Sequence[str] = (), misshaped: Sequence[str] = ()
) -> CheckpointError:
    """The error that begins with `told` and lists the tensors that do not fit."""
    lines = [told]
    for title, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped)):
        if names:
            more = f"; and {len(names) - MOST_TOLD} more" if len(names) > MOST_TOLD else ""
            lines.append(f"  {title} ({len(names)}): {'; '.join(map(shown, names[:MOST_TOLD]))}{more}")
    return CheckpointError("\n".join(lines))
