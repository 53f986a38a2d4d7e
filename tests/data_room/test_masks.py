"""Masks: the stored value is the class, image and mask are seen through one window, and what does not fit is told."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nextblock.data.masked import Masked, open_masked, split_pairs
from nextblock.data.masks import IGNORED, MaskConfig, MaskView, class_numbers, masked_batches, read_mask, view_of
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import ConfigError, DataError, SampleError

VALUES = np.array([[0, 1, 2], [3, 1, 0]])


def png(image: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def gray_png(values: NDArray[Any], bits: int) -> bytes:
    """Gray of any depth, as Pillow does not write it."""
    lines = b""
    for line in values:
        text = "".join(format(int(value), f"0{bits}b") for value in line)
        text += "0" * (-len(text) % 8)
        lines += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 0, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_gray_of_any_depth_is_the_number_stored(bits: int) -> None:
    values = np.minimum(VALUES, 2**bits - 1)
    np.testing.assert_array_equal(read_mask(gray_png(values, bits), "m"), values)
    assert read_mask(gray_png(np.full((1, 1), 2**bits - 1), bits), "m").item() == 2**bits - 1


def test_a_palette_is_its_index() -> None:
    image = Image.fromarray(VALUES.astype(np.uint8))
    image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9])
    for options in ({}, {"bits": 2}, {"transparency": 0}):
        np.testing.assert_array_equal(read_mask(png(image, **options), "m"), VALUES)
    np.testing.assert_array_equal(read_mask(image, "m"), VALUES)


def test_arrays_and_tensors() -> None:
    for mask in (VALUES, VALUES.astype(np.uint16), torch.from_numpy(VALUES), VALUES > 1):
        np.testing.assert_array_equal(read_mask(mask, "m"), np.asarray(mask).astype(int))
    for wrong in (VALUES.astype(float), VALUES[None], np.zeros((0, 3), int)):
        with pytest.raises(DataError, match=r"m must be integers \[H, W\]"):
            read_mask(wrong, "m")
    with pytest.raises(DataError, match="m is a int"):
        read_mask(3, "m")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_colours_are_no_classes(mode: str) -> None:
    with pytest.raises(DataError, match=rf"m is a picture in colour.*{mode}.*gray or palette PNG"):
        read_mask(png(Image.new(mode, (2, 2))), "m")


def test_damage_costs_one_sample() -> None:
    whole = png(Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)))
    out = io.BytesIO()
    Image.new("L", (8, 8)).save(out, "JPEG")
    for content in (whole[:100], b"", b"text", out.getvalue()):
        with pytest.raises(SampleError, match="m: "):
            read_mask(content, "m")


def test_values_become_classes() -> None:
    found = class_numbers(np.array([[0, 3, 255]]), "m", MaskConfig())
    assert found.tolist() == [[0, 3, IGNORED]]
    assert class_numbers(np.array([[0, 255, 7]]), "m", MaskConfig(values=(0, 255), ignore=(7, 255))).tolist() == [
        [0, 1, IGNORED]
    ]
    assert class_numbers(np.array([[-1, 2, 65535]]), "m", MaskConfig(ignore=(-1, 65535))).tolist() == [
        [IGNORED, 2, IGNORED]
    ]
    told = r"m holds the value {}; classes are {}.*--segmentation\.ignore 255 {}"
    with pytest.raises(DataError, match=told.format(3, "0 to 2", 3)):
        class_numbers(np.array([[0, 3]]), "m", MaskConfig(), 3)
    with pytest.raises(DataError, match=told.format(1, "the values 0, 9", 1)):
        class_numbers(np.array([[0, 1]]), "m", MaskConfig(values=(0, 9)), 2)
    for value in (254, 300, -1, 70000):
        with pytest.raises(DataError, match=f"the value {value};"):
            class_numbers(np.array([[0, value]]), "m", MaskConfig())


@pytest.mark.parametrize("view", ["whole", "crop"])
@pytest.mark.parametrize("shape", [(40, 61), (83, 40), (30, 30), (9, 11), (7, 200)])
@pytest.mark.parametrize("size", [(32, 32), (16, 24)])
def test_image_and_mask_share_a_window(view: str, shape: tuple[int, int], size: tuple[int, int]) -> None:
    """Half planes: what is bright in the image is class 1 in the mask, but for the pixels that an edge crosses."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    for mask in (x >= 0.55 * shape[1], y >= 0.4 * shape[0], x * shape[0] + y * shape[1] > 0.9 * shape[0] * shape[1]):
        pixels = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
        preprocessing = Preprocessing(size_px=size, resize_px=36)
        seen, found = view_of(pixels, mask.astype(np.uint8), preprocessing, view)
        assert seen.shape[:2] == found.shape == size
        clear = (seen[..., 0] < 30) | (seen[..., 0] > 225)
        assert clear.mean() > 0.6
        np.testing.assert_array_equal(found[clear], seen[..., 0][clear] > 127)


