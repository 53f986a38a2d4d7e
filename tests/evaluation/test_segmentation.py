"""Heads on patches: their loss on pixels is the plain one, and their scores are those counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from close import assert_close
from nextblock.errors import DataError
from nextblock.evaluation import segmentation
from nextblock.evaluation.probe import HeadSpec, ProbeGrid
from nextblock.evaluation.segmentation import (
    SegmentationTraining,
    TokenBatch,
    always,
    ceiling,
    class_counts,
    coarse_logits,
    confusions,
    pixel_confusion,
    pixel_losses,
    predicted,
    scores,
    upsampled,
)
from nextblock.xtra.classifier import LayerMean

LAST = LayerMean(2, 2)
SPECS = [HeadSpec("linear", lr, 0.1, LAST) for lr in (1e-3, 1e-2, 1e-1)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_masks(*shape: int, classes: int = 3) -> Tensor:
    masks = torch.randint(classes, shape, generator=torch.Generator().manual_seed(9)).to(torch.uint8)
    masks[:, :2, 1:3] = 255
    return masks


@pytest.mark.parametrize(("grid", "size"), [((4, 4), (16, 16)), ((3, 5), (10, 7)), ((1, 2), (3, 8))])
def test_upsampling_is_bilinear_between_the_patches_centres(grid: tuple[int, int], size: tuple[int, int]) -> None:
    coarse = random(2, *grid, 3)
    plain = F.interpolate(coarse.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
    assert_close(upsampled(coarse, size), plain.permute(0, 2, 3, 1), 1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_loss_and_gradient_are_the_plain_ones(smoothing: float, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "AT_ONCE", at_once)
    coarse, masks, weights = random(2, 3, 4, 4, 3), random_masks(3, 16, 12), torch.tensor([1.0, -2.5])
    ours, plain = coarse.clone().requires_grad_(), coarse.clone().requires_grad_()
    losses = pixel_losses(ours, masks, smoothing)
    (losses * weights).sum().backward()
    expected = []
    for head in plain:
        logits = F.interpolate(head.permute(0, 3, 1, 2), size=(16, 12), mode="bilinear", align_corners=False)
        expected.append(F.cross_entropy(logits, masks.long(), ignore_index=255, label_smoothing=smoothing))
    (torch.stack(expected) * weights).sum().backward()
    assert_close(losses, torch.stack(expected), 1e-6)
    assert ours.grad is not None
    assert_close(ours.grad, plain.grad, 1e-6)


def test_masks_without_a_labelled_pixel_move_nothing() -> None:
    coarse = random(2, 1, 2, 2, 3).requires_grad_()
    losses = pixel_losses(coarse, torch.full((1, 8, 8), 255, dtype=torch.uint8))
    losses.sum().backward()
    assert losses.tolist() == [0, 0]
    assert coarse.grad is not None
    assert not coarse.grad.any()


def test_a_head_reads_each_patch_alone() -> None:
    grid = ProbeGrid(SPECS, 8, 3).double().eval()
    tokens = random(2, 6, 8)
    before = coarse_logits(grid, [tokens], (2, 3))
    changed = tokens.clone()
    changed[1, 4] += 1  # row 1, column 1
    moved = (coarse_logits(grid, [changed], (2, 3)) != before).any(-1)
    assert before.shape == (3, 2, 2, 3, 3)
    assert moved.nonzero().tolist() == [[head, 1, 1, 1] for head in range(3)]


def test_a_head_that_diverged_counts_as_nothing() -> None:
    grid = ProbeGrid(SPECS, 8, 3)
    trainer = SegmentationTraining(grid, torch.device("cpu"))
    trainer.size = (2, 3)
    batch = TokenBatch([random(2, 6, 8).float()], random_masks(2, 8, 12))
    whole = trainer.pixel_loss(grid, batch)
    with torch.no_grad():
        grid.stacks[0].weight[1].fill_(float("nan"))
    assert_close(trainer.pixel_loss(grid, batch), whole * 2 / 3, 1e-5)
    assert not trainer._finite[1]
    assert trainer._finite[[0, 2]].all()


def test_scores_by_hand() -> None:
    truth = torch.tensor([[[0, 0, 0, 1], [1, 1, 255, 255]]], dtype=torch.uint8)
    said = torch.tensor([[[0, 0, 1, 1], [1, 2, 2, 0]]], dtype=torch.uint8)
    found = pixel_confusion(said, truth, 4)
    assert found.tolist() == [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    measured = scores(found.numpy())
    assert measured.iou == pytest.approx([100 * 2 / 3, 100 * 2 / 4, None, None])
    assert measured.miou == pytest.approx(100 * (2 / 3 + 2 / 4) / 2)
    assert measured.pixel_accuracy == pytest.approx(100 * 4 / 6)
    with pytest.raises(DataError, match="no labelled pixel"):
        scores(np.zeros((3, 3), dtype=np.int64))


def test_the_score_is_of_the_whole_set_not_a_mean_of_images() -> None:
    grid = ProbeGrid(SPECS[:1], 2, 2).eval()
    with torch.no_grad():
        grid.stacks[0].weight.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
        grid.stacks[0].bias.zero_()
    said = torch.tensor([[[5.0, 0.0]] * 4, [[0.0, 5.0]] * 4])  # two images of 2x2 patches: all 0, then all 1
    masks = torch.zeros(2, 4, 4, dtype=torch.uint8)
    masks[1, 0] = 1
    batches = [TokenBatch([said[i : i + 1]], masks[i : i + 1]) for i in range(2)]
    found = confusions(grid, batches, (2, 2), 2, [0])
    assert found.tolist() == [[[16, 12], [0, 4]]]
    assert scores(found[0]).iou == pytest.approx([100 * 16 / 28, 100 * 4 / 16])
    with pytest.raises(DataError, match="no image to judge"):
        confusions(grid, [], (2, 2), 2, [0])


def test_several_heads_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = ProbeGrid(SPECS, 8, 3)
    for number in range(3):
        with torch.no_grad():
            grid.stacks[0].bias[number, number] += 100
    batch = TokenBatch([random(5, 4, 8).float()], random_masks(5, 8, 8))
    for at_once in (1, 1 << 24):
        monkeypatch.setattr(segmentation, "AT_ONCE", at_once)
        ((_, found),) = predicted(grid, [batch], (2, 2), [2, 0])
        assert [part.unique().tolist() for part in found] == [[2], [0]]
    assert grid.training


def test_what_a_score_is_read_by() -> None:
    masks = torch.zeros(1, 16, 16, dtype=torch.uint8)
    masks[:, :, 8:] = 1
    masks[:, 0] = 255
    counts = class_counts(masks, 3)
    assert counts.tolist() == [120, 120, 0]
    floor = always(counts, 1)
    assert (floor.miou, floor.pixel_accuracy) == (25.0, 50.0)
    assert floor.iou == [0.0, 50.0, None]
    top = ceiling(masks, (4, 4), 3)  # an edge between patches costs nothing
    assert top.iou == [100.0, 100.0, None]
    assert ceiling(masks, (1, 1), 3).miou < 30
    fine = (torch.arange(16)[:, None] + torch.arange(16)).remainder(2).to(torch.uint8)[None]
    assert ceiling(fine, (4, 4), 2).miou < 60  # finer than any patch
    assert ceiling(fine, (16, 16), 2).miou == 100
