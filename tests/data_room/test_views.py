"""Views of sources keep the promises of sources: names, labels, pickling, and a manifest that tells them apart."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

from nextblock.data.sources import Source, fingerprint, open_source
from nextblock.data.sources.views import Joined, Relabelled, Subset, known_labels
from nextblock.errors import DataError
from tiny_run import write_images


class Items:
    """Labels are known with the images only; one item is broken."""

    classes = ("a", "b")

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[np.ndarray, int | None]:
        if index == 2:
            raise OSError("broken")
        return np.full((4, 4, 3), index, dtype=np.uint8), None if index == 3 else index % 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(write_images(tmp_path_factory.mktemp("views") / "images", per_class=3))


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def assert_keeps_promises(source: Source) -> None:
    assert isinstance(source, Source)
    assert len(set(names(source))) == len(source)
    entries = [os.fsencode(name) for name, _ in source.manifest()]
    assert entries == sorted(entries)
    again = pickle.loads(pickle.dumps(source))
    assert names(again) == names(source)
    assert [again[i].label for i in range(len(again))] == [source[i].label for i in range(len(source))]
    assert fingerprint(again) == fingerprint(source)
    for outside in (-1, len(source)):
        with pytest.raises(IndexError):
            source.name(outside)


def test_subset(folder: Source) -> None:
    source = Subset(folder, [4, 1])
    assert_keeps_promises(source)
    assert names(source) == ["top/001.png", "left/001.png"]
    assert source[0] == folder[4]
    assert source.classes == ("left", "top")
    assert source.labels().tolist() == [1, 0]
    assert "2 of the images of" in source.description
    with pytest.raises(DataError, match=r"image 6 is outside 0\.\.5"):
        Subset(folder, [0, 6])


def test_a_subset_of_other_images_is_other_data(folder: Source) -> None:
    prints = {fingerprint(Subset(folder, chosen)).sha256 for chosen in ([0, 1], [1, 0], [0, 2], range(6))}
    assert len({*prints, fingerprint(folder).sha256}) == 5
    assert fingerprint(Subset(folder, [0, 1])) == fingerprint(Subset(folder, np.array([0, 1], dtype=np.int32)))


def test_joined(folder: Source) -> None:
    source = Joined([folder, Subset(folder, [0, 5])], titles=("train", "val"))
    assert_keeps_promises(source)
    assert len(source) == 8
    assert names(source)[5:] == ["train/top/002.png", "val/left/000.png", "val/top/002.png"]
    assert [source[i].content for i in (0, 5, 6, 7)] == [folder[i].content for i in (0, 5, 0, 5)]
    assert source.labels().tolist() == [0, 0, 0, 1, 1, 1, 0, 1]
    assert source.classes == folder.classes
    assert names(Joined([folder, folder]))[6] == "1/left/000.png"
    with pytest.raises(DataError, match="their classes differ"):
        Joined([folder, Relabelled(folder, ("x", "y"), {0: 0, 1: 1})])
    with pytest.raises(DataError, match="one or more sources"):
        Joined([])
    with pytest.raises(DataError, match="a title each"):
        Joined([folder, folder], titles=("train", "train"))


def test_relabelled(folder: Source) -> None:
    source = Relabelled(folder, ("down", "top", "left"), {0: 2, 1: 1})
    assert_keeps_promises(source)
    assert source.classes == ("down", "top", "left")
    assert source.labels().tolist() == [2, 2, 2, 1, 1, 1]
    assert [source[i].label for i in (0, 5)] == [2, 1]
    assert Relabelled(folder, ("top",), {1: 0})[0].label is None
    with pytest.raises(DataError, match="a class gets the number 2, but there are 2 classes"):
        Relabelled(folder, ("top", "left"), {0: 2, 1: 1})


def test_labels_are_read_with_the_images_where_nothing_else_knows_them() -> None:
    objects = open_source(Items())
    assert objects.labels() is None
    assert known_labels(objects).tolist() == [0, 1, -1, -1]
    assert Subset(objects, [1]).labels() is None
    assert Joined([objects, objects]).labels() is None
    source = Relabelled(objects, ("b", "a"), {0: 1, 1: 0})
    assert source.labels().tolist() == [1, 0, -1, -1]
    assert source[1].label == 0
    assert known_labels(source) is source.labels()
