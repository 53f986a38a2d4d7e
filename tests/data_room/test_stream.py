"""The stream is a pure function of (seed, position), and broken samples are replaced by one."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.data.augment import CropConfig
from nextblock.data.erasing import prepare
from nextblock.data.preprocess import Preprocessing
from nextblock.data.randaugment import OPERATIONS, RandAugment
from nextblock.data.sources import open_source
from nextblock.data.stream import Batch, TrainingStream, locate
from nextblock.errors import ConfigError, DataError
from nextblock.randomness import uniforms

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 12, 14, 3), dtype=np.uint8)


def make_stream(items: object = (PIXELS, np.arange(23)), seed: int = 0, **crop: object) -> TrainingStream:
    return TrainingStream(open_source(items), seed, CropConfig((8, 8), **crop), Preprocessing((8, 8)))


def same(a: Batch, b: Batch) -> bool:
    fields = ("images", "labels", "flip", "positions", "indices", "erase", "noise")
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields) and a.bad == b.bad


@pytest.mark.parametrize("length", [1, 2, 23, 100])
def test_every_epoch_is_a_different_permutation(length: int) -> None:
    epochs, indices = locate(0, np.arange(3 * length), length)
    assert epochs.tolist() == np.repeat([0, 1, 2], length).tolist()
    orders = indices.reshape(3, length)
    assert (np.sort(orders, axis=1) == np.arange(length)).all()
    if length > 2:
        assert len({tuple(order) for order in orders.tolist()}) == 3
        assert not np.array_equal(indices, locate(1, np.arange(3 * length), length)[1])


def test_locate_takes_positions_in_any_order() -> None:
    _, ordered = locate(0, np.arange(60), 23)
    shuffled = np.random.default_rng(0).permutation(60)
    assert np.array_equal(locate(0, shuffled, 23)[1], ordered[shuffled])
    far = 10**14
    assert np.array_equal(locate(0, [far], 23)[0], [far // 23])
    with pytest.raises(DataError):
        locate(0, [0], 0)


def test_batches_do_not_depend_on_how_positions_are_grouped() -> None:
    stream = make_stream()
    whole = stream.load(range(40))
    first, second = stream.load(range(15)), make_stream().load(range(15, 40))
    for field in ("images", "labels", "flip", "positions", "indices"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(first, field), getattr(second, field)]))
    assert whole.images.shape == (40, 8, 8, 3)
    assert whole.images.dtype == torch.uint8
    assert torch.equal(whole.labels, whole.indices)
    assert whole.positions.tolist() == list(range(40))
    assert len(whole) == 40
    assert not same(make_stream(seed=1).load(range(40)), whole)


def test_crops_and_flips_differ_from_epoch_to_epoch() -> None:
    stream = make_stream(PIXELS[:1])
    batch = stream.load(range(400))
    assert batch.indices.unique().tolist() == [0]
    assert batch.labels.unique().tolist() == [-1]
    assert len(batch.images.flatten(1).unique(dim=0)) > 100
    assert 0.4 < batch.flip.float().mean() < 0.6
    assert not make_stream(flip=0.0).load(range(50)).flip.any()
    assert make_stream(flip=1.0).load(range(50)).flip.all()


def test_gray_streams() -> None:
    crop, preprocessing = CropConfig((8, 6)), Preprocessing((8, 6), channels=1)
    batch = TrainingStream(open_source(PIXELS), 0, crop, preprocessing).load([3, 1])
    assert batch.images.shape == (2, 8, 6, 1)


def encoded(value: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS[value]).save(out, "PNG")
    return out.getvalue()


def test_broken_samples_are_replaced_and_listed() -> None:
    good = [(encoded(i), i) for i in range(20)]
    items = [(b"broken", 99) if i % 4 == 0 else item for i, item in enumerate(good)]
    batch, clean = make_stream(items).load(range(40)), make_stream(good).load(range(40))
    assert set(batch.labels.tolist()) <= {i for i in range(20) if i % 4}
    assert torch.equal(batch.labels, batch.indices)
    assert len(batch.bad) >= 10
    replaced = torch.isin(batch.positions, torch.tensor([bad.position for bad in batch.bad]))
    assert torch.equal(replaced, clean.indices % 4 == 0)
    # the other samples are exactly what they would have been
    assert torch.equal(batch.images[~replaced], clean.images[~replaced])
    name, reason, position = batch.bad[0]
    assert name == f"list[{clean.indices[position]}]"
    assert "accepted format" in reason
    # and the replacement is a function of the position
    alone = make_stream(items).load([position])
    assert torch.equal(alone.images[0], batch.images[position])
    assert len({int(batch.indices[bad.position]) for bad in batch.bad}) > 3


def test_nothing_readable_is_an_error() -> None:
    with pytest.raises(DataError, match=r"100 samples in a row .*list\[.\]: not an image"):
        make_stream([b"x", b"y"]).load([0])


def test_batch_moves_to_a_device() -> None:
    batch = make_stream().load([0, 1])
    assert same(batch.to("cpu"), batch)
    assert batch.to("meta").images.device.type == "meta"


def make_augmented(randaugment: RandAugment | None, erasing: float = 0.0, seed: int = 0) -> TrainingStream:
    source = open_source((PIXELS, np.arange(23)))
    return TrainingStream(source, seed, CropConfig((8, 8)), Preprocessing((8, 8)), randaugment, erasing)


def test_augmented_batches_do_not_depend_on_how_positions_are_grouped() -> None:
    stream = make_augmented(RandAugment(), 0.5)
    whole, preprocessing = stream.load(range(60)), stream.preprocessing
    prepared = prepare(whole, preprocessing)
    for position in (0, 1, 17, 59):
        alone = stream.load([position])
        assert torch.equal(prepare(alone, preprocessing)[0], prepared[position])
        assert torch.equal(alone.erase[0], whole.erase[position])
    scattered = stream.load([40, 3, 22])
    assert torch.equal(prepare(scattered, preprocessing), prepared[[40, 3, 22]])
    assert 15 <= int((whole.erase[:, 2] > 0).sum()) <= 45
    assert len(whole.noise.unique()) == 60
    other = make_augmented(RandAugment(), 0.5, seed=1).load(range(60))
    assert not torch.equal(other.erase, whole.erase)


def test_augmentation_leaves_everything_else_as_it_was() -> None:
    plain, augmented = make_stream().load(range(60)), make_augmented(RandAugment(probability=1), 1.0).load(range(60))
    for field in ("labels", "flip", "positions", "indices"):
        assert torch.equal(getattr(plain, field), getattr(augmented, field))
    assert not plain.erase.any()
    assert not plain.noise.any()
    changed = (plain.images != augmented.images).flatten(1).any(1)
    assert changed.float().mean() > 0.8
    assert same(make_augmented(RandAugment(probability=0), 0.0).load(range(60)), plain)


def test_mirroring_comes_before_randaugment() -> None:
    augment = RandAugment(probability=1)
    plain, augmented = make_stream().load(range(80)), make_augmented(augment).load(range(80))
    assert OPERATIONS.index("shear_y") in (uniforms(0, "randaugment", range(80), 8)[:, 0] * 15).astype(int)
    for row, u in enumerate(uniforms(0, "randaugment", range(80), 8)):
        image = plain.images[row].numpy()
        expected = augment.apply(image[:, ::-1] if plain.flip[row] else image, u)
        seen = augmented.images[row].numpy()
        assert np.array_equal(seen[:, ::-1] if augmented.flip[row] else seen, expected)


def test_gray_and_other_channels_with_randaugment() -> None:
    source, crop = open_source(PIXELS), CropConfig((8, 6))
    stream = TrainingStream(source, 0, crop, Preprocessing((8, 6), channels=1, mean=(0.2,)), RandAugment(), 1.0)
    batch = stream.load(range(4))
    assert batch.images.shape == (4, 8, 6, 1)
    assert stream.randaugment is not None
    assert stream.randaugment.fill == (51,)
    with pytest.raises(ConfigError, match="these have 5"):
        TrainingStream(source, 0, crop, Preprocessing((8, 6), channels=5), RandAugment())
    with pytest.raises(ConfigError, match="erasing must be a probability from 0 to 1, got 2"):
        TrainingStream(source, 0, crop, Preprocessing((8, 6)), None, 2)


def test_augmented_streams_and_batches_can_be_sent() -> None:
    stream = make_augmented(RandAugment.parse("rand-m9-mstd0.5-inc1"), 0.5)
    batch = stream.load(range(12))
    assert same(pickle.loads(pickle.dumps(stream)).load(range(12)), batch)
    assert same(pickle.loads(pickle.dumps(batch)), batch)
    assert same(batch.to("cpu"), batch)
    # the host must know how much is erased
    assert batch.to("meta").erase.device.type == "cpu"
    assert stream.load([]).erase.shape == (0, 4)
