from pathlib import Path

import numpy as np
import pytest
import torch

from close import assert_close
from nextblock.data.preprocess import Preprocessing, denormalize, normalize
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.reconstruction import Reconstructions, reconstruct
from nextblock.ordering import Ordering
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA
from nextblock.xtra.objective import next_entity_loss, normalize_cells

CASES = {
    "cells": {},
    "patches": {"cell_size": 1},
    "rectangular": {"image_size_px": (16, 24)},
    "pseudo-random": {"order": "pseudo_random"},
    "lookahead": {"num_lookahead": 2},
    "plain pixels": {"normalize_targets": False},
    "gray": {"channels": 1},
    "everything": {
        "image_size_px": (8, 24),
        "order": "pseudo_random",
        "num_lookahead": 2,
        "normalize_targets": False,
        "pixel_loss": "l1",
        "cell_size": 1,
    },
}


def make(**changes: object) -> tuple[XTRA, torch.Tensor, Preprocessing]:
    values = {"image_size_px": 16, "patch_size_px": 4, "cell_size": 2, "width": 16, "depth": 1, "num_heads": 2}
    config = XTRAConfig(**{**values, "predictor_depth": 1, "predictor_width": 16, "predictor_heads": 2, **changes})
    preprocessing = Preprocessing(size_px=config.image, channels=config.channels)
    pixels = torch.randint(0, 256, (3, *config.image, config.channels), dtype=torch.uint8)
    return XTRA(config), normalize(pixels, None, preprocessing), preprocessing


@pytest.mark.parametrize("case", CASES)
def test_the_error_is_the_training_loss(case: str) -> None:
    model, images, preprocessing = make(**CASES[case])
    recs = reconstruct(model, images, preprocessing)
    ordering = model.orderings[0]
    targets = model.targets(images, ordering)
    if model.config.normalize_targets:
        targets = normalize_cells(targets)
    with torch.no_grad():
        loss = next_entity_loss([model.predict(images, 0, ordering)[:, :-1]], targets)
    assert_close(recs.prediction_errors.mean(), float(loss), 1e-5)
    assert recs.prediction_errors.shape == (3, ordering.num_entities - 1)


@pytest.mark.parametrize("case", CASES)
def test_pictures_and_their_pixel_errors(case: str) -> None:
    model, images, preprocessing = make(**CASES[case])
    recs = reconstruct(model, images, preprocessing)
    assert (recs.originals == denormalize(images, preprocessing).numpy()).all()
    given = recs.place == 0
    for which in ("prediction", "baseline"):
        picture = getattr(recs, f"{which}s")
        assert (picture[:, given] == recs.originals[:, given]).all()
        squares = ((picture / 255.0 - recs.originals / 255.0) ** 2).mean(-1)  # [B, H, W]
        by_cell = [squares[:, recs.place == c].mean(1) for c in range(1, recs.place.max() + 1)]
        assert_close(getattr(recs, f"{which}_pixel_errors"), np.stack(by_cell, 1), 0.02)  # the picture is 8 bits


def test_a_perfect_pattern_gives_the_image_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, preprocessing = make()
    ahead = normalize_cells(model.targets(images)).roll(-1, 1)
    monkeypatch.setattr(model, "predict", lambda *_, **__: ahead)
    recs = reconstruct(model, images, preprocessing)
    assert (recs.predictions == recs.originals).all()
    assert recs.prediction_errors.max() < 1e-9


def test_the_baseline_is_flat_and_what_a_prediction_of_zero_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, preprocessing = make()
    monkeypatch.setattr(model, "predict", lambda *_, **__: torch.zeros(3, 4, model.config.cell_pixels))
    recs = reconstruct(model, images, preprocessing)
    assert (recs.predictions == recs.baselines).all()
    numbers = model.config.cell_pixels
    assert_close(recs.baseline_errors, np.full((3, 3), (numbers - 1) / numbers), 1e-4)
    assert all((recs.baselines[:, recs.place == c].std(1) == 0).all() for c in (1, 2, 3))


def test_a_cell_is_predicted_from_earlier_cells_only() -> None:
    model, images, preprocessing = make(normalize_targets=False, order="pseudo_random")
    before = reconstruct(model, images, preprocessing)
    changed = images.clone()
    changed[:, :, torch.from_numpy(before.place == 2)] += 1.0
    after = reconstruct(model, changed, preprocessing)
    assert (after.predictions[:, before.place <= 2][:, 0:] == before.predictions[:, before.place <= 2]).all()
    with torch.no_grad():
        moved = np.abs(after.prediction_errors - before.prediction_errors)[:, 2]
    assert moved.max() > 0


def test_places_follow_any_ordering_handed_in() -> None:
    model, images, preprocessing = make()
    recs = reconstruct(model, images, preprocessing, Ordering.subsamples(4, 2).permuted([3, 2, 1, 0]))
    assert recs.place[::4, ::4].tolist() == [[3, 2, 3, 2], [1, 0, 1, 0]] * 2
    with pytest.raises(ConfigError, match="entities of 4 patches"):
        reconstruct(model, images, preprocessing, Ordering.patches(4))


def test_another_size_than_that_of_training() -> None:
    model, _, preprocessing = make(order="pseudo_random")
    recs = reconstruct(model, torch.randn(1, 3, 24, 16), preprocessing)
    assert recs.place[0, 0] == 0
    assert recs.prediction_errors.shape == (1, 5)


def test_training_goes_on_afterwards() -> None:
    model, images, preprocessing = make(order="pseudo_random", order_seed=31)  # an ordering no other test has used
    model.train()
    reconstruct(model, images, preprocessing)
    assert model.training
    images.requires_grad_()
    model(images).backward()


def test_save_and_load(tmp_path: Path) -> None:
    recs = reconstruct(*make())
    recs.save(tmp_path / "new" / "recs.npz")
    again = Reconstructions.load(tmp_path / "new" / "recs.npz")
    assert again.normalized_cells is True
    for name, value in vars(recs).items():
        assert np.array_equal(getattr(again, name), value), name
    np.savez(tmp_path / "other.npz", x=1)
    for name in ("other.npz", "absent.npz"):
        with pytest.raises(DataError, match=name):
            Reconstructions.load(tmp_path / name)
