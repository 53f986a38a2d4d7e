from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nextblock.data.sources import open_source
from nextblock.jobs.choose import choose
from nextblock.recipes.config import typed


class Many:
    """As many images as one likes, all alike."""

    def __init__(self, length: int, side: int, channels: int = 3) -> None:
        self.length = length
        shape = (side, side + 10, channels) if channels > 1 else (side, side)
        self.image = np.zeros(shape, dtype=np.uint8)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.image


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("length", [1, 5_000, 2_000_000])
@pytest.mark.parametrize("side", [8, 70, 128, 2000])
def test_every_choice_can_be_trained(device: str, length: int, side: int) -> None:
    choice = choose(open_source(Many(length, side)), device, {}, sized=False)
    config = typed(choice.values)
    assert config.model.ordering.num_entities >= 16
    assert max(config.model.image) <= (128 if device == "cpu" else 256)
    assert config.training.batch_size <= max(8, length)
    assert choice.reasons


def test_larger_data_get_larger_models_on_a_gpu() -> None:
    widths = [
        typed(choose(open_source(Many(n, 300)), "cuda", {}, sized=False).values).model.width
        for n in (10_000, 100_000, 1_000_000)
    ]
    assert widths == [192, 384, 768]


def test_gray_images_give_a_gray_model() -> None:
    assert choose(open_source(Many(100, 32, channels=1)), "cpu", {}, sized=False).values["model"]["channels"] == 1


def test_what_is_given_stays_and_decides_the_geometry() -> None:
    given = {"model": {"image_size_px": 64}, "training": {"lr": 0.1, "batch_size": 4}}
    choice = choose(open_source(Many(100, 300)), "cuda", given, sized=True)
    assert choice.values["model"] == {"patch_size_px": 8, "cell_size": 2}
    assert not {"lr", "lr_at_batch", "batch_size"} & set(choice.values["training"])
    assert not any("batch_size" in line for line in choice.reasons)
