"""Linear segmentation heads on frozen tokens: a class for every patch, up-sampled to pixels; and how they are scored.

A head is a BatchNorm without affine parameters and a linear map, as in the published linear probe, for each token
alone. Its logits stand at the centres of the patches and are up-sampled bilinearly to the mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from nextblock.data.stream import BadSample
from nextblock.errors import DataError
from nextblock.evaluation.probe import ProbeTraining

IGNORED = 255
AT_ONCE = 1 << 24  # numbers of up-sampled logits in memory at a time, 64 MiB; there are several of that size


@dataclass
class TokenBatch:
    """inputs: what a grid of heads reads, [B, N, D] each, raster order. masks: uint8 [B, H, W], 255 = ignored."""

    inputs: list[Tensor]
    masks: Tensor
    bad: list[BadSample] = field(default_factory=list)

    def to(self, device: torch.device) -> TokenBatch:
        return TokenBatch([x.to(device) for x in self.inputs], self.masks.to(device), self.bad)


@lru_cache(maxsize=16)
def _weights(many: int, few: int, device: torch.device) -> Tensor:
    """Bilinear interpolation along one side, as a matrix [many, few]; both stand at the centres of their cells."""
    with torch.inference_mode(False):
        rows = F.interpolate(torch.eye(few)[None], size=many, mode="linear", align_corners=False)[0]
        return rows.T.contiguous().to(device)


def upsampled(coarse: Tensor, size: tuple[int, int]) -> Tensor:
    """[n, h, w, C] -> [n, *size, C], bilinear.

    Two products with constant matrices: unlike the library's interpolation, whose backward pass on CUDA adds in any
    order, they give the same bits every time.
    """
    n, h, w, classes = coarse.shape
    down, across = _weights(size[0], h, coarse.device), _weights(size[1], w, coarse.device)
    rows = (down.to(coarse.dtype) @ coarse.reshape(n, h, w * classes)).view(n * size[0], w, classes)
    return (across.to(coarse.dtype) @ rows).view(n, *size, classes)


class _PixelLoss(torch.autograd.Function):
    """Sum of the cross entropies over labelled pixels, [G, B, h, w, C] -> [G].

    Loss and gradient are computed together, a few images at a time: the logits of all heads on all pixels would be
    gigabytes, their gradient on the patches is small.
    """

    @staticmethod
    def forward(ctx: Any, coarse: Tensor, masks: Tensor, smoothing: float) -> Tensor:
        heads, images, classes = coarse.shape[0], coarse.shape[1], coarse.shape[-1]
        size = (masks.shape[1], masks.shape[2])
        most = max(1, AT_ONCE // (size[0] * size[1] * classes))
        losses = coarse.new_zeros(heads)
        gradient = torch.empty_like(coarse)
        with torch.enable_grad(), torch.autocast(coarse.device.type, enabled=False):
            for head in range(heads):
                for start in range(0, images, most):
                    part = coarse[head, start : start + most].detach().requires_grad_()
                    truth = masks[start : start + most].reshape(-1).long()
                    logits = upsampled(part, size).view(-1, classes)
                    loss = F.cross_entropy(
                        logits, truth, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
                    )
                    (gradient[head, start : start + most],) = torch.autograd.grad(loss, part)
                    losses[head] += loss.detach()
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * above[0].view(-1, 1, 1, 1, 1), None, None


def pixel_losses(coarse: Tensor, masks: Tensor, smoothing: float = 0.0) -> Tensor:
    """Every head's mean cross entropy over labelled pixels: [G, B, h, w, C], uint8 [B, H, W] -> [G], float32 or wider.

    Zero where no pixel is labelled.
    """
    wide = coarse if coarse.dtype == torch.float64 else coarse.float()
    total: Tensor = _PixelLoss.apply(wide, masks, smoothing)  # type: ignore[no-untyped-call]
    return total / (masks != IGNORED).sum().clamp(min=1)


def coarse_logits(grid: nn.Module, inputs: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """What every head says of every patch: tokens [B, N, D], raster order -> [G, B, h, w, C]; `size` is (h, w)."""
    flat = [tokens.flatten(0, 1) for tokens in inputs]
    logits: Tensor = grid(flat)
    return logits.view(len(logits), len(inputs[0]), *size, -1)


class SegmentationTraining(ProbeTraining):
    """The loss and the update of a grid of linear heads on patches; `size` is their grid (h, w)."""

    size: tuple[int, int] = (0, 0)

    def pixel_loss(self, grid: nn.Module, batch: TokenBatch) -> Tensor:
        """The mean of the heads' losses; heads that have diverged count as nothing."""
        losses = pixel_losses(coarse_logits(grid, batch.inputs, self.size), batch.masks, self.label_smoothing)
        finite = torch.isfinite(losses.detach())
        self._finite &= finite
        kept = torch.where(finite, losses, 0.0)
        self.loss_sum += kept.detach().float()
        self.steps += 1
        return kept.mean()


