"""Every kind of source opens, keeps its promises, and says what is wrong when it cannot."""

import errno
import io
import os
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from nextblock.data.decode import decode
from nextblock.data.sources import (
    Source,
    explain_change,
    fingerprint,
    open_source,
    write_manifest,
)
from nextblock.errors import DataError, SampleError


def png(value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (5, 4), (value, value, value)).save(out, "PNG")
    return out.getvalue()


def write_files(root, *names: str) -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


@pytest.fixture(autouse=True)
def quiet_cache(tmp_path_factory, monkeypatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    datasets.disable_progress_bars()


def write_parquet(path, values=range(3), label: str | None = "label", image: str = "image", text=False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, object] = {image: [{"bytes": png(v), "path": f"{v}.png"} for v in values]}
    if label:
        columns[label] = [f"class {v}" if text else v % 2 for v in values]
    pq.write_table(pa.table(columns), path)


# --- folders ---------------------------------------------------------------------------------------------


def test_folder_with_classes(tmp_path) -> None:
    # 'b-c' sorts before 'b/': names are sorted as whole paths, classes as folder names
    write_files(tmp_path, "b/z.png", "b/a/deep.JPG", "b-c/x.webp", "a/1.png", "a/.hidden.png", "a/notes.txt")
    source = open_source(tmp_path)
    assert isinstance(source, Source)
    assert names(source) == ["a/1.png", "b-c/x.webp", "b/a/deep.JPG", "b/z.png"]
    assert source.classes == ("a", "b", "b-c")
    assert source.labels().tolist() == [0, 2, 1, 1]
    assert source.labels().dtype == np.int64
    assert [source[i].label for i in range(4)] == [0, 2, 1, 1]
    assert source[0].content == png(3)
    assert [name for name, _ in source.manifest()] == names(source)
    assert dict(source.manifest())["a/1.png"] == len(png(3))
    assert "4 image files, 3 classes (first-level folders), 2 other files ignored" in source.description
    again = pickle.loads(pickle.dumps(source))
    assert names(again) == names(source)
    with pytest.raises(IndexError):
        source[4]


def test_an_image_outside_the_folders_means_no_classes(tmp_path) -> None:
    write_files(tmp_path, "a/1.png", "b/2.png", "3.png")
    source = open_source(str(tmp_path))
    assert source.classes is None
    assert source.labels() is None
    assert source[0] == (png(2), None)


def test_folders_without_images_are_no_classes(tmp_path) -> None:
    write_files(tmp_path, "c/1.png", "a/1.png", "b/readme.md")
    assert open_source(tmp_path).classes == ("a", "c")
    assert open_source(tmp_path).labels().tolist() == [0, 1]


def test_order_is_bytewise_whatever_the_depth(tmp_path) -> None:
    write_files(tmp_path, "a/x.png", "a.png", "a!/x.png", "ä.png", "Z/q/p.png", "a/b.d/x.png", "a/b/x.png")
    found = names(open_source(tmp_path))
    assert len(found) == 7
    assert found == sorted(found, key=os.fsencode)


def test_links(tmp_path) -> None:
    write_files(tmp_path / "real", "x.png", "y.png")
    root = tmp_path / "root"
    write_files(root, "a/1.png")
    (root / "a/link.png").symlink_to(tmp_path / "real/x.png")
    (root / "b").symlink_to(tmp_path / "real")
    (root / "b2.png").symlink_to(tmp_path / "gone.png")
    (root / "a/up").symlink_to(root)
    assert names(open_source(root)) == ["a/1.png", "a/link.png", "b/x.png", "b/y.png"]


def test_split_folders(tmp_path) -> None:
    write_files(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/1.png")
    assert open_source(tmp_path).classes == ("a", "b")
    assert names(open_source(tmp_path, split="validation")) == ["a/1.png"]
    with pytest.raises(DataError, match=r"no split 'unlabeled'; splits: train, val"):
        open_source(tmp_path, split="unlabeled")


def test_names_that_are_not_unicode(tmp_path) -> None:
    path = os.path.join(os.fsencode(tmp_path), b"\xff\n.png")
    with open(path, "wb") as file:
        file.write(png())
    source = open_source(tmp_path)
    assert decode(source[0].content, source.name(0)).shape == (4, 5, 3)
    write_manifest(source, tmp_path / "manifest.gz")
    assert "no difference" in explain_change(tmp_path / "manifest.gz", source)


def test_files_and_lists_of_files(tmp_path) -> None:
    write_files(tmp_path, "b.png", "a.png", "f/c.png", "f/d.png")
    assert len(open_source(tmp_path / "a.png")) == 1
    spec = [tmp_path / "b.png", str(tmp_path / "a.png"), tmp_path / "f", tmp_path / "b.png"]
    source = open_source(spec)
    assert [os.path.basename(name) for name in names(source)] == ["b.png", "a.png", "c.png", "d.png"]
    assert source[0].content == png(0)
    assert source.labels() is None
    assert len(open_source(f"{tmp_path}/*.png")) == 2


def test_folder_errors(tmp_path, monkeypatch) -> None:
    (tmp_path / "imagenet").mkdir()
    with pytest.raises(DataError, match=r"imagenet is empty. Accepted: .jpg"):
        open_source(tmp_path / "imagenet")
    with pytest.raises(DataError, match=r"no such file or folder: .*/imagnet. Did you mean 'imagenet'"):
        open_source(tmp_path / "imagnet")
    with pytest.raises(DataError, match=r"hub write 'hf:uoft-cs/cifar10'"):
        open_source("uoft-cs/cifar10")
    write_files(tmp_path, "docs/a.txt", "docs/b.txt", "docs/c.csv", "docs/d")
    with pytest.raises(DataError, match=r"no image among 4 files .*2 \.txt, 1 \.csv, 1 no extension.*\.webp"):
        open_source(tmp_path / "docs")
    with pytest.raises(DataError, match=r"a\.txt has no image extension. Accepted"):
        open_source(tmp_path / "docs/a.txt")
    with pytest.raises(DataError, match=r"no such file or folder: .*none.png"):
        open_source([tmp_path / "none.png"])
    with pytest.raises(DataError, match="no file matches"):
        open_source(f"{tmp_path}/*.parquet")

    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(DataError, match=r"cannot read folder .*docs: Permission denied. Check"):
        open_source(tmp_path / "docs")


# --- Parquet and Hugging Face ----------------------------------------------------------------------------


def test_parquet_folder_in_the_hub_layout(tmp_path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", range(3))
    write_parquet(tmp_path / "train-00001-of-00002.parquet", range(3, 5))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", range(7, 9))
    train = open_source(tmp_path)
    assert len(train) == 5
    assert train[4] == (png(4), 0)
    assert train.labels().tolist() == [0, 1, 0, 1, 0]
    assert len(set(names(train))) == 5
    assert [name for name, _ in train.manifest()] == [f"train-0000{i}-of-00002.parquet" for i in (0, 1)]
    assert open_source(tmp_path, split="validation")[0] == (png(7), 1)
    with pytest.raises(DataError, match=r"no split 'trian'; splits: test, train. Did you mean 'train'"):
        open_source(tmp_path, split="trian")
    # files that are named need no split
    assert len(open_source(tmp_path / "test-00000-of-00001.parquet")) == 2
    assert len(open_source(f"{tmp_path}/test-*.parquet")) == 2
    assert len(open_source(f"{tmp_path}/*.parquet")) == 5
    assert len(pickle.loads(pickle.dumps(train))) == 5


def test_parquet_without_splits(tmp_path) -> None:
    write_parquet(tmp_path / "data/part1.parquet", [1])
    write_parquet(tmp_path / "data/part2.parquet", [2])
    assert len(open_source(tmp_path)) == 2
    assert len(open_source(tmp_path / "data")) == 2


def test_class_names_and_text_labels(tmp_path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(), "path": None}] * 2, "label": [1, None]}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(str(tmp_path / "x.parquet"))
    source = open_source(tmp_path / "x.parquet")
    assert source.classes == ("cat", "dog")
    assert source.labels().tolist() == [1, -1]
    write_parquet(tmp_path / "text.parquet", [5, 3, 5], text=True)
    source = open_source(tmp_path / "text.parquet")
    assert source.classes == ("class 3", "class 5")
    assert source.labels().tolist() == [1, 0, 1]


def test_columns(tmp_path) -> None:
    path = tmp_path / "x.parquet"
    write_parquet(path, label=None, image="img")
    with pytest.raises(DataError, match=r"no image column 'image'; columns: img. Did you mean 'img'"):
        open_source(path)
    source = open_source(path, image_column="img")
    assert source[0] == (png(0), None)
    with pytest.raises(DataError, match="no label column 'label'; columns: img"):
        open_source(path, image_column="img", label_column="label")
    write_parquet(tmp_path / "y.parquet", label="fine_label")
    assert open_source(tmp_path / "y.parquet").labels() is None
    assert open_source(tmp_path / "y.parquet", label_column="fine_label").labels().tolist() == [0, 1, 0]
    with pytest.raises(DataError, match=r"label column 'image' of .* integers or strings"):
        open_source(tmp_path / "y.parquet", label_column="image")
    with pytest.raises(DataError, match="an image column holds encoded images"):
        open_source(tmp_path / "y.parquet", image_column="fine_label")


def test_plain_binary_path_and_missing_images(tmp_path) -> None:
    write_files(tmp_path, "a.png")
    binary = datasets.Dataset.from_dict({"image": [png(1)]})
    assert open_source(binary)[0].content == png(1)
    path = datasets.Dataset.from_dict({"image": [str(tmp_path / "a.png"), str(tmp_path / "gone.png")]})
    assert open_source(path)[0].content == png(0)
    with pytest.raises(SampleError, match=r"dataset\[1\]: no such file"):
        open_source(path)[1]
    empty = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": None}]})
    with pytest.raises(SampleError, match="holds no image"):
        open_source(empty)[0]
    with pytest.raises(DataError, match="has no rows"):
        open_source(datasets.Dataset.from_dict({"image": []}))


def test_a_broken_parquet_file(tmp_path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="cannot read the Parquet files"):
        open_source(tmp_path)


def test_saved_data_sets(tmp_path) -> None:
    rows = {"image": [png(1), png(2)], "label": [0, 1]}
    one = datasets.Dataset.from_dict(rows)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=one, test=one.select([1])).save_to_disk(tmp_path / "two")
    for spec in (tmp_path / "one", f"hf:{tmp_path}/one", f"hf:{tmp_path}/two", tmp_path / "two"):
        source = open_source(spec)
        assert len(source) == 2
        assert source[1] == (png(2), 1)
    before = fingerprint(open_source(tmp_path / "one"))
    os.rename(tmp_path / "one", tmp_path / "moved")
    assert fingerprint(open_source(tmp_path / "moved")) == before
    assert fingerprint(open_source(one.select([1]))) != before
    assert open_source(f"hf:{tmp_path}/two@validation")[0] == (png(2), 1)
    assert open_source(datasets.DatasetDict(val=one), split="test")[0] == (png(1), 0)
    with pytest.raises(DataError, match=r"no split 'dev'; splits: test, train"):
        open_source(f"hf:{tmp_path}/two@dev")