def test_only_the_whole_view_sees_the_edges() -> None:
    mask = np.zeros((40, 80), dtype=np.uint8)
    mask[:, :8] = 1
    pixels, preprocessing = np.zeros((40, 80, 3), dtype=np.uint8), Preprocessing(size_px=(32, 32))
    share = {view: (view_of(pixels, mask, preprocessing, view)[1] == 1).mean() for view in ("whole", "crop")}
    assert share == {"whole": pytest.approx(0.1, abs=0.02), "crop": 0}


# --- folders ---


def write(folder: Path, names: list[str], masks: str = "masks", split: str = "", above: bool = True) -> None:
    """Images and masks whose colour and class are their number in `names`."""
    for i, name in enumerate(names):
        for kind in ("images", masks):
            place = folder / split / kind if above else folder / kind / split
            stem, suffix = name.rsplit(".", 1)
            file = place / (name if kind == "images" else f"{stem}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (12, 10), (20 * i,) * 3) if kind == "images" else Image.new("L", (12, 10), i)
            picture.save(file, "JPEG" if suffix == "jpg" and kind == "images" else "PNG")


def names_of(data: Masked) -> tuple[list[str], list[str]]:
    return tuple([side.images.name(i) for i in range(len(side))] for side in (data.train, data.test))  # type: ignore[return-value]


def test_one_folder_is_split(tmp_path: Path) -> None:
    names = ["b/a.jpg", "a.PNG", "c.jpg", "d.png", "e.jpg"]
    write(tmp_path / "d", names)
    (tmp_path / "d/classes.txt").write_text("wall\n floor\n\ndoor\n")
    data = open_masked(tmp_path / "d", test_fraction=0.4)
    assert (len(data.train), len(data.test), data.classes) == (3, 2, ("wall", "floor", "door"))
    assert "40 % of the images were held out" in data.note
    assert names_of(data) == names_of(open_masked(str(tmp_path / "d"), test_fraction=0.4))
    other = [names_of(open_masked(tmp_path / "d", test_fraction=0.4, seed=seed)) for seed in range(5)]
    assert len({str(each) for each in other}) > 1
    for side in (data.train, data.test):
        for i in range(len(side)):
            assert side.images.name(i).rsplit(".", 1)[0].replace("images", "masks") + ".png" == side.masks.name(i)


@pytest.mark.parametrize(
    ("masks", "above", "splits"),
    [
        ("masks", True, ("train", "val")),
        ("masks", True, ("train", "test")),
        ("annotations", False, ("training", "validation")),
        ("masks", False, ("train", "test")),
    ],
)
def test_layouts_with_splits(masks: str, above: bool, splits: tuple[str, str], tmp_path: Path) -> None:
    write(tmp_path, ["a.jpg", "b.jpg", "c.jpg"], masks, splits[0], above)
    write(tmp_path, ["d.jpg"], masks, splits[1], above)
    (tmp_path / "images/testing").mkdir(parents=True, exist_ok=True)  # published without masks
    data = open_masked(tmp_path)
    assert [len(side) for side in (data.train, data.test)] == [3, 1]
    assert data.note == ""
    assert len(open_masked(tmp_path, train_split=splits[1], test_split=splits[0]).train) == 1
    with pytest.raises(DataError, match="no split 'dev'"):
        open_masked(tmp_path, test_split="dev")


def test_a_test_folder_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "one", ["a.jpg", "b.jpg"])
    write(tmp_path / "two", ["c.jpg"], split="test")
    assert names_of(open_masked(tmp_path / "one", test=tmp_path / "two"))[1] == ["test/images/c.jpg"]
    assert names_of(open_masked(tmp_path / "one", test=tmp_path / "two/test"))[1] == ["test/images/c.jpg"]


def test_what_does_not_belong_together(tmp_path: Path) -> None:
    write(tmp_path, ["a.jpg", "b.jpg", "c.jpg"])

    def told(match: str) -> None:
        with pytest.raises(DataError, match=match):
            open_masked(tmp_path)

    (tmp_path / "masks/b.png").rename(tmp_path / "masks/z.png")
    told(r"1 of 3 images in .*images have no mask: b\.jpg\..*masks/b\.png")
    (tmp_path / "images/b.jpg").unlink()
    told(r"1 masks in .*masks have no image: z\.png")
    (tmp_path / "masks/z.png").rename(tmp_path / "masks/z.jpg")
    told(r"must be PNG files.*z\.jpg")
    (tmp_path / "masks/z.jpg").unlink()
    (tmp_path / "images/a.png").write_bytes(b"")
    told(r"a\.jpg and a\.png have the same name")
    (tmp_path / "images/a.png").unlink()
    (tmp_path / "classes.txt").write_text("only\n")
    told("two classes or more")
    (tmp_path / "masks").rename(tmp_path / "labels")
    told("holds images, labels; wanted is one of images/ and masks/")
    with pytest.raises(DataError, match=f"Did you mean '{tmp_path.name}'"):
        open_masked(str(tmp_path) + "x")
    with pytest.raises(DataError, match="cannot read images and masks from a int"):
        open_masked(3)


