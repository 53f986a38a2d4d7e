"""What an XTRA model predicts: every cell from the true cells before it, beside what needs no model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextblock.data.preprocess import Preprocessing, denormalize
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.inference import device_of, inference
from nextblock.evaluation.npz_files import UNREADABLE
from nextblock.layers.patches import entity_images, entity_pixels
from nextblock.ordering import Ordering
from nextblock.xtra.model import XTRA
from nextblock.xtra.objective import cell_statistics


@dataclass(frozen=True)
class Reconstructions:
    """B images, their predictions and the baseline; K cells in the order in which they are predicted.

    The baseline is every cell flat at its own true mean. A model trained on normalised cells predicts only the
    pattern of a cell, and is drawn here with the cell's *true* mean and deviation: that much is given away. With
    no pattern known, the least-squares prediction of a normalised cell is 0, whatever its contrast, and 0 drawn
    with the true mean and deviation is the flat cell. So a picture (and an error) is the model's merit only as
    far as it is better than the baseline. A model trained on plain pixels predicts the mean too; there the
    baseline knows something that the model does not.

    Errors are mean squared errors over the pixels and channels of a cell, [B, K-1] float32, cells 1..K-1 (the
    first is never predicted): in the units of the training loss (normalised cells, where the baseline is about
    1, or normalised pixels), and in pixels of 0..1, clipped as in the picture.

    Attributes:
        originals, predictions, baselines: uint8 [B, H, W, C]; the first cell is the original's in all three.
        place: int64 [H, W], the cell of every pixel as its place in the order, 0..K-1.
        prediction_errors, baseline_errors: in the units of the training loss.
        prediction_pixel_errors, baseline_pixel_errors: in pixels of 0..1.
        normalized_cells: whether the model was trained on normalised cells.
    """

    originals: NDArray[np.uint8]
    predictions: NDArray[np.uint8]
    baselines: NDArray[np.uint8]
    place: NDArray[np.int64]
    prediction_errors: NDArray[np.float32]
    baseline_errors: NDArray[np.float32]
    prediction_pixel_errors: NDArray[np.float32]
    baseline_pixel_errors: NDArray[np.float32]
    normalized_cells: bool

    def __len__(self) -> int:
        return len(self.originals)

    def save(self, path: str | Path) -> None:
        """As a compressed .npz file; its folder is made when needed."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            np.savez_compressed(file, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Reconstructions:
        """The inverse of `save`. Raises DataError when the file is absent or something else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                values: dict[str, Any] = {field.name: file[field.name] for field in dataclasses.fields(cls)}
        except UNREADABLE as error:
            raise DataError(f"{path} cannot be read as saved reconstructions: {error}") from error
        return cls(**{**values, "normalized_cells": bool(values["normalized_cells"])})


def reconstruct(
    model: XTRA, images: Tensor, preprocessing: Preprocessing, ordering: Ordering | None = None
) -> Reconstructions:
    """Predict every cell of every image from the true cells before it, with the first pixel head.

    Args:
        model: left in the mode it came in.
        images: float [B, C, H, W], normalised by `preprocessing`; all of them in one batch.
        preprocessing: of the model.
        ordering: the order of the cells; absent: the first configured one on the training size, raster order
            on other sizes.

    Raises ConfigError when images or ordering do not fit the model.
    """
    images = images.to(device_of(model))
    ordering = ordering or model.default_ordering(images)
    if ordering.entity_size != model.config.ordering.entity_size or ordering.num_entities < 2:
        raise ConfigError(
            f"the model predicts entities of {model.config.ordering.entity_size} patches and needs two of them; this "
            f"ordering has {ordering.num_entities} of {ordering.entity_size}."
        )
    with inference(model):
        raw = model.predict(images, ordering=ordering)[:, :-1].float()  # [B, K-1, P]
    cells = model.targets(images, ordering).float()  # [B, K, P]
    mean, deviation = cell_statistics(cells[:, 1:])
    if not model.config.normalize_targets:
        deviation = torch.ones_like(deviation)  # errors in normalised pixels
    predicted = raw * deviation + mean if model.config.normalize_targets else raw
    versions = {"original": cells[:, 1:], "prediction": predicted, "baseline": mean.expand_as(predicted)}

    picture = {
        name: entity_images(torch.cat((cells[:, :1], x), 1), model.config.patch, ordering)
        for name, x in versions.items()
    }

    def errors(name: str) -> NDArray[np.float32]:
        return _array(((versions[name] - versions["original"]) / deviation).square().mean(-1))

    def pixel_errors(name: str) -> NDArray[np.float32]:
        difference = _unit_pixels(picture[name], preprocessing) - _unit_pixels(picture["original"], preprocessing)
        return _array(entity_pixels(difference, model.config.patch, ordering)[:, 1:].square().mean(-1))

    return Reconstructions(
        originals=_array(denormalize(picture["original"], preprocessing)),
        predictions=_array(denormalize(picture["prediction"], preprocessing)),
        baselines=_array(denormalize(picture["baseline"], preprocessing)),
        place=_array(_places(model, ordering)),
        prediction_errors=errors("prediction"),
        baseline_errors=errors("baseline"),
        prediction_pixel_errors=pixel_errors("prediction"),
        baseline_pixel_errors=pixel_errors("baseline"),
        normalized_cells=model.config.normalize_targets,
    )


def _places(model: XTRA, ordering: Ordering) -> Tensor:
    """The place in the order of each pixel's entity: [H, W] int64."""
    pixels = ordering.entity_size * model.config.patch[0] * model.config.patch[1]
    numbers = torch.arange(ordering.num_entities)[None, :, None].expand(1, -1, pixels)
    return entity_images(numbers, model.config.patch, ordering)[0, 0]


def _unit_pixels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """[B, C, H, W], normalised -> 0..1, clipped to what a picture can show."""
    mean = torch.tensor(preprocessing.mean, device=images.device)[:, None, None]
    std = torch.tensor(preprocessing.std, device=images.device)[:, None, None]
    return (images * std + mean).clamp(0, 1)


def _array(x: Tensor) -> NDArray[Any]:
    return x.cpu().numpy()
