"""The sections of a generator's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nextblock.data.augment import CropConfig
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import ConfigError
from nextblock.ordering import Pair
from nextblock.recipes.config import Kind, SourceConfig, typed_as
from nextblock.training.config import TrainingConfig
from nextblock.xar.config import PRESETS, XARConfig


@dataclass(frozen=True)
class GeneratorDataConfig(SourceConfig):
    """What is learned from: images (the model then works on pixels) or cached latents.

    For latents only `train`, `val`, `flip`, `workers` and `timeout_s` matter. An image is never distorted: the crop has
    the proportions of the model's images, and at the default `crop_scale` it is the largest central one, whose shorter
    side is the image's own.

    Attributes:
        train: a folder of latents made by `nextblock cache-latents`; or images: a folder of them, Parquet file(s),
            `hf:NAME` (a Hugging Face data set); in Python also arrays or any object with `__len__` and `__getitem__`.
        val: of the same kind as `train`, to watch the training with; optional.
        crop_scale: share of the image's area that a training crop covers, (least, most).
    """

    crop_scale: tuple[float, float] = (1.0, 1.0)

    def preprocessing(self, size_px: Pair, channels: int) -> Preprocessing:
        """How an image becomes what the model learns: pixels in -1..1."""
        half = (0.5,) * channels
        return Preprocessing(size_px, min(size_px), channels, half, half, self.exif_orientation)

    def crop(self, size_px: Pair) -> CropConfig:
        aspect = size_px[1] / size_px[0]
        return CropConfig(size_px, self.crop_scale, (aspect, aspect), self.flip)


@dataclass(frozen=True)
class GeneratorTraining(TrainingConfig):
    """How a generator trains; every length is derived from `epochs`.

    The defaults that differ from an encoder's are xAR's (arXiv 2502.20388, Table 6); the decay of the average is the
    official code's.

    Attributes:
        ema_decay: of the average of the weights, which is what is sampled from; 0 = the last weights.
    """

    betas: tuple[float, float] = (0.9, 0.96)
    weight_decay: float = 0.02
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"training.ema_decay must be at least 0 and below 1; got {self.ema_decay!r}.")


@dataclass(frozen=True)
class GeneratorWatchConfig:
    """What is looked at while a generator trains.

    Attributes:
        every_epochs: between two looks; 0 = ten times in the run. There is always one at the end.
        max_images: of the validation images, the most that the loss is measured on.
        pictures: samples in each sheet; 0 = none. They are drawn from the same noise every time.
        steps: solver steps for each entity of a sample.
        guidance: of the samples; 1 = none.
        solver: of the samples.
        vae: where the VAE is that decodes latents; as the cache says when left out.
    """

    every_epochs: float = 0.0
    max_images: int = 5000
    pictures: int = 20
    steps: int = 25
    guidance: float = 1.0
    solver: Literal["euler", "heun", "euler_maruyama", "multistep"] = "euler_maruyama"
    vae: str | None = None

    def __post_init__(self) -> None:
        for name in ("every_epochs", "pictures", "guidance"):
            if getattr(self, name) < 0:
                raise ConfigError(f"watch.{name} must be 0 or more; got {getattr(self, name)!r}.")
        for name in ("max_images", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"watch.{name} must be at least 1; got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class GeneratorConfig:
    """A complete training of a generator."""

    data: GeneratorDataConfig = field(default_factory=GeneratorDataConfig)
    model: XARConfig = field(default_factory=XARConfig)
    training: GeneratorTraining = field(default_factory=GeneratorTraining)
    watch: GeneratorWatchConfig = field(default_factory=GeneratorWatchConfig)


SECTIONS: dict[str, type] = {
    "data": GeneratorDataConfig,
    "model": XARConfig,
    "training": GeneratorTraining,
    "watch": GeneratorWatchConfig,
}
GENERATOR = Kind("train-generator", GeneratorConfig, SECTIONS, PRESETS)


def typed_generator(values: Mapping[str, Any]) -> GeneratorConfig:
    """The plain sections of a generator's training as its dataclasses. Raises ConfigError in one sentence."""
    return typed_as(GENERATOR, values)
