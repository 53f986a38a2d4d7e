"""Each benchmark data set opens from its own layout and from copies, on fixtures; what is wrong is said."""

from __future__ import annotations

import importlib.machinery
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import benchmark_folders as on_disk
from nextblock.data.decode import decode
from nextblock.data.labelled import Labelled, open_labelled
from nextblock.data.named import NAMED, PUBLISHED, SUITES, data_root, find, is_named, named
from nextblock.data.named.dataset import METRICS
from nextblock.data.sources import Source, fingerprint
from nextblock.errors import DataError

# class names in the order of their tones; None: as the shards name them
CLASSES = {
    "imagenet1k": ("n01440764", "n01443537", "n02102040"),
    "inat18": ("Corvus", "Pica", "Parus"),
    "cifar10": ("airplane", "automobile", "bird"),
    "cifar100": ("apple", "baby", "bear"),
    "food101": ("apple_pie", "baby_back_ribs", "baklava"),
    "dtd": ("banded", "blotchy", "braided"),
    "pets": ("Abyssinian", "american_bulldog", "Bengal"),
    "cars": ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Acura TL Sedan 2012"),
    "iwildcam": ("empty", "tayassu pecari", "cuon"),
    "camelyon17": ("normal", "tumor"),
    "pcam": ("0", "1"),
    "rxrx1": ("s21721", "s21722", "s21723"),
    "eurosat": ("class 0", "class 1", "class 2"),
    "fmow": ("airport", "barn", "zoo"),
    "infograph": ("aircraft_carrier", "airplane", "The_Eiffel_Tower"),
}
JOINED = {"dtd": 2, "cifar10": 5, "camelyon17": 2}  # so many times the images of a class are in training


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def assert_shows_its_classes(source: Source, classes: tuple[str, ...], split: str, per_class: int) -> None:
    """Every image decodes to the tone that its label's class and its split have, and the source keeps its promises."""
    labels = source.labels()
    assert labels is not None
    assert np.unique(labels, return_counts=True)[1].tolist() == [per_class] * len(classes)
    assert source.classes == classes
    for index, label in enumerate(labels.tolist()):
        sample = source[index]
        assert sample.label == label
        pixels = decode(sample.content, source.name(index))
        assert abs(pixels.mean() - on_disk.tone(label, split)) < 3, (source.name(index), label)
    assert len({source.name(index) for index in range(len(source))}) == len(source)
    assert [name for name, _ in source.manifest()] == sorted(n for n, _ in source.manifest())
    again = pickle.loads(pickle.dumps(source))
    assert fingerprint(again) == fingerprint(source)
    assert again[0].label == source[0].label


def assert_both_sides(found: Labelled, classes: tuple[str, ...], times: int = 1) -> None:
    assert found.classes == classes
    assert_shows_its_classes(found.train, classes, "train", times * on_disk.PER_CLASS["train"])
    assert_shows_its_classes(found.test, classes, "test", on_disk.PER_CLASS["test"])


@pytest.mark.parametrize("name", NAMED)
def test_opens_in_its_own_layout(name: str, tmp_path: Path) -> None:
    on_disk.WRITERS[name](tmp_path)
    found = open_labelled(name, root=tmp_path)
    assert (found.name, found.dataset) == (name, NAMED[name])
    assert_both_sides(found, CLASSES[name], JOINED.get(name, 1))
    few = f"{NAMED[name].title} has {NAMED[name].classes} classes, only {len(CLASSES[name])} were found"
    assert found.note == ("" if NAMED[name].classes == len(CLASSES[name]) else few)


@pytest.mark.parametrize("name", NAMED)
def test_opens_as_split_folders(name: str, tmp_path: Path) -> None:
    held_out = NAMED[name].test_split
    on_disk.split_folders(tmp_path / name, "train", held_out, classes=2)
    assert_both_sides(open_labelled(name, root=tmp_path), ("class 0", "class 1"))


@pytest.mark.parametrize("name", NAMED)
def test_opens_as_parquet(name: str, tmp_path: Path) -> None:
    columns = {"cifar10": ("img", "label"), "cifar100": ("img", "fine_label")}.get(name, ("image", "label"))
    digest = "" if name < "e" else "-da7f777dde05cdc6"
    splits = {"train": "train", NAMED[name].test_split: "test"}
    on_disk.shards(tmp_path / name, splits, classes=2, columns=columns, digest=digest)
    assert_both_sides(open_labelled(name, root=tmp_path), ("class 0", "class 1"))


