"""Weighted nearest neighbours: how good are features with nothing trained on top of them?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nextblock.errors import ConfigError
from nextblock.evaluation.features import Features, labelled_pair

CHUNK_NUMBERS = 2**24  # similarities held at once: 64 MiB


def knn_accuracy(
    train: Features,
    test: Features,
    *,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
    device: torch.device | str | None = None,
) -> dict[int, float]:
    """Accuracy in percent of a vote of the k most similar training images, for each k.

    Similarity is the cosine, and a neighbour's vote counts exp(similarity / temperature) (Wu et al. 2018,
    arXiv 1805.01978; k = 20 and 0.07 as in DINO, arXiv 2104.14294).

    Args:
        train, test: pooled features; images without a label are left out. A test image of a class that the
            training set has not counts as wrong.
        k: one number or several. A k above the number of training images takes all of them; the result is
            found under the k that was asked for.
        device: where to compute; the CPU when absent. Memory beyond the features is bounded.

    Raises ConfigError for k, temperature or dimensions that cannot work, DataError when there are no labels or
    one class only.
    """
    train, test = labelled_pair(train, test)
    ks = [k] if isinstance(k, int) else list(k)
    if not ks or min(ks) < 1:
        raise ConfigError(f"k must be one or more whole numbers of at least 1; got {k!r}.")
    if temperature <= 0:
        raise ConfigError(f"temperature must be above 0; got {temperature!r}.")
    classes, members = np.unique(train.labels, return_inverse=True)
    place = torch.device(device or "cpu")
    bank = F.normalize(torch.from_numpy(train.values).to(place), dim=1)  # [M, D]
    bank_classes = torch.from_numpy(members).to(place)  # [M]
    correct = dict.fromkeys(ks, 0)
    rows = max(1, CHUNK_NUMBERS // len(bank))
    for start in range(0, len(test), rows):
        queries = F.normalize(torch.from_numpy(test.values[start : start + rows]).to(place), dim=1)
        similarity, neighbours = (queries @ bank.T).topk(min(max(ks), len(bank)))  # [rows, k]
        # Relative to the nearest: the same winner, and no overflow at small temperatures.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        truth = test.labels[start : start + rows]
        for each in correct:
            winner = _winner(bank_classes[neighbours[:, :each]], weights[:, :each], len(classes))
            correct[each] += int((classes[winner.cpu().numpy()] == truth).sum())
    return {each: 100 * count / len(test) for each, count in correct.items()}


def _winner(voters: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """The class with the largest sum of votes: two of [B, k] -> [B] int64."""
    votes = weights.new_zeros(len(voters), num_classes)
    return votes.scatter_add_(1, voters, weights).argmax(1)
