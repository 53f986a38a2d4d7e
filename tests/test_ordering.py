from __future__ import annotations

import pytest
import torch

from nextblock.errors import ConfigError
from nextblock.ordering import Ordering, ScalePyramid

ORDERINGS = [
    Ordering.patches((4, 6)),
    Ordering.cells((4, 6), 2),
    Ordering.cells((4, 6), (1, 3)),
    Ordering.subsamples((4, 6), 2),
    Ordering.subsamples((4, 6), (2, 3)),
    Ordering.whole((4, 6)),
    Ordering.cells((4, 6), 2).permuted([3, 0, 5, 1, 4, 2]),
    Ordering.subsamples((4, 6), 2).permuted([5, 4, 3, 2, 1, 0]),
    Ordering.cells(5, 1),
]
IDS = [f"{o.kind}-{o.size}-{o.ranks is not None}" for o in ORDERINGS]


def test_the_picture_in_the_docstring() -> None:
    sequences = {
        Ordering.cells(4, 2): [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15],
        Ordering.subsamples(4, 2): [0, 2, 8, 10, 1, 3, 9, 11, 4, 6, 12, 14, 5, 7, 13, 15],
        Ordering.patches(4): list(range(16)),
        Ordering.whole(4): list(range(16)),
    }
    for ordering, sequence in sequences.items():
        assert ordering.sequence.tolist() == sequence
    assert Ordering.cells(4, 2).entity.tolist() == [e for e in range(4) for _ in range(4)]


@pytest.mark.parametrize("ordering", ORDERINGS, ids=IDS)
def test_split_and_merge_are_inverse(ordering: Ordering) -> None:
    x = torch.randn(2, *ordering.grid, 3)
    assert torch.equal(ordering.merge(ordering.split(x)), x)
    flat = x.flatten(1, 2)
    assert torch.equal(ordering.split(x), flat[:, ordering.sequence])
    assert torch.equal(ordering.split(x)[:, ordering.inverse], flat)


@pytest.mark.parametrize("ordering", ORDERINGS, ids=IDS)
def test_derived_facts_agree(ordering: Ordering) -> None:
    assert sorted(ordering.sequence.tolist()) == list(range(ordering.num_patches))
    assert sum(ordering.entity_sizes) == ordering.num_patches
    assert torch.equal(torch.bincount(ordering.entity), torch.tensor(ordering.entity_sizes))
    rows, columns = ordering.positions.T
    assert torch.equal(rows * ordering.grid[1] + columns, ordering.sequence)


@pytest.mark.parametrize("ordering", ORDERINGS, ids=IDS)
def test_json_round_trip(ordering: Ordering) -> None:
    again = Ordering.from_json(ordering.to_json())
    assert again == ordering
    assert hash(again) == hash(ordering)


def test_permuted_moves_entities_to_their_ranks() -> None:
    base, ranks = Ordering.cells(4, 2), [2, 0, 3, 1]
    moved = base.permuted(ranks)
    for entity, place in enumerate(ranks):
        assert torch.equal(moved.sequence[place * 4 : place * 4 + 4], base.sequence[entity * 4 : entity * 4 + 4])
    assert moved.order == (1, 3, 0, 2)


def test_permuted_twice_is_the_permutation_of_the_permutation() -> None:
    first, second = [2, 0, 3, 1], [1, 2, 3, 0]
    twice = Ordering.cells(4, 2).permuted(first).permuted(second)
    assert twice == Ordering.cells(4, 2).permuted([second[r] for r in first])
    undo = Ordering.cells(4, 2).permuted(first)
    assert undo.permuted(undo.order) == Ordering.cells(4, 2)


def test_an_index_made_in_inference_serves_training() -> None:
    ordering = Ordering.cells(6, 3).permuted([3, 1, 0, 2])
    with torch.inference_mode():
        ordering.split(torch.zeros(1, 6, 6, 1))
    x = torch.ones(1, 6, 6, 1, requires_grad=True)
    ordering.split(x).square().sum().backward()
    assert x.grad is not None


def test_equal_when_the_sequence_is_equal() -> None:
    assert Ordering.patches(4) == Ordering.cells(4, 1) == Ordering.subsamples(4, 1)
    assert Ordering.whole(4) == Ordering.subsamples(4, 4)
    assert Ordering.cells(4, 2).permuted([0, 1, 2, 3]) == Ordering.cells((4, 4), (2, 2))
    assert Ordering.cells(4, 2) != Ordering.subsamples(4, 2)
    assert len({Ordering.patches(4), Ordering.cells(4, 1), Ordering.cells(4, 2)}) == 2


def test_a_size_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"4×4 do not fit a grid of 14×14.*that fit this grid: 2 and 7.*12, 16"):
        Ordering.cells((14, 14), 4)


@pytest.mark.parametrize("ranks", [[0, 1], [0, 0, 1, 2], [1, 2, 3, 4]])
def test_bad_ranks_are_refused(ranks: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"0\.\.3 once"):
        Ordering.cells(4, 2).permuted(ranks)


@pytest.mark.parametrize("grid", [0, (4,), (4, -1), (2, 3, 4), True])
def test_bad_grids_are_refused(grid: object) -> None:
    with pytest.raises(ConfigError, match="grid"):
        Ordering.patches(grid)  # type: ignore[arg-type]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected"):
        Ordering.cells(4, 2).split(torch.zeros(1, 4, 5, 1))
    with pytest.raises(ConfigError, match="16 tokens"):
        Ordering.cells(4, 2).merge(torch.zeros(1, 15, 1))


def test_a_pyramid_answers_as_an_ordering_does() -> None:
    pyramid = ScalePyramid((4, 6))
    assert pyramid.scales == ((1, 1), (1, 2), (2, 3), (4, 6))
    assert pyramid.entity_sizes == (1, 2, 6, 24)
    assert pyramid.num_tokens == 33
    assert pyramid.entity.tolist() == [0] + [1] * 2 + [2] * 6 + [3] * 24
    grid = torch.randn(2, 4, 6, 3)
    sequence = pyramid.split(grid)
    assert sequence.shape == (2, 33, 3)
    assert torch.equal(pyramid.merge(sequence), grid)
    assert torch.equal(sequence[:, 9:], Ordering.patches((4, 6)).split(grid))
    assert pyramid.positions[-24:].tolist() == Ordering.patches((4, 6)).positions.tolist()
    assert pyramid.positions[0].tolist() == [1.5, 2.5]  # the centre of the grid
    assert ScalePyramid.from_dict(pyramid.to_dict()) == pyramid


def test_how_a_pyramid_resizes() -> None:
    images = torch.arange(16.0).view(1, 1, 4, 4)
    assert ScalePyramid((4, 4)).levels(images)[1].flatten().tolist() == [0, 2, 8, 10]
    assert ScalePyramid((4, 4), resize="area").levels(images)[1].flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert ScalePyramid((4, 4), resize="area").levels(images)[0].item() == 7.5
    assert ScalePyramid((2, 2), resize="area").levels(images, (2, 2))[0].shape == (1, 1, 2, 2)


@pytest.mark.parametrize("scales", [((4, 4), (2, 2)), ((2, 2),), ((2, 2), (2, 2), (4, 4)), ((4, 1), (1, 4), (4, 4))])
def test_scales_that_do_not_grow_are_refused(scales: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ConfigError, match="must grow"):
        ScalePyramid((4, 4), scales)