# --- where copies differ -------------------------------------------------------------------------------------


def test_the_hub_copy_of_camelyon17(tmp_path: Path) -> None:
    splits = {"id_train": "train", "id_val": "", "ood_val": "test", "ood_test": "", "unlabeled_train": ""}
    on_disk.shards(tmp_path / "camelyon17/data", splits, classes=2, named=False)
    assert_both_sides(open_labelled("camelyon17", root=tmp_path), ("0", "1"))


def test_a_split_that_stands_in_is_told(tmp_path: Path) -> None:
    on_disk.shards(tmp_path / "food101/data", {"train": "train", "validation": "test"})
    found = open_labelled("food101", root=tmp_path)
    assert_both_sides(found, ("class 0", "class 1", "class 2"))
    assert "tested on 'validation': there is no split 'test'" in found.note
    on_disk.split_folders(tmp_path / "dtd", "train", "test")
    assert "there is no split 'val': trained on train alone" in open_labelled("dtd", root=tmp_path).note


def test_what_is_trained_on_does_not_stand_in_for_the_test(tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path / "dtd", "train", "val")
    with pytest.raises(DataError, match=r"splits train, val; needed are train \+ val to train and test to test"):
        open_labelled("dtd", root=tmp_path)


def test_pets_with_train_and_val_apart(tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path / "pets", "train", "test")
    for _, c, i in on_disk.each(3, ("train",)):
        on_disk.write(tmp_path / "pets/val" / f"class {c}" / f"{i}.png", c, "train")
    assert_both_sides(open_labelled("pets", root=tmp_path), ("class 0", "class 1", "class 2"), times=2)


def test_parquet_in_folders_by_split_and_of_one_configuration(tmp_path: Path) -> None:
    for word, split in (("train", "train"), ("test", "test")):
        on_disk.shards(tmp_path / "cars/default" / word, {"0000": split}, digest="")
        for path in (tmp_path / "cars/default" / word).iterdir():
            path.rename(path.with_name(path.name.replace("0000-", "")))
    assert_both_sides(open_labelled("cars", root=tmp_path), ("class 0", "class 1", "class 2"))
    on_disk.shards(tmp_path / "cars/cropped", {"train": "train"})
    with pytest.raises(DataError, match="several sets of Parquet files: cropped, default"):
        open_labelled("cars", root=tmp_path)


def test_a_saved_dataset_dict(tmp_path: Path) -> None:
    on_disk.shards(tmp_path / "shards", {"train": "train", "test": "test"})
    files = {s: [str(p) for p in (tmp_path / "shards").glob(f"{s}-*")] for s in ("train", "test")}
    datasets.load_dataset("parquet", data_files=files).save_to_disk(tmp_path / "eurosat")
    assert_both_sides(open_labelled("eurosat", root=tmp_path), ("class 0", "class 1", "class 2"))


def test_eurosat_as_its_archive_has_no_split(tmp_path: Path) -> None:
    for _, c, i in on_disk.each(2, ("train",)):
        name = ("AnnualCrop", "Forest")[c]
        on_disk.write(tmp_path / "eurosat/2750" / name / f"{name}_{i}.jpg", c, "train")
    found = open_labelled("eurosat", root=tmp_path)
    assert found.classes == ("AnnualCrop", "Forest")
    assert (len(found.train), len(found.test)) == (4, 2)
    assert "this copy has no split: 20 % held out, class by class, by us" in found.test.description
    names = [source.name(i) for source in (found.train, found.test) for i in range(len(source))]
    assert sorted(names) == [f"{n}/{n}_{i}.jpg" for n in ("AnnualCrop", "Forest") for i in range(3)]


def test_infograph_rows_of_all_of_domainnet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    on_disk.shards(tmp_path / "infograph/data", {"train": "train", "test": "test"}, digest="")
    for path in (tmp_path / "infograph/data").iterdir():
        table = pq.read_table(path)
        other = table.set_column(1, "label", pa.array([(c + 1) % 3 for c in table["label"].to_pylist()]))
        both = pa.concat_tables([table, other]).append_column(
            "domain", pa.array(["infograph"] * len(table) + ["sketch"] * len(table))
        )
        pq.write_table(both.replace_schema_metadata(table.schema.metadata and None), path)
    assert_both_sides(open_labelled("infograph", root=tmp_path), ("0", "1", "2"))


