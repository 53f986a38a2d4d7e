from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nextblock.errors import ConfigError, DataError
from nextblock.figures import reconstruction
from nextblock.figures.canvas import COLOURS
from nextblock.figures.curves import draw_bars, draw_curves, smoothed
from nextblock.figures.ordering import draw_entities, draw_ordering
from nextblock.figures.reconstruction import draw_contact_sheet, draw_image
from nextblock.ordering import Ordering, ScalePyramid

HEADER = "step,samples,epoch,loss,lr,val_loss,knn,effective_rank\n"


def recs(count: int = 2, cells: int = 4, channels: int = 3, size: tuple[int, int] = (16, 16)) -> SimpleNamespace:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, count, *size, channels), dtype=np.uint8)
    errors = rng.random((4, count, cells - 1)).astype(np.float32)
    side = int(cells**0.5)
    place = np.kron(np.arange(cells).reshape(side, side), np.ones((size[0] // side, size[1] // side), np.int64))
    return SimpleNamespace(
        originals=images[0],
        predictions=images[1],
        baselines=images[2],
        place=place,
        prediction_errors=errors[0],
        baseline_errors=errors[1],
        prediction_pixel_errors=errors[2],
        baseline_pixel_errors=errors[3],
        normalized_cells=True,
    )


def colours(path: Path) -> int:
    """A picture with something on it has many."""
    with Image.open(path) as image:
        return len(image.convert("RGB").getcolors(1 << 24) or ())


@pytest.mark.parametrize("shape", [{}, {"cells": 64, "channels": 1}, {"size": (16, 32)}, {"channels": 4}])
def test_an_image_is_drawn(tmp_path: Path, shape: dict[str, int]) -> None:
    assert colours(draw_image(recs(**shape), 1, tmp_path / "new" / "image.png", "a/b.jpg")) > 100


def test_small_images_are_enlarged_pixel_by_pixel(tmp_path: Path) -> None:
    made = recs()
    made.originals[0] = 255
    made.originals[0, 3, 5] = (1, 254, 3)
    with Image.open(draw_image(made, 0, tmp_path / "image.png")) as image:
        same = (np.asarray(image.convert("RGB")) == (1, 254, 3)).all(-1)
    rows, columns = np.nonzero(same[: image.height // 2])
    # one sharp square of one colour, not a blur
    assert (np.ptp(rows) + 1) * (np.ptp(columns) + 1) == len(rows) > 300


def test_a_step_shows_only_what_was_seen() -> None:
    made = recs()
    step = reconstruction._seen(made, 0, 2, made.predictions[0])
    assert (step[:8] == made.originals[0, :8]).all()
    assert (step[8:, :8] == made.predictions[0, 8:, :8]).all()
    assert (step[8:, 8:] == reconstruction.UNSEEN).all()


def test_steps_are_spread_over_all_cells() -> None:
    assert reconstruction._steps(recs()).tolist() == [1, 2, 3]
    steps = reconstruction._steps(recs(cells=64))
    assert (steps[0], steps[-1], len(steps)) == (1, 63, 16)
    assert np.ptp(np.diff(steps)) <= 1


def test_contact_sheets_go_over_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "IMAGES_PER_PAGE", 2)
    pages = draw_contact_sheet(recs(3), ["one", "two", "three"], tmp_path / "sheet.png")
    assert [page.name for page in pages] == ["sheet.png", "sheet-2.png"]
    assert all(colours(page) > 100 for page in pages)


def test_images_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 images"):
        draw_image(recs(), 2, tmp_path / "x.png")
    with pytest.raises(ConfigError, match="got 1"):
        draw_contact_sheet(recs(), ["one"], tmp_path / "x.png")


def test_curves_from_runs_of_any_state(tmp_path: Path) -> None:
    whole, short = tmp_path / "a.csv", tmp_path / "b.csv"
    rows = [f"{s},{s * 8},0.1,{1 / s},1e-3," + ("0.5,30,12.5" if s % 4 == 0 else ",,") for s in range(1, 20)]
    whole.write_text(HEADER + "\n".join(rows) + "\n20,16")  # being written
    short.write_text("step,loss\n1,nan\n2,0.5\n3,0.4\n4,0.")
    assert colours(draw_curves({"a": whole, "b": short}, tmp_path / "both.png")) > 50
    assert colours(draw_curves({"b": short}, tmp_path / "one.png")) > 10


def test_a_curve_of_one_row_can_be_seen(tmp_path: Path) -> None:
    one, gap = tmp_path / "a.csv", tmp_path / "b.csv"
    one.write_text("step,loss,lr\n1,0.5,0.002\n")
    gap.write_text("step,loss,lr\n1,nan,0.002\n2,0.5,0.002\n")
    blue = tuple(int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5))
    for name, file in {"one": one, "gap": gap}.items():
        path = draw_curves({name: file}, tmp_path / f"{name}.png")
        with Image.open(path) as image:
            seen = (np.asarray(image.convert("RGB")) == blue).all(-1)
        above = seen[: int(0.7 * len(seen))]  # the legend lies below
        halves = np.array_split(above, 2, axis=1)
        assert all(half.sum() > 8 for half in halves), name


def test_curves_of_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "metrics.csv"
    empty.write_text(HEADER)
    with pytest.raises(DataError, match="nothing to draw"):
        draw_curves({"a": empty}, tmp_path / "x.png")
    with pytest.raises(DataError, match="absent"):
        draw_curves({"a": tmp_path / "absent.csv"}, tmp_path / "x.png")


def test_smoothing_is_a_moving_mean_without_the_gaps() -> None:
    assert smoothed(np.array([1.0, 2.0, 3.0, 7.0]), 0).tolist() == [1, 2, 3, 7]
    assert smoothed(np.array([1.0, 2.0, 3.0, 7.0]), 1).tolist() == [1.5, 2, 4, 5]
    assert smoothed(np.array([1.0, np.nan, 3.0]), 1).tolist() == [1, 2, 3]


def test_bars(tmp_path: Path) -> None:
    table = [{"name": "raw pixels", "knn": 30.0, "linear": 35.0}, {"name": "XTRA", "knn": None, "linear": 50.0}]
    assert colours(draw_bars(table, tmp_path / "bars.png", title="CIFAR-10", chance=10)) > 10
    with pytest.raises(DataError, match="knn"):
        draw_bars([{"name": "nothing"}], tmp_path / "x.png")


@pytest.mark.parametrize("ordering", [Ordering.cells(8, 2), Ordering.subsamples((4, 6), 2), Ordering.patches(21)])
def test_orderings(tmp_path: Path, ordering: Ordering) -> None:
    assert colours(draw_ordering(ordering, tmp_path / "ordering.png")) > 10


def test_no_display_and_no_global_state() -> None:
    room = Path(reconstruction.__file__).parent
    assert not [file.name for file in room.glob("*.py") if "pyplot" in file.read_text(encoding="utf-8")]


def test_every_entity_of_the_paper_is_drawn(tmp_path: Path) -> None:
    shown = {"cells": Ordering.cells((4, 6), 2), "scales": ScalePyramid((4, 6)), "whole": Ordering.whole((4, 6))}
    assert colours(draw_entities(shown, tmp_path / "entities.png")) > 10
