"""What is looked at while an encoder trains: validation loss, kNN, effective rank, pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.data.sources import Source
from nextblock.evaluation.features import Features, extract
from nextblock.evaluation.knn import knn_accuracy
from nextblock.evaluation.rank import effective_rank
from nextblock.evaluation.reconstruction import reconstruct
from nextblock.figures.curves import draw_curves
from nextblock.figures.reconstruction import draw_contact_sheet
from nextblock.randomness import permutation
from nextblock.recipes.config import WatchConfig
from nextblock.xtra.model import XTRA

BATCH = 250
RANK_IMAGES = 2000


class Watch:
    """Call it with the number of steps done; it returns columns for metrics.csv and writes pictures.

    kNN uses the training images as its bank when they are labelled, else one half of `val` for the other.
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
    ) -> None:
        self.model, self.preprocessing, self.config, self.folder = model, preprocessing, config, folder
        self.train, self.val = train, val
        self.train_indices = _some(len(train), config.max_images, seed)
        self.val_indices = _some(len(val), config.max_images, seed) if val else []
        self.pictured = self.val_indices if val else self.train_indices

    def __call__(self, done: int) -> dict[str, float]:
        row: dict[str, float] = {}
        if self.val:
            row["val_loss"] = self._loss(self.val)
            queries = self._features(self.val, self.val_indices)
            bank = self._bank(queries)
            if bank is not None:
                row["knn"] = next(iter(knn_accuracy(*bank, k=self.config.knn_k).values()))
            row["effective_rank"] = effective_rank(queries.values[:RANK_IMAGES])
        else:
            row["effective_rank"] = effective_rank(self._features(self.train, self.train_indices[:RANK_IMAGES]).values)
        if self.config.pictures:
            self._picture(done)
        return row

    def draw_curves(self) -> None:
        draw_curves({self.folder.name: self.folder / "metrics.csv"}, self.folder / "figures" / "curves.png")

    def _features(self, source: Source, indices: list[int]) -> Features:
        batches = evaluation_batches(source, self.preprocessing, batch_size=BATCH, indices=indices)
        return extract(self.model.encoder, batches, self.preprocessing)

    def _bank(self, queries: Features) -> tuple[Features, Features] | None:
        """(bank, queries) with labels on both sides, or None."""
        if (queries.labels < 0).any():
            return None
        if self.train.labels() is not None:
            return self._features(self.train, self.train_indices), queries
        half = len(queries) // 2
        return _part(queries, slice(half)), _part(queries, slice(half, None))

    @torch.inference_mode()
    def _loss(self, source: Source) -> float:
        """Mean over the watched validation images, first configured order, no drop path."""
        device = next(self.model.parameters()).device
        total, count = torch.zeros((), device=device), 0
        for batch in evaluation_batches(source, self.preprocessing, batch_size=BATCH, indices=self.val_indices):
            if len(batch):
                images = self._input(batch.images.to(device))
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    total += self.model.loss(images) * len(batch)
                count += len(batch)
        return float(total) / max(1, count)

    def _picture(self, done: int) -> None:
        source = self.val or self.train
        indices = self.pictured[: self.config.pictures]
        batch = next(evaluation_batches(source, self.preprocessing, batch_size=len(indices), indices=indices))
        if not len(batch):
            return
        device = next(self.model.parameters()).device
        found = reconstruct(self.model, self._input(batch.images.to(device)), self.preprocessing)
        names = [source.name(int(i)) for i in batch.indices]
        draw_contact_sheet(found, names, self.folder / "figures" / f"reconstructions-step-{done:08d}.png")

    def _input(self, images: Tensor) -> Tensor:
        return normalize(images, None, self.preprocessing)


def _part(features: Features, where: slice) -> Features:
    return Features(features.values[where], features.labels[where], features.indices[where])


def _some(length: int, most: int, seed: int) -> list[int]:
    """A fixed random choice of indices, all when there are few."""
    if length <= most:
        return list(range(length))
    if length > 1_000_000:  # evenly spaced: sorting a very large range would take gigabytes
        return [i * length // most for i in range(most)]
    return sorted(permutation(seed, "watched", length)[:most].tolist())
