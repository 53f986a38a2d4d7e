"""Probes and fine-tuning on a CUDA device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nextblock.jobs.finetune import finetune
from nextblock.jobs.pretrain import pretrain
from nextblock.jobs.probe import Probed, probe
from tiny_run import tiny

pytestmark = pytest.mark.gpu
GRID: dict[str, Any] = {"epochs": 20, "lrs": [1e-3, 1e-2, 1e-1], "workers": 0, "batch_size": 16, "device": "cuda"}


@pytest.fixture(scope="module")
def data() -> tuple[np.ndarray, np.ndarray]:
    """Two classes: fine stripes, or coarse ones."""
    generator = np.random.default_rng(0)
    pixels, labels = generator.integers(0, 80, (80, 16, 16, 3), dtype=np.uint8), np.arange(80) % 2
    pixels[labels == 0, :, ::2] += 150
    pixels[labels == 1, :, :8] += 150
    return pixels, labels


@pytest.fixture(scope="module")
def run(data: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    pretrain(
        config="xtra_cifar10", out=folder, quiet=True, **tiny(data={"train": data[0]}, training={"device": "cuda"})
    )
    return folder


@pytest.mark.parametrize("augment", ["none", "flip", "published"])
def test_a_grid_learns_in_bf16(augment: str, run: Path, data: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("NEXTBLOCK_CACHE", str(tmp_path / "cache"))
    found = probe(run=run, dataset=data, out=tmp_path / "out", quiet=True, probe=GRID | {"augment": augment})
    assert isinstance(found, Probed)
    assert found.best is not None
    assert found.best["test_top1"] > 70


def test_cuda_and_cpu_agree(run: Path, data: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("NEXTBLOCK_CACHE", str(tmp_path / "cache"))
    settings = GRID | {"augment": "none", "precision": "fp32", "epochs": 3}
    rows = {}
    for device in ("cuda", "cpu"):
        found = probe(run=run, dataset=data, out=tmp_path / device, quiet=True, probe=settings | {"device": device})
        assert isinstance(found, Probed)
        rows[device] = [row["val_top1"] for row in found.rows]
    assert rows["cuda"] == pytest.approx(rows["cpu"], abs=15)  # of 6 images; features are bf16 on one side


def test_fine_tuning_learns(run: Path, data: Any, tmp_path: Path) -> None:
    done = finetune(
        run=run, dataset=data, out=tmp_path / "out", quiet=True,
        finetune={"ema_decay": 0.9, "workers": 0, "num_heads": 4},
        training={"device": "cuda", "epochs": 20, "batch_size": 16},
    )  # fmt: skip
    assert done.result is not None
    assert done.result["top1"] > 60