def test_food101_with_its_json_lists_alone(tmp_path: Path) -> None:
    on_disk.food101(tmp_path)
    for path in (tmp_path / "food-101/meta").glob("*.txt"):
        path.unlink()
    assert_both_sides(open_labelled("food101", root=tmp_path), CLASSES["food101"])


# --- arrays ----------------------------------------------------------------------------------------------------


def test_pickled_batches_that_python_3_wrote(tmp_path: Path) -> None:
    on_disk.cifar100(tmp_path)
    folder = tmp_path / "cifar100/cifar-100-python"
    for split in ("train", "test"):
        fine = [c for _, c, _ in on_disk.each(3, (split,))]
        content = {b"fine_labels": np.array(fine), b"data": on_disk._planes(split, fine)}
        (folder / split).write_bytes(pickle.dumps(content, protocol=2))
    assert_both_sides(open_labelled("cifar100", root=tmp_path), CLASSES["cifar100"])


def test_pickled_planes_become_upright_colour_images(tmp_path: Path) -> None:
    on_disk.cifar10(tmp_path)
    pixels = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3) // 13 % 256
    content = {"labels": [2], "data": pixels.astype(np.uint8).transpose(2, 0, 1).reshape(1, -1)}
    on_disk.py2_dump(tmp_path / "cifar10/cifar-10-batches-py/test_batch", content)
    sample = open_labelled("cifar10", root=tmp_path).test[0]
    assert (decode(sample.content, "first") == pixels).all()
    assert sample.label == 2


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("made_by_a_pickle",)


@pytest.mark.parametrize("content", [{"data": Evil()}, np.array([Evil()], dtype=object), [1, 2]])
def test_a_pickle_that_is_no_batch_is_refused_and_runs_nothing(
    content: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    on_disk.cifar10(tmp_path)
    (tmp_path / "cifar10/cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match="data_batch_3"):
        open_labelled("cifar10", root=tmp_path)
    assert not Path("made_by_a_pickle").exists()


def write_h5(root: Path) -> None:
    """Named as the official files; what stands in for h5py below reads numpy's format from them."""
    for word, split in (("train", "train"), ("valid", "test"), ("test", "")):
        labels = [c for _, c, _ in on_disk.each(2, (split,))]
        pixels = np.stack([np.asarray(on_disk.image(c, split)) for c in labels])
        (root / "pcam").mkdir(parents=True, exist_ok=True)
        for part, values in (("x", pixels), ("y", np.array(labels, dtype=np.uint8).reshape(-1, 1, 1, 1))):
            with (root / f"pcam/camelyonpatch_level_2_split_{word}_{part}.h5").open("wb") as file:
                np.savez(file, **{part: values})


def test_pcam_says_what_its_hdf5_files_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_h5(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="pip install h5py"):
        open_labelled("pcam", root=tmp_path)


def test_pcam_from_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_h5(tmp_path)
    library = types.ModuleType("h5py")
    library.__spec__ = importlib.machinery.ModuleSpec("h5py", None)
    library.File = lambda path, mode: np.load(path)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "h5py", library)
    assert_both_sides(open_labelled("pcam", root=tmp_path), ("normal", "tumor"))


# --- what is wrong ---------------------------------------------------------------------------------------------


def test_what_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"DTD is not on this machine: .*dtd is not there\. Download dtd-r1\.0\.1"):
        open_labelled("dtd", root=tmp_path)
    (tmp_path / "dtd").mkdir()
    assert find("dtd", tmp_path) is None


def test_an_unknown_layout_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "cars").mkdir()
    (tmp_path / "cars/cars_train.tgz").touch()
    with pytest.raises(
        DataError, match=r"not laid out in a way known for Stanford Cars; it holds cars_train\.tgz\. The"
    ):
        open_labelled("cars", root=tmp_path)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path / "cifar10", "train", "extra")
    (tmp_path / "cifar10/extra").rename(tmp_path / "cifar10/id_val")
    with pytest.raises(DataError, match=r"has the splits id_val, train; needed are train to train and test to test"):
        open_labelled("cifar10", root=tmp_path)
    on_disk.split_folders(tmp_path / "pcam", "train", "val", classes=2)
    with pytest.raises(DataError, match=r"vall to test\. Did you mean 'val'\?"):
        open_labelled("pcam", root=tmp_path, test_split="vall")


