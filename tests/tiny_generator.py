"""A tiny training of a generator, for the images of `tiny_run.write_images`."""

from __future__ import annotations

from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "data": {"workers": 0},
    "model": {
        "latent_size": 8, "latent_channels": 3, "patch_size": 2, "entity_size": 2, "width": 16, "depth": 2,
        "num_heads": 2, "num_classes": 2, "label_dropout": 0.2,
    },
    "training": {
        "epochs": 2, "batch_size": 8, "lr_at_batch": 8, "log_every_steps": 1, "warmup_epochs": 0,
        "checkpoint_every_steps": 4,
    },
    "watch": {"pictures": 3, "steps": 2, "every_epochs": 1},
}  # fmt: skip


def tiny(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: values | sections.get(name, {}) for name, values in TINY.items()}
