"""Targets sum to 1 and say what is in the picture; nothing but the given numbers decides."""

import numpy as np
import pytest
import torch
from scipy import stats

from nextblock.data.mixing import MIX_UNIFORMS, MixConfig, cut_box, mix, soft_targets
from nextblock.errors import ConfigError
from nextblock.randomness import uniforms

LABELS = torch.tensor([0, 3, 1, 3])
# Image i is i everywhere, so what is in a mixture can be read from its pixels.
IMAGES = torch.arange(4.0)[:, None, None, None].expand(4, 2, 20, 30).clone()
BLEND, CUT = MixConfig(cutmix=0), MixConfig(mixup=0)
DRAWS = uniforms(0, "mix", np.arange(200), MIX_UNIFORMS)


@pytest.mark.parametrize("config", [BLEND, CUT, MixConfig()])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_sum_to_one(config: MixConfig, smoothing: float) -> None:
    for u in DRAWS[:50]:
        images, targets = mix(IMAGES, LABELS, config, u, 5, smoothing)
        assert images.shape == IMAGES.shape
        assert targets.shape == (4, 5)
        assert targets.dtype == torch.float32
        assert torch.allclose(targets.sum(1), torch.ones(4), rtol=0, atol=1e-6)
        assert targets.min() >= smoothing / 5 - 1e-7
    assert torch.equal(IMAGES[3], torch.full((2, 20, 30), 3.0))  # left as they were


def test_mixup_blends_images_and_targets_alike() -> None:
    for u in DRAWS[:50]:
        images, targets = mix(IMAGES, LABELS, BLEND, u, 5)
        first = targets[0, 0]  # image 0 of label 0 with image 3 of label 3
        assert torch.allclose(images[0], (1 - first) * 3.0, atol=1e-5)
        assert torch.allclose(targets[0], torch.tensor([first, 0, 0, 1 - first, 0]), atol=1e-6)
        assert torch.allclose(images[1], first * 1.0 + (1 - first) * 2.0, atol=1e-5)
        assert torch.allclose(targets[1], torch.tensor([0, 1 - first, 0, first, 0]), atol=1e-6)


def test_cutmix_target_is_the_pasted_area() -> None:
    clipped = 0
    for u in DRAWS:
        images, targets = mix(IMAGES, LABELS, CUT, u, 5)
        assert set(images[0].unique().tolist()) <= {0.0, 3.0}
        pasted = (images[0, 0] == 3).float().mean()
        assert targets[0, 3] == pytest.approx(float(pasted), abs=1e-6)
        assert torch.equal(images[0, 0] == 3, images[2, 1] == 1)  # the same box in all images and channels
        rows, columns = (images[0, 0] == 3).any(1), (images[0, 0] == 3).any(0)
        assert pasted == pytest.approx(float(rows.float().mean() * columns.float().mean()))
        clipped += float(pasted) < u[2] - 0.1
    assert clipped > 20


@pytest.mark.parametrize(
    ("lam", "down", "across", "box"),
    [
        (0.75, 0.5, 0.5, (5, 8, 10, 14)),  # half of each side, 10 x 15, rounded down to even
        (0.75, 0.0, 0.999, (0, 22, 5, 8)),  # around the upper right corner
        (0.0, 0.5, 0.5, (0, 0, 20, 30)),
        (0.9999, 0.5, 0.5, (10, 15, 0, 0)),
    ],
)
def test_boxes(lam: float, down: float, across: float, box: tuple[int, ...]) -> None:
    assert cut_box(20, 30, lam, down, across) == box


@pytest.mark.parametrize("alpha", [0.05, 0.8, 1.0, 4.0])
def test_parts_are_beta_distributed(alpha: float) -> None:
    config = MixConfig(mixup=alpha, cutmix=0)
    draws = uniforms(3, "mix", np.arange(500), MIX_UNIFORMS)
    parts = [float(mix(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1]), config, u, 2)[1][0, 0]) for u in draws]
    assert np.isfinite(parts).all()
    if alpha > 0.1:  # for less, most are 0 or 1 in single precision
        assert stats.kstest(parts, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert abs(np.mean(parts) - 0.5) < 0.07


def test_probability_and_switch() -> None:
    def kinds(config: MixConfig) -> tuple[float, float]:
        plain = cut = 0
        for u in DRAWS:
            images, _ = mix(IMAGES, LABELS, config, u, 5)
            plain += torch.equal(images, IMAGES)
            cut += bool((images == images.round()).all()) and not torch.equal(images, IMAGES)
        return plain / len(DRAWS), cut / len(DRAWS)

    assert kinds(MixConfig(probability=0)) == (1, 0)
    assert kinds(MixConfig(mixup=0, cutmix=0)) == (1, 0)
    assert kinds(MixConfig(switch=0)) == (0, 0)
    assert kinds(MixConfig(switch=1))[1] > 0.95  # the rest are boxes of no area
    plain, cut = kinds(MixConfig(probability=0.5))
    assert plain == pytest.approx(0.5, abs=0.12)
    assert cut == pytest.approx(0.25, abs=0.1)
    assert kinds(MixConfig(mixup=0.8, cutmix=1.0, switch=0.5))[1] == pytest.approx(0.5, abs=0.12)


def test_a_batch_of_one_and_odd_batches() -> None:
    for u in DRAWS[:20]:
        images, targets = mix(IMAGES[:1], LABELS[:1], MixConfig(), u, 5, 0.1)
        assert torch.equal(images, IMAGES[:1])
        assert torch.allclose(targets, soft_targets(LABELS[:1], 5, 0.1))
        images, _ = mix(IMAGES[:3], LABELS[:3], MixConfig(), u, 5)
        assert torch.allclose(images[1], IMAGES[1])


def test_smoothing() -> None:
    assert torch.allclose(soft_targets(torch.tensor([1]), 4, 0.1), torch.tensor([[0.025, 0.925, 0.025, 0.025]]))
    assert soft_targets(torch.tensor([1]), 3).tolist() == [[0, 1, 0]]
    _, targets = mix(IMAGES, LABELS, MixConfig(probability=0), DRAWS[0], 5, 0.1)
    assert torch.equal(targets, soft_targets(LABELS, 5, 0.1))
    with pytest.raises(ConfigError, match="smoothing must be from 0 to below 1, got 1"):
        soft_targets(LABELS, 5, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixup": -1}, "mixup must be the positive alpha of a Beta distribution, or 0 for off, got -1"),
        ({"cutmix": float("nan")}, "cutmix must"),
        ({"probability": 1.5}, "probability must be a probability from 0 to 1, got 1.5"),
        ({"switch": -0.1}, "switch must"),
    ],
)
def test_wrong_values_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixConfig(**values)
