import numpy as np
import pytest
import torch

from close import assert_close
from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.data.stream import BadSample, Batch
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.features import (
    FeatureConfig,
    Features,
    extract,
    extract_batches,
    labelled_pair,
    pixel_features,
)
from nextblock.xtra.config import XTRAConfig
from nextblock.xtra.model import Encoder

PREPROCESSING = Preprocessing(size_px=(16, 16))


def make_batch(count: int, first: int = 0, bad: list[BadSample] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(first)
    indices = torch.arange(first, first + count)
    return Batch(
        images=torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8, generator=generator),
        labels=indices % 3,
        flip=torch.zeros(count, dtype=torch.bool),
        positions=indices,
        indices=indices,
        bad=bad or [],
    )


@pytest.fixture
def encoder() -> Encoder:
    return Encoder(
        XTRAConfig(image_size_px=16, patch_size_px=4, cell_size=2, width=16, depth=3, num_heads=2, drop_path=0.5)
    )


def expected(encoder: Encoder, batch: Batch, **how: object) -> torch.Tensor:
    encoder.eval()
    with torch.no_grad():
        return encoder.features(normalize(batch.images, None, PREPROCESSING), **how)


def test_features_are_the_encoders_pooled(encoder: Encoder) -> None:
    batches = [make_batch(3), make_batch(2, first=3, bad=[BadSample("x.jpg", "broken", 5)])]
    found = extract(encoder, batches, PREPROCESSING, FeatureConfig(last_layers=2))
    assert found.values.dtype == np.float32
    assert found.indices.tolist() == [0, 1, 2, 3, 4]
    assert found.labels.tolist() == [0, 1, 2, 0, 1]
    assert [sample.name for sample in found.bad] == ["x.jpg"]
    assert_close(found.values[3:], expected(encoder, batches[1], last_layers=2).mean(1), 1e-5)


def test_unpooled_bidirectional_and_final_norm(encoder: Encoder) -> None:
    batch = make_batch(2)
    tokens = extract(encoder, [batch], PREPROCESSING, FeatureConfig(pool=False, bidirectional=True))
    assert_close(tokens.values, expected(encoder, batch, bidirectional=True), 1e-5)
    normed = extract(encoder, [batch], PREPROCESSING, FeatureConfig(pool=False, final_norm=True))
    assert_close(normed.values, encoder.norm(expected(encoder, batch)), 1e-5)


def test_modes_come_back_even_between_batches(encoder: Encoder) -> None:
    encoder.train()
    encoder.layers.eval()  # a mixed state
    before = [m.training for m in encoder.modules()]
    parts = extract_batches(encoder, [make_batch(1), make_batch(1, 1)], PREPROCESSING)
    first = next(iter(parts))
    assert len(first) == 1
    assert [m.training for m in encoder.modules()] == before
    assert torch.is_grad_enabled()
    with pytest.raises(ConfigError):
        encoder_input = make_batch(1)
        encoder_input.images = encoder_input.images[:, :15]
        extract(encoder, [encoder_input], PREPROCESSING)
    assert [m.training for m in encoder.modules()] == before


def test_a_batch_of_broken_images_is_passed_over_and_listed(encoder: Encoder) -> None:
    broken = make_batch(0, bad=[BadSample("y.jpg", "truncated", 0)])
    found = extract(encoder, [broken, make_batch(2)], PREPROCESSING)
    assert len(found) == 2
    assert len(found.bad) == 1
    with pytest.raises(DataError, match=r"1 could not be read.*y\.jpg: truncated"):
        extract(encoder, [broken], PREPROCESSING)
    with pytest.raises(DataError, match="no images"):
        extract(encoder, [], PREPROCESSING)


def test_pixel_features_are_the_normalised_pixels() -> None:
    batch = make_batch(2)
    found = pixel_features([batch], PREPROCESSING)
    assert_close(found.values, normalize(batch.images, None, PREPROCESSING).flatten(1), 1e-7)
    assert found.values.shape == (2, 3 * 16 * 16)


def test_config_errors(encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="last_layers"):
        FeatureConfig(last_layers=0)
    with pytest.raises(ConfigError, match="final_norm"):
        FeatureConfig(last_layers=2, final_norm=True)
    with pytest.raises(ConfigError, match="depth"):
        extract(encoder, [make_batch(1)], PREPROCESSING, FeatureConfig(last_layers=4))


def features(values: object, labels: list[int]) -> Features:
    return Features(np.asarray(values, np.float32), np.array(labels), np.arange(len(labels)))


def test_probes_refuse_what_they_cannot_use() -> None:
    good = features(np.eye(4), [0, 0, 1, 1])
    with pytest.raises(DataError, match="None of the 4 training images has a label"):
        labelled_pair(features(np.eye(4), [-1] * 4), good)
    with pytest.raises(DataError, match="test"):
        labelled_pair(good, features(np.eye(4), [-1] * 4))
    with pytest.raises(DataError, match="two classes"):
        labelled_pair(features(np.eye(4), [3] * 4), good)
    with pytest.raises(ConfigError, match="4 dimensions and test features 3"):
        labelled_pair(good, features(np.ones((4, 3)), [0, 0, 1, 1]))
    with pytest.raises(ConfigError, match="pool=True"):
        labelled_pair(features(np.ones((4, 2, 3)), [0, 0, 1, 1]), good)
    with pytest.raises(DataError, match="not finite"):
        labelled_pair(features(np.full((2, 4), np.nan), [0, 1]), good)


def test_images_without_a_label_are_left_out() -> None:
    train, _ = labelled_pair(features(np.eye(4), [0, -1, 1, 1]), features(np.eye(4), [0, 0, 1, 1]))
    assert train.indices.tolist() == [0, 2, 3]
    assert train.values.tolist() == np.eye(4)[[0, 2, 3]].tolist()
