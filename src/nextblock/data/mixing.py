"""Mixup and cutmix: each image of a batch mixed with another one, and its label with the other's label.

Sources: Zhang et al., "mixup: Beyond empirical risk minimization", 2018; Yun et al., "CutMix: Regularization strategy
to train strong classifiers with localizable features", 2019. Drawn once for a batch, the partner of image i being
image B - 1 - i, as in DeiT (Touvron et al., 2021).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor

from nextblock.errors import ConfigError

MIX_UNIFORMS = 5  # whether at all, mixup or cutmix, how much, centre down and across


@dataclass(frozen=True)
class MixConfig:
    """How batches are mixed.

    Arguments:
        mixup: alpha of the Beta(alpha, alpha) distribution of the first image's part; 0: no mixup.
        cutmix: the same of cutmix.
        probability: of a batch to be mixed at all.
        switch: where both are on, the probability of cutmix rather than mixup.

    Raises ConfigError for values that cannot work.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        for field in ("mixup", "cutmix"):
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                raise ConfigError(
                    f"{field} must be the positive alpha of a Beta distribution, or 0 for off, got {value}"
                )
        for field in ("probability", "switch"):
            if not 0 <= getattr(self, field) <= 1:
                raise ConfigError(f"{field} must be a probability from 0 to 1, got {getattr(self, field)}")


def mix(
    images: Tensor, labels: Tensor, config: MixConfig, u: NDArray[np.float64], num_classes: int, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The mixed images [B, C, H, W] and their targets, float32 [B, num_classes], each row of sum 1.

    images: float [B, C, H, W], left as they are. labels: int64 [B], 0 to num_classes - 1. u: uniform numbers in
    [0, 1), [MIX_UNIFORMS], on the host. smoothing: part of each target that is spread evenly over all classes.
    """
    lam, cut = _drawn(config, u)
    if lam < 1 and cut:
        top, left, height, width = cut_box(images.shape[2], images.shape[3], lam, float(u[3]), float(u[4]))
        here = (..., slice(top, top + height), slice(left, left + width))
        # The border may have clipped the box.
        lam = 1 - height * width / (images.shape[2] * images.shape[3])
        others, images = images.flip(0), images.clone()
        images[here] = others[here]
    elif lam < 1:
        images = images * lam + images.flip(0) * (1 - lam)
    targets = soft_targets(labels, num_classes, smoothing)
    return images, targets * lam + targets.flip(0) * (1 - lam)


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0) -> Tensor:
    """float32 [B, num_classes]: 1 - `smoothing` at the label, and `smoothing` spread evenly over all classes.

    Raises ConfigError when `smoothing` is not from 0 to below 1. Labels are not checked, for the device would be
    waited for.
    """
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing must be from 0 to below 1, got {smoothing}")
    spread = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), spread, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + spread)


def cut_box(height: int, width: int, lam: float, down: float, across: float) -> tuple[int, int, int, int]:
    """The box (top, left, height, width) of about 1 - `lam` of an image, around any of its pixels, clipped at borders.

    `down` and `across` are uniform numbers in [0, 1), which choose the centre.
    """
    side = math.sqrt(1 - lam)
    half_h, half_w = int(height * side) // 2, int(width * side) // 2
    y, x = int(down * height), int(across * width)
    top, left = max(0, y - half_h), max(0, x - half_w)
    return top, left, min(height, y + half_h) - top, min(width, x + half_w) - left


def _drawn(config: MixConfig, u: NDArray[np.float64]) -> tuple[float, bool]:
    """The part of the first image, and whether the rest is cut in rather than blended."""
    if (config.mixup == 0 and config.cutmix == 0) or u[0] >= config.probability:
        return 1.0, False
    cut = config.cutmix > 0 and (config.mixup == 0 or bool(u[1] < config.switch))
    alpha = config.cutmix if cut else config.mixup
    return float(betaincinv(alpha, alpha, u[2])), cut
