"""Sets of images to be judged: sample files, statistics, folders."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextblock.data.sources import open_source
from nextblock.errors import ConfigError, DataError, SampleError
from nextblock.evaluation.frechet import Statistics
from nextblock.evaluation.image_sets import OneSize, first_shape, open_image_set
from nextblock.evaluation.npz_files import KeptStatistics, NpzImages, require_same_features, write_statistics
from tiny_run import write_images

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 25, 27, 3), dtype=np.uint8)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("fortran", [False, True])
def test_a_sample_file_is_mapped_and_gives_its_images(packed: bool, fortran: bool, tmp_path: Path) -> None:
    save = np.savez_compressed if packed else np.savez
    save(tmp_path / "s.npz", np.asfortranarray(PIXELS) if fortran else PIXELS, np.arange(6))  # arr_1: classes
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    found = open_image_set(tmp_path / "s.npz", scratch=scratch)
    assert found.kept is None
    source = found.source
    assert isinstance(source, NpzImages)
    assert isinstance(source._pixels(), np.memmap)
    assert len(list(scratch.iterdir())) == int(packed)
    sent = pickle.dumps(source)  # to a worker: the path, not the pixels
    assert len(sent) < PIXELS.nbytes / 2
    for each in (source, pickle.loads(sent)):
        assert np.array_equal(np.stack([each[i].content for i in range(6)]), PIXELS)
    assert source.name(2) == "s.npz[2]"
    assert "6 samples of 25 x 27" in found.description


def test_statistics_are_written_and_read(tmp_path: Path) -> None:
    identity = {"kind": "pixels", "size_px": [4, 4], "channels": 1, "dimensions": 3}
    kept = KeptStatistics(Statistics(np.arange(3.0), np.eye(3), 50), identity, (4, 4))
    write_statistics(tmp_path / "s.npz", kept)
    found = open_image_set(str(tmp_path / "s.npz"), scratch=tmp_path)
    assert found.source is None
    assert found.kept is not None
    assert np.array_equal(found.kept.statistics.mean, np.arange(3.0))
    assert (found.kept.statistics.count, found.kept.identity, found.kept.size_px) == (50, identity, (4, 4))
    require_same_features(found.kept, identity | {"name": "another name"}, "s.npz")
    with pytest.raises(ConfigError, match=r"other features: size_px \[4, 4\] there, \[8, 8\] here"):
        require_same_features(found.kept, identity | {"size_px": [8, 8]}, "s.npz")


def test_statistics_of_other_packages_have_no_count_and_no_identity(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    found = open_image_set(tmp_path / "s.npz", scratch=tmp_path)
    assert found.kept is not None
    assert (found.kept.statistics.count, found.kept.identity, found.kept.size_px) == (None, None, None)
    require_same_features(found.kept, {"kind": "pixels"}, "s.npz")


def test_a_reference_file_may_hold_images_and_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", PIXELS, mu=np.zeros(2), sigma=np.eye(2), mu_s=np.zeros(9), sigma_s=np.eye(9))
    found = open_image_set(tmp_path / "s.npz", scratch=tmp_path)
    assert found.source is not None
    assert found.kept is not None


def npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


def test_files_that_are_something_else_are_told(tmp_path: Path) -> None:
    def refused(path: Path, told: str) -> None:
        with pytest.raises(DataError, match=told):
            open_image_set(path, scratch=tmp_path)

    refused(npz(tmp_path / "features.npz", names=np.zeros(2), features=np.eye(2)), "holds names, features; samples are")
    refused(npz(tmp_path / "half.npz", mu=np.zeros(2)), "holds mu; samples are")
    refused(npz(tmp_path / "float.npz", arr_0=PIXELS / 255), r"must be uint8 .* got float64 \[6, 25, 27, 3\]")
    refused(npz(tmp_path / "first.npz", arr_0=PIXELS.transpose(0, 3, 1, 2)), r"got uint8 \[6, 3, 25, 27\]")
    refused(npz(tmp_path / "one.npz", arr_0=PIXELS[:1]), "needs two images")
    refused(npz(tmp_path / "shape.npz", mu=np.zeros(2), sigma=np.eye(3)), r"shape.npz: statistics are")
    refused(npz(tmp_path / "nan.npz", mu=np.full(2, np.nan), sigma=np.eye(2)), "not finite")
    refused(npz(tmp_path / "objects.npz", arr_0=np.array([None, 1], dtype=object)), "must be uint8")
    (tmp_path / "text.npz").write_text("no archive")
    refused(tmp_path / "text.npz", r"text.npz cannot be read .* Is it whole")
    whole = npz(tmp_path / "samples.npz", arr_0=PIXELS).read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.npz", "Is it whole")
    refused(tmp_path / "sample.npz", "no such file.*Did you mean 'samples.npz'")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is empty")
    Image.fromarray(PIXELS[0]).save(tmp_path / "empty" / "one.png")
    refused(tmp_path / "empty", "one image is not a set")


def test_a_folder_of_nextblock_sample_means_its_images(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    (folder / "images").mkdir(parents=True)
    (folder / "sample.json").write_text("{}")
    for name in ("contact-sheet.png", "entities.gif"):
        Image.fromarray(PIXELS[0]).save(folder / name)
    with pytest.raises(DataError, match=r"samples/images is empty"):
        open_image_set(folder, scratch=tmp_path)
    for i, image in enumerate(PIXELS):
        Image.fromarray(image).save(folder / "images" / f"{i:06d}.png")
    for spec in (folder, str(folder), f"{folder}/"):
        found = open_image_set(spec, scratch=tmp_path)
        assert found.source is not None
        assert [found.source.name(i) for i in range(len(found.source))] == [f"{i:06d}.png" for i in range(6)]
    (folder / "images").rename(folder / "moved")
    with pytest.raises(DataError, match=r"samples was made by nextblock sample, but its folder images is not there"):
        open_image_set(folder, scratch=tmp_path)


def test_a_run_is_no_set_of_images(tmp_path: Path) -> None:
    (tmp_path / "run" / "figures").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("model: {}")
    for i, image in enumerate(PIXELS):
        Image.fromarray(image).save(tmp_path / "run" / "figures" / f"{i}.png")
    with pytest.raises(ConfigError, match=r"run is the folder of a run.*nextblock sample .*run --out.*--encoder"):
        open_image_set(tmp_path / "run", scratch=tmp_path)


def test_named_data_sets_are_opened_by_split(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / "cifar10" / split, per_class=2 if split == "train" else 3)
    found = open_image_set("cifar10", split="test", root=tmp_path, scratch=tmp_path)
    assert found.source is not None
    assert len(found.source) == 6
    with pytest.raises(DataError, match=r"no split 'tset'.*Did you mean 'test'"):
        open_image_set("cifar10", split="tset", root=tmp_path, scratch=tmp_path)
    with pytest.raises(DataError, match="not on this machine"):
        open_image_set("cifar10", root=tmp_path / "none", scratch=tmp_path)


def test_first_shape_passes_over_broken_images(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", per_class=2)
    (folder / "left" / "000.png").write_bytes(b"no")
    assert first_shape(open_source(str(folder))) == (20, 24, 3)
    assert first_shape(open_source(PIXELS[..., 0])) == (25, 27, 1)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no")
    with pytest.raises(DataError, match=r"none of the first images can be decoded; left/000\.png"):
        first_shape(open_source(str(folder)))


def test_one_size_says_which_images_have_another(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", per_class=2)
    Image.fromarray(PIXELS[0]).save(folder / "top" / "001.png")
    (folder / "left" / "000.png").write_bytes(b"no")
    sized = OneSize(open_source(str(folder)), (20, 24), 3)
    assert [sized[i].label for i in (1, 2, 3)] == [0, 0, 1]
    with pytest.raises(SampleError):
        sized[0]
