"""What a generator learns from: images, whose pixels are then its latents, or a folder of cached latents."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nextblock.data.decoders import chosen_decoder
from nextblock.data.latents import LatentCache, LatentStream, is_latent_cache, latents_of, open_latents
from nextblock.data.preprocess import normalize
from nextblock.data.sources import Source, explain_change, known_labels, renumbered, write_manifest
from nextblock.data.sources.views import WithLabels
from nextblock.data.stream import TrainingStream
from nextblock.errors import ConfigError
from nextblock.jobs.record import described
from nextblock.randomness import normals, uniforms
from nextblock.recipes.generator import GeneratorConfig, GeneratorDataConfig
from nextblock.vae import Pixels, same_vae
from nextblock.xar.config import XARConfig
from nextblock.xar.objective import draw_times

Material = Source | LatentCache
CHANNELS = (1, 3)


def open_material(config: GeneratorDataConfig, name: str, objects: Mapping[str, Any]) -> Material | None:
    """The images or the cache that `name` ("train" or "val") says; None where it says nothing."""
    spec = objects.get(name, getattr(config, name))
    if isinstance(spec, LatentCache):
        return spec
    if isinstance(spec, str) and is_latent_cache(os.path.expanduser(spec)):
        return open_latents(spec)
    source = config.open(name, objects)
    if source is not None and source.labels() is None:  # read every image once for its label, not once a question
        return WithLabels(source, known_labels(source))
    return source


def fitted(values: dict[str, dict[str, Any]], material: Material) -> dict[str, dict[str, Any]]:
    """The recipe's sections, with what is left out of `model` taken from the data: classes; size, of a cache."""
    known: dict[str, Any] = {"num_classes": len(classes_of(material))}
    if isinstance(material, LatentCache):
        _, height, width = material.shape
        known |= {"latent_size": [height, width], "latent_channels": material.shape[0] // 2}
    return {**values, "model": {**known, **values.get("model", {})}}


def classes_of(material: Material) -> list[str]:
    """Class names by number: the numbers themselves where there are no names; empty where nothing is labelled."""
    if isinstance(material, LatentCache):
        if material.classes:
            return list(material.classes)
        labels = np.asarray(material.labels)
    else:
        if material.classes is not None:
            return list(material.classes)
        labels = known_labels(material)
    return [str(number) for number in range(int(labels.max(initial=-1)) + 1)]


def learned_from(config: GeneratorConfig, material: Material) -> Learned:
    """The data as this model learns from them. Raises ConfigError, naming both sides, where they do not fit."""
    return LatentData(config, material) if isinstance(material, LatentCache) else PixelData(config, material)


def watched_with(config: GeneratorConfig, material: Material, train: Learned) -> Learned:
    """The validation data beside the training data. Raises ConfigError or DataError where they do not fit."""
    if isinstance(material, LatentCache) != isinstance(train, LatentData):
        raise ConfigError(
            f"{train.description} and {material.description}: one holds latents, the other images. Give --data.train "
            f"and --data.val of the same kind."
        )
    if not isinstance(material, LatentCache):
        return PixelData(config, renumbered(material, train.classes) if train.classes else material)
    found = LatentData(config, material)
    if found.classes != train.classes or not same_vae(found.vae, train.vae):
        what = "classes" if found.classes != train.classes else "VAE"
        raise ConfigError(f"{material.description} is of another {what} than {train.description}.")
    return found


class PixelData:
    """Images; the model works on their pixels, in -1..1.

    Attributes:
        stream: see `data.stream.TrainingStream`.
        classes: names by number, as many as the model has; empty for an unconditional one.
        preprocessing: of an image, to be stored beside the weights.
    """

    def __init__(self, config: GeneratorConfig, source: Source) -> None:
        model, data = config.model, config.data
        if model.latent_channels not in CHANNELS:
            raise ConfigError(
                f"{source.description} are images, whose pixels have 1 or 3 channels, but model.latent_channels is "
                f"{model.latent_channels}. Set it to 1 or 3, or train on latents (nextblock cache-latents makes them)."
            )
        self.source = source
        self.classes = _checked_classes(model, known_labels(source), classes_of(source), source.description)
        self.preprocessing = data.preprocessing(model.latent, model.latent_channels)
        self.stream = TrainingStream(
            source, config.training.seed, data.crop(model.latent), self.preprocessing,
            decoder=chosen_decoder(data.decoder),
        )  # fmt: skip
        self.vae = Pixels(model.latent_channels).identity()
        self.description = source.description

    def __len__(self) -> int:
        return len(self.source)

    def latents(self, batch: Any) -> Tensor:
        """What the model learns of one of the stream's batches, on its device: [B, C, H, W]."""
        return normalize(batch.images, batch.flip, self.preprocessing)

    def record(self) -> dict[str, Any]:
        return described(self.source)

    def write_manifest(self, file: Path) -> None:
        write_manifest(self.source, file)

    def what_changed(self, file: Path) -> str:
        return explain_change(file, self.source)


class LatentData:
    """A folder of cached latents, the same as `PixelData` otherwise."""

    def __init__(self, config: GeneratorConfig, cache: LatentCache) -> None:
        model, (doubled, height, width) = config.model, cache.shape
        if (model.latent, model.latent_channels) != ((height, width), doubled // 2):
            raise ConfigError(
                f"{cache.folder} holds latents of {height}×{width} with {doubled // 2} channels, but the model is made "
                f"for {model.latent[0]}×{model.latent[1]} with {model.latent_channels}. Set model.latent_size and "
                f"model.latent_channels, or use another cache."
            )
        self.cache, self.seed = cache, config.training.seed
        names = classes_of(cache)
        self.classes = _checked_classes(model, np.asarray(cache.labels), names, cache.description)
        self.preprocessing = cache.preprocessing
        self.stream = LatentStream(cache, self.seed, config.data.flip)
        self.vae = dict(cache.vae)
        self.description = cache.description

    def __len__(self) -> int:
        return len(self.cache)

    def latents(self, batch: Any) -> Tensor:
        """A sample of each posterior, [B, C, h, w], drawn from (seed, position)."""
        return latents_of(batch, self.seed, self.vae["scale_factor"], self.vae.get("shift_factor", 0.0))

    def record(self) -> dict[str, Any]:
        return {"description": self.cache.description, "sha256": self.cache.fingerprint, "count": len(self.cache)}

    def write_manifest(self, file: Path) -> None:
        """A cache has a fingerprint, and no list of its own to compare."""

    def what_changed(self, file: Path) -> str:
        return f"the fingerprint of {self.cache.description} is another"


Learned = PixelData | LatentData


def _checked_classes(model: XARConfig, labels: NDArray[np.int64], names: list[str], what: str) -> list[str]:
    """The names of the model's classes. Raises ConfigError, with what to set, where the labels do not fit."""
    wanted = model.num_classes
    if not wanted:
        return []
    missing = int((labels < 0).sum()) if len(names) else len(labels)
    if missing:
        raise ConfigError(
            f"the model is made for {wanted} classes, but {missing:,} of the {len(labels):,} images of {what} have no "
            f"label. Label them (a folder for each class), or set model.num_classes to 0: unconditional."
        )
    if len(names) > wanted or (len(names) < wanted and names != [str(n) for n in range(len(names))]):
        raise ConfigError(
            f"{what} has {len(names)} classes, the model is made for {wanted}. Set model.num_classes to {len(names)}."
        )
    return names + [str(number) for number in range(len(names), wanted)]


def drawn_for(config: XARConfig, seed: int, positions: ArrayLike, purpose: str = "") -> tuple[Tensor, Tensor]:
    """Times [B, E] and noise [B, N, C·p·p], entity-major, float32, each row a function of (seed, position) alone."""
    entities = config.entities
    lots = torch.from_numpy(uniforms(seed, f"{purpose}times", positions, entities.num_entities))
    noise = normals(seed, f"{purpose}noise", positions, (entities.num_tokens, config.token_channels))
    return draw_times(config, lots).float(), noise
