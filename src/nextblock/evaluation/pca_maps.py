"""Features as colours: three principal components of the patches of all images together, as red, green and blue."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nextblock.errors import ConfigError, DataError

COLOURS = 3
TAILS_PERCENT = 1.0  # of the values at either end are beyond the darkest and the brightest
NO_VARIANCE = 1e-12  # of the first component's: below, a direction is rounding


@dataclass(frozen=True)
class ColourBasis:
    """A fixed way from features to colours, so that several sets of images can share one.

    Attributes:
        mean: float64 [D].
        components: float64 [3, D], unit length; a row of zeros where the features have no such direction.
        low, high: float64 [3], the projections that become 0 and 255.
        explained: float64 [3], the part of the variance that each component holds, 0..1.
        about: plain values: what the features are. `require_fit` compares them.
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    explained: NDArray[np.float64]
    about: dict[str, Any] = field(default_factory=dict)

    def colours(self, features: ArrayLike) -> NDArray[np.uint8]:
        """[..., D] -> uint8 [..., 3]; a component without spread is 128 everywhere."""
        projected = (np.asarray(features, dtype=np.float64) - self.mean) @ self.components.T
        spread = self.high - self.low
        scaled = np.where(spread > 0, (projected - self.low) / np.where(spread > 0, spread, 1), 0.5)
        return np.rint(scaled.clip(0, 1) * 255).astype(np.uint8)

    def require_fit(self, width: int, about: Mapping[str, Any], where: str | Path) -> None:
        """Raise ConfigError when the basis is one of other features than these of so many dimensions.

        `about` is compared value by value; of "weights", the encoder's digest, an older file says nothing, which fits.
        """
        if len(self.mean) != width:
            raise ConfigError(
                f"{where} holds colours for features of {len(self.mean)} dimensions; this encoder gives {width}. "
                "Leave out --colours, or give a file of this encoder."
            )
        if "weights" in self.about and self.about["weights"] != about.get("weights", self.about["weights"]):
            raise ConfigError(
                f"{where} holds colours for features of another encoder. Leave out --colours, or give a file of this "
                "encoder."
            )
        about = {name: value for name, value in about.items() if name != "weights"}
        other = [f"{k} {self.about.get(k)} there, {v} here" for k, v in about.items() if self.about.get(k) != v]
        if other:
            raise ConfigError(f"{where} holds colours for other features: {'; '.join(other)}. Give the same options.")

    def save(self, path: str | Path) -> None:
        """As an .npz file; overwritten."""
        with open(path, "wb") as file:
            np.savez(
                file, mean=self.mean, components=self.components, low=self.low, high=self.high,
                explained=self.explained, about=np.array(json.dumps(self.about)),
            )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> ColourBasis:
        """The inverse of `save`. Raises DataError when the file is absent or something else."""
        names = ("mean", "components", "low", "high", "explained")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name].astype(np.float64) for name in names}
                about = json.loads(str(file["about"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(
                f"{path} cannot be read as colours: {error}. Give a colours.npz of an earlier page."
            ) from error
        width = arrays["mean"].size
        shapes = {"mean": (width,), "components": (COLOURS, width)}
        wrong = [name for name in names if arrays[name].shape != shapes.get(name, (COLOURS,))]
        wrong += [name for name in names if not np.isfinite(arrays[name]).all()]
        if wrong or not isinstance(about, dict):
            raise DataError(f"{path} holds no colours: {', '.join(wrong) or 'about'} is not what it should be.")
        return cls(**arrays, about=about)


def fit_colours(features: ArrayLike, about: Mapping[str, Any] | None = None) -> ColourBasis:
    """The first three principal components of all the rows of `features` [..., D], computed in float64.

    The same features in another order give the same colours, to rounding: a component's largest loading is positive.
    Every component is stretched over its own range from the 1st to the 99th percentile of all rows together, so
    that a few odd patches do not take the contrast from the rest.

    Raises DataError for values that are not finite, or less than two rows.
    """
    x = np.asarray(features, dtype=np.float64)
    x = x.reshape(-1, x.shape[-1])  # [M, D]
    if len(x) < 2 or not np.isfinite(x).all():
        raise DataError(f"colours need two patches or more with finite features; got {list(x.shape)}.")
    mean = x.mean(0)
    centred = x - mean
    variance, vectors = np.linalg.eigh(centred.T @ centred / len(x))  # ascending
    held, components = _first(variance[::-1].clip(0), vectors[:, ::-1].T)
    projected = centred @ components.T  # [M, 3]
    low, high = np.percentile(projected, (TAILS_PERCENT, 100 - TAILS_PERCENT), axis=0)
    total = max(float(variance.clip(0).sum()), np.finfo(np.float64).tiny)
    return ColourBasis(mean, components, low, high, held / total, dict(about or {}))


def _first(
    variance: NDArray[np.float64], directions: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variances [3] and directions [3, D] of the first three, signs fixed; zeros where there is no such direction."""
    held, components = np.zeros(COLOURS), np.zeros((COLOURS, directions.shape[1]))
    for i in range(min(COLOURS, len(directions))):
        if variance[i] > NO_VARIANCE * variance[0]:
            held[i] = variance[i]
            components[i] = directions[i] * np.sign(directions[i, np.abs(directions[i]).argmax()])
    return held, components
