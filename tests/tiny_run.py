"""A tiny pre-training run and images for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TINY: dict[str, dict[str, Any]] = {
    "data": {"resize_px": 16, "workers": 0},
    "model": {
        "image_size_px": 16, "patch_size_px": 4, "cell_size": 2, "width": 16, "depth": 2, "num_heads": 2,
        "predictor_width": 16, "predictor_depth": 1, "predictor_heads": 2, "head_hidden": 32,
    },
    "training": {"epochs": 2, "batch_size": 8, "log_every_steps": 1, "warmup_epochs": 0, "checkpoint_every_steps": 4},
    "watch": {"knn_k": 3, "pictures": 2},
}  # fmt: skip


def tiny(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: values | sections.get(name, {}) for name, values in TINY.items()}


def flags(sections: dict[str, dict[str, Any]]) -> list[str]:
    return [f"--{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()]


def write_images(folder: Path, per_class: int = 12) -> Path:
    """Two classes of 20x24 px images: bright at the top, or at the left."""
    generator = np.random.default_rng(0)
    for name in ("left", "top"):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.integers(0, 80, (20, 24, 3))
            half = pixels[:10] if name == "top" else pixels[:, :12]
            half += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03d}.png")
    return folder
