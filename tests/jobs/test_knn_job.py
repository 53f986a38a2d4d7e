"""kNN on data sets by name, and with a few images of each class."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import nextblock as nb
from nextblock.cli import main
from nextblock.errors import ConfigError, DataError


def write_cifar10(root: Path, per_batch: int = 20) -> Path:
    """CIFAR-10's Python layout, of dark and bright images; no batch has each class."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [name.encode() for name in names]}))
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = np.arange(per_batch) % 2 * 3  # airplane and cat
        pixels = rng.integers(0, 60, (per_batch, 3072)) + 120 * (labels[:, None] > 0)
        content = {b"data": pixels.astype(np.uint8), b"labels": labels.tolist(), b"filenames": [b"x.png"] * per_batch}
        (folder / name).write_bytes(pickle.dumps(content))
    return root


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


def test_a_data_set_by_name(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_cifar10(tmp_path)
    assert nb.knn(run=run, dataset="cifar10", data_root=root, k=[1, 5]) == {1: 100.0, 5: 100.0}
    assert "bank 100 images, 20 queries" in told(capsys)
    assert main(["knn", str(run), "--dataset", "cifar10", "--data_root", str(root), "--few_shot", "3"]) == 0
    assert "bank 6 images, 20 queries" in told(capsys)


def test_a_folder_without_test_images_is_split(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = nb.knn(run=run, dataset=str(images), k=[1])
    said = told(capsys)
    assert "held out, class by class" in said
    assert "bank 20 images, 4 queries" in said
    assert found == nb.knn(run=run, dataset=images, k=[1], quiet=True)


def test_test_images_of_their_own_and_arrays(run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "top", tmp_path / "top")
    assert nb.knn(run=run, dataset=images, test=tmp_path, k=[1], quiet=True) == {1: 100.0}
    pixels = np.stack([np.full((16, 16, 3), 20 * i, dtype=np.uint8) for i in range(10)])
    labels = np.arange(10) // 5
    assert nb.knn(run=run, dataset=(pixels, labels), test=(pixels, labels), k=[1], quiet=True) == {1: 100.0}


def test_few_shots_choose_the_bank_by_seed(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"train": str(images), "val": str(images)}

    def few(count: int, seed: int) -> dict[int, float]:
        found = nb.knn(run=run, data=data, few_shot=count, seed=seed, k=[1])
        assert f"bank {2 * count} images, 24 queries" in told(capsys)
        return found

    assert few(12, 0) == nb.knn(run=run, data=data, k=[1], quiet=True)
    assert few(1, 0) == few(1, 0)
    with pytest.raises(DataError, match=r"12 images .*, fewer than the 13 asked for"):
        few(13, 0)
    with pytest.raises(ConfigError, match="--few_shot must be 0"):
        few(-1, 0)


def test_the_seed_chooses_other_images(run: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nextblock.jobs import knn as job

    banks: list[list[str]] = []
    extract = job._features

    def spied(opened, source, config, batch_size, name, console):  # type: ignore[no-untyped-def]
        if name == "train":
            banks.append([source.name(i) for i in range(len(source))])
        return extract(opened, source, config, batch_size, name, console)

    monkeypatch.setattr(job, "_features", spied)
    for seed in (0, 0, 1):
        nb.knn(run=run, data={"train": images, "val": images}, few_shot=2, seed=seed, k=[1], quiet=True)
    assert banks[0] == banks[1] != banks[2]
    assert [name.split("/")[0] for name in banks[0]] == ["left", "left", "top", "top"]


def test_columns_hold_for_a_data_set_as_well(run: Path, images: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = sorted(images.rglob("*.png"))
    content = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    for split in ("learn", "exam"):
        pq.write_table(
            pa.table({"picture": content, "kind": [path.parent.name for path in paths]}),
            tmp_path / f"{split}-00000-of-00001.parquet",
        )
    columns = {"image_column": "picture", "label_column": "kind", "train_split": "learn", "val_split": "exam"}
    assert nb.knn(run=run, dataset=tmp_path, data=columns, k=[1], quiet=True) == {1: 100.0}


def test_what_does_not_go_together(run: Path, images: Path) -> None:
    with pytest.raises(ConfigError, match=r"either --dataset or --data\.train and --data\.val"):
        nb.knn(run=run, dataset="cifar10", data={"train": str(images)}, quiet=True)
    with pytest.raises(ConfigError, match="--test belongs to a --dataset"):
        nb.knn(run=run, test=str(images), quiet=True)
    with pytest.raises(ConfigError, match=r"--dataset NAME.*--data\.train"):
        nb.knn(run=run / "exported", quiet=True)
    with pytest.raises(DataError, match="Did you mean 'cifar10'"):
        nb.knn(run=run, dataset="cifar01", quiet=True)
    with pytest.raises(ConfigError, match=r"no key 'data\.label_colum'"):
        nb.knn(run=run, dataset=images, data={"label_colum": "x"}, quiet=True)


def test_a_bank_that_is_its_own_queries_is_told(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nb.knn(run=run, data={"train": str(images), "val": str(images)}, k=[1])
    assert "every query finds itself" in capsys.readouterr().out
    nb.knn(run=run, dataset=str(images), k=[1])
    assert "every query finds itself" not in capsys.readouterr().out
