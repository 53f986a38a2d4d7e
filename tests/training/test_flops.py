"""The counts of operations are those that torch counts, and grow as they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nextblock.errors import ConfigError
from nextblock.training.flops import matmul_ceiling, model_flops, xar_flops, xar_sampling_flops, xtra_flops
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xar.sampler import Guidance, sample_latents
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import XTRA

XTRA_SIZES: dict[str, Any] = {
    "image_size_px": 16, "patch_size_px": 4, "cell_size": 2, "width": 16, "depth": 2, "num_heads": 2,
    "predictor_width": 24, "predictor_depth": 1, "predictor_heads": 2, "head_hidden": 20, "projection_hidden": 28,
}  # fmt: skip
XAR_SIZES: dict[str, Any] = {
    "latent_size": 8, "latent_channels": 3, "patch_size": 2, "entity_size": 2, "width": 16, "depth": 3, "num_heads": 2,
    "num_classes": 2, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip


def counted(model: nn.Module, *inputs: torch.Tensor) -> int:
    """By torch, of one forward and backward pass; attention as plain products, which hides nothing in a kernel."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changed",
    [{}, {"num_lookahead": 2}, {"cell_size": 1, "predictor_depth": 0}, {"order": "pseudo_random", "drop_path": 0.3},
     {"image_size_px": (16, 32), "channels": 1}],
)  # fmt: skip
def test_xtra_costs_what_torch_counts(changed: dict[str, Any]) -> None:
    config = XTRAConfig(**(XTRA_SIZES | changed))
    images = torch.randn(3, config.channels, *config.image)
    assert 3 * model_flops(XTRA(config)).training == counted(XTRA(config), images)


@pytest.mark.parametrize(
    "changed",
    [{}, {"context": "clean"}, {"ordering": "scales"}, {"ordering": "scales", "context": "clean"},
     {"ordering": "whole", "depth": 1}, {"ordering": "subsamples", "mlp_ratio": 3.0}],
)  # fmt: skip
def test_xar_costs_what_torch_counts(changed: dict[str, Any]) -> None:
    config = XARConfig(**(XAR_SIZES | changed))
    latents, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 1])
    assert 3 * model_flops(XAR(config)).training == counted(XAR(config), latents, labels)


@pytest.mark.parametrize(
    "changed", [{}, {"ordering": "scales"}, {"ordering": "whole"}, {"ordering": "patches", "depth": 2}]
)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sampling_costs_what_torch_counts(changed: dict[str, Any], guidance: float) -> None:
    config = XARConfig(**(XAR_SIZES | changed))
    entities = config.entities.num_entities
    guided = [Guidance(guidance).of(n, entities) != 1 for n in range(entities)]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sample_latents(XAR(config), torch.tensor([0, 1, 1]), steps=4, guidance=guidance)
    assert counter.get_total_flops() == 3 * xar_sampling_flops(config, 4, guided)


def test_the_count_grows_with_depth_and_with_the_square_of_tokens() -> None:
    def xtra(**changed: Any) -> int:
        return xtra_flops(XTRAConfig(**(XTRA_SIZES | changed))).forward["encoder"]

    assert xtra(depth=4) - xtra(depth=3) == xtra(depth=3) - xtra(depth=2)
    # A layer is a·n + b·n² in its n tokens (a cell is left out of 4 and of 16): what is left beside a·n is 4·n²·width.
    few, many = (xtra(depth=2, image_size_px=s) - xtra(depth=1, image_size_px=s) for s in (16, 32))
    n, m = 3 * 4, 15 * 4
    assert (many / m - few / n) / (m - n) == 4 * 16
    one, two = (xar_flops(XARConfig(**(XAR_SIZES | {"depth": d}))).forward["layers"] for d in (1, 2))
    assert xar_flops(XARConfig(**(XAR_SIZES | {"depth": 7}))).forward["layers"] == one + 6 * (two - one)


def test_the_published_base_model_is_counted_with_and_without_its_last_cell() -> None:
    config = XTRAConfig.preset("xtra_b16")
    ours, full = xtra_flops(config), xtra_flops(config, full_sequence=True)
    # ViT-B/16 at 256 tokens: 86 million weights, two operations for each token, and 4·n²·width in each of 12 layers.
    assert full.forward["encoder"] == pytest.approx(2 * 256 * 85.5e6 + 12 * 4 * 256**2 * 768, rel=0.01)
    assert ours.forward["heads"] == full.forward["heads"]
    assert 0.92 < ours.training / full.training < 0.96  # 15 of 16 cells, squared where pairs of tokens are


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="XTRA and XAR; got Linear"):
        model_flops(nn.Linear(2, 2))


def test_the_ceiling_is_a_rate_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    rate = matmul_ceiling(torch.device("cpu"), torch.float32)
    assert 1e8 < rate < 1e14
    assert torch.equal(torch.get_rng_state(), before)
