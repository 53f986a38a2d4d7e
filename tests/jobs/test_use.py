"""The jobs that use a trained encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import nextblock as nb
from nextblock.errors import ConfigError, DataError, RunError
from tiny_run import write_images


def test_embed_to_parquet_and_npz_and_memory(run: Path, images: Path, tmp_path: Path) -> None:
    made = nb.embed(run=run, images=str(images), last_layers=2, quiet=True)
    assert made.features.shape == (24, 16)
    assert made.names[0] == "left/000.png"
    nb.embed(run=run, images=str(images), last_layers=2, out=tmp_path / "f.parquet", batch_size=5, quiet=True)
    table = pq.read_table(tmp_path / "f.parquet")
    assert table["name"].to_pylist() == made.names
    assert np.allclose(np.array(table["features"].to_pylist(), dtype=np.float32), made.features, atol=1e-5)
    nb.embed(run=run, images=str(images), last_layers=2, out=tmp_path / "f.npz", quiet=True)
    assert np.array_equal(np.load(tmp_path / "f.npz")["features"], made.features)


def test_embed_unpooled_keeps_patches_in_raster_order(run: Path, images: Path, tmp_path: Path) -> None:
    made = nb.embed(run=run / "exported", images=[str(images / "top")], pool=False, quiet=True)
    assert made.features.shape == (12, 16, 16)
    nb.embed(run=run, images=str(images / "top"), pool=False, out=tmp_path / "f.parquet", quiet=True)
    stored = np.array(pq.read_table(tmp_path / "f.parquet")["features"].to_pylist(), dtype=np.float32)
    assert np.allclose(stored, made.features, atol=1e-5)


def test_embed_leaves_broken_images_out(run: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", per_class=2)
    (folder / "top" / "000.png").write_bytes(b"no")
    made = nb.embed(run=run, images=str(folder), quiet=True)
    assert len(made.names) == 3
    assert made.bad[0].name == "top/000.png"
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no")
    for out in (None, tmp_path / "x.parquet"):
        with pytest.raises(DataError, match="none of the 4 images"):
            nb.embed(run=run, images=str(folder), out=out, quiet=True)
    assert not (tmp_path / "x.parquet").exists()


def test_paths_are_told_as_they_are(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a["  # and "/b]", an end of markup without a beginning
    folder.mkdir()
    nb.embed(run=run, images=str(images / "top"), out=folder / "b].npz", workers=0)
    nb.reconstruct(run=run, images=str(images / "top"), most=1, out=folder / "[bold]c]")
    told = capsys.readouterr().out
    assert f"embedded: {folder}/b].npz\n" in told
    assert f"in {folder}/[bold]c]\n" in told


def test_embed_never_overwrites(run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "old.npz").write_text("mine")
    with pytest.raises(RunError, match="not overwritten"):
        nb.embed(run=run, images=str(images), out=tmp_path / "old.npz", quiet=True)
    with pytest.raises(ConfigError, match=r"\.parquet or \.npz"):
        nb.embed(run=run, images=str(images), out=tmp_path / "old.csv", quiet=True)
    with pytest.raises(RunError, match="does not exist"):
        nb.embed(run=run, images=str(images), out=tmp_path / "none" / "f.npz", quiet=True)


def test_knn_on_given_and_on_the_runs_own_data(run: Path, images: Path) -> None:
    own = nb.knn(run=run, k=[1, 3], quiet=True)
    assert own[1] == 100.0  # bank and queries are the same images
    assert nb.knn(run=run, data={"train": images, "val": str(images)}, k=[1, 3], quiet=True) == own
    with pytest.raises(DataError, match="has a label"):
        nb.knn(run=run, data={"train": str(images / "top")}, quiet=True)
    with pytest.raises(ConfigError, match=r"--data\.train"):
        nb.knn(run=run / "exported", quiet=True)


def test_knn_matches_classes_by_name(run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images / "top", tmp_path / "val" / "top")
    shutil.copytree(images / "top", tmp_path / "other" / "bottom")
    assert nb.knn(run=run, data={"train": images, "val": tmp_path / "val"}, k=[1], quiet=True)[1] == 100.0
    with pytest.raises(DataError, match="no class is in both"):
        nb.knn(run=run, data={"train": images, "val": tmp_path / "other"}, quiet=True)


def test_labels_that_come_with_the_items(run: Path) -> None:
    class Pairs:
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return np.full((16, 16, 3), 30 * index, dtype=np.uint8), index // 4

    assert nb.knn(run=run, data={"train": Pairs(), "val": Pairs()}, k=[1], quiet=True)[1] == 100.0


def test_tables_with_another_column_and_several_parquet_files(run: Path, images: Path, tmp_path: Path) -> None:
    for name in ("top", "left"):
        content = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted((images / name).iterdir())]
        pq.write_table(pa.table({"img": content}), tmp_path / f"{name}.parquet")
    files = [str(tmp_path / "left.parquet"), str(tmp_path / "top.parquet")]
    made = nb.embed(run=run, images=files, image_column="img", quiet=True)
    assert np.allclose(made.features, nb.embed(run=run, images=str(images), quiet=True).features, atol=1e-5)


def test_reconstruct_draws_every_image_and_a_sheet(run: Path, images: Path, tmp_path: Path) -> None:
    folder = nb.reconstruct(run=run, images=str(images), out=tmp_path / "pictures", most=3, quiet=True)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000-000.png", "001-008.png", "002-004.png", "contact-sheet.png", "reconstructions.npz"]
    with pytest.raises(RunError, match="nothing is ever overwritten"):
        nb.reconstruct(run=run, images=str(images), out=folder, quiet=True)


def test_a_run_without_an_export_is_used_from_its_checkpoint(run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("exported"))
    a, b = (nb.embed(run=r, images=str(images), quiet=True).features for r in (run, tmp_path / "copy"))
    assert np.array_equal(a, b)


def test_doctor_finds_versions_and_devices() -> None:
    found = nb.doctor(quiet=True)
    assert found["torch"].startswith("2.")
    assert "cores" in found["cpu"]
    assert "GB" in found["free disk here"]


def test_demo_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextblock.jobs.demo.PER_ORIGINAL", 1)
    monkeypatch.setattr("nextblock.jobs.demo_generator.SAMPLES", 80)
    monkeypatch.setattr("nextblock.jobs.demo_generator.STEPS", 2)
    made = nb.demo(out=tmp_path / "demo", epochs=0.1, generator_epochs=0.2, compare=True)
    told = capsys.readouterr().out
    names = [row["name"] for row in made["rows"]]
    assert len(names) == 4
    assert json.loads((tmp_path / "demo" / "results.json").read_text())["rows"] == made["rows"]
    assert [row["images"] for row in made["generated"]] == [[80, 1437], [80, 1437], [718, 719]]
    assert all(0 <= row["frechet"] < 10 for row in made["generated"])
    pictures = ("accuracy.png", "curves.png", "reconstructions/contact-sheet.png", "generated-cells.png")
    for picture in (*pictures, "generated-patches.png"):
        assert (tmp_path / "demo" / picture).is_file()
        assert picture.split("/")[-1] in told.replace("\n", "")
    by_name = {row["name"]: row for row in made["rows"]}
    assert by_name["raw pixels"]["linear"] < 40


def test_scattered_digits_are_split_by_original() -> None:
    from nextblock.data.digits import on_canvas, plain_digits, scattered_digits

    train, held_out = scattered_digits(0, 2)
    assert not set(train.originals) & set(held_out.originals)
    assert len(train.images) == 2 * (1797 - 360)
    plain, _ = plain_digits()
    assert set(plain.originals) == set(train.originals)
    assert np.array_equal(on_canvas(plain.images)[:, 8:24, 8:24], plain.images)
    again, _ = scattered_digits(0, 2)
    assert np.array_equal(train.images, again.images)
    assert not np.array_equal(train.images, scattered_digits(1, 2)[0].images)
