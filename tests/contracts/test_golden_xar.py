"""The official code's own numbers, reproduced (tests/data/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from close import assert_close
from nextblock.checkpoints.name_table import find_row
from nextblock.checkpoints.official_xar import load_official_xar, xar_table
from nextblock.errors import CheckpointError, ConfigError
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xar.sampler import sample_latents

DATA = Path(__file__).parents[1] / "data"
SIZES = json.loads((DATA / "xar_cell8.json").read_text())
CONFIG = XARConfig(
    latent_size=(16, 16), latent_channels=16, ordering="cells", entity_size=8, width=SIZES["dim"],
    depth=SIZES["depth"], num_heads=SIZES["heads"], num_classes=1000, dropout=0.0, attention_dropout=0.0,
    label_dropout=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(DATA / "xar_cell8.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture
def model() -> XAR:
    return load_official_xar(DATA / "xar_cell8.pth", CONFIG)


def loss_of(model: XAR, golden: dict[str, torch.Tensor]) -> torch.Tensor:
    times = golden["times_entity_major"].view(4, 2).T
    noise = golden["noise_entity_major"].movedim(0, 1).flatten(1, 2)
    return model.loss(golden["latents"], golden["labels"], times=times, noise=noise)


def test_loss_and_gradients(model: XAR, golden: dict[str, torch.Tensor]) -> None:
    loss = loss_of(model.train(), golden)
    assert_close(loss, golden["loss"], 1e-4)
    loss.backward()
    parameters = dict(model.named_parameters())
    seen = set()
    for name, norm in golden.items():
        if name.startswith("grad_norm/"):
            official = name.removeprefix("grad_norm/")
            row = find_row(xar_table(CONFIG.depth), official)
            assert row is not None
            ours = row.translate(official)
            assert ours is not None
            seen.add(ours)
            assert_close(parameters[ours].grad.norm(), norm, 1e-4)
    assert seen == set(parameters)


@pytest.mark.parametrize(("steps", "guidance"), [(n, g) for g, n in SIZES["samples"]])
def test_samples(model: XAR, golden: dict[str, torch.Tensor], steps: int, guidance: float) -> None:
    name = f"sample_em_steps{steps}_cfg{guidance}"
    found = sample_latents(
        model.eval(), golden["labels"], steps=steps, guidance=guidance, solver="euler_maruyama",
        draws=list(golden[f"{name}/draws"]),
    )  # fmt: skip
    assert_close(found, golden[name], 1e-4)


def test_noise_as_an_image_is_the_same_as_entity_major(model: XAR, golden: dict[str, torch.Tensor]) -> None:
    times = golden["times_entity_major"].view(4, 2).T
    flat = golden["noise_entity_major"].movedim(0, 1).flatten(1, 2)
    image = model.ordering.merge(flat).movedim(-1, 1)
    found = model.loss(golden["latents"], golden["labels"], times=times, noise=image)
    assert torch.equal(found, loss_of(model, golden))


def test_a_file_of_other_sizes_is_refused_with_the_lists() -> None:
    other = XARConfig.from_dict(CONFIG.to_dict() | {"depth": 6})
    with pytest.raises(CheckpointError, match=r"missing \(24\): encoder_blocks\.2"):
        load_official_xar(DATA / "xar_cell8.pth", other)
    with pytest.raises(ConfigError, match="cells"):
        load_official_xar(DATA / "xar_cell8.pth", XARConfig.from_dict(CONFIG.to_dict() | {"ordering": "scales"}))


def test_the_file_that_the_official_training_writes(tmp_path: Path, model: XAR) -> None:
    import argparse

    bare = torch.load(DATA / "xar_cell8.pth", weights_only=True)
    raw = {name: torch.zeros_like(value) for name, value in bare.items()}
    torch.save({"model": raw, "model_ema": bare, "epoch": 3, "args": argparse.Namespace(lr=1.0)}, tmp_path / "c.pth")
    found = load_official_xar(tmp_path / "c.pth", CONFIG)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