def test_python_objects() -> None:
    pixels = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 6, 6, 3), dtype=np.uint8)
    masks = np.arange(4)[:, None, None] * np.ones((1, 6, 6), dtype=int)
    pairs = [
        (Image.fromarray(image), Image.fromarray(mask.astype(np.uint8)))
        for image, mask in zip(pixels, masks, strict=True)
    ]
    for spec in (
        (pixels, masks),
        list(zip(pixels, masks, strict=True)),
        pairs,
        (torch.from_numpy(pixels), torch.from_numpy(masks)),
    ):
        data = open_masked(spec, test=spec)
        view = MaskView(data.train.images, data.train.masks, Preprocessing(size_px=(4, 4)), MaskConfig())
        batch = view.load(range(4))
        assert batch.images[:, 0, 0, 0].tolist() == batch.masks[:, 0, 0].tolist() == [0, 1, 2, 3]
        assert batch.highest == 3
    with pytest.raises(DataError, match="4 images and 3 masks"):
        open_masked((pixels, masks[:3]))
    with pytest.raises(DataError, match=r"item 0 must be \(image, mask\)"):
        open_masked([pixels[0]])


def test_batches_leave_out_the_broken_and_keep_the_order(tmp_path: Path) -> None:
    write(tmp_path, [f"{i}.jpg" for i in range(6)])
    (tmp_path / "masks/1.png").write_bytes(b"broken")
    (tmp_path / "images/4.jpg").write_bytes(b"broken")
    data = open_masked(tmp_path, test=tmp_path).train
    view = MaskView(data.images, data.masks, Preprocessing(size_px=(4, 4)), MaskConfig())
    for workers in (0, 1):
        batches = list(masked_batches(view, [range(3), range(3, 6)], workers=workers))
        assert [batch.indices.tolist() for batch in batches] == [[0, 2], [3, 5]]
        assert [batch.masks[:, 0, 0].tolist() for batch in batches] == [[0, 2], [3, 5]]
        bad = [sample.name.split("/")[1:] for batch in batches for sample in batch.bad]
        assert bad == [["masks", "1.png"], ["images", "4.jpg"]]


def test_orientation_is_that_of_image_and_mask_alike(tmp_path: Path) -> None:
    """A photo lying on its side: its mask was drawn on the upright image, or on the pixels as they are stored."""
    write(tmp_path, ["a.jpg", "b.jpg"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (12, 10)).save(tmp_path / "images/a.jpg", exif=exif)
    preprocessing = Preprocessing(size_px=(4, 4))

    def load(config: MaskConfig) -> MaskView:
        data = open_masked(tmp_path, test=tmp_path).train
        return MaskView(data.images, data.masks, config.reading(preprocessing), config)

    with pytest.raises(DataError, match=r"masks/a\.png is 12×10 px.*10×12 px.*--segmentation\.exif_orientation no"):
        load(MaskConfig()).load([0])
    assert len(load(MaskConfig(exif_orientation=False)).load([0]).indices) == 1
    Image.new("L", (10, 12)).save(tmp_path / "masks/a.png")
    assert load(MaskConfig()).pair(0)[0].shape[:2] == (12, 10)
    with pytest.raises(DataError, match="must have the same size"):
        load(MaskConfig(exif_orientation=False)).load([0])
    Image.new("L", (12, 10)).save(tmp_path / "masks/a.png", exif=exif)  # the mask says that it lies on its side, too
    assert load(MaskConfig()).pair(0)[1].shape == (12, 10)


def test_split_and_configuration_are_checked() -> None:
    rows, val = split_pairs(10, 0.3, 0)
    assert sorted([*rows, *val]) == list(range(10))
    assert len(val) == 3
    with pytest.raises(DataError, match="no image can be held out of 1"):
        split_pairs(1, 0.5, 0)
    for wrong in ({"view": "half"}, {"values": (1,)}, {"values": (1, 1)}, {"values": (0, 70000)}):
        with pytest.raises(ConfigError, match=f"segmentation.{next(iter(wrong))}"):
            MaskConfig(**wrong)
