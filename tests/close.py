"""What "close" means here: max|a-b| <= tol * max|b|."""

from __future__ import annotations

import numpy as np
import torch


def assert_close(a: object, b: object, tol: float) -> None:
    x = a.detach().cpu().numpy() if isinstance(a, torch.Tensor) else np.asarray(a)
    y = b.detach().cpu().numpy() if isinstance(b, torch.Tensor) else np.asarray(b)
    assert x.shape == y.shape, f"{x.shape} != {y.shape}"
    error, scale = np.abs(x - y).max(), np.abs(y).max()
    assert error <= tol * scale, f"differs by {error / max(scale, 1e-300):.2e} of the largest value; allowed {tol:.0e}"
