"""What a model expects of its images, and the two maps between uint8 pixels and normalised floats."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextblock.checkpoints.pretrained import find_folder, read_preprocessing
from nextblock.data.augment import resize_and_crop
from nextblock.data.decode import decode
from nextblock.errors import ConfigError, nearest

MOST_CHANNELS = 65_536  # each has a mean and a deviation
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """How images become model input; stored beside the weights.

    Arguments:
        size_px: height and width of the model's input.
        resize_px: shorter side before the central crop of evaluation; None: 8/7 of the larger side of
            `size_px`, the 256 for 224 rule.
        channels: 3 (RGB), 1 (gray), or any number for images given as arrays.
        mean, std: per channel, of pixels in 0..1; None: ImageNet's for 3 channels, else 0.5 each. Filled in on
            construction.
        exif_orientation: whether images are turned as their EXIF orientation says.

    Raises ConfigError for values that cannot work.
    """

    size_px: tuple[int, int]
    resize_px: int | None = None
    channels: int = 3
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    exif_orientation: bool = True

    def __post_init__(self) -> None:
        size = tuple(self.size_px) if isinstance(self.size_px, tuple | list) else ()
        if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
            raise ConfigError(f"size_px must be a height and a width in pixels, got {self.size_px!r}")
        object.__setattr__(self, "size_px", size)
        if self.resize_px is not None and self.resize_px < 1:
            raise ConfigError(f"resize_px must be at least 1, or None, got {self.resize_px}")
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise ConfigError(f"channels must lie between 1 and {MOST_CHANNELS:,}; got {self.channels}")
        self._fill("mean", IMAGENET_MEAN)
        self._fill("std", IMAGENET_STD)
        if any(value <= 0 for value in self.std or ()):
            raise ConfigError(f"std must be positive, got {self.std}")

    def _fill(self, field: str, imagenet: tuple[float, ...]) -> None:
        given = getattr(self, field)
        if given is None:
            given = imagenet if self.channels == 3 else (0.5,) * self.channels
        if len(given) != self.channels:
            raise ConfigError(f"{field} must have one value for each of the {self.channels} channels, got {given}")
        object.__setattr__(self, field, tuple(float(value) for value in given))

    @property
    def shorter_side_px(self) -> int:
        """`resize_px`, or what its None stands for."""
        return round(max(self.size_px) * 8 / 7) if self.resize_px is None else self.resize_px

    def __call__(self, images: Any) -> Tensor:
        """Images as the model wants them: resized, centrally cropped, normalised; float32 [B, C, H, W].

        `images` is a file, a Pillow image or uint8 pixels [H, W] or [H, W, C]; or a list of such. Raises SampleError
        for an image that cannot be read.
        """
        several = images if isinstance(images, list | tuple) else [images]
        if not several:
            raise ConfigError("no images were given.")
        pixels = [self._pixels(image, i) for i, image in enumerate(several)]
        return normalize(torch.from_numpy(np.stack(pixels)), None, self)

    def _pixels(self, image: Any, number: int) -> NDArray[np.uint8]:
        """uint8 [H, W, C] of one image, at the model's size."""
        name = str(image) if isinstance(image, str | os.PathLike) else f"image {number}"
        pixels = decode(image, name, channels=self.channels, exif_orientation=self.exif_orientation)
        return resize_and_crop(pixels, self.shorter_side_px, self.size_px)

    @classmethod
    def from_pretrained(cls, where: str | Path, *, revision: str | None = None) -> Preprocessing:
        """What the weights in a folder, in a finished run, or on the Hugging Face hub expect.

        Raises CheckpointError when there are none.
        """
        return cls.from_dict(read_preprocessing(find_folder(where, revision)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`. Raises ConfigError for an unknown or a missing key."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown preprocessing key '{key}'.{nearest(key, known)}")
        if "size_px" not in values:
            raise ConfigError("preprocessing needs 'size_px': [height, width] in pixels")
        return cls(**values)


@lru_cache(maxsize=32)
def _constants(values: tuple[float, ...], device: torch.device) -> Tensor:
    # Cached, because copying numbers to a GPU anew for each batch would make the host wait.
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)[:, None, None]  # [C, 1, 1]


def normalize(
    images: Tensor, flip: Tensor | None, preprocessing: Preprocessing, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Mirror, scale to 0..1, subtract the mean, divide by the standard deviation; on the images' device.

    `images` uint8 [B, H, W, C]; `flip` bool [B] or None. Returns `dtype` [B, C, H, W]; computed in float32.
    Raises ValueError when the images are not uint8 [B, H, W, channels].
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != preprocessing.channels:
        found = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"images must be uint8 [B, H, W, {preprocessing.channels}], got {found}")
    x = images.permute(0, 3, 1, 2)  # [B, C, H, W]
    if flip is not None:
        x = torch.where(flip[:, None, None, None], x.flip(3), x)
    mean = _constants(preprocessing.mean or (), x.device)
    std = _constants(preprocessing.std or (), x.device)
    x = x.to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(255).sub_(mean).div_(std).to(dtype)


@torch.no_grad()
def denormalize(x: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The inverse of `normalize` without the mirroring: float [B, C, H, W] to uint8 [B, H, W, C], clamped."""
    mean = _constants(preprocessing.mean or (), x.device)
    std = _constants(preprocessing.std or (), x.device)
    pixels = (x.to(torch.float32) * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
