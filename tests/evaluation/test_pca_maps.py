from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from close import assert_close
from nextblock.errors import ConfigError, DataError
from nextblock.evaluation.pca_maps import ColourBasis, fit_colours


def features(images: int = 4, patches: int = 16, width: int = 8) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(images, patches, width)) * 2.0 ** -np.arange(width) + 3).astype(np.float32)


def test_components_are_those_of_scikit_learn() -> None:
    x = features()
    basis, reference = fit_colours(x), PCA(3).fit(x.reshape(-1, 8).astype(np.float64))
    assert_close(np.abs(basis.components), np.abs(reference.components_), 1e-6)
    assert_close(basis.explained, reference.explained_variance_ratio_, 1e-6)


def test_colours_do_not_depend_on_the_order_of_the_images() -> None:
    x = features()
    once, again = fit_colours(x).colours(x), fit_colours(x[::-1]).colours(x)
    assert np.abs(once.astype(int) - again).max() <= 1
    assert once.shape == (4, 16, 3)
    assert once.dtype == np.uint8


def test_the_sign_of_a_component_is_fixed() -> None:
    x = features()
    largest = np.abs(fit_colours(x).components).argmax(1)
    assert (fit_colours(x).components[range(3), largest] > 0).all()


def test_scaling_is_joint_and_robust() -> None:
    x = features(images=8, patches=64)
    x[0, 0] += 1000 * np.eye(8)[7]  # one odd patch takes the first component, not its contrast
    x[1:] += 5 * np.eye(8)[0]
    colours = fit_colours(x).colours(x).astype(int)
    assert all(np.ptp(colours[1:, :, i]) > 150 for i in range(3))
    # red stands for the same number in every image: the first image differs from the rest and is seen to
    assert abs(colours[0, 1:].mean(0) - colours[1:].mean((0, 1))).max() > 60


@pytest.mark.parametrize("case", ["one dimension", "constant", "a line"])
def test_missing_directions_are_gray(case: str) -> None:
    x = {
        "one dimension": features(width=1),
        "constant": np.ones((2, 4, 8)),
        "a line": np.arange(8.0).reshape(2, 4, 1) * np.arange(8.0),
    }[case]
    basis = fit_colours(x)
    colours = basis.colours(x)
    present = 0 if case == "constant" else 1
    assert (colours[..., present:] == 128).all()
    assert basis.explained.sum() == pytest.approx(present)


def test_numbers_that_are_no_features() -> None:
    with pytest.raises(DataError, match="finite"):
        fit_colours(np.array([[1.0, np.nan], [0, 0]]))
    with pytest.raises(DataError, match="two patches"):
        fit_colours(np.ones((1, 4)))


def test_colours_of_another_encoder_do_not_fit() -> None:
    basis = fit_colours(features(), {"weights": "ab", "last_layers": 2})
    basis.require_fit(8, {"weights": "ab", "last_layers": 2}, "x.npz")
    with pytest.raises(ConfigError, match=r"x\.npz holds colours for features of another encoder"):
        basis.require_fit(8, {"weights": "cd", "last_layers": 2}, "x.npz")
    older = fit_colours(features(), {"last_layers": 2})
    older.require_fit(8, {"weights": "cd", "last_layers": 2}, "x.npz")
    with pytest.raises(ConfigError, match="last_layers 2 there, 1 here"):
        older.require_fit(8, {"weights": "cd", "last_layers": 1}, "x.npz")


def test_saved_colours_are_the_same_and_are_checked(tmp_path: Path) -> None:
    x, file = features(), tmp_path / "colours.npz"
    basis = fit_colours(x, {"last_layers": 2})
    basis.save(file)
    again = ColourBasis.load(file)
    assert np.array_equal(again.colours(x), basis.colours(x))
    again.require_fit(8, {"last_layers": 2}, file)
    with pytest.raises(ConfigError, match="8 dimensions; this encoder gives 9"):
        again.require_fit(9, {"last_layers": 2}, file)
    with pytest.raises(ConfigError, match="last_layers 2 there, 1 here"):
        again.require_fit(8, {"last_layers": 1}, file)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04no")
    np.savez(tmp_path / "other.npz", x=1)
    np.save(tmp_path / "array.npy", np.ones(3))
    arrays = {"mean": np.ones(4), "components": np.ones((2, 4)), "low": np.ones(3), "high": np.ones(3)}
    np.savez(tmp_path / "shape.npz", **arrays, explained=np.ones(3), about=np.array("{}"))
    for name in ("text.npz", "cut.npz", "other.npz", "array.npy", "shape.npz", "absent.npz"):
        with pytest.raises(DataError, match=name):
            ColourBasis.load(tmp_path / name)
