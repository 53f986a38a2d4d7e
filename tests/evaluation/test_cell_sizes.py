from __future__ import annotations

import pytest
import torch

from close import assert_close
from nextblock.errors import ConfigError
from nextblock.evaluation.cell_sizes import cell_orderings, cosines_of_patches, patch_features, unrelated_cosine
from nextblock.evaluation.features import FeatureConfig
from nextblock.ordering import Ordering
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import Encoder


def make(**changes: object) -> Encoder:
    values = {"image_size_px": 16, "patch_size_px": 4, "cell_size": 2, "width": 16, "depth": 3, "num_heads": 2}
    return Encoder(XTRAConfig(**{**values, **changes})).eval()


@torch.no_grad()
def test_with_its_own_cells_these_are_the_encoders_features() -> None:
    encoder, images = make(), torch.randn(2, 3, 16, 16)
    own, whole = Ordering.cells(4, 2), Ordering.whole(4)
    for layers in (1, 3):
        config = FeatureConfig(last_layers=layers)
        assert_close(patch_features(encoder, images, own, config), encoder.features(images, layers), 1e-6)
        unmasked = encoder.features(images, layers, bidirectional=True)
        assert_close(patch_features(encoder, images, whole, config), unmasked, 1e-5)
    assert_close(patch_features(encoder, images, own, FeatureConfig(final_norm=True)), encoder(images), 1e-6)
    with pytest.raises(ConfigError, match=r"depth \(3\); got 4"):
        patch_features(encoder, images, own, FeatureConfig(last_layers=4))


def test_every_size_that_divides_the_grid() -> None:
    found = cell_orderings((16, 16), 4)
    assert list(found) == ["1×1", "2×2", "4×4", "8×8", "no mask"]
    assert found["no mask"].num_entities == 1
    assert list(cell_orderings((4, 6), (2, 3))) == ["1×1", "2×2", "2×3", "no mask"]
    assert list(cell_orderings((4, 4), 4)) == ["1×1", "2×2", "no mask"]


def test_cosines_are_one_for_the_same_and_less_under_another_mask() -> None:
    encoder, images = make(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        encoder.layers.layers[0].attn.qkv.weight.mul_(10)
        encoder.layers.layers[0].attn.out.weight.mul_(10)
    sizes = cell_orderings((4, 4), 2)
    features = {name: patch_features(encoder, images, o, FeatureConfig()) for name, o in sizes.items()}
    cosines = cosines_of_patches(features, "2×2")
    assert_close(cosines["2×2"], torch.ones(16), 1e-6)
    assert max(cosines["1×1"].mean(), cosines["no mask"].mean()) < 0.999
    assert_close(cosines["no mask"][[10, 11, 14, 15]], torch.ones(4), 1e-4)  # the last cell sees everything as it is
    assert cosines["no mask"][[0, 1, 4, 5]].max() < 0.999


def test_the_cosine_of_unrelated_patches() -> None:
    x = torch.tensor([[[1.0, 0], [0, 2]], [[3, 0], [0, -1]]])  # of the six pairs one is 1, one is -1, four are 0
    assert unrelated_cosine(x) == pytest.approx(0)
    assert unrelated_cosine(torch.ones(2, 3, 4)) == pytest.approx(1)
