"""Are the features collapsing? A number that needs no labels."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from nextblock.errors import ConfigError, DataError


def effective_rank(features: NDArray[np.float32]) -> float:
    """RankMe: the exponential of the entropy of the singular values scaled to sum 1 (arXiv 2210.02885, eq. 1-2).

    Args:
        features: [M, D], as they are (not centred). The paper takes M = 25,600; the number depends on M while M
            is not well above D, so compare only runs judged on equally many images.

    Returns:
        Between 1 (all features on one line) and min(M, D); 0 when every feature is 0.

    Raises ConfigError unless the features are [M, D] and not empty, DataError when a value is not finite.
    """
    if features.ndim != 2 or features.size == 0:
        raise ConfigError(f"effective_rank takes features [M, D]; got shape {list(features.shape)}.")
    x = torch.from_numpy(np.asarray(features, dtype=np.float64))
    if not bool(torch.isfinite(x).all()):
        raise DataError("The features hold values that are not finite: did the encoder's training diverge?")
    # By way of the smaller Gram matrix, whose eigenvalues are the squares: far cheaper than an SVD for M >> D.
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    if total == 0:
        return 0.0
    p = singular / total
    return float(torch.special.entr(p).sum().exp())
