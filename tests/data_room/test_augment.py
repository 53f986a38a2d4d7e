"""Crop boxes keep to their configuration; resampling agrees with Pillow."""

import numpy as np
import pytest
from PIL import Image

from nextblock.data.augment import (
    CROP_UNIFORMS,
    CropConfig,
    crop_box,
    random_resized_crop,
    resize_and_crop,
)
from nextblock.errors import ConfigError
from nextblock.randomness import uniforms

NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def test_boxes_keep_to_scale_and_ratio() -> None:
    config = CropConfig((32, 32), scale=(0.3, 1.0), ratio=(0.75, 1.5))
    draws = uniforms(0, "crop", np.arange(3000), CROP_UNIFORMS)
    boxes = np.array([crop_box(375, 500, config, u) for u in draws])
    top, left, h, w = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 375).all()
    assert (left + w <= 500).all()
    area, ratio = h * w / (375 * 500), w / h
    assert 0.295 < area.min() < 0.31
    assert area.max() > 0.95
    assert 0.745 < ratio.min() < 0.77
    assert 1.45 < ratio.max() < 1.51
    # all places are used, evenly
    room = 375 - h > 50
    place = top[room] / (375 - h[room])
    assert abs(place.mean() - 0.5) < 0.03
    assert abs(np.quantile(place, 0.25) - 0.25) < 0.03


def test_ratio_is_log_uniform_and_area_uniform_where_everything_fits() -> None:
    config = CropConfig((8, 8), scale=(0.1, 0.3), ratio=(0.5, 2.0))
    draws = uniforms(1, "crop", np.arange(4000), CROP_UNIFORMS)
    boxes = np.array([crop_box(1000, 1000, config, u) for u in draws])
    area, log_ratio = boxes[:, 2] * boxes[:, 3] / 1e6, np.log2(boxes[:, 3] / boxes[:, 2])
    assert np.allclose(np.quantile(area, [0.25, 0.5, 0.75]), [0.15, 0.2, 0.25], atol=0.01)
    assert np.allclose(np.quantile(log_ratio, [0.25, 0.5, 0.75]), [-0.5, 0, 0.5], atol=0.05)


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1), (1, 500)])
def test_extreme_images_get_the_largest_central_box(height: int, width: int) -> None:
    config = CropConfig((8, 8))
    for u in uniforms(0, "crop", np.arange(20), CROP_UNIFORMS):
        top, left, h, w = crop_box(height, width, config, u)
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert min(h, w) >= 1
    assert crop_box(10, 1000, config, np.zeros(CROP_UNIFORMS)) == (0, 492, 10, 15)


def test_box_is_what_is_resized() -> None:
    whole = random_resized_crop(NOISE, (0, 0, 60, 80), (60, 80))
    assert np.array_equal(whole, NOISE)
    part = random_resized_crop(NOISE, (5, 7, 20, 30), (20, 30))
    assert np.array_equal(part, NOISE[5:25, 7:37])
    assert random_resized_crop(NOISE, (5, 7, 20, 30), (9, 17)).shape == (9, 17, 3)


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_channels_are_resized_alike(channels: int) -> None:
    pixels = np.repeat(NOISE[:, :, :1], channels, axis=2)
    gray = np.repeat(NOISE[:, :, :1], 3, axis=2)
    expected = random_resized_crop(gray, (3, 4, 40, 50), (16, 24))[:, :, :1]
    result = random_resized_crop(pixels, (3, 4, 40, 50), (16, 24))
    assert np.array_equal(result, np.repeat(expected, channels, axis=2))


@pytest.mark.parametrize(
    ("resize_px", "size", "sides"),
    [
        (32, (28, 28), (32, 42)),
        (32, (32, 32), (32, 42)),
        (48, (20, 48), (48, 64)),
        (100, (90, 90), (100, 133)),
        (20, (28, 28), (28, 37)),  # too small for the crop: covers it
        (32, (16, 56), (42, 56)),  # a wide crop: both sides are covered
    ],
)
def test_evaluation_view_is_resize_then_central_crop(resize_px: int, size, sides) -> None:
    resized = Image.fromarray(NOISE).resize((sides[1], sides[0]), Image.Resampling.BICUBIC)
    top, left = round((sides[0] - size[0]) / 2), round((sides[1] - size[1]) / 2)
    expected = np.asarray(resized)[top : top + size[0], left : left + size[1]].astype(int)
    result = resize_and_crop(NOISE, resize_px, size)
    assert result.shape == (*size, 3)
    assert np.abs(result - expected).max() <= 1


def test_extreme_images_cost_no_memory_in_evaluation() -> None:
    assert resize_and_crop(np.zeros((1, 50_000, 3), np.uint8), 256, (224, 224)).shape == (224, 224, 3)
    assert resize_and_crop(np.zeros((1, 1, 1), np.uint8), 256, (224, 224)).shape == (224, 224, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size_px", (0, 8)),
        ("size_px", 8),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.2)),
        ("scale", (0.5, 1.2)),
        ("ratio", (0.0, 1.0)),
        ("ratio", (2.0, 1.0)),
        ("flip", 1.5),
    ],
)
def test_wrong_values_are_named(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field} .*{str(value)[1:-1] if isinstance(value, tuple) else value}"):
        CropConfig(**{"size_px": (8, 8), field: value})


def test_lists_become_tuples() -> None:
    assert CropConfig([8, 8], scale=[0.2, 1]) == CropConfig((8, 8), scale=(0.2, 1))
