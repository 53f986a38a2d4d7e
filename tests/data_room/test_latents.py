"""The latent cache: its crop, what is written, what is read, and the stream."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from close import assert_close
from nextblock.data.latents import (
    About,
    CroppedImages,
    LatentBatch,
    LatentCache,
    LatentStream,
    adm_center_crop,
    is_latent_cache,
    latents_of,
    open_latents,
)
from nextblock.data.latents.cache import ABOUT
from nextblock.data.latents.shards import write_shard
from nextblock.data.loading import training_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.data.stream import BadSample, locate
from nextblock.errors import ConfigError, DataError
from nextblock.randomness import normals

SHAPE = (4, 3, 2)  # 2C, h, w
SHARDS = (5, 3, 0, 4)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(sum(SHARDS), 2, *SHAPE)).astype(np.float16)


@pytest.fixture
def folder(tmp_path: Path, values: np.ndarray) -> Path:
    return fill(tmp_path / "cache", values)


def fill(folder: Path, values: np.ndarray) -> Path:
    folder.mkdir()
    shards, ends = {}, np.cumsum(SHARDS)
    for number, (stop, count) in enumerate(zip(ends, SHARDS, strict=True)):
        rows = range(stop - count, stop)
        labels = np.array([row % 3 - 1 for row in rows], dtype=np.int64)
        bad = [BadSample("broken.png", "empty", 9)] if count == 3 else []
        shards[number] = write_shard(folder, number, values[list(rows)], labels, [f"é{row}.png" for row in rows], bad)
    about = About(
        vae={"kind": "kl16", "sha256": "f" * 64},
        crop="adm_center",
        preprocessing=Preprocessing((16, 16)).to_dict(),
        data={"count": 20, "sha256": "0"},
        classes=["cat", "dog"],
        shape=SHAPE,
        dtype="float16",
        shard_images=5,
        finished=True,
        shards=shards,
    )
    about.write(folder)
    return folder


def test_what_was_written_is_read(folder: Path, values: np.ndarray) -> None:
    cache = open_latents(folder)
    assert is_latent_cache(folder)
    assert not is_latent_cache(folder.parent)
    assert (len(cache), cache.shape, cache.image_size_px, cache.classes) == (12, SHAPE, 16, ["cat", "dog"])
    assert cache.labels.tolist() == [row % 3 - 1 for row in range(12)]
    assert [cache.name(i) for i in (0, 4, 5, 11)] == ["é0.png", "é4.png", "é5.png", "é11.png"]
    indices = np.array([11, 0, 7, 5, 0])
    flips = np.array([True, False, True, False, True])
    found = cache.moments(indices, flips)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, values[indices, flips.astype(int)].astype(np.float32))
    with pytest.raises(IndexError):
        cache.moments([12], [False])


def test_about_survives_the_disk(folder: Path) -> None:
    about = About.read(folder)
    about.write(folder.parent)
    assert About.read(folder.parent) == about
    assert about.shards[1].bad == (BadSample("broken.png", "empty", 9),)
    stored = json.loads((folder / ABOUT).read_text())
    assert len(stored["preprocessing_sha256"]) == 64


def test_a_shard_is_a_plain_safetensors_file(folder: Path, values: np.ndarray) -> None:
    found = load_file(folder / "shard-00000.safetensors")
    np.testing.assert_array_equal(found["moments"], values[:5])
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # whoever may read latents.json may read the shards


def test_fingerprint_is_of_the_content(folder: Path, values: np.ndarray, tmp_path: Path) -> None:
    ours = open_latents(folder).fingerprint
    assert ours == open_latents(fill(tmp_path / "again", values)).fingerprint
    values[7, 1, 0, 0, 0] += 1
    assert ours != open_latents(fill(tmp_path / "other", values)).fingerprint


@pytest.mark.parametrize("change", [-1, 3])
def test_a_shard_of_another_size_is_named_at_once(folder: Path, change: int) -> None:
    path = folder / "shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    how = "truncated" if change < 0 else "too long"
    with pytest.raises(DataError, match=rf"shard-00001.*{how}.*\n?.*cache-latents --resume {folder}"):
        open_latents(folder)


def test_a_lost_shard_is_named(folder: Path) -> None:
    (folder / "shard-00003.safetensors").unlink()
    with pytest.raises(DataError, match=r"shard-00003.*no such file"):
        open_latents(folder)


def test_changed_bytes_are_noticed_when_they_are_read(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    flip_bit(path, tensor_start(path.read_bytes(), "moments") + 1, 4)  # image 0 of this shard, not mirrored
    cache = open_latents(folder)
    cache.moments([5, 6], [True, False])
    with pytest.raises(DataError, match=r"shard-00001.*image 0 of it is not what was written"):
        cache.moments([5], [False])
    with pytest.raises(DataError, match=r"shard-00001.*SHA-256"):
        cache.verify()


def tensor_start(content: bytes, name: str) -> int:
    """Where the numbers of a tensor begin in a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return 8 + length + int(json.loads(content[8 : 8 + length])[name]["data_offsets"][0])


