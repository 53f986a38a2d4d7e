"""Generated images on a sheet, and in motion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from nextblock.errors import ConfigError, DataError
from nextblock.figures.samples import GAP_PX, animation, contact_sheet


def flat(values: list[int], side: int = 4, channels: int = 3) -> np.ndarray:
    return np.stack([np.full((side, side + 1, channels), value, np.uint8) for value in values])


def test_a_sheet_shows_every_image_in_its_place_with_exact_pixels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    path = contact_sheet(images, [], tmp_path / "new" / "sheet.png", columns=2, scale=3)
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (3 * (12 + GAP_PX) + GAP_PX, 2 * (18 + GAP_PX) + GAP_PX, 3)
    for i, image in enumerate(images):
        top, left = GAP_PX + i // 2 * (12 + GAP_PX), GAP_PX + i % 2 * (18 + GAP_PX)
        shown = sheet[top : top + 12, left : left + 18]
        np.testing.assert_array_equal(shown[1::3, 1::3], image)
        np.testing.assert_array_equal(shown, image.repeat(3, 0).repeat(3, 1))
    assert (sheet[-GAP_PX - 12 :, -GAP_PX - 18 :] == 255).all()  # the sixth place is empty


def test_titles_are_drawn_above_their_image_and_cut_to_its_width(tmp_path: Path) -> None:
    images = flat([0, 0], 100)
    path = contact_sheet(images, ["", "an exceedingly long name of a class"], tmp_path / "sheet.png", columns=2)
    sheet = np.asarray(Image.open(path).convert("L"))
    middle = 101 + GAP_PX + GAP_PX // 2
    titles = sheet[: sheet.shape[0] - 100 - GAP_PX]
    assert (titles[:, :middle] == 255).all()
    assert (titles[:, middle:] < 128).any()
    assert (titles[:, -GAP_PX:] == 255).all()


def test_small_gray_images_are_enlarged(tmp_path: Path) -> None:
    sheet = np.asarray(Image.open(contact_sheet(flat([7, 200], 8, 1), ["7", "200"], tmp_path / "sheet.png")))
    assert sheet.shape[:2] > (96, 192)
    assert set(np.unique(sheet[-GAP_PX - 96 : -GAP_PX])) == {7, 200, 255}


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_has_every_frame_and_rests_on_the_last(tmp_path: Path, suffix: str) -> None:
    path = animation([flat([value, 255 - value]) for value in (0, 100, 200)], tmp_path / f"a{suffix}", ms=40, scale=5)
    with Image.open(path) as moving:
        frames, times = [], []
        for frame in ImageSequence.Iterator(moving):
            frames.append(np.asarray(frame.convert("RGB")).astype(int))
            times.append(frame.info["duration"])
    assert times == [40, 40, 2000]
    assert frames[0].shape == (20 + 2 * GAP_PX, 2 * 25 + 3 * GAP_PX, 3)
    for frame, value in zip(frames, (0, 100, 200), strict=True):
        assert abs(frame[GAP_PX + 10, GAP_PX + 12] - value).max() <= 3
        assert abs(frame[GAP_PX + 10, 2 * GAP_PX + 25 + 12] - (255 - value)).max() <= 3


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    images = flat([0, 1])
    with pytest.raises(DataError, match="one title for each of the 2 images"):
        contact_sheet(images, ["one"], tmp_path / "sheet.png")
    with pytest.raises(DataError, match="not empty"):
        contact_sheet(images[:0], [], tmp_path / "sheet.png")
    with pytest.raises(DataError, match="uint8"):
        animation([images.astype(np.float32)], tmp_path / "a.gif")
    with pytest.raises(DataError, match="no frame"):
        animation([], tmp_path / "a.gif")
    with pytest.raises(DataError, match="one shape"):
        animation([images, images[:1]], tmp_path / "a.gif")
    with pytest.raises(ConfigError, match=r"\.gif or \.webp"):
        animation([images], tmp_path / "a.mp4")
