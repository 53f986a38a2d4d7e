"""A pre-trained encoder as a scikit-learn transformer: images in, one row of numbers each out."""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin

from nextblock.data.loading import evaluation_batches
from nextblock.data.sources import Source, open_source
from nextblock.data.sources.memory import ObjectSource
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.features import FeatureConfig, extract_batches
from nextblock.jobs.opening import OpenedEncoder, open_encoder, require_positive

ON_ERROR = ("raise", "nan")


class ImageFeatures(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """The features of a frozen encoder, for a scikit-learn pipeline.

        make_pipeline(ImageFeatures("runs/mine"), StandardScaler(), LogisticRegression()).fit(paths, labels)

    Nothing is learned from X: `fit` only makes sure that the weights open. Copies and pickles keep the parameters
    and open the weights again where they are used; to compute the features of the same images once for many
    settings of what follows, give the pipeline a `memory`.

    Args:
        weights: a run folder, or a folder of exported weights.
        last_layers: mean over the outputs of so many last layers.
        pool: mean over the tokens of an image; else the vectors of all N patches one behind the other, raster order.
        final_norm: the tokens after the encoder's final norm instead; requires last_layers = 1.
        bidirectional: let all tokens see each other; by default the encoder keeps its block-causal mask.
        batch_size: images per forward pass.
        device: "auto", "cpu" or "cuda".
        workers: loading processes.
        on_error: what a broken image does: "raise" a DataError, or give a row of "nan".

    X is a list (or an array, or a table with one column) of image files, Pillow images or arrays; an array uint8
    [M, H, W] or [M, H, W, C]; a folder; or anything else that `open_source` takes. A row belongs to each image, in
    the order of X, also where an image occurs twice.
    """

    _opened: tuple[tuple[str, str], OpenedEncoder] | None = None

    def __init__(
        self,
        weights: str | os.PathLike[str],
        last_layers: int = 1,
        pool: bool = True,
        final_norm: bool = False,
        bidirectional: bool = False,
        batch_size: int = 64,
        device: str = "auto",
        workers: int = 0,
        on_error: Literal["raise", "nan"] = "raise",
    ) -> None:
        self.weights = weights
        self.last_layers = last_layers
        self.pool = pool
        self.final_norm = final_norm
        self.bidirectional = bidirectional
        self.batch_size = batch_size
        self.device = device
        self.workers = workers
        self.on_error = on_error

    def fit(self, X: Any = None, y: Any = None) -> ImageFeatures:
        """Open the weights and check the parameters; X and y are not looked at.

        Raises ConfigError, RunError or CheckpointError.
        """
        self._check()
        return self

    def _check(self) -> None:
        require_positive(batch_size=self.batch_size)
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"on_error must be one of {', '.join(map(repr, ON_ERROR))}; got {self.on_error!r}.")
        depth = self._encoder().encoder.config.depth
        if self._wanted().last_layers > depth:
            raise ConfigError(f"last_layers must be between 1 and the depth ({depth}); got {self.last_layers}.")

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Images to float32 [M, D] ([M, N·D] when not pooled).

        Raises DataError when X cannot be opened or, unless on_error is "nan", an image cannot be read.
        """
        self._check()
        opened, source = self._encoder(), _rows_of(X)
        rows = np.full((len(source), self._width()), np.nan, dtype=np.float32)
        batches = evaluation_batches(source, opened.preprocessing, batch_size=self.batch_size, workers=self.workers)
        for part in extract_batches(opened.encoder, batches, opened.preprocessing, self._wanted()):
            if part.bad and self.on_error == "raise":
                bad = part.bad[0]
                raise DataError(f"{bad.name}: {bad.reason}. To give such images a row of NaN instead: on_error='nan'.")
            if len(part):
                rows[part.indices] = part.values.reshape(len(part), -1)
        return rows

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Names of the columns: imagefeatures0, imagefeatures1, ..."""
        return np.array([f"imagefeatures{i}" for i in range(self._width())], dtype=object)

    def _wanted(self) -> FeatureConfig:
        return FeatureConfig(self.last_layers, self.pool, self.bidirectional, self.final_norm)

    def _encoder(self) -> OpenedEncoder:
        """The model that the present parameters name, opened once."""
        named = (os.fspath(self.weights), self.device)
        if self._opened is None or self._opened[0] != named:
            self._opened = (named, open_encoder(*named))
        return self._opened[1]

    def _width(self) -> int:
        config = self._encoder().encoder.config
        return config.width if self.pool else config.grid[0] * config.grid[1] * config.width

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        state.pop("_opened", None)  # hundreds of megabytes that are on the disk already
        return state

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.no_validation = True  # images are not checked as a table of numbers would be
        tags.input_tags.two_d_array, tags.input_tags.string = False, True
        tags.transformer_tags.preserves_dtype = []
        return tags


class _Files(ObjectSource):
    """A list of image files, each named by its path; unlike a source of files it keeps what occurs twice."""

    def name(self, index: int) -> str:
        return os.fspath(self._items[index])


def _rows_of(X: Any) -> Source:
    """A source with one sample for each element of X, in the order of X."""
    if hasattr(X, "iloc"):  # a pandas column or table
        X = X.to_numpy()
    if isinstance(X, np.ndarray) and X.dtype.kind in "OU":
        if X.ndim == 2 and X.shape[1] == 1:
            X = X[:, 0]
        if X.ndim != 1:
            raise DataError(f"X must have one column, of images or their files; got {list(X.shape)}.")
        X = X.tolist()
    if isinstance(X, list | tuple) and X and all(isinstance(item, str | os.PathLike) for item in X):
        return _Files(X)
    return open_source(X)