def test_more_classes_than_the_data_set_has(tmp_path: Path) -> None:
    on_disk.split_folders(tmp_path / "pcam", "train", "val", classes=3)
    with pytest.raises(DataError, match="PatchCamelyon has 2 classes, but 3 were found"):
        open_labelled("pcam", root=tmp_path)


@pytest.mark.parametrize("name", ["food101", "dtd", "pets", "iwildcam", "infograph", "inat18"])
def test_lists_without_their_images(name: str, tmp_path: Path) -> None:
    on_disk.WRITERS[name](tmp_path)
    for path in tmp_path.rglob("*.jpg"):
        path.unlink()
    with pytest.raises(DataError, match="Unpack the images there"):
        open_labelled(name, root=tmp_path)


@pytest.mark.parametrize(
    ("name", "path", "line"),
    [
        ("pets", "oxford-iiit-pet/annotations/test.txt", "Abyssinian_100"),
        ("infograph", "domainnet/infograph_train.txt", "infograph/airplane/infograph_002_000000.jpg"),
        ("inat18", "inat18/val2018.json", '{"annotations": [], "images": [{"id": 3, "file_name": "x.jpg"}]}'),
        ("inat18", "inat18/val2018.json", "<html>not found</html>"),
        ("rxrx1", "rxrx1_v1.0/metadata.csv", "experiment,plate,well,site,sirna_id,dataset\nHUVEC-01,1,B02,1,x,train"),
        ("rxrx1", "rxrx1_v1.0/metadata.csv", "experiment,plate,well,site,sirna_id,dataset\n1"),
        ("cars", "stanford_cars/devkit/cars_train_annos.mat", "<html>not found</html>"),
    ],
)
def test_damaged_lists(name: str, path: str, line: str, tmp_path: Path) -> None:
    on_disk.WRITERS[name](tmp_path)
    (tmp_path / path).write_text(line)
    with pytest.raises(DataError, match=r"cannot read|damaged"):
        open_labelled(name, root=tmp_path)


# --- the table -------------------------------------------------------------------------------------------------


def test_the_table_is_whole() -> None:
    assert list(NAMED) == list(SUITES["xtra15"])
    assert sum(row.classes for row in NAMED.values()) == 1000 + 8142 + 110 + 101 + 47 + 37 + 196 + 182 + 4 + 1139 + 417
    for name, row in NAMED.items():
        assert row.name == name
        assert row.metric in METRICS
        assert row.batch_size in (128, 256, 512, 4096)
        assert len(row.lrs) in (7, 9, 10)
        assert row.url.startswith("https://")
        assert row.test_split not in row.train_splits
    assert NAMED["imagenet1k"].warmup_epochs == NAMED["inat18"].warmup_epochs == 10
    assert {name for name, row in NAMED.items() if row.metric != "accuracy"} == {"pets", "iwildcam"}
    assert {name for name, row in NAMED.items() if len(row.lrs) == 10} == {"inat18", "cars", "infograph"}


def test_published_rows_have_their_published_means() -> None:
    assert {row.model: row.mean for row in PUBLISHED}["XTRA-H/14"] == 76.2
    whole = [row for row in PUBLISHED if set(row.accuracy) == set(SUITES["xtra15"])]
    assert len(whole) == 2
    for row in whole:
        assert round(float(np.mean(list(row.accuracy.values()))), 1) == row.mean


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_named("cifar10")
    assert not is_named("cifar-10")
    assert named("pets").title == "Oxford-IIIT Pets"
    with pytest.raises(DataError, match=r"no data set is named 'eurosta'\. Did you mean 'eurosat'\?"):
        named("eurosta")
    monkeypatch.delenv("NEXTBLOCK_DATA", raising=False)
    assert data_root() == Path("datasets")
    monkeypatch.setenv("NEXTBLOCK_DATA", str(tmp_path))
    assert data_root() == tmp_path
    assert data_root(tmp_path / "other") == tmp_path / "other"
    on_disk.dtd(tmp_path)
    assert find("dtd") == tmp_path / "dtd"


@pytest.mark.skipif(find("cifar10") is None, reason="the real CIFAR-10 is not below $NEXTBLOCK_DATA or ./datasets")
def test_cifar10_as_it_is() -> None:
    found = open_labelled("cifar10")
    assert (len(found.train), len(found.test)) == (50_000, 10_000)
    assert found.classes[0] == "airplane"
    assert found.note == ""
    assert np.bincount(found.test.labels()).tolist() == [1000] * 10
    assert decode(found.test[0].content, "first").shape == (32, 32, 3)
