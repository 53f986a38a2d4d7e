"""What to train when nobody said: sizes, batch and length from the images and the device.

All of it is ours, meant as a sound first run, and told in a few lines before training starts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from nextblock.data.loading import default_workers
from nextblock.data.sources import Source
from nextblock.errors import SampleError
from nextblock.ordering import as_pair
from nextblock.training.launcher import launched
from nextblock.xtra.config import PRESETS

# side of the training image in px -> (patch px, patches along a cell); every one has 16 or more cells
GEOMETRY = {32: (4, 2), 48: (6, 2), 64: (8, 2), 96: (12, 2), 128: (16, 2), 192: (16, 3), 256: (16, 4)}
CPU_LARGEST_PX = 128
CPU_IMAGES = 600_000  # seen in a run: about an hour for the small model on two cores
GPU_IMAGES = 100_000_000
PROBED = 64


@dataclass
class Choice:
    """`values` are recipe sections; `reasons` are the lines to print. What is `given` is not chosen."""

    given: Mapping[str, Mapping[str, Any]]
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def take(self, section: str, reason: str, **values: Any) -> None:
        fresh = {name: value for name, value in values.items() if name not in self.given.get(section, {})}
        if fresh:
            self.values.setdefault(section, {}).update(fresh)
            shown = ", ".join(f"{name} {value}" for name, value in fresh.items())
            self.reasons.append(f"  {section}: {shown} ({reason})")


def choose(source: Source, device: str, given: Mapping[str, Mapping[str, Any]], *, sized: bool) -> Choice:
    """Pick what is not given for these images on this device.

    Args:
        source: the images.
        device: "cpu" or "cuda".
        given: the values of recipe sections that are given and stay.
        sized: a preset already gives the sizes of the model.
    """
    choice = Choice(given)
    _choose_geometry(choice, source, device)
    if not sized:
        _choose_sizes(choice, len(source), device)
    _choose_length(choice, len(source), device)
    return choice


def _choose_geometry(choice: Choice, source: Source, device: str) -> None:
    side, channels = typical_image(source)
    largest = CPU_LARGEST_PX if device == "cpu" else max(GEOMETRY)
    size = max([s for s in GEOMETRY if s <= min(side, largest)], default=min(GEOMETRY))
    why = f"the images' shorter side is about {side} px"
    why += f"; on a CPU at most {CPU_LARGEST_PX}" if size == largest == CPU_LARGEST_PX < side else ""
    patch, cell = GEOMETRY[size]
    given = choice.given.get("model", {})
    if "image_size_px" in given or "patch_size_px" in given:
        size = min(as_pair(given.get("image_size_px", size), "image_size_px"))
        patch, cell = _fitting(size, given.get("patch_size_px"))
        why = "fits the given sizes"
    choice.take("model", why, image_size_px=size, patch_size_px=patch, cell_size=cell)
    if channels != 3:
        choice.take("model", "the images are gray", channels=channels)
    if size <= 64:
        choice.take("data", "at so few px, evaluation shrinks whole images and crops little", resize_px=size)


def _fitting(size: int, patch: int | None) -> tuple[int, int]:
    """(patch px, patches along a cell) that divide an image of `size` px into about 4×4 cells, where that can be."""
    if not isinstance(patch, int):
        wanted = GEOMETRY[max([s for s in GEOMETRY if s <= size], default=min(GEOMETRY))][0]
        patch = min((p for p in range(1, size + 1) if size % p == 0), key=lambda p: abs(p - wanted))
    grid = max(1, size // patch)
    cell = min((k for k in range(1, grid + 1) if grid % k == 0), key=lambda k: (abs(grid / k - 4), k))
    return patch, cell


def _choose_sizes(choice: Choice, images: int, device: str) -> None:
    if device == "cpu":
        sizes = {"width": 192, "depth": 6, "num_heads": 3, "predictor_width": 128, "predictor_depth": 2}
        choice.take("model", "small enough for a CPU", **sizes)
        return
    preset = "xtra_ti16" if images < 50_000 else "xtra_s16" if images < 500_000 else "xtra_b16"
    sizes = {name: PRESETS[preset][name] for name in ("width", "depth", "num_heads")}
    choice.take("model", f"as in {preset}, for {images:,} images", **sizes)


def _choose_length(choice: Choice, images: int, device: str) -> None:
    if device == "cpu":
        batch, budget, lr_at_batch = 128, CPU_IMAGES, 128
    else:
        batch, budget, lr_at_batch = (2048 if images >= 500_000 else 512), GPU_IMAGES, 2048
    batch = max(8, min(batch, 2 ** int(np.log2(max(8, images // 4)))))
    given = choice.given.get("training", {})
    epochs = float(given.get("epochs", round(min(800.0, max(1.0, budget / images)), 1)))
    choice.take("training", f"for {images:,} images", batch_size=batch)
    if "lr" not in given:
        choice.take("training", "scaled to the batch by its square root", lr=1e-3, lr_at_batch=lr_at_batch)
    seen = f"about {epochs * images:,.0f} images seen"
    choice.take("training", seen, epochs=epochs, warmup_epochs=round(epochs / 20, 2))
    found = launched()
    workers = default_workers(int(given.get("devices", 1)) if found is None else found.here)
    choice.take("data", "the cores of this machine, less one", workers=workers)


def typical_image(source: Source) -> tuple[int, int]:
    """(median shorter side in px, channels) of up to 64 images spread over the source; (256, 3) if none opens."""
    sides, gray = [], []
    for index in np.linspace(0, len(source) - 1, min(PROBED, len(source)), dtype=int).tolist():
        try:
            found = _measure(source[index].content)
        except (SampleError, UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # the stream reports broken images; here they only do not count
        sides.append(found[0])
        gray.append(found[1])
    return (int(np.median(sides)), 1 if all(gray) else 3) if sides else (256, 3)


def _measure(content: Any) -> tuple[int, bool]:
    """(shorter side in px, is gray) from the header alone."""
    if isinstance(content, np.ndarray):
        return min(content.shape[:2]), content.ndim == 2 or content.shape[2] == 1
    image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
    return min(image.size), image.mode in ("L", "1", "I;16", "LA")
