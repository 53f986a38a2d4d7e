"""Boxes keep to their ranges; the noise is standard normal and a function of the sample and the place alone."""

import numpy as np
import pytest
import torch

from nextblock.data.erasing import ERASE_UNIFORMS, NOTHING, erase, erase_box, prepare
from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.data.stream import Batch
from nextblock.randomness import hashed, uniforms


def test_boxes_keep_to_area_and_ratio() -> None:
    draws = uniforms(0, "erase", np.arange(4000), ERASE_UNIFORMS)
    boxes = np.array([erase_box(200, 300, 0.25, u) for u in draws])
    erased = boxes[:, 2] > 0
    assert erased.mean() == pytest.approx(0.25, abs=0.025)  # a standard deviation is 0.007
    assert (boxes[~erased] == NOTHING).all()
    top, left, h, w = boxes[erased].T
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + h <= 200).all()
    assert (left + w <= 300).all()
    area, ratio = h * w / (200 * 300), h / w
    assert 0.019 < area.min() < 0.03
    assert 0.3 < area.max() < 0.34
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.015)
    assert 0.29 < ratio.min() < 0.33
    assert 2.5 < ratio.max() < 3.45
    assert abs((top / (200 - h)).mean() - 0.5) < 0.05
    assert (top == 0).any()
    assert (top + h == 200).any()


def test_probability_bounds_and_small_images() -> None:
    draws = uniforms(1, "erase", np.arange(300), ERASE_UNIFORMS)
    assert all(erase_box(32, 32, 0.0, u) == NOTHING for u in draws)
    assert all(erase_box(32, 32, 1.0, u)[2] > 0 for u in draws)
    assert all(erase_box(1, 1, 1.0, u) == NOTHING for u in draws)
    for height, width in ((4, 3), (6, 12), (12, 6)):
        found = [erase_box(height, width, 1.0, u) for u in draws]
        assert all(box == NOTHING or (1 <= box[2] < height and 1 <= box[3] < width) for box in found)


def test_ten_attempts() -> None:
    # 0.333 of a 10 x 40 image with height / width 3.3: 21 pixels high, does not fit; with 0.3: 6 x 21 does
    u = np.zeros(ERASE_UNIFORMS)
    u[1:21] = 0.999
    assert erase_box(10, 40, 1.0, u) == NOTHING
    u[20] = 0.0
    u[21:] = 0.999, 0.0
    assert erase_box(10, 40, 1.0, u) == (4, 0, 6, 21)


BOXES = torch.tensor([[2, 3, 4, 5], [0, 0, 0, 0], [0, 0, 15, 1], [7, 0, 9, 20]])
KEYS = torch.from_numpy(hashed(0, "erase noise", np.arange(4)).view(np.int64))


@pytest.mark.parametrize("channels", [1, 3, 6])
def test_only_the_boxes_change(channels: int) -> None:
    x = torch.full((4, channels, 16, 20), 99.0)
    result = erase(x.clone(), BOXES, KEYS)
    for image, (top, left, height, width) in zip(result, BOXES.tolist(), strict=True):
        box = image[:, top : top + height, left : left + width]
        assert (box.abs() < 5).all()
        assert box.unique().numel() >= 0.99 * box.numel()  # of 65,536 values, so a few may be the same
        box[...] = 99.0
    assert torch.equal(result, x)


def test_noise_does_not_depend_on_the_batch() -> None:
    x = torch.zeros(4, 3, 16, 20)
    whole = erase(x.clone(), BOXES, KEYS)
    for row in range(4):
        assert torch.equal(erase(x[:1].clone(), BOXES[row : row + 1], KEYS[row : row + 1])[0], whole[row])
    backwards = erase(x.clone(), BOXES.flip(0), KEYS.flip(0))
    assert torch.equal(backwards.flip(0), whole)
    # a function of the place in the image, not in the box
    larger = erase(x[:1].clone(), torch.tensor([[1, 1, 10, 12]]), KEYS[:1])
    assert torch.equal(larger[0, :, 2:6, 3:8], whole[0, :, 2:6, 3:8])


def test_noise_is_standard_normal() -> None:
    boxes = torch.tensor([[0, 0, 200, 200]] * 2)
    noise = erase(torch.zeros(2, 3, 200, 200), boxes, KEYS[:2]).double()
    values = noise.flatten().sort().values  # 240,000: a standard deviation of the mean is 0.002
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    wanted = torch.special.ndtri(torch.tensor([0.001, 0.1, 0.25, 0.75, 0.9, 0.999], dtype=torch.float64))
    found = torch.tensor([values.quantile(q) for q in (0.001, 0.1, 0.25, 0.75, 0.9, 0.999)])
    assert (found - wanted).abs().max() < 0.06
    # neighbours, channels and images have nothing to do with each other
    pairs = [(noise[:, :, :, 1:], noise[:, :, :, :-1]), (noise[:, :, 1:], noise[:, :, :-1])]
    pairs += [(noise[:, 0], noise[:, 1]), (noise[:, 1], noise[:, 2]), (noise[0], noise[1])]
    for a, b in pairs:
        assert abs((a * b).mean()) < 0.02


def test_noise_is_the_hash_of_randomness() -> None:
    # the first 16 bits for channel 0, by way of Python's integers
    def finalised(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    key = int(KEYS[0]) % 2**64
    bits = finalised(finalised((key + (2 * 20 + 3) * 0x9E3779B97F4A7C15) % 2**64))
    noise = erase(torch.zeros(1, 3, 16, 20), BOXES[:1], KEYS[:1])[0, :, 2, 3]
    levels = [(bits >> 16 * channel) % 2**16 for channel in range(3)]
    wanted = torch.special.ndtri((torch.tensor(levels, dtype=torch.float64) + 0.5) / 2**16)
    assert torch.equal(noise, wanted.float())


def test_prepare_mirrors_normalises_and_erases() -> None:
    images = torch.randint(0, 256, (4, 16, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    where, flip = torch.arange(4), torch.tensor([True, False, False, True])
    preprocessing = Preprocessing((16, 20))
    plain = Batch(images, where, flip, where, where, [])
    assert plain.erase.tolist() == [[0, 0, 0, 0]] * 4
    normalised = normalize(images, flip, preprocessing)
    assert torch.equal(prepare(plain, preprocessing), normalised)
    erased = Batch(images, where, flip, where, where, [], BOXES, KEYS)
    assert torch.equal(prepare(erased, preprocessing), erase(normalised.clone(), BOXES, KEYS))
    empty = Batch(images[:0], where[:0], flip[:0], where[:0], where[:0], [])
    assert prepare(empty, preprocessing).shape == (0, 3, 16, 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_is_the_same_on_the_device_which_is_not_waited_for() -> None:
    expected = erase(torch.zeros(4, 3, 16, 20), BOXES, KEYS)
    x = torch.zeros(4, 3, 16, 20, device="cuda")
    erase(x, BOXES, KEYS)  # makes the table
    boxes, keys = BOXES.pin_memory(), KEYS.pin_memory()
    torch.cuda.set_sync_debug_mode("error")
    try:
        erase(x.zero_(), boxes, keys)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(x.cpu(), expected)
