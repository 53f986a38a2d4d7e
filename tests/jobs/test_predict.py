from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from close import assert_close
from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.loading import evaluation_batches
from nextblock.data.preprocess import Preprocessing, normalize
from nextblock.data.sources import open_source
from nextblock.errors import CheckpointError, ConfigError, DataError, RunError
from nextblock.jobs.predict import predict
from nextblock.xtra.classifier import Classifier, HeadConfig, LayerMean
from nextblock.xtra.config import XTRAConfig
from tiny_run import TINY, write_images

CLASSES = ("left, mostly", 'the "top"', "neither")
PREPROCESSING = Preprocessing((16, 16), resize_px=16)


def tiny_classifier(classes: tuple[str, ...] = CLASSES) -> Classifier:
    torch.manual_seed(0)
    config = XTRAConfig.from_dict({**XTRAConfig().to_dict(), **TINY["model"], "image_size_px": (16, 16)})
    model = Classifier(config, HeadConfig("linear", LayerMean(2, 2)), classes)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    return save_pretrained(folder, tiny_classifier(), PREPROCESSING.to_dict(), "a card")


def rows(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_predictions_are_the_models_own(weights: Path, images: Path) -> None:
    made = predict(run=weights, images=images, batch_size=5, top=2, workers=0, quiet=True)
    assert made.names[0] == "left/000.png"
    assert len(made.names) == 24
    assert made.probabilities.dtype == np.float32
    (batch,) = evaluation_batches(open_source(images), PREPROCESSING, batch_size=24)
    expected = tiny_classifier().probabilities(normalize(batch.images, None, PREPROCESSING))
    best = expected.sort(1, descending=True)
    assert_close(made.probabilities, best.values[:, :2], 1e-5)
    assert made.classes.tolist() == [[CLASSES[i] for i in row[:2]] for row in best.indices.tolist()]


def test_csv_holds_the_same_with_any_class_name(weights: Path, images: Path, tmp_path: Path) -> None:
    made = predict(run=weights, images=images, quiet=True, workers=0)
    out = predict(run=weights, images=images, out=tmp_path / "p.csv", batch_size=7, quiet=True, workers=0)
    assert out == tmp_path / "p.csv"
    head, *lines = rows(out)
    assert head == ["name", "class_1", "probability_1", "class_2", "probability_2", "class_3", "probability_3"]
    assert [line[0] for line in lines] == made.names
    assert [line[1::2] for line in lines] == made.classes.tolist()
    assert_close(np.array([line[2::2] for line in lines], dtype=float), made.probabilities, 1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_more_classes_than_there_are_is_told(weights: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = predict(run=weights, images=images, workers=0, top=7)
    assert made.classes.shape == (24, 3)
    told = " ".join(capsys.readouterr().out.split())
    assert "knows 3 classes: all of them are given, not 7." in told
    assert "left/000.png" in told
    assert "and 4 more images" in told
    first = f"{made.classes[0, 0]} {100 * made.probabilities[0, 0]:.1f} %"
    assert first in told
    assert predict(run=weights, images=images, workers=0, quiet=True).names == made.names
    assert capsys.readouterr().out == ""


def test_broken_images_are_left_out_and_told(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "images", per_class=2)
    (folder / "left" / "000.png").write_bytes(b"no")
    predict(run=weights, images=folder, out=tmp_path / "p.csv", batch_size=1, workers=0)
    told = capsys.readouterr().out
    assert "left out: left/000.png" in told
    assert "3 images predicted" in told
    assert [row[0] for row in rows(tmp_path / "p.csv")[1:]] == ["left/001.png", "top/000.png", "top/001.png"]
    assert predict(run=weights, images=folder, workers=0, quiet=True).bad[0].name == "left/000.png"
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no")
    for out in (None, tmp_path / "none.csv"):
        with pytest.raises(DataError, match="none of the 4 images"):
            predict(run=weights, images=folder, out=out, workers=0, quiet=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "p.csv"]


def test_file_names_of_other_bytes_are_kept(weights: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", per_class=1)
    os.rename(folder / "top" / "000.png", os.fsencode(folder / "top") + b"/caf\xe9.png")
    predict(run=weights, images=folder, out=tmp_path / "p.csv", workers=0, quiet=True)
    assert b"top/caf\xe9.png," in (tmp_path / "p.csv").read_bytes()
    predict(run=weights, images=folder, workers=0)  # and can be shown


def test_the_path_is_told_as_it_is(
    weights: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a[").mkdir()
    predict(run=weights, images=images / "top", out=tmp_path / "a[" / "b].csv", workers=0)
    assert f"images predicted: {tmp_path}/a[/b].csv\n" in capsys.readouterr().out


def test_a_file_is_never_overwritten(weights: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("mine")
    with pytest.raises(RunError, match="not overwritten"):
        predict(run=weights, images=images, out=tmp_path / "old.csv", quiet=True)
    with pytest.raises(ConfigError, match=r"must end in \.csv; got p\.tsv"):
        predict(run=weights, images=images, out=tmp_path / "p.tsv", quiet=True)
    with pytest.raises(ConfigError, match="--top must be at least 1"):
        predict(run=weights, images=images, top=0, quiet=True)


def test_an_encoder_without_a_head_knows_no_classes(run: Path, images: Path) -> None:
    with pytest.raises(RunError, match="knows no classes"):
        predict(run=run, images=images, quiet=True)


def test_weights_that_are_not_finite_are_refused(images: Path, tmp_path: Path) -> None:
    model = tiny_classifier()
    for parameter in model.head.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    folder = save_pretrained(tmp_path / "nan", model, PREPROCESSING.to_dict(), "a card")
    with pytest.raises(CheckpointError, match="not finite"):
        predict(run=folder, images=images, out=tmp_path / "p.csv", workers=0, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["nan"]


def test_the_column_that_the_run_took_its_images_from(weights: Path, images: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(images.rglob("*.png"))]
    pq.write_table(pa.table({"img": content}), tmp_path / "images.parquet")
    run = tmp_path / "run"
    run.mkdir()
    (run / "exported").symlink_to(weights)
    with pytest.raises(DataError, match="img"):
        predict(run=run, images=tmp_path / "images.parquet", workers=0, quiet=True)
    (run / "config.yaml").write_text("finetune: {image_column: img}\n")
    made = predict(run=run, images=tmp_path / "images.parquet", workers=0, quiet=True)
    assert_close(made.probabilities, predict(run=weights, images=images, workers=0, quiet=True).probabilities, 1e-5)
