"""Features of a frozen encoder, and raw pixels in the same shape as their control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.data.stream import BadSample, Batch
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.inference import device_of, inference
from nextblock.xtra.model import Encoder


@dataclass(frozen=True)
class FeatureConfig:
    """Which numbers of an encoder are taken as its features.

    Attributes:
        last_layers: average the outputs of so many last layers.
        pool: average over the tokens: [D] for an image; otherwise [N, D], tokens in raster order.
        bidirectional: every token sees every other one. The encoder is trained block-causally; the published
            probes keep the mask.
        final_norm: after the encoder's final norm; requires last_layers = 1.

    Raises ConfigError for values that cannot work.
    """

    last_layers: int = 1
    pool: bool = True
    bidirectional: bool = False
    final_norm: bool = False

    def __post_init__(self) -> None:
        if self.last_layers < 1:
            raise ConfigError(f"last_layers must be at least 1; got {self.last_layers}.")
        if self.final_norm and self.last_layers != 1:
            raise ConfigError(
                f"final_norm works on the last layer alone; got last_layers {self.last_layers}. "
                "Set last_layers=1 or final_norm=False."
            )


@dataclass
class Features:
    """M images as numbers.

    values: float32 [M, D], or [M, N, D] unpooled. labels: int64 [M], -1 where there is none. indices: int64 [M],
    of the samples in their source. bad: the samples that could not be read and are not among the M.
    """

    values: NDArray[np.float32]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    bad: list[BadSample] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        """One after the other. Raises DataError when there is not one image in them."""
        bad = [sample for part in parts for sample in part.bad]
        whole = [part for part in parts if len(part)]
        if not whole:
            first = f"; {len(bad)} could not be read, the first of them {bad[0].name}: {bad[0].reason}" if bad else ""
            raise DataError(f"There are no images to take features of{first}.")
        return cls(
            np.concatenate([part.values for part in whole]),
            np.concatenate([part.labels for part in whole]),
            np.concatenate([part.indices for part in whole]),
            bad,
        )


def extract(
    encoder: Encoder,
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
    config: FeatureConfig = FeatureConfig(),
    *,
    device: torch.device | str | None = None,
) -> Features:
    """The features of all images, in memory: M·D·4 bytes (M·N·D·4 unpooled), for a moment twice that.

    Args:
        encoder: left in the mode it came in.
        batches: as from `nextblock.data.loading.evaluation_batches`.
        preprocessing: of the encoder.
        config: which numbers.
        device: the encoder is moved there and stays; absent: where it is. bfloat16 autocast on CUDA only.

    Raises DataError when there are no images, ConfigError when they do not fit the encoder.
    """
    return Features.joined(list(extract_batches(encoder, batches, preprocessing, config, device=device)))


def extract_batches(
    encoder: Encoder,
    batches: Iterable[Batch],
    preprocessing: Preprocessing,
    config: FeatureConfig = FeatureConfig(),
    *,
    device: torch.device | str | None = None,
) -> Iterator[Features]:
    """`extract`, handed over batch by batch, for outputs that do not fit into memory.

    A batch without a readable image gives no values, [0, 0], and its bad samples.
    """
    if device is not None:
        encoder.to(device)
    place = device_of(encoder)

    def values(images: Tensor) -> Tensor:
        with inference(encoder):  # around each batch, never around a yield
            return _features(encoder, normalize(images.to(place), None, preprocessing), config)

    return (_part(batch, values) for batch in batches)


def pixel_features(batches: Iterable[Batch], preprocessing: Preprocessing) -> Features:
    """The normalised pixels themselves, [M, C·H·W] in (channel, row, column): what an encoder has to beat."""

    def values(images: Tensor) -> Tensor:
        return normalize(images, None, preprocessing).flatten(1)

    return Features.joined([_part(batch, values) for batch in batches])


def labelled(features: Features, what: str) -> Features:
    """The images that have a label, pooled and finite as a probe needs them.

    `what` names the set in errors. Raises ConfigError for unpooled features, DataError when no image is
    labelled or a value is not finite.
    """
    if features.values.ndim != 2:
        raise ConfigError(
            f"a probe takes one vector an image, [M, D]; the {what} features are {list(features.values.shape)}. "
            "Extract them with FeatureConfig(pool=True)."
        )
    known = features.labels >= 0
    if not known.any():
        raise DataError(
            f"None of the {len(features)} {what} images has a label, and a probe needs them. "
            "Use a folder with one sub-folder for each class, or name the label column."
        )
    if not np.isfinite(features.values).all():
        raise DataError(f"The {what} features hold values that are not finite: did the encoder's training diverge?")
    if known.all():
        return features
    return Features(features.values[known], features.labels[known], features.indices[known], features.bad)


def labelled_pair(train: Features, test: Features) -> tuple[Features, Features]:
    """Both sets as `labelled` gives them. Also raises ConfigError when their dimensions differ, DataError when
    the training set has one class only."""
    train, test = labelled(train, "training"), labelled(test, "test")
    if train.values.shape[1] != test.values.shape[1]:
        raise ConfigError(
            f"training features have {train.values.shape[1]} dimensions and test features {test.values.shape[1]}. "
            "Extract both with the same encoder and FeatureConfig."
        )
    if (train.labels == train.labels[0]).all():
        raise DataError(
            f"All {len(train)} training images have label {train.labels[0]}; a probe needs at least two classes."
        )
    return train, test


def _features(encoder: Encoder, images: Tensor, config: FeatureConfig) -> Tensor:
    x: Tensor  # [B, N, D]
    if config.final_norm:
        x = encoder(images, bidirectional=config.bidirectional)
    else:
        x = encoder.features(images, config.last_layers, bidirectional=config.bidirectional)
    return x.float().mean(1) if config.pool else x.float()


def _part(batch: Batch, values: Callable[[Tensor], Tensor]) -> Features:
    found = values(batch.images).cpu().numpy() if len(batch) else np.zeros((0, 0), np.float32)
    return Features(found, batch.labels.numpy(), batch.indices.numpy(), list(batch.bad))
