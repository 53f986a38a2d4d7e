from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextblock.errors import ConfigError
from nextblock.figures import features
from nextblock.figures.attention import Look, draw_attention, overlay
from nextblock.figures.features import draw_cell_sizes, draw_changes, draw_feature_colours, draw_neighbours
from nextblock.figures.panels import enlarged, short


def pictures(count: int = 2, size: tuple[int, int] = (8, 8), channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *size, channels), dtype=np.uint8)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def look(heads: int = 2, grid: tuple[int, int] = (4, 4)) -> Look:
    visible = np.ones(grid, bool)
    visible[-1] = False
    weights = np.random.default_rng(0).random((heads, *grid)).astype(np.float32) * visible
    weights /= weights.sum((1, 2), keepdims=True)
    return Look((1, 2), "the middle", weights, range(heads), weights.mean(0), visible)


@pytest.mark.parametrize("shape", [{}, {"channels": 1}, {"size": (8, 16)}, {"channels": 5}])
def test_colours_of_patches_are_seen(tmp_path: Path, shape: dict[str, int]) -> None:
    images = pictures(**shape)
    colours = np.full((2, 2, 4, 3), 200, np.uint8)
    colours[1, 0, 3] = (1, 254, 3)
    (page,) = draw_feature_colours(images, colours, ["a", "$b$_{c}.png"], tmp_path / "new" / "page.png")
    found = (pixels(page) == (1, 254, 3)).all(-1)
    rows, columns = np.nonzero(found)
    assert (np.ptp(rows) + 1) * (np.ptp(columns) + 1) == len(rows) > 500  # one sharp patch


def test_many_images_go_over_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "IMAGES_PER_PAGE", 2)
    images, names = pictures(3), ["a", "b", "c"]
    colours = pictures(3, (4, 4))
    sizes = {"1×1": colours, "2×2": colours}
    cosines = {"1×1": 0.5, "2×2": 1.0}
    near = [[("x", 0.5, images[0]), ("y", 0.4, None)], [("x", 0.5, images[0])], []]
    drawn = {
        "colours": draw_feature_colours(images, colours, names, tmp_path / "colours.png"),
        "sizes": draw_cell_sizes(images, sizes, cosines, "2×2", names, tmp_path / "sizes.png"),
        "near": draw_neighbours(images, names, near, tmp_path / "near.png"),
    }
    for name, pages in drawn.items():
        assert [page.name for page in pages] == [f"{name}.png", f"{name}-2.png"]
        assert all(len(np.unique(pixels(page))) > 50 for page in pages)


def test_pictures_that_are_not_known_are_blank(tmp_path: Path) -> None:
    images = pictures(1)
    known = draw_neighbours(images, ["a"], [[("x", 0.5, images[0])]], tmp_path / "known.png")
    unknown = draw_neighbours(images, ["a"], [[("x", 0.5, None)]], tmp_path / "unknown.png")
    blank = (pixels(unknown[0]) == 232).all(-1)
    assert blank.sum() > 10_000
    assert not (pixels(known[0]) == 232).all(-1)[blank].all()


def test_numbers_of_things_must_agree(tmp_path: Path) -> None:
    images = pictures()
    with pytest.raises(ConfigError, match="2 images to draw, and 1 names"):
        draw_feature_colours(images, images, ["a"], tmp_path / "x.png")
    with pytest.raises(ConfigError, match="one at least"):
        draw_neighbours(images[:0], [], [], tmp_path / "x.png")
    with pytest.raises(ConfigError, match="no patch"):
        draw_attention(images[0], [], tmp_path / "x.png")


def test_changes_have_one_scale(tmp_path: Path) -> None:
    strong = np.zeros((4, 4))
    strong[0, 0] = 0.5
    page = pixels(draw_changes({"1×1": strong, "no mask": strong / 50}, tmp_path / "x.png"))
    dark = np.nonzero((page[..., 1] < 60) & (page[..., 2] > 90))[1]
    assert len(dark) > 500
    assert dark.max() < page.shape[1] / 2
    draw_changes({"1×1": np.zeros((4, 4))}, tmp_path / "none.png")


def test_attention_is_bright_where_it_is_and_white_where_it_cannot_be() -> None:
    image, visible = np.full((8, 8, 3), 100, np.uint8), np.ones((4, 4), bool)
    visible[3] = False
    weights = np.zeros((4, 4), np.float32)
    weights[1, 2] = 1
    shown = overlay(image, weights, visible).astype(int)
    assert shown[2:4, 4:6].sum(-1).min() > shown[:2].sum(-1).max() + 100
    assert (shown[:2] == 60).all()  # none: the image alone, dim
    assert shown[6:].min() > 220
    assert np.array_equal(overlay(image[..., :1], weights, visible), shown)


def test_even_attention_does_not_look_like_much() -> None:
    image, visible = np.full((8, 8, 3), 100, np.uint8), np.ones((4, 4), bool)
    even, peaked = np.full((4, 4), 1 / 16, np.float32), np.zeros((4, 4), np.float32)
    peaked[0, 0] = 1
    assert overlay(image, even, visible).sum(-1).max() < overlay(image, peaked, visible).sum(-1).max() - 100


@pytest.mark.parametrize("heads", [1, 6])
def test_attention_of_any_number_of_heads(tmp_path: Path, heads: int) -> None:
    path = draw_attention(pictures(1)[0], [look(heads), look(heads)], tmp_path / "x.png", "layer 3 · $x")
    page = pixels(path)
    assert len(np.unique(page)) > 100
    frame = (np.abs(page.astype(int) - (0x56, 0xB4, 0xE9)).max(-1) < 70).sum()  # a thin line is blended
    assert frame > 40 * 2 * (2 + heads)  # around the patch in every panel


def test_small_things() -> None:
    assert short("a/b.png") == "a/b.png"
    assert short("folder/with/a/long/name.png", 9) == "…name.png"
    assert short("new\nline") == "new�line"
    assert enlarged(np.arange(4).reshape(2, 2), (4, 6)).tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
