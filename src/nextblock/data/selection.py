"""Which images, by class: a stratified hold-out, and a few of each class. Functions of labels and a seed alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nextblock.errors import ConfigError, DataError
from nextblock.randomness import permutation


def held_out(
    labels: NDArray[np.int64], fraction: float, seed: int, purpose: str = "selection/held_out"
) -> NDArray[np.bool_]:
    """Hold out the `fraction` of every class, rounded, at least one image and never a class's last one.

    Args:
        labels: class numbers int64 [N]; images with -1 (no label) and a class's only image are never held out.
        fraction: between 0 and 1.
        seed, purpose: decide which images.

    Returns bool [N], True where held out. Raises ConfigError for a fraction that cannot work, DataError when no
    class has two images.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"the fraction to hold out must lie between 0 and 1; got {fraction!r}.")
    chosen = np.zeros(len(labels), dtype=bool)
    for members in _by_class(labels, seed, purpose).values():
        if len(members) > 1:
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            chosen[members[:count]] = True
    if not chosen.any():
        raise DataError(
            f"no image can be held out: none of the classes of these {len(labels)} images has two images. "
            "Choosing by held-out images needs a class with at least two: add images, or hold none out "
            "(--probe.select test, --finetune.val_fraction 0)."
        )
    return chosen


def few_shot(labels: NDArray[np.int64], per_class: int, seed: int) -> NDArray[np.int64]:
    """Choose `per_class` images of every class.

    Args:
        labels: class numbers int64 [N]; images with -1 (no label) are never chosen.
        per_class: 1 or more.
        seed: decides which images; those of a smaller `per_class` are among those of a larger one.

    Returns indices int64 [classes * per_class], ascending. Raises ConfigError for per_class below 1, DataError
    naming a class that has fewer images, and when no image has a label.
    """
    if per_class < 1:
        raise ConfigError(f"per_class must be 1 or more; got {per_class!r}.")
    by_class = _by_class(labels, seed, "selection/few_shot")
    if not by_class:
        raise DataError(f"none of these {len(labels)} images has a label to choose by.")
    for label, members in by_class.items():
        if len(members) < per_class:
            raise DataError(
                f"class {label} has {len(members)} images to choose from (others may be held out), fewer than the "
                f"{per_class} asked for."
            )
    return np.sort(np.concatenate([members[:per_class] for members in by_class.values()]))


def _by_class(labels: NDArray[np.int64], seed: int, purpose: str) -> dict[int, NDArray[np.int64]]:
    """Indices of each class's images, shuffled; one sort for all classes, as there may be thousands."""
    mixed = permutation(seed, purpose, len(labels))
    mixed = mixed[labels[mixed] >= 0]
    grouped = mixed[np.argsort(labels[mixed], kind="stable")]
    classes, starts = np.unique(labels[grouped], return_index=True)
    return dict(zip(classes.tolist(), np.split(grouped, starts[1:]), strict=True)) if len(classes) else {}
