from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted

import nextblock as nb
from close import assert_close
from nextblock.checkpoints.pretrained import load_pretrained, save_pretrained
from nextblock.errors import ConfigError, DataError, RunError
from nextblock.jobs.image_features import ImageFeatures


@pytest.fixture(scope="module")
def paths(images: Path) -> list[str]:
    return [str(path) for path in sorted(images.rglob("*.png"))]


def test_features_are_those_of_embed(run: Path, images: Path, paths: list[str]) -> None:
    expected = nb.embed(run=run, images=images, last_layers=2, quiet=True).features
    made = ImageFeatures(run, last_layers=2, batch_size=7).fit(paths).transform(paths)
    assert made.shape == (24, 16)
    assert made.dtype == np.float32
    assert_close(made, expected, 1e-5)
    assert_close(ImageFeatures(run, last_layers=2).transform(str(images)), expected, 1e-5)  # needs no fit
    flat = nb.embed(run=run, images=images, pool=False, bidirectional=True, quiet=True).features.reshape(24, -1)
    assert_close(ImageFeatures(run, pool=False, bidirectional=True).transform(images), flat, 1e-5)


def test_any_kind_of_x_gives_the_same_rows(run: Path, paths: list[str]) -> None:
    pandas = pytest.importorskip("pandas")
    features = ImageFeatures(run)
    expected = features.transform(paths)
    pillow = [Image.open(path) for path in paths]
    pixels = np.stack([np.asarray(image) for image in pillow])
    objects = np.empty(len(paths), dtype=object)
    objects[:] = pillow
    table = pandas.DataFrame({"file": paths}, index=range(100, 124))
    for x in (map(Path, paths), pillow, pixels, np.array(paths), objects, table, table["file"], tuple(paths)):
        assert_close(features.transform(list(x) if isinstance(x, map) else x), expected, 1e-5)
    with pytest.raises(DataError, match=r"one column.*\[12, 2\]"):
        features.transform(np.array(paths).reshape(12, 2))


def test_rows_keep_the_order_and_the_repetitions_of_x(run: Path, paths: list[str]) -> None:
    features = ImageFeatures(run, batch_size=2)
    first, last = features.transform([paths[0]])[0], features.transform([paths[-1]])[0]
    assert_close(features.transform([paths[-1], paths[0], paths[-1]]), np.stack([last, first, last]), 1e-5)
    with pytest.raises(DataError):
        features.transform([])


def test_broken_images_raise_or_are_nan(run: Path, paths: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no")
    given = [paths[0], str(tmp_path / "broken.png"), str(tmp_path / "missing.png"), paths[1]]
    with pytest.raises(DataError, match=r"broken\.png: not an image.*on_error='nan'"):
        ImageFeatures(run).transform(given)
    for batch_size in (1, 4):
        made = ImageFeatures(run, on_error="nan", batch_size=batch_size).transform(given)
        assert np.isnan(made).all(1).tolist() == [False, True, True, False]
        assert_close(made[[0, 3]], ImageFeatures(run).transform(paths[:2]), 1e-5)
    assert np.isnan(ImageFeatures(run, on_error="nan").transform(given[1:3])).all()


def test_in_a_pipeline_and_a_grid_search(run: Path, images: Path, paths: list[str], tmp_path: Path) -> None:
    labels = [Path(path).parent.name for path in paths]
    model = make_pipeline(ImageFeatures(run, batch_size=24), StandardScaler(), LogisticRegression())
    assert model.fit(paths, labels).score(paths, labels) == 1.0
    assert list(model.classes_) == ["left", "top"]
    assert model[:-1].get_feature_names_out()[15] == "imagefeatures15"
    model.memory = str(tmp_path)
    grid = {"imagefeatures__last_layers": [1, 2], "logisticregression__C": [0.1, 1.0]}
    search = GridSearchCV(model, grid, cv=2, error_score="raise").fit(np.array(paths), labels)
    assert search.best_score_ > 0.9
    assert pickle.loads(pickle.dumps(search)).predict(paths[:1]) == ["left"]


def test_pickles_and_copies_hold_parameters_and_no_model(run: Path, paths: list[str]) -> None:
    features = ImageFeatures(run, last_layers=2).fit()
    stored = pickle.dumps(features)
    assert len(stored) < 2000
    again = pickle.loads(stored)
    assert again.get_params() == features.get_params()
    assert np.array_equal(again.transform(paths[:2]), features.transform(paths[:2]))
    assert features._opened is not None  # pickling took nothing away from the original
    assert clone(features).get_params() == features.get_params()
    assert clone(features)._opened is None


def test_other_weights_are_opened(run: Path, paths: list[str], tmp_path: Path) -> None:
    model, preprocessing = load_pretrained(run / "exported")
    for parameter in model.parameters():
        parameter.data += 0.1
    save_pretrained(tmp_path / "other", model, preprocessing, "a card")
    features = ImageFeatures(run).fit()
    before = features.transform(paths[:3])
    opened = features._opened
    assert features.set_params(batch_size=2).transform(paths[:3]).shape == before.shape
    assert features._opened is opened  # not opened twice
    after = features.set_params(weights=tmp_path / "other").transform(paths[:3])
    assert_close(after, ImageFeatures(tmp_path / "other").transform(paths[:3]), 1e-6)
    assert np.abs(after - before).max() > 0.01
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(RunError, match="No run or weights folder"):
        clone(features).fit()


def test_parameters_that_cannot_work_are_refused_by_fit(run: Path) -> None:
    ImageFeatures(run, last_layers=9, on_error="ignore")  # type: ignore[arg-type]  # a constructor only stores
    for wrong, told in (
        ({"last_layers": 3}, r"between 1 and the depth \(2\); got 3"),
        ({"last_layers": 0}, "at least 1"),
        ({"last_layers": 2, "final_norm": True}, "final_norm works on the last layer alone"),
        ({"on_error": "ignore"}, "'raise', 'nan'; got 'ignore'"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=told):
            ImageFeatures(run, **wrong).fit()


@pytest.mark.parametrize(
    "check",
    ["estimator_cloneable", "estimator_repr", "estimator_tags_renamed", "get_params_invariance", "mixin_order",
     "no_attributes_set_in_init", "set_params", "valid_tag_types", "do_not_raise_errors_in_init_or_set_param"],
)  # fmt: skip
def test_scikit_learns_own_checks(run: Path, check: str) -> None:
    """Those that do not feed it random numbers."""
    found = getattr(estimator_checks, f"check_{check}", None) or getattr(estimator_checks, f"check_{check}s")
    found("ImageFeatures", ImageFeatures(run))


def test_it_is_always_fitted_and_can_fill_a_table(run: Path, paths: list[str]) -> None:
    pandas = pytest.importorskip("pandas")
    features = ImageFeatures(run)
    check_is_fitted(features)
    assert len(ImageFeatures(run, pool=False).get_feature_names_out()) == 16 * 16
    table = features.set_output(transform="pandas").transform(pandas.Series(paths[:2], index=["a", "b"]))
    assert table.shape == (2, 16)
    assert list(table.columns[:2]) == ["imagefeatures0", "imagefeatures1"]
