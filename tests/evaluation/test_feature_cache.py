"""Features on disk: what is there is what was written, or it is computed anew."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.data.stream import Batch
from nextblock.errors import DataError
from nextblock.evaluation.feature_cache import CachedFeatures, cached_features
from nextblock.xtra.classifier import LayerMean
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA
from tiny_run import tiny

LAYERS = LayerMean(1, 2)
PREPROCESSING = Preprocessing((16, 16), resize_px=16)


class Kept:
    """Features of six images, and how often they were computed."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.encoder, self.folder, self.times = XTRA(XTRAConfig(**tiny()["model"])).encoder.eval(), folder, 0
        pixels = np.random.default_rng(0).integers(0, 256, (6, 18, 20, 3), dtype=np.uint8)
        self.source = open_source((pixels, np.arange(6) % 2))

    def read(self) -> CachedFeatures:
        def batches() -> Iterator[Batch]:
            self.times += 1
            return evaluation_batches(self.source, PREPROCESSING, batch_size=4)

        return cached_features(self.encoder, self.source, PREPROCESSING, {LAYERS: True}, batches, folder=self.folder)

    def file(self, name: str) -> Path:
        (found,) = self.folder.glob(f"features/*/{name}")
        return found


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path)


@pytest.mark.parametrize("name", ["values.npy", "indices.npy", "about.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_what_is_damaged_is_computed_anew(name: str, how: str, kept: Kept) -> None:
    first = np.array(kept.read().values[LAYERS])
    assert np.array_equal(first, kept.read().values[LAYERS])
    assert kept.times == 1
    file = kept.file(name)
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content if how == "flipped" else content[:-5])
    if how == "gone":
        file.unlink()
    assert np.array_equal(first, kept.read().values[LAYERS])
    assert kept.times == 2
    kept.read()
    assert kept.times == 2


def test_a_full_disk_is_told(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"No space left on device.*--probe\.cache"):
        patch.setattr(os, "fsync", refused)
        kept.read()
    assert not list(kept.folder.glob("features/*"))
    kept.read()
