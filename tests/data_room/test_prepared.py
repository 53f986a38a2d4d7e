"""Prepared images: how one is encoded, what a shard gives back, and what is said of damage."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from nextblock.data.augment import CropConfig
from nextblock.data.decode import decode
from nextblock.data.jpeg_units import UnitJpeg, are_as_listed
from nextblock.data.loading import training_batches
from nextblock.data.prepared import Encoding, PreparedImages, is_prepared, open_prepared, source
from nextblock.data.prepared.about import ABOUT, About
from nextblock.data.prepared.encoding import encode, stored
from nextblock.data.prepared.making import Maker, write_about
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source, explain_change, fingerprint, open_source, write_manifest
from nextblock.data.stream import TrainingStream
from nextblock.errors import ConfigError, DataError, SampleError

GENERATOR = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return GENERATOR.integers(0, 256, (height, width, channels), dtype=np.uint8)


def file(pixels: np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(out, kind, **options)
    return out.getvalue()


def opened(content: bytes) -> Any:
    return Image.open(io.BytesIO(content))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


# --- one image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "size"), [(200, 300, (150, 100)), (300, 200, (100, 150)), (1000, 999, (100, 100))]
)
def test_the_shorter_side_is_reduced(height: int, width: int, size: tuple[int, int]) -> None:
    found = encode(file(noise(height, width)), "x", Encoding(100))
    assert found.kind == "jpeg"
    image = opened(found.content)
    assert (image.format, image.size, image.mode) == ("JPEG", size, "RGB")
    assert "progressive" not in image.info


def test_reducing_is_antialiased_and_nothing_is_enlarged() -> None:
    stripes = np.zeros((400, 400, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    pixels = stored(encode(file(stripes, "PNG"), "x", Encoding(100, format="raw")).content)
    assert isinstance(pixels, np.ndarray)
    assert abs(pixels[3:-3, 3:-3].astype(int) - 127).max() <= 2  # gray, not black or white
    small = noise(70, 80)
    assert np.array_equal(stored(encode(small, "x", Encoding(100, format="raw")).content), small)
    assert opened(encode(small, "x", Encoding(100)).content).size == (80, 70)


def test_a_jpeg_that_is_small_upright_and_not_progressive_is_copied() -> None:
    pixels = noise(80, 90)
    for name, content in {
        "plain": file(pixels), "gray": file(pixels[:, :, :1]), "upright": file(pixels, exif=turned(1)),
    }.items():  # fmt: skip
        assert encode(content, name, Encoding(80)) == (content, "copied")
    for name, content in {
        "large": file(noise(81, 90)), "progressive": file(pixels, progressive=True), "PNG": file(pixels, "PNG"),
        "turned": file(pixels, exif=turned(6)), "four inks": file(pixels[:, :, [0, 1, 2, 0]].copy(), "TIFF"),
    }.items():  # fmt: skip
        found = encode(content, name, Encoding(80))
        assert (found.kind, "progressive" in opened(found.content).info) == ("jpeg", False), name
    assert encode(file(pixels), "x", Encoding(80, format="png")).kind == "png"


def test_exif_orientation_is_applied_or_not() -> None:
    content = file(noise(80, 120), exif=turned(6))
    for applied, size in ((True, (80, 120)), (False, (120, 80))):
        image = opened(encode(content, "x", Encoding(80, exif_orientation=applied)).content)
        assert image.size == size
        assert 0x0112 not in image.getexif()  # whoever reads it turns it no further


@pytest.mark.parametrize("kind", ["png", "raw", "jpeg"])
def test_gray_images_are_kept_with_one_channel_and_decode_to_the_same(kind: str) -> None:
    gray = noise(70, 70, 1)
    for content in (file(gray, "PNG"), file(np.repeat(gray, 3, axis=2), "PNG"), gray):
        kept = stored(encode(content, "x", Encoding(format=kind)).content)
        assert (kept.shape[2] if isinstance(kept, np.ndarray) else len(opened(kept).getbands())) == 1
        pixels = decode(kept, "x", channels=3)
        assert np.array_equal(pixels[:, :, 0], pixels[:, :, 2])
        if kind != "jpeg":
            assert np.array_equal(pixels[:, :, :1], gray)


def test_formats() -> None:
    small, large, long = noise(63, 200), noise(64, 200), np.zeros((64, 65_501, 3), dtype=np.uint8)
    assert encode(small, "x", Encoding()).kind == "raw"
    assert encode(small, "x", Encoding(format="jpeg")).kind == "jpeg"
    assert encode(large, "x", Encoding()).kind == "jpeg"
    assert encode(large, "x", Encoding(short_side=63)).kind == "raw"
    assert encode(long, "x", Encoding()).kind == "png"  # more than a JPEG can hold
    for kind in ("png", "raw"):
        assert np.array_equal(decode(stored(encode(large, "x", Encoding(format=kind)).content), "x"), large)
    sampling = {
        chroma: JpegImagePlugin.get_sampling(opened(encode(large, "x", Encoding(chroma=chroma)).content))
        for chroma in ("4:4:4", "4:2:0")
    }
    assert sampling == {"4:4:4": 0, "4:2:0": 2}
    sizes = [len(encode(large, "x", Encoding(quality=quality)).content) for quality in (50, 90, 95)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize("chroma", ["4:2:0", "4:4:4"])
def test_a_part_of_a_jpeg_can_be_decoded_alone_and_the_pixels_are_those_of_an_ordinary_one(chroma: str) -> None:
    pixels, encoding = noise(90, 100), Encoding(80, quality=85, chroma=chroma)
    for given in (pixels, pixels[:, :, :1]):
        found = stored(encode(given, "x", encoding).content)
        assert isinstance(found, UnitJpeg)
        assert are_as_listed(found)
        reduced = stored(encode(given, "x", Encoding(80, format="raw")).content)
        assert isinstance(reduced, np.ndarray)
        ordinary = file(reduced, quality=85, **({} if given.shape[2] == 1 else {"subsampling": chroma}))
        assert np.array_equal(decode(found, "x"), decode(ordinary, "x"))
        assert type(stored(ordinary)) is bytes


def test_a_list_of_units_is_copied_only_when_it_is_right() -> None:
    listed = encode(noise(90, 100), "x", Encoding(80)).content
    assert encode(listed, "x", Encoding(80)) == (listed, "copied")
    wrong = bytearray(listed)
    wrong[40:60] = bytes(20)
    found = encode(bytes(wrong), "x", Encoding(80))
    assert found.kind == "jpeg"
    assert are_as_listed(found.content)


def test_a_broken_image_is_told_by_its_name() -> None:
    with pytest.raises(SampleError, match=r"^a/b\.png: not an image in an accepted format"):
        encode(b"no image", "a/b.png", Encoding())


def test_what_an_encoding_refuses() -> None:
    with pytest.raises(ConfigError, match="short_side must be at least 1 pixel; got 0"):
        Encoding(short_side=0)
    with pytest.raises(ConfigError, match="quality must lie between 1 and 100; got 101"):
        Encoding(quality=101)
    with pytest.raises(ConfigError, match=r"format must be one of 'auto', .*; got 'jpg'\. Did you mean 'jpeg'"):
        Encoding(format="jpg")
    with pytest.raises(ConfigError, match="chroma must be one of"):
        Encoding(chroma="4:2:2")


# --- many of them ------------------------------------------------------------------------------------------

COUNT = 11


class Named:
    """Images with odd names, some of them without a label."""

    def __init__(self, values: int = 0) -> None:
        self.classes = ("a", "b")
        self.description = "odd names"
        self.images = [np.full((9, 8 + i, 3), (values + i, 7, 9), dtype=np.uint8) for i in range(COUNT)]

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        from nextblock.data.sources import Sample

        return Sample(self.images[index], [None, 0, 1][index % 3])

    def name(self, index: int) -> str:
        return os.fsdecode(b"\xff\xc3\xa9\n" + b"x" * index)

    def labels(self) -> None:
        return None

    def manifest(self) -> Any:
        return iter(())


def make(folder: Path, images: Source, shard_bytes: int = 700, **encoding: Any) -> PreparedImages:
    folder.mkdir(parents=True)
    classes = None if images.classes is None else list(images.classes)
    about = About(Encoding(**encoding), shard_bytes / 2**20, {"count": len(images)}, classes)  # type: ignore[arg-type]
    write_about(folder, about)
    Maker(folder, images, workers=0, max_bad=10).make(about)
    return open_prepared(folder)


@pytest.fixture
def made(tmp_path: Path) -> PreparedImages:
    return make(tmp_path / "made", Named())


def test_it_is_a_source_with_the_same_names_labels_and_classes(made: PreparedImages) -> None:
    given = Named()
    for found in (made, pickle.loads(pickle.dumps(made)), open_source(made.folder)):
        assert isinstance(found, Source)
        assert (len(found), found.classes) == (COUNT, ("a", "b"))
        assert [found.name(i) for i in range(COUNT)] == [given.name(i) for i in range(COUNT)]
        labels = found.labels()
        assert labels is not None
        assert labels.tolist() == [-1, 0, 1] * 3 + [-1, 0]
        assert labels.dtype == np.int64
        for i in (10, 0, 4, 3):
            assert np.array_equal(found[i].content, given.images[i])
            assert found[i].label == given[i].label
    assert len(made.about.shards) == 5
    assert made.description == f"{made.folder}: 11 prepared images, shorter side at most 320 px, 2 classes"
    for wrong in (-1, COUNT):
        for ask in (made.__getitem__, made.name):
            with pytest.raises(IndexError, match=r"outside 0\.\.10"):
                ask(wrong)


def test_a_pickled_source_is_small_and_keeps_no_file(made: PreparedImages) -> None:
    made[3], made[10]
    assert made._files
    again = pickle.loads(pickle.dumps(made))
    assert (again._facts, len(again._files)) == (None, 0)


def test_few_files_are_open_at_a_time(made: PreparedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "OPEN_FILES", 2)
    before = len(os.listdir("/proc/self/fd"))
    for i in (0, 4, 7, 10, 0, 10):
        assert made[i].label == Named()[i].label
    assert len(made._files) == 2
    assert len(os.listdir("/proc/self/fd")) == before + 2


def test_training_on_them_is_the_same_with_workers_and_from_the_middle(made: PreparedImages) -> None:
    stream = TrainingStream(made, 0, CropConfig((8, 8)), Preprocessing((8, 8)))
    plan = [range(i, i + 4) for i in range(0, 24, 4)]
    whole = list(training_batches(stream, plan, workers=0))
    for found in (list(training_batches(stream, plan[2:], workers=2)), [stream.load(part) for part in plan[2:]]):
        for a, b in zip(whole[2:], found, strict=True):
            assert a.images.equal(b.images)
            assert a.labels.equal(b.labels)
            assert a.indices.equal(b.indices)


def test_one_flipped_bit_of_an_image_is_noticed_and_named(made: PreparedImages) -> None:
    path = made.folder / "shard-00001.bin"
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)
    damaged = open_prepared(made.folder)  # the size is right, and so is the index
    first = made._ends[0]
    with pytest.raises(SampleError, match=r"damaged in shard-00001\.bin of .*made") as error:
        damaged[first]
    assert error.value.name == made.name(first)
    assert damaged[first + 1].label == made[first + 1].label
    batch = TrainingStream(damaged, 0, CropConfig((8, 8)), Preprocessing((8, 8))).load(range(COUNT))
    assert [sample.name for sample in batch.bad] == [made.name(first)]
    assert first not in batch.indices
    with pytest.raises(DataError, match=r"shard-00001\.bin .*SHA-256.*nextblock prepare DATA --out"):
        damaged.verify()
    for record in made.about.in_order:
        assert record.require_size(made.folder) is None


@pytest.mark.parametrize("part", ["row", "end", "name"])
def test_one_flipped_bit_of_the_index_is_noticed_when_opened(made: PreparedImages, part: str) -> None:
    path = made.folder / "index.bin"
    content = bytearray(path.read_bytes())
    content[{"row": 0, "end": 16 * COUNT, "name": -1}[part]] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"index\.bin of .* is damaged: its content.*nextblock prepare DATA --out"):
        open_prepared(made.folder)


def test_files_that_are_missing_or_cut(made: PreparedImages) -> None:
    path = made.folder / "shard-00002.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"shard-00002\.bin .*truncated, [\d,]+ bytes instead of"):
        open_prepared(made.folder)
    path.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="too long"):
        open_prepared(made.folder)
    path.unlink()
    with pytest.raises(DataError, match=r"shard-00002\.bin .*no such file"):
        open_prepared(made.folder)
    with pytest.raises(DataError, match=r"read error on .*shard-00002\.bin: No such file"):
        made[made._ends[1]]
    path.write_bytes(whole)
    (made.folder / "index.bin").unlink()
    with pytest.raises(DataError, match=r"index\.bin .* cannot be read"):
        open_prepared(made.folder)


def test_the_manifest_notices_other_content(tmp_path: Path) -> None:
    one, same, other = (make(tmp_path / str(i), Named(values)) for i, values in enumerate((0, 0, 1)))
    assert fingerprint(one) == fingerprint(same)
    assert fingerprint(one) != fingerprint(other)
    assert fingerprint(one).count == COUNT
    write_manifest(one, tmp_path / "manifest")
    assert "5 added: shard-00000.bin sha256:" in explain_change(tmp_path / "manifest", other)
    names = [name for name, _ in one.manifest()]
    assert names == sorted(names)


def test_a_folder_of_splits(tmp_path: Path) -> None:
    for split, values in (("train", 0), ("val", 50)):
        make(tmp_path / split, Named(values))
    for split, first in (("train", 0), ("val", 50), ("test", 50)):
        assert open_source(tmp_path, split=split)[0].content.flat[0] == first


def test_what_is_no_folder_of_finished_prepared_images(made: PreparedImages, tmp_path: Path) -> None:
    assert is_prepared(made.folder)
    assert not is_prepared(tmp_path)
    with pytest.raises(DataError, match=r"holds no prepared images.*Did you mean 'made'"):
        open_prepared(tmp_path / "mode")
    path = made.folder / ABOUT
    values = json.loads(path.read_text())
    write_about(made.folder, dataclasses.replace(made.about, index=None, asked={"data": "/images"}))
    with pytest.raises(DataError, match=r"not finished: 11 of 11 .*Go on with: nextblock prepare /images --out .*made"):
        open_source(made.folder)
    path.write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(DataError, match="of format 99; this version reads 1"):
        open_source(made.folder)
    for garbage in ("{", "[]", '{"format": 1}', json.dumps(values | {"shards": {"0": {"file": 1}}})):
        path.write_text(garbage)
        with pytest.raises(DataError, match=r"prepared\.json cannot be read"):
            open_source(made.folder)


@pytest.mark.parametrize("change", [{"classes": ["a", "c"]}, {"more": 1}, {"sha256": None}])
def test_what_prepared_json_says_is_what_was_written(made: PreparedImages, change: dict[str, Any]) -> None:
    path = made.folder / ABOUT
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | change))
    with pytest.raises(DataError, match=r"prepared\.json cannot be read.*not what was written"):
        open_source(made.folder)
    del values["sha256"]
    path.write_text(json.dumps(values))  # as it was written before there was a hash
    assert len(open_source(made.folder)) == COUNT
