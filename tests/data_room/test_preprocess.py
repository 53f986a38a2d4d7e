"""normalize and denormalize are each other's inverse; the record of preprocessing is complete."""

import json

import pytest
import torch

from nextblock.data.preprocess import Preprocessing, denormalize, normalize
from nextblock.errors import ConfigError

IMAGES = torch.randint(0, 256, (4, 6, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalize_is_the_textbook_formula() -> None:
    p = Preprocessing((6, 8))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((IMAGES / 255 - mean) / std).permute(0, 3, 1, 2)
    result = normalize(IMAGES, None, p)
    assert torch.allclose(result, expected, rtol=0, atol=1e-6)
    assert result.is_contiguous()
    assert normalize(IMAGES, None, p, torch.bfloat16).dtype == torch.bfloat16


def test_flip_is_per_sample() -> None:
    p = Preprocessing((6, 8))
    plain = normalize(IMAGES, None, p)
    flipped = normalize(IMAGES, torch.tensor([True, False, True, False]), p)
    assert torch.equal(flipped[1::2], plain[1::2])
    assert torch.equal(flipped[::2], plain[::2].flip(3))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_round_trip(channels: int) -> None:
    p = Preprocessing((6, 8), channels=channels)
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, channels)
    assert torch.equal(denormalize(normalize(images, None, p), p), images)


def test_denormalize_clamps() -> None:
    p = Preprocessing((2, 2), channels=1)
    x = torch.tensor([-9.0, 9.0, 0.0, 1.0], requires_grad=True).reshape(1, 1, 2, 2)
    assert denormalize(x, p).flatten().tolist() == [0, 255, 128, 255]


def test_constants_made_in_inference_mode_serve_later() -> None:
    p = Preprocessing((6, 8), mean=(0.11, 0.12, 0.13))
    with torch.inference_mode():
        normalize(IMAGES, None, p)
    x = torch.zeros(1, 3, 6, 8, requires_grad=True)
    assert denormalize(x, p).shape == (1, 6, 8, 3)


def test_wrong_images() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[B, H, W, 1\]"):
        normalize(IMAGES, None, Preprocessing((6, 8), channels=1))


def test_defaults_are_filled_in_and_recorded() -> None:
    p = Preprocessing((224, 224))
    assert p.mean == (0.485, 0.456, 0.406)
    assert p.shorter_side_px == 256
    assert Preprocessing((256, 192), resize_px=300).shorter_side_px == 300
    assert Preprocessing((32, 32), channels=1).std == (0.5,)
    assert Preprocessing.from_dict(json.loads(json.dumps(p.to_dict()))) == p


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size_px": [8]}, "size_px"),
        ({"size_px": [8, 0]}, "size_px"),
        ({"size_px": [8, 8], "channels": 0}, "channels"),
        ({"size_px": [8, 8], "channels": 10**9}, "channels must lie between 1 and 65,536"),
        ({"size_px": [8, 8], "resize_px": 0}, "resize_px"),
        ({"size_px": [8, 8], "mean": [0.5]}, "mean must have one value for each of the 3"),
        ({"size_px": [8, 8], "std": [0.5, 0.0, 1]}, "std must be positive"),
        ({"size_px": [8, 8], "meen": [0.5]}, "'meen'. Did you mean 'mean'"),
        ({}, "size_px"),
    ],
)
def test_wrong_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preprocessing.from_dict(values)