# --- scores ---


def pixel_confusion(predictions: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Labelled pixels counted, int64 [C, C], rows the truth; both [..., H, W], on one device."""
    known = masks != IGNORED
    pairs = masks[known].long() * num_classes + predictions[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


@torch.no_grad()
def confusions(
    grid: nn.Module, batches: Iterable[TokenBatch], size: tuple[int, int], num_classes: int, heads: Sequence[int]
) -> NDArray[np.int64]:
    """The confusion matrices of these heads over a whole set, [len(heads), C, C]. The grid's mode is left as it was.

    Raises DataError when there is no image.
    """
    total: Tensor | None = None
    for batch, said in predicted(grid, batches, size, heads):
        found = torch.stack([pixel_confusion(each, batch.masks, num_classes) for each in said])
        total = found if total is None else total + found
    if total is None:
        raise DataError("There is no image to judge the heads by: none could be read.")
    return total.cpu().numpy()


@torch.no_grad()
def predicted(
    grid: nn.Module, batches: Iterable[TokenBatch], size: tuple[int, int], heads: Sequence[int]
) -> Iterator[tuple[TokenBatch, list[Tensor]]]:
    """Every batch with the classes that each head says, uint8 [B, H, W]."""
    for batch in batches:
        was_training = grid.training
        grid.eval()
        coarse = coarse_logits(grid, batch.inputs, size)
        grid.train(was_training)
        shape = (batch.masks.shape[1], batch.masks.shape[2])
        yield batch, [_largest(coarse[head].float(), shape) for head in heads]


def _largest(coarse: Tensor, size: tuple[int, int]) -> Tensor:
    """The class with the largest up-sampled value at each pixel: [B, h, w, C] -> uint8 [B, *size]."""
    most = max(1, AT_ONCE // (size[0] * size[1] * coarse.shape[-1]))
    parts = [upsampled(part, size).argmax(-1).to(torch.uint8) for part in torch.split(coarse, most)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Scores:
    """In percent. miou: the mean of `iou` over the classes that occur in the truth; the others have None."""

    miou: float
    pixel_accuracy: float
    iou: list[float | None]


def scores(confusion: NDArray[np.int64]) -> Scores:
    """Scores of a confusion matrix [C, C] over a whole set, rows the truth. Raises DataError when it is empty."""
    counts = confusion.astype(np.float64)
    hits, truth, said = np.diag(counts), counts.sum(1), counts.sum(0)
    there = truth > 0
    if not there.any():
        raise DataError("There is no labelled pixel to judge the heads by.")
    iou = 100 * hits[there] / (truth + said - hits)[there]
    each: list[float | None] = [None] * len(counts)
    for number, value in zip(np.flatnonzero(there).tolist(), iou.tolist(), strict=True):
        each[number] = value
    return Scores(float(iou.mean()), 100 * float(hits.sum() / truth.sum()), each)


def class_counts(masks: Tensor, num_classes: int) -> NDArray[np.int64]:
    """Pixels of each class in uint8 [M, H, W]: [C]."""
    counts = torch.zeros(256, dtype=torch.int64)
    for part in torch.split(masks, 64):
        counts += torch.bincount(part.reshape(-1).long(), minlength=256)
    return counts[:num_classes].numpy()


def always(counts: NDArray[np.int64], commonest: int) -> Scores:
    """The scores of saying `commonest` everywhere, on pixels `counts` [C]."""
    confusion = np.zeros((len(counts), len(counts)), dtype=np.int64)
    confusion[:, commonest] = counts
    return scores(confusion)


def ceiling(masks: Tensor, size: tuple[int, int], num_classes: int) -> Scores:
    """What knowing each patch exactly is worth on this grid: uint8 [M, H, W], `size` = (h, w).

    Every patch is given its true share of each class, and the shares are up-sampled as the logits of a head are. What
    is lost are the edges inside patches. A head can be a little better, as its logits may be larger where it helps.
    """
    total = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    shape = (masks.shape[1], masks.shape[2])
    most = max(1, AT_ONCE // (shape[0] * shape[1] * num_classes))
    for part in torch.split(masks, most):
        shares = F.adaptive_avg_pool2d(_one_hot(part, num_classes), size).permute(0, 2, 3, 1).contiguous()
        total += pixel_confusion(_largest(shares, shape), part, num_classes)
    return scores(total.numpy())


def _one_hot(masks: Tensor, num_classes: int) -> Tensor:
    """float32 [M, C, H, W]; nothing where ignored."""
    return torch.stack([(masks == number).float() for number in range(num_classes)], 1)
