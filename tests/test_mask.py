from __future__ import annotations

import torch

from nextblock.mask import block_causal_mask, teacher_forcing_mask
from nextblock.ordering import Ordering


def drawn(mask: torch.Tensor) -> list[str]:
    return ["".join("#" if seen else "." for seen in row) for row in mask.tolist()]


def test_block_causal_as_drawn() -> None:
    entity = torch.tensor([0, 0, 1, 1, 2, 2])
    assert drawn(block_causal_mask(entity)) == ["##....", "##....", "####..", "####..", "######", "######"]


def test_block_causal_for_new_queries() -> None:
    assert drawn(block_causal_mask(torch.tensor([1]), torch.tensor([0, 0, 1, 1, 2]))) == ["####."]


def test_teacher_forcing_as_drawn() -> None:
    expected = ["#.....", "##....", "###...", "...#..", "#...#.", "##...#"]
    assert drawn(teacher_forcing_mask(torch.arange(3))) == expected


def test_keys_seen_in_a_grid_of_cells() -> None:
    """16×16 patches in cells of 4×4: the first token sees 16 keys, the last 256."""
    seen = block_causal_mask(Ordering.cells(16, 4).entity).sum(1)
    assert seen[0] == 16
    assert seen[-1] == 256
