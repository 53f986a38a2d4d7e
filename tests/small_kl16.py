"""The small KL-16 autoencoder of tests/data as a file of the official layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"


def official_state() -> dict[str, torch.Tensor]:
    stored = np.load(DATA / "kl16_small_weights_int8.npz")
    names = [name for name in stored.files if not name.startswith("scale:")]
    return {n: torch.from_numpy(stored[n].astype(np.float32) * stored[f"scale:{n}"].astype(np.float32)) for n in names}


def write_kl16(path: Path) -> Path:
    torch.save({"model": official_state()}, path)
    return path
