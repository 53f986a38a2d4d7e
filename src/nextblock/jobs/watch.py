"""What is looked at while an encoder trains: validation loss, kNN, effective rank, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.data.sources import Source
from nextblock.errors import DataError
from nextblock.evaluation.features import Features, extract
from nextblock.evaluation.inference import device_of, inference
from nextblock.evaluation.knn import knn_accuracy
from nextblock.evaluation.rank import effective_rank
from nextblock.evaluation.reconstruction import reconstruct
from nextblock.figures.curves import draw_curves
from nextblock.figures.reconstruction import draw_contact_sheet
from nextblock.jobs.classes import in_classes_of
from nextblock.randomness import permutation
from nextblock.recipes.config import WatchConfig
from nextblock.xtra.model import XTRA

BATCH = 250
RANK_IMAGES = 2000


class Watch:
    """Call it with the number of steps done; it returns columns for metrics.csv and writes pictures.

    kNN uses the training images as its bank when they are labelled with the classes of `val`, else every second
    image of `val` for the others. What cannot be measured or drawn is told once and left out: looking never ends a run.
    """

    def __init__(
        self,
        model: XTRA,
        preprocessing: Preprocessing,
        config: WatchConfig,
        train: Source,
        val: Source | None,
        folder: Path,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.preprocessing, self.config, self.folder = model, preprocessing, config, folder
        self.train, self.val, self.say = train, val, say
        self.told: set[str] = set()
        self.train_indices = _some(len(train), config.max_images, seed)
        self.val_indices = _some(len(val), config.max_images, seed) if val else []
        seen = self.val_indices if val else self.train_indices
        count = min(config.pictures, len(seen))
        self.pictured = [seen[i * len(seen) // count] for i in range(count)]

    def __call__(self, done: int) -> dict[str, float]:
        row: dict[str, float] = {}
        with self._told():
            if self.val:
                row["val_loss"] = self._loss(self.val)
                queries = self._features(self.val, self.val_indices)
                row["effective_rank"] = effective_rank(queries.values[:RANK_IMAGES])
                with self._told():
                    row |= self._knn(self.val, queries)
            else:
                features = self._features(self.train, self.train_indices[:RANK_IMAGES])
                row["effective_rank"] = effective_rank(features.values)
        if self.pictured:
            with self._told("drawn"):
                self._picture(done)
        return row

    @contextmanager
    def _told(self, what: str = "measured") -> Iterator[None]:
        try:
            yield
        except (DataError, OSError) as error:  # OSError: a picture for which there is no room
            why = str(error) if isinstance(error, DataError) else error.strerror or str(error)
            if why not in self.told:
                self.say(f"not {what} while training: {why}")
                self.told.add(why)

    def _features(self, source: Source, indices: list[int]) -> Features:
        batches = evaluation_batches(source, self.preprocessing, batch_size=BATCH, indices=indices)
        return extract(self.model.encoder, batches, self.preprocessing)

    def _knn(self, val: Source, queries: Features) -> dict[str, float]:
        """The kNN column; empty when `val` has no labels."""
        if (queries.labels < 0).any():
            return {}
        bank, asked = _part(queries, slice(0, None, 2)), _part(queries, slice(1, None, 2))
        labels = self.train.labels()
        if labels is not None and len(np.unique(labels[labels >= 0])) > 1 and _share_classes(self.train, val):
            bank = self._features(self.train, self.train_indices)
            asked = in_classes_of(self.train, val, queries)
        return {"knn": next(iter(knn_accuracy(bank, asked, k=self.config.knn_k).values()))}

    def _loss(self, source: Source) -> float:
        """Mean over the watched validation images, first configured order, no drop path."""
        device = device_of(self.model)
        total, count = torch.zeros((), device=device), 0
        for batch in evaluation_batches(source, self.preprocessing, batch_size=BATCH, indices=self.val_indices):
            if len(batch):
                with inference(self.model):
                    total += self.model.loss(self._input(batch.images.to(device))) * len(batch)
                count += len(batch)
        return float(total) / max(1, count)

    def _picture(self, done: int) -> None:
        source = self.val or self.train
        indices = self.pictured
        batch = next(evaluation_batches(source, self.preprocessing, batch_size=len(indices), indices=indices))
        if not len(batch):
            return
        images = self._input(batch.images.to(device_of(self.model)))
        found = reconstruct(self.model, images, self.preprocessing)
        names = [source.name(int(i)) for i in batch.indices]
        draw_contact_sheet(found, names, self.folder / "figures" / f"reconstructions-step-{done:08d}.png")

    def _input(self, images: Tensor) -> Tensor:
        return normalize(images, None, self.preprocessing)


def draw_curves_of(run: Path, say: Callable[[str], None]) -> None:
    """The curves of a finished run, from its metrics.csv. What cannot be drawn is told: the weights are there."""
    path = run / "figures" / "curves.png"
    try:
        draw_curves({run.name: run / "metrics.csv"}, path)
    except (DataError, OSError) as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # half a picture
        say(f"{path} is not drawn: {getattr(error, 'strerror', None) or error}")


def _share_classes(a: Source, b: Source) -> bool:
    return not a.classes or not b.classes or bool(set(a.classes) & set(b.classes))


def _part(features: Features, where: slice) -> Features:
    return Features(features.values[where], features.labels[where], features.indices[where])


def _some(length: int, most: int, seed: int) -> list[int]:
    """A fixed random choice of indices, all when there are few."""
    if length <= most:
        return list(range(length))
    if length > 1_000_000:  # evenly spaced: sorting a very large range would take gigabytes
        return [i * length // most for i in range(most)]
    return sorted(permutation(seed, "watched", length)[:most].tolist())