def test_hub_names(monkeypatch) -> None:
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        if split in ("train", "test"):
            return datasets.Dataset.from_dict({"image": [png()]})
        if name == "gone":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'gone' doesn't exist on the Hub")
        raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'test'].")

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_source("hf:a/b").name(0) == "hf:a/b@train[0]"
    assert open_source("hf:a/b@validation").name(0) == "hf:a/b@test[0]"
    assert open_source("hf:a/b:small@test").name(0) == "hf:a/b:small@test[0]"
    assert asked[0] == ("a/b", None, "train")
    assert asked[-1] == ("a/b", "small", "test")
    with pytest.raises(DataError, match=r"hf:a/b@dev has no split 'dev': .*'train', 'test'"):
        open_source("hf:a/b@dev")
    with pytest.raises(DataError, match=r"cannot open hf:gone@dev: .*doesn't exist.*network"):
        open_source("hf:gone@dev")


# --- in memory -------------------------------------------------------------------------------------------


def test_arrays() -> None:
    images = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    source = open_source((images, [3, 4]))
    assert np.array_equal(source[1].content, images[1])
    assert source[1].label == 4
    assert source.labels().tolist() == [3, 4]
    assert open_source(images).labels() is None
    assert open_source(images[..., 0])[0].content.shape == (4, 5)
    tensor = torch.from_numpy(images)
    assert np.array_equal(open_source((tensor, torch.tensor([0, 1])))[0].content, images[0])
    wide = torch.zeros(2, 3, 8, 9, dtype=torch.uint8)
    assert open_source(wide)[0].content.shape == (8, 9, 3)
    ((name, size),) = source.manifest()
    assert name.startswith("array[2,4,5,3] uint8 sha256:")
    assert size == images.nbytes
    assert fingerprint(source) != fingerprint(open_source(images[::-1]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "must be uint8 .*got float32"),
        (np.zeros((4, 4), np.uint8), r"must be \[N, H, W\] or \[N, H, W, C\], got \[4, 4\]"),
        (np.zeros((0, 4, 4), np.uint8), "at least one image"),
        ((np.zeros((2, 4, 4), np.uint8), [1]), r"labels must be integers \[2\]"),
        ((np.zeros((2, 4, 4), np.uint8), [0.5, 1]), "labels must be integers"),
        ([], "list given is empty"),
        ([np.zeros((4, 4), np.float64)], "float64 pixels; uint8"),
        ([object()], "is a object; an image is bytes, a path"),
        ([(png(), "cat")], "label 'cat'; a label is a class number"),
        ([(png(), 1, 2)], "got 3 parts"),
        ([{"img": png()}], "no 'image'; it has: img. Did you mean 'img'"),
        (7, "cannot read images from a int"),
        ({"image": 1}, "cannot read images from a dict"),
    ],
)
def test_wrong_objects(spec: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(spec)


class Things:
    """What a person's own data set looks like."""

    classes: tuple[str, ...] = ("x", "y")

    def __init__(self, *items: object) -> None:
        self.items = items
        self.targets = [1] * len(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        item = self.items[index]
        if isinstance(item, Exception):
            raise item
        return item


def test_any_object(tmp_path) -> None:
    write_files(tmp_path, "a.png")
    image = Image.new("RGB", (5, 4))
    array = np.zeros((4, 5, 3), np.uint8)
    items = (
        png(),
        image,
        array,
        torch.zeros(3, 4, 5, dtype=torch.uint8),
        str(tmp_path / "a.png"),
        (image, 1),
        (png(), torch.tensor(1)),
        {"image": tmp_path / "a.png", "label": np.int64(1)},
        {"image": array},
    )
    source = open_source(Things(*items))
    assert source.classes == ("x", "y")
    assert source.labels().tolist() == [1] * 9
    assert [source[i].label for i in range(9)] == [None] * 5 + [1, 1, 1, None]
    for index in range(9):
        assert decode(source[index].content, source.name(index)).shape == (4, 5, 3)
    assert list(source.manifest()) == [("python:Things", 9)]
    assert open_source(source) is source
    keyed = open_source([{"pixels": png(7), "kind": 3}], image_column="pixels", label_column="kind")
    assert keyed[0] == (png(7), 3)


def test_an_object_that_fails() -> None:
    transient = OSError(errno.EIO, "Input/output error")
    source = open_source(Things(png(), OSError("broken"), KeyError("bug"), transient))
    with pytest.raises(SampleError, match=r"Things\[1\]: broken"):
        source[1]
    with pytest.raises(DataError, match=r"Things\[2\] raised KeyError: 'bug'"):
        source[2]
    with pytest.raises(DataError, match="read error"):
        source[3]


# --- fingerprints ----------------------------------------------------------------------------------------


def test_fingerprint_and_what_changed(tmp_path) -> None:
    root, manifest = tmp_path / "images", tmp_path / "manifest.gz"
    write_files(root, *(f"{i}.png" for i in range(8)))
    before = open_source(root)
    print_before = fingerprint(before)
    assert print_before.count == 8
    assert print_before.bytes == sum(len(png(i)) for i in range(8))
    assert fingerprint(open_source(root)) == print_before
    write_manifest(before, manifest)
    assert "no difference" in explain_change(manifest, before)
    for i in range(4):
        (root / f"{i}.png").unlink()
    write_files(root, "new.png")
    (root / "7.png").write_bytes(b"12345")
    after = open_source(root)
    assert fingerprint(after) != print_before
    assert explain_change(manifest, after) == (
        "1 added: new.png; 4 removed: 0.png, 1.png, 2.png, ...; 1 resized: 7.png"
    )


def test_manifest_has_a_limit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("nextblock.data.sources.manifest.MANIFEST_LIMIT", 2)
    root, manifest = tmp_path / "images", tmp_path / "manifest.gz"
    write_files(root, "b.png", "c.png", "d.png")
    write_manifest(open_source(root), manifest)
    assert "no difference" in explain_change(manifest, open_source(root))
    write_files(root, "a.png")
    assert explain_change(manifest, open_source(root)) == "1 added: a.png"
    with pytest.raises(DataError, match="cannot read the manifest"):
        explain_change(tmp_path / "gone.gz", open_source(root))
