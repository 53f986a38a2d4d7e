"""Do the labels of two sources mean the same?"""

from __future__ import annotations

import numpy as np

from nextblock.data.sources import Source
from nextblock.errors import DataError
from nextblock.evaluation.features import Features


def in_classes_of(bank: Source, queries: Source, features: Features) -> Features:
    """`features` of `queries` with their labels as numbered in `bank`, matched by class name.

    A class that the bank has not gets a number beyond its classes, so that its images count as wrong. Sources
    without class names are taken to number their classes alike. Raises DataError when no class is in common.
    """
    ours, theirs = bank.classes, queries.classes
    if not ours or not theirs or ours == theirs:
        return features
    if not set(ours) & set(theirs):
        raise DataError(
            f"no class is in both sets: {', '.join(ours[:3])} ... in the bank, {', '.join(theirs[:3])} ... in the "
            f"queries. Class sub-folders must have the same names on both sides."
        )
    known = {name: number for number, name in enumerate(ours)}
    numbers = np.array([known.get(name, len(ours) + i) for i, name in enumerate(theirs)], dtype=np.int64)
    labels = np.where(features.labels < 0, -1, numbers[np.maximum(features.labels, 0)])
    return Features(features.values, labels, features.indices, features.bad)