def flip_bit(path: Path, place: int, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= bit
    path.write_bytes(content)


@pytest.mark.parametrize("tensor", ["labels", "names", "ends", "checks"])
def test_all_but_the_moments_is_checked_when_the_cache_is_opened(folder: Path, tensor: str) -> None:
    path = folder / "shard-00001.safetensors"
    flip_bit(path, tensor_start(path.read_bytes(), tensor))
    told = rf"shard-00001.*labels, names or checks of it are not what was written.*cache-latents --resume {folder}"
    with pytest.raises(DataError, match=told):
        open_latents(folder)


@pytest.mark.parametrize("word", [b'"labels"', b'"shape"', b'"I64"', b"[0,24]", b"{"])
def test_a_damaged_header_is_told(folder: Path, word: bytes) -> None:
    path = folder / "shard-00001.safetensors"
    content = path.read_bytes()
    assert word in content
    flip_bit(path, content.index(word) + len(word) // 2)
    with pytest.raises(DataError, match=rf"shard-00001.* is damaged.*cache-latents --resume {folder}"):
        open_latents(folder)


def test_a_header_that_reaches_beyond_the_file_is_told(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(
        b"\x00\x10" + path.read_bytes()[2:]
    )  # of 4,096 bytes, as long as a page of memory and more than all
    with pytest.raises(DataError, match=r"shard-00001.* is damaged: its header cannot be read"):
        open_latents(folder)


@pytest.mark.parametrize(("classes", "label"), [(["cat"], 1), (["cat", "dog"], 2), (["cat", "dog"], -2), (None, -2)])
def test_labels_lie_within_the_classes(folder: Path, classes: list[str] | None, label: int) -> None:
    labels, about = np.array([0, label, -1], dtype=np.int64), About.read(folder)
    moments = np.zeros((3, 2, *SHAPE), dtype=np.float16)
    shards = {0: write_shard(folder, 0, moments, labels, ["a", "b", "c"], [])}
    dataclasses.replace(about, classes=classes, shards=shards).write(folder)
    with pytest.raises(DataError, match=rf"shard-00000.*b has the label {label}"):
        open_latents(folder)


def test_verify_passes_over_all_shards(folder: Path) -> None:
    seen = []
    open_latents(folder).verify(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_what_is_no_finished_cache(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cach is no latent cache.*Did you mean 'cache'"):
        open_latents(tmp_path / "cach")
    about, stored = About.read(folder), json.loads((folder / ABOUT).read_text())
    dataclasses.replace(about, finished=False).write(folder)
    with pytest.raises(DataError, match=r"not finished: 4 of 4 shards.*--resume"):
        open_latents(folder)
    (folder / ABOUT).write_text(json.dumps(stored | {"format": 9}))
    with pytest.raises(DataError, match="format 9"):
        open_latents(folder)
    (folder / ABOUT).write_text("{")
    with pytest.raises(DataError, match=r"latents\.json cannot be read"):
        open_latents(folder)


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"classes": ["cat", "cow"]}, {"more": 1}, {"sha256": None}])
def test_what_latents_json_says_is_what_was_written(folder: Path, change: dict[str, object]) -> None:
    stored = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps(stored | change))
    with pytest.raises(DataError, match=r"latents\.json cannot be read.*not what was written"):
        open_latents(folder)
    del stored["sha256"]
    (folder / ABOUT).write_text(json.dumps(stored))  # as it was written before there was a hash
    assert len(open_latents(folder)) == 12


def test_a_pickle_holds_no_moments(folder: Path, values: np.ndarray) -> None:
    cache = open_latents(folder)
    before = len(pickle.dumps(cache))
    cache.moments(range(12), [False] * 12)
    content = pickle.dumps(cache)
    assert len(content) == before
    again: LatentCache = pickle.loads(content)
    np.testing.assert_array_equal(again.moments([3], [True])[0], values[3, 1].astype(np.float32))


def test_stream_is_a_function_of_seed_and_position(folder: Path, values: np.ndarray) -> None:
    stream = LatentStream(open_latents(folder), seed=3)
    batch = stream.load(range(60))
    _, indices = locate(3, np.arange(60), 12)
    assert batch.labels.tolist() == (indices % 3 - 1).tolist()
    plain, mirrored = (torch.from_numpy(values[indices, flip].astype(np.float32)) for flip in (0, 1))
    is_plain, is_mirrored = ((batch.moments == which).flatten(1).all(1) for which in (plain, mirrored))
    assert (is_plain ^ is_mirrored).all()
    assert 15 <= int(is_mirrored.sum()) <= 45
    one = stream.load([17])
    assert torch.equal(one.moments[0], batch.moments[17])
    assert batch.bad == []
    assert not torch.equal(LatentStream(stream.cache, seed=4).load(range(60)).moments, batch.moments)


def test_flips_can_be_turned_off(folder: Path, values: np.ndarray) -> None:
    batch = LatentStream(open_latents(folder), seed=0, flip=0).load(range(12))
    _, indices = locate(0, np.arange(12), 12)
    assert torch.equal(batch.moments, torch.from_numpy(values[indices, 0].astype(np.float32)))
    with pytest.raises(ConfigError, match="probability"):
        LatentStream(open_latents(folder), seed=0, flip=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_by_workers(folder: Path, workers: int) -> None:
    stream = LatentStream(open_latents(folder), seed=1)
    plan = (range(first, first + 5) for first in itertools.count(0, 5))
    batches = training_batches(stream, plan, workers=workers)
    for first, batch in zip(range(0, 20, 5), batches, strict=False):
        assert isinstance(batch, LatentBatch)
        assert batch.positions.tolist() == list(range(first, first + 5))
        assert torch.equal(batch.moments, stream.load(range(first, first + 5)).moments)


def test_damage_reaches_the_person_through_workers(folder: Path) -> None:
    stream = LatentStream(open_latents(folder), seed=1)
    for path in folder.glob("shard-*"):
        content = bytearray(path.read_bytes())
        content[-40:] = bytes(40) if len(content) > 400 else content[-40:]
        path.write_bytes(bytes(b ^ 255 if i > len(content) // 2 else b for i, b in enumerate(content)))
    with pytest.raises(DataError, match="damaged"):
        next(training_batches(stream, iter([range(12)]), workers=1))


def test_latents_are_a_posterior_sample_by_position() -> None:
    moments = torch.randn(3, 4, 3, 2)
    batch = LatentBatch(moments, torch.zeros(3, dtype=torch.int64), torch.tensor([7, 0, 12]))
    found = latents_of(batch, 5, 0.5, 0.25)
    noise = normals(5, "posterior", [7, 0, 12], (2, 3, 2))
    want = (moments[:, :2] + (moments[:, 2:] / 2).exp() * noise - 0.25) * 0.5
    assert_close(found, want, 1e-6)
    alone = LatentBatch(moments[1:2], batch.labels[1:2], batch.positions[1:2])
    assert torch.equal(latents_of(alone, 5, 0.5, 0.25)[0], found[1])
    assert not torch.equal(latents_of(batch, 6, 0.5, 0.25), found)


def adm_by_hand(image: Image.Image, size: int) -> np.ndarray:
    """Dhariwal and Nichol's preparation, step by step."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.Resampling.BOX)
    ratio = size / min(image.size)
    image = image.resize(tuple(round(side * ratio) for side in image.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (31, 45), (33, 32), (70, 129), (9, 20), (64, 1000)])
def test_adm_crop(height: int, width: int) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    want = adm_by_hand(Image.fromarray(pixels), 16)
    np.testing.assert_array_equal(adm_center_crop(pixels, 16), want)
    gray = adm_center_crop(pixels[:, :, :1], 16)
    assert gray.shape == (16, 16, 1)


def test_adm_crop_of_an_endless_image() -> None:
    pixels = np.zeros((1, 100_000, 3), dtype=np.uint8)
    pixels[:, 49_992:50_008] = 200
    assert adm_center_crop(pixels, 16).min() == 200


def test_cropped_images_leave_broken_ones_out(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (20, 30), "red").save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "2.png").write_bytes(b"no image")
    Image.new("L", (40, 20), 80).save(tmp_path / "b" / "3.png")
    view = CroppedImages(open_source(tmp_path), Preprocessing((8, 8)))
    batch = view.load(range(3))
    assert batch.images.shape == (2, 8, 8, 3)
    assert batch.labels.tolist() == [0, 1]
    assert batch.indices.tolist() == [0, 2]
    assert [(bad.name, bad.position) for bad in batch.bad] == [("a/2.png", 1)]
    assert view.load([1]).images.shape == (0, 8, 8, 3)
