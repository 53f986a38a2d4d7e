"""Labelled images from any spec: labels mean the same on both sides, and what is missing is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import benchmark_folders as on_disk
from nextblock.data.decode import decode
from nextblock.data.labelled import open_labelled
from nextblock.data.sources import Source
from nextblock.errors import DataError

THREE = ("class 0", "class 1", "class 2")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()


def tones(source: Source) -> list[tuple[int | None, int]]:
    """(label, gray) of each image, the gray as the number of the class it was made for."""
    pixels = [decode(source[i].content, source.name(i)).mean() for i in range(len(source))]
    return [(source[i].label, round((value - 6) / 50) - 1) for i, value in enumerate(pixels)]


def arrays(*numbers: int) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([np.asarray(on_disk.image(n % 4, "train")) for n in numbers]), np.array(numbers)


class Items:
    """Items with labels that are known only with the images; counts how often it is asked."""

    def __init__(self, labels: list[int | None]) -> None:
        self.given, self.asked = labels, 0

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int | None]:
        self.asked += 1
        return np.asarray(on_disk.image(index % 3, "train")), self.given[index]


@pytest.mark.parametrize("held_out", ["test", "val", "validation", "valid"])
def test_a_folder_with_splits(held_out: str, tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path / "mine", "train", held_out)
    (tmp_path / "mine/notes").mkdir()
    found = open_labelled(tmp_path / "mine")
    assert (found.name, found.dataset, found.note, found.classes) == ("mine", None, "", THREE)
    assert (len(found.train), len(found.test)) == (9, 6)
    for source in (found.train, found.test):
        assert all(label == made_for for label, made_for in tones(source))


def test_test_comes_before_val_and_splits_can_be_named(tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path / "mine", "train", "test")
    for c in range(3):
        on_disk.write(tmp_path / f"mine/val/class {c}/only.png", c, "train")
    assert len(open_labelled("mine").test) == 6
    assert len(open_labelled("mine", test_split="val").test) == 3
    joined = open_labelled("mine", train_split="train+val")
    assert (len(joined.train), len(joined.test)) == (12, 6)
    assert joined.train.name(9) == "val/class 0/only.png"
    with pytest.raises(DataError, match=r"mine has no split 'tset'; splits: test, train, val\. Did you mean 'test'\?"):
        open_labelled("mine", test_split="tset")
    with pytest.raises(DataError, match=r"mine has no split 'train\+extra'"):
        open_labelled("mine", train_split="train+extra")


def test_plain_class_folders_are_divided(tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path, "plain", "other")
    found = open_labelled("plain", test_fraction=0.34)
    assert found.note == "no test split was given: 34 % of the images were held out, class by class"
    assert np.bincount(found.train.labels()).tolist() == [2, 2, 2]
    assert np.bincount(found.test.labels()).tolist() == [1, 1, 1]
    names = {source.name(i) for source in (found.train, found.test) for i in range(len(source))}
    assert len(names) == 9
    others = [open_labelled("plain", test_fraction=0.34, seed=seed).test for seed in range(4)]
    assert len({tuple(source.name(i) for i in range(3)) for source in others}) > 1
    with pytest.raises(DataError, match="it has no splits, but 'val' was asked for"):
        open_labelled("plain", test_split="val")


def test_a_test_set_of_its_own(tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path / "a", "train", "test")
    on_disk.split_folders(tmp_path / "b", "one", "two")
    found = open_labelled("a", test="b/two")
    assert (len(found.train), len(found.test), found.note) == (9, 6, "")
    assert len(open_labelled("b/one", test="a").test) == 6  # its test split
    assert len(open_labelled("b/one", test="a", test_split="train").test) == 9


def test_parquet_files(tmp_path: Path) -> None:
    on_disk.shards(tmp_path / "shards", {"train": "train", "test": "test"}, columns=("img", "fine_label"))
    found = open_labelled("shards")
    assert (len(found.train), len(found.test), found.classes) == (9, 6, THREE)
    (alone,) = (tmp_path / "shards").glob("test-*")
    assert np.bincount(open_labelled(alone, test_fraction=0.5).test.labels()).tolist() == [1, 1, 1]
    (tmp_path / "only").mkdir()
    alone.rename(tmp_path / "only" / alone.name)
    assert len(open_labelled("shards").test) == 3  # held out, as the test shard is gone
    assert len(open_labelled("shards", test="only").test) == 6
    (tmp_path / "only" / alone.name).rename(tmp_path / "only/test.parquet")
    (tmp_path / "only/train_0.parquet").symlink_to(next((tmp_path / "shards").glob("train-00000-*")))
    assert (len(open_labelled("only").train), len(open_labelled("only").test)) == (5, 6)
    with pytest.raises(DataError, match="no image column 'imgs'"):
        open_labelled("shards", image_column="imgs")


def test_data_sets_of_the_library_datasets(tmp_path: Path) -> None:
    on_disk.shards(tmp_path / "shards", {"train": "train", "test": "test"})
    files = {s: [str(p) for p in (tmp_path / "shards").glob(f"{s}-*")] for s in ("train", "test")}
    both = datasets.load_dataset("parquet", data_files=files)
    assert (len(open_labelled(both).train), len(open_labelled(both).test)) == (9, 6)
    assert len(open_labelled(both["train"], test=both["test"]).test) == 6
    both.save_to_disk(tmp_path / "saved")
    assert len(open_labelled("saved").test) == len(open_labelled("hf:saved").test) == 6
    assert len(open_labelled("hf:saved@test").test) == 3


def test_a_hub_copy_of_a_known_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_disk.shards(tmp_path / "shards", {"id_train": "train", "id_val": "", "ood_val": "test"}, classes=2)
    files = {s: [str(p) for p in (tmp_path / "shards").glob(f"{s}-*")] for s in ("id_train", "id_val", "ood_val")}
    held = datasets.load_dataset("parquet", data_files=files)

    class Builder:
        info = held["id_train"].info

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: list(held))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: Builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: held[split])
    found = open_labelled("hf:jxie/camelyon17")
    assert found.dataset is not None
    assert (found.dataset.name, len(found.train), len(found.test)) == ("camelyon17", 6, 4)
    unknown = open_labelled("hf:someone/else", train_split="id_train", test_split="id_val")
    assert (unknown.dataset, unknown.name, len(unknown.test)) == (None, "someone/else", 2)


def test_arrays_and_numbers_as_names() -> None:
    found = open_labelled(arrays(3, 3, 7, 7, 0, 0), test=arrays(7, 0))
    assert found.classes == ("0", "3", "7")
    assert found.train.labels().tolist() == [1, 1, 2, 2, 0, 0]
    assert found.test.labels().tolist() == [2, 0]
    assert found.test[0].label == 2


def test_numbers_count_in_the_order_of_the_other_sides_names(tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path, "one", "two")
    for train, test in (("one", arrays(2, 0, 1)), (arrays(2, 0, 1), "one")):
        found = open_labelled(train, test=test)
        assert found.classes == THREE
        for source in (found.train, found.test):
            assert all(label == made_for for label, made_for in tones(source))


def test_objects_are_read_once_for_their_labels() -> None:
    items = Items([0, 1, 2, None, 1, 2] * 4)
    found = open_labelled(items, test_fraction=0.25)
    assert found.note.startswith("4 training images without a label were left out; no test split")
    assert items.asked <= len(items) + 1  # and the one that is looked at when the source is opened
    assert (len(found.train), len(found.test)) == (15, 5)
    assert sorted(np.concatenate([found.train.labels(), found.test.labels()])) == [0] * 4 + [1] * 8 + [2] * 8


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path / "mine", "train", "test")
    (tmp_path / "mine/train/class 0").rename(tmp_path / "mine/train/zero")
    (tmp_path / "mine/test/class 0").rename(tmp_path / "mine/test/zero")
    (tmp_path / "mine/train/class 1").rename(tmp_path / "mine/train/another")
    with pytest.raises(DataError, match=r"1 classes that are not among the 3 of the training images: class 1\."):
        open_labelled("mine")
    (tmp_path / "mine/test/class 1").rename(tmp_path / "mine/test/another")
    for gone in (tmp_path / "mine/test/class 2").iterdir():
        gone.unlink()
    found = open_labelled("mine")
    assert found.classes == ("another", "class 2", "zero")
    assert set(tones(found.test)) == {(0, 1), (2, 0)}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (arrays(0, 1, 2)[0], "the training images have no labels"),
        (arrays(1, 1, 1), "all images are of one class, 1; two are needed"),
        (arrays(0, 1, 2), "none of the classes of these 3 images has two images"),
        (object(), "cannot read images from a object"),
    ],
)
def test_what_cannot_be_used(spec: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_labelled(spec)
    with pytest.raises(DataError, match="the test images have no labels"):
        open_labelled(arrays(0, 1, 0, 1), test=arrays(0)[0])


def test_unknown_names_get_the_nearest_of_data_sets_and_siblings(tmp_path: Path) -> None:
    (tmp_path / "flowers").mkdir()
    for given, meant in (("cifar-10", "cifar10"), ("flower", "flowers"), (str(tmp_path / "flowerss"), "flowers")):
        with pytest.raises(DataError, match=f"neither a file or folder.*Did you mean '{re.escape(meant)}'"):
            open_labelled(given)


def test_a_data_sets_name_wins_over_a_folder_here_unless_it_is_written_as_a_path(tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path / "dtd", "train", "test", classes=2)
    on_disk.dtd(tmp_path / "root")
    assert open_labelled("dtd", root="root").classes == ("banded", "blotchy", "braided")
    for spec in ("./dtd", Path("dtd"), str(tmp_path / "dtd")):
        assert open_labelled(spec, root="root").classes == ("class 0", "class 1")
    with pytest.raises(DataError, match=r"empty/dtd is not there.*write \./dtd"):
        open_labelled("dtd", root="empty")


def test_a_named_data_set_with_splits_or_a_test_set_of_ones_own(tmp_path: Path) -> None:
    on_disk.iwildcam(tmp_path)
    official = open_labelled("iwildcam", root=tmp_path)
    other = open_labelled("iwildcam", root=tmp_path, test_split="id_test")
    assert (len(official.test), len(other.test)) == (6, 3)
    assert {gray for _, gray in tones(other.test)} == {-1}
    assert len(open_labelled("iwildcam", root=tmp_path, train_split="train+id_val").train) == 12
    mine = open_labelled("iwildcam", root=tmp_path, test=arrays(0, 2))
    assert (len(mine.train), len(mine.test)) == (9, 2)
    assert mine.dataset is official.dataset
