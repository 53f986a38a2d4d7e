"""prepare: what is in the folder, what happens to what was stopped, what is refused, and who reads it."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from killed import Killed, killed_at
from nextblock.data.decode import decode
from nextblock.data.prepared import index as index_files
from nextblock.data.prepared import making, open_prepared, shards
from nextblock.data.sources import open_source
from nextblock.errors import ConfigError, DataError, RunError
from nextblock.jobs import images_record
from nextblock.jobs import prepare as job
from nextblock.jobs.embed import embed
from nextblock.jobs.knn import knn
from nextblock.jobs.prepare import prepare
from nextblock.jobs.pretrain import pretrain
from nextblock.training.run_folder import read_metrics
from nextblock.training.signals import Stopped, StopRequest
from tiny_run import tiny


@pytest.fixture
def asked(images: Path) -> dict[str, Any]:
    """24 images of 20 x 24 px, kept as raw pixels of 1,453 bytes."""
    return {"data": images, "workers": 0, "quiet": True}


SMALL_MB: Any = 7000 / 2**20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of five images; `shard_mb` counts in whole MiB."""
    begin = job.begin

    def smaller(*arguments: Any) -> Any:
        about = dataclasses.replace(begin(*arguments), shard_mb=SMALL_MB)
        making.write_about(arguments[0], about)
        return about

    monkeypatch.setattr(job, "begin", smaller)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_it_holds_the_images_with_their_names_labels_and_classes(asked: dict[str, Any], tmp_path: Path) -> None:
    folder = prepare(**asked, out=tmp_path / "made")
    made, given = open_source(folder), open_source(asked["data"])
    assert (len(made), made.classes) == (24, ("left", "top"))
    for i in range(24):
        assert made.name(i) == given.name(i)
        assert made[i].label == given[i].label
        assert np.array_equal(decode(made[i].content, "x"), decode(given[i].content, "x"))
    assert sorted(content(folder)) == ["data_manifest.txt.gz", "index.bin", "prepared.json", "shard-00000.bin"]
    about = json.loads((folder / "prepared.json").read_text())
    assert about["data"]["count"] == 24
    assert about["shards"]["0"]["kinds"] == {"raw": 24}
    assert about["encoding"] == {
        "short_side": 320, "quality": 90, "format": "auto", "chroma": "4:2:0", "exif_orientation": True
    }  # fmt: skip
    assert set(about["made_with"]) == {"nextblock", "pillow", "libjpeg"}


@pytest.mark.parametrize("what", ["arrays", "objects", "Parquet", "a split", "prepared"])
def test_any_source_can_be_prepared(what: str, asked: dict[str, Any], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3), dtype=np.uint8)
    data: Any = (pixels, np.arange(6) % 2)
    more: dict[str, Any] = {}
    if what == "objects":
        data = [{"image": Image.fromarray(image), "label": i % 2} for i, image in enumerate(pixels)]
    elif what == "Parquet":
        rows = [{"bytes": making.encode(image, "x", making.Encoding(format="png")).content} for image in pixels]
        data = tmp_path / "some.parquet"
        pq.write_table(pa.table({"picture": rows, "kind": [i % 2 for i in range(6)]}), data)
        more = {"image_column": "picture", "label_column": "kind"}
    elif what == "a split":
        for split in ("train", "val"):
            for i, image in enumerate(pixels):
                path = tmp_path / "splits" / split / f"{i % 2}" / f"{i // 2}{split}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
        data, more = tmp_path / "splits", {"split": "val"}
    elif what == "prepared":
        data = prepare(**asked | {"data": data}, out=tmp_path / "once")
    made = open_prepared(prepare(**asked | {"data": data}, **more, out=tmp_path / "made"))
    order = [0, 2, 4, 1, 3, 5] if what == "a split" else range(6)
    labels = made.labels().tolist()
    assert labels == [i % 2 for i in order]
    assert all(np.array_equal(made[row].content, pixels[i]) for row, i in enumerate(order))
    if what == "a split":
        assert made.name(3) == "1/0val.png"


def test_the_number_of_workers_changes_nothing(asked: dict[str, Any], tmp_path: Path, small: None) -> None:
    asked |= {"format": "jpeg", "short_side": 16}
    folders = [prepare(**asked | {"workers": workers}, out=tmp_path / str(workers)) for workers in (0, 1, 2)]
    whole = content(folders[0])
    assert all(content(folder) == whole for folder in folders[1:])


def stop_at(patch: pytest.MonkeyPatch, moment: str) -> None:
    if moment == "begun":
        patch.setattr(images_record, "write_manifest", killed_at(0, images_record.write_manifest))
    elif moment == "first image":
        patch.setattr(making, "encode", killed_at(0, making.encode))
    elif moment == "third shard":
        patch.setattr(shards.ShardWriter, "add", killed_at(12, shards.ShardWriter.add))
    elif moment == "shard on disk, not recorded":
        patch.setattr(making, "write_about", killed_at(2, making.write_about))
    elif moment == "before the index":
        patch.setattr(making, "write_index", killed_at(0, making.write_index))
    else:
        patch.setattr(making, "write_about", killed_at(6, making.write_about))


@pytest.mark.parametrize(
    ("moment", "there"),
    [
        ("begun", 0), ("first image", 0), ("third shard", 10), ("shard on disk, not recorded", 5),
        ("before the index", 24), ("index on disk, not recorded", 24),
    ],
)  # fmt: skip
def test_stopped_anywhere_and_given_again(
    asked: dict[str, Any], tmp_path: Path, small: None, moment: str, there: int
) -> None:
    whole = content(prepare(**asked, out=tmp_path / "made"))
    assert sum(name.startswith("shard-") for name in whole) == 5
    shutil.rmtree(tmp_path / "made")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, moment)
        with pytest.raises(Killed):
            prepare(**asked, out=tmp_path / "made")
    with pytest.raises(DataError, match=f"not finished: {there} of 24 images.*nextblock prepare .*images --out"):
        open_source(tmp_path / "made")
    if moment == "begun":  # before the fixture could make its shards small
        making.write_about(tmp_path / "made", dataclasses.replace(prepared(tmp_path / "made"), shard_mb=SMALL_MB))
    prepare(**asked, out=tmp_path / "made")
    assert content(tmp_path / "made") == whole


def prepared(folder: Path) -> Any:
    return making.About.read(folder)


def test_killed_before_anything_was_written_down(asked: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    for left_over in (".writable", ".prepared.json.partial"):
        (folder / left_over).write_text("{")
    assert len(open_prepared(prepare(**asked, out=folder))) == 24


class StopAfter(StopRequest):
    """Asks for a stop when it is looked at for the second time."""

    looks = 2

    def __call__(self) -> bool:
        self.looks -= 1
        if self.looks == 0:
            self.received = signal.SIGTERM
        return self.received != 0


def test_a_stop_is_heard_and_told_once(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None
) -> None:
    whole = content(prepare(**asked, out=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(job, "StopRequest", StopAfter)
        told = f"give the same command again: nextblock prepare {asked['data']} --out {tmp_path / 'made'}$"
        with pytest.raises(Stopped, match=told) as error:
            prepare(**asked, out=tmp_path / "made")
    assert error.value.signal == signal.SIGTERM
    assert len(prepared(tmp_path / "made").shards) == 3  # of the first sixteen images
    assert not list((tmp_path / "made").glob(".*"))
    prepare(**asked, out=tmp_path / "made")
    assert content(tmp_path / "made") == whole


def test_the_command_to_go_on_has_the_options_that_were_given(asked: dict[str, Any], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "encode", killed_at(3, making.encode))
        with pytest.raises(Killed):
            prepare(**asked, out=tmp_path / "made", short_side=16, format="png", exif_orientation=False)
    told = f"nextblock prepare {asked['data']} --out {tmp_path / 'made'} --short_side=16 --format=png "
    with pytest.raises(DataError, match=f"Go on with: {told}--exif_orientation=False$"):
        open_source(tmp_path / "made")


def test_damaged_shards_are_made_anew(
    asked: dict[str, Any], tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(**asked, out=tmp_path / "made")
    whole = content(folder)
    damaged = bytearray(whole["shard-00001.bin"])
    damaged[100] ^= 1
    (folder / "shard-00001.bin").write_bytes(damaged)
    (folder / "shard-00002.bin").unlink()
    (folder / "shard-00004.bin").write_bytes(whole["shard-00004.bin"][:-5])
    prepare(**asked | {"quiet": False}, out=folder)
    told = capsys.readouterr().out
    assert "shard-00001.bin is damaged or missing, and made anew" in told
    assert "2 of 5 shards" in told
    assert content(folder) == whole
    (folder / "index.bin").write_bytes(whole["index.bin"][:-1] + b"?")
    prepare(**asked | {"quiet": False}, out=folder)
    assert "index.bin is damaged or missing, and made anew" in capsys.readouterr().out
    assert content(folder) == whole


def test_stopped_while_mending(asked: dict[str, Any], tmp_path: Path, small: None) -> None:
    folder = prepare(**asked, out=tmp_path / "made")
    whole = content(folder)
    for number in (0, 1, 4):
        (folder / f"shard-0000{number}.bin").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards.ShardWriter, "add", killed_at(8, shards.ShardWriter.add))
        with pytest.raises(Killed):
            prepare(**asked, out=folder)
    assert sorted(prepared(folder).shards) == [0, 2, 3]
    prepare(**asked, out=folder)
    assert content(folder) == whole


def test_what_is_complete_is_left_alone(
    asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(**asked, out=tmp_path / "made")
    before = times(folder)
    assert prepare(**asked | {"quiet": False, "workers": 2, "max_bad_fraction": 0.5}, out=folder) == folder
    assert "already complete" in capsys.readouterr().out
    assert times(folder) == before


def test_what_it_says(asked: dict[str, Any], tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepare(**asked | {"quiet": False}, out=tmp_path / "made")
    told = capsys.readouterr().out
    assert "24 images to prepare by 1 process: shorter side at most 320 px, JPEG quality 90 (4:2:0)" in told
    assert "\n1 shard: 5 of 24 images" in told
    assert "\n5 shards: 24 of 24 images" in told
    assert "images/s" in told
    before = sum(path.stat().st_size for path in asked["data"].rglob("*.png"))
    assert f"24 images: {before / 2**20:.1f} MiB before, 0.0 MiB now (" in told
    assert sum(record.original_bytes for record in prepared(folder).in_order) == before
    assert f"nextblock pretrain --data.train {folder}" in told


def test_other_settings_and_other_images_are_refused(asked: dict[str, Any], tmp_path: Path) -> None:
    images = shutil.copytree(asked["data"], tmp_path / "images")
    asked |= {"data": images}
    folder = prepare(**asked, out=tmp_path / "made")
    before = times(folder)
    with pytest.raises(ConfigError, match=r"other settings: short_side was 320, now 16; quality was 90, now 80\. Ask"):
        prepare(**asked, out=folder, short_side=16, quality=80)
    with pytest.raises(ConfigError, match="shard_mb was 256, now 1"):
        prepare(**asked, out=folder, shard_mb=1)
    moved = images.rename(tmp_path / "moved")
    prepare(**asked | {"data": moved}, out=folder)  # the same images elsewhere
    (moved / "left").rename(moved / "aleft")
    with pytest.raises(RunError, match=r"images are not those that .* 12 added: aleft/000\.png"):
        prepare(**asked | {"data": moved}, out=folder)
    (moved / "aleft").rename(moved / "left")
    Image.new("RGB", (20, 20)).save(moved / "top" / "new.png")
    with pytest.raises(RunError, match=r"1 added: top/new\.png"):
        prepare(**asked | {"data": moved}, out=folder)
    assert times(folder) == before


def test_other_labels_are_other_images(asked: dict[str, Any], tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    folder = prepare(**asked | {"data": (pixels, np.arange(4))}, out=tmp_path / "made")
    with pytest.raises(RunError, match="other labels"):
        prepare(**asked | {"data": (pixels, np.arange(4)[::-1].copy())}, out=folder)
    unlabelled = open_prepared(prepare(**asked | {"data": pixels}, out=tmp_path / "none"))
    assert unlabelled.labels().tolist() == [-1] * 4
    assert unlabelled[0].label is None
    assert unlabelled.classes is None


def test_broken_images_are_left_out_and_listed(asked: dict[str, Any], tmp_path: Path, small: None) -> None:
    images = shutil.copytree(asked["data"], tmp_path / "images")
    for number in (0, 1, 8):
        (images / "left" / f"{number:03d}.png").write_bytes(b"no image")
    (images / "top" / "011.png").write_bytes(b"")  # the very last one
    asked |= {"data": images}
    made = open_prepared(prepare(**asked, out=tmp_path / "made"))
    assert len(made) == 20
    assert [made.name(i) for i in (0, 6, 19)] == ["left/002.png", "left/009.png", "top/010.png"]
    assert made.labels().tolist() == [0] * 9 + [1] * 11
    with open(made.folder / "bad_samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["position"] for row in rows] == ["0", "1", "8", "23"]
    assert rows[3]["name"] == "top/011.png"
    assert rows[3]["reason"] == "the file is empty"
    for number in range(12):
        (images / "left" / f"{number:03d}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="11 images cannot be decoded, more than the 10 allowed"):
        prepare(**asked, out=tmp_path / "too many")
    assert (tmp_path / "too many" / "bad_samples.csv").is_file()


def test_nothing_but_broken_images(asked: dict[str, Any], tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the images can be decoded: see .*bad_samples\.csv"):
        prepare(**asked | {"data": images}, out=tmp_path / "made")


def test_labels_that_no_class_has(asked: dict[str, Any], tmp_path: Path) -> None:
    source = open_source(asked["data"])
    source.classes = ("left",)  # type: ignore[misc]
    with pytest.raises(DataError, match=r"top/000\.png has the label 1, but there is 1 class"):
        prepare(**asked | {"data": source}, out=tmp_path / "made")
    with pytest.raises(DataError, match=r"array\[0\] has the label 9999999999, but labels go from 0 to 2147483647"):
        data = np.zeros((1, 8, 8), dtype=np.uint8), np.array([9_999_999_999])
        prepare(**asked | {"data": data}, out=tmp_path / "large")


@pytest.mark.parametrize("where", ["shard", "index"])
def test_a_full_disk(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None, where: str
) -> None:
    whole = content(prepare(**asked, out=tmp_path / "made"))
    shutil.rmtree(tmp_path / "made")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def at_the_second_shard(handle: int) -> None:
        (full if os.readlink(f"/proc/self/fd/{handle}").endswith("shard-00001.bin.partial") else fsync)(handle)

    fsync = os.fsync
    with monkeypatch.context() as patch:
        if where == "shard":
            patch.setattr(shards.os, "fsync", at_the_second_shard)
        else:
            patch.setattr(index_files, "read_facts", lambda *given: full(0))
        with pytest.raises(DataError, match=r"cannot write to .*made: No space left.*go on with the same command"):
            prepare(**asked, out=tmp_path / "made")
    assert not list((tmp_path / "made").glob(".*"))
    assert len(prepared(tmp_path / "made").shards) == {"shard": 1, "index": 5}[where]
    prepare(**asked, out=tmp_path / "made")
    assert content(tmp_path / "made") == whole


def test_two_at_once(asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "LOCK_WAIT_S", 0.2)
    folder = prepare(**asked, out=tmp_path / "made")
    with job._alone(folder), pytest.raises(RunError, match=r"another process prepares images in .*made\. Wait"):
        prepare(**asked, out=folder)
    assert prepare(**asked, out=folder) == folder


def test_another_pillow_is_told(
    asked: dict[str, Any], tmp_path: Path, small: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(**asked, out=tmp_path / "made")
    about = prepared(folder)
    making.write_about(folder, dataclasses.replace(about, made_with={"pillow": "1.0"}, index=None))
    prepare(**asked | {"quiet": False}, out=folder)
    assert "begun with pillow 1.0, now " in capsys.readouterr().out


def test_what_is_refused_at_once(asked: dict[str, Any], tmp_path: Path) -> None:
    def refused(match: str, kind: type[Exception] = ConfigError, **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            prepare(**{"out": tmp_path / "x", **asked, **changes})

    refused("needs --out: a new folder for the shards", out=None)
    refused("short_side must be at least 1", short_side=0)
    refused("quality must lie between 1 and 100", quality=0)
    refused("format must be one of", format="webp")
    refused("shard_mb must lie between 1 and 4095; got 4096", shard_mb=4096)
    refused("max_bad_fraction must lie between 0 and 1", max_bad_fraction=2)
    refused("'./nowhere' is neither .* `nextblock datasets` lists", DataError, data="./nowhere")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    refused("not empty, and nothing is ever overwritten", RunError, out=full)
    refused("not empty", RunError, out=asked["data"])
    assert not (tmp_path / "x").exists()


# --- who reads them ----------------------------------------------------------------------------------------


def test_training_from_shards_is_that_from_files_and_goes_on_exactly(
    asked: dict[str, Any], run: Path, tmp_path: Path, small: None
) -> None:
    folder = prepare(**asked, out=tmp_path / "made")  # 20 px: raw, so the same pixels
    sections = tiny(data={"train": str(folder), "val": str(folder), "workers": 1})
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    pretrain(**sections, config="xtra_cifar10", out=whole, quiet=True)
    assert losses(whole) == losses(run)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")  # as if it had been killed after step 4
    pretrain(resume=cut, quiet=True)
    assert losses(cut) == losses(whole)
    a, b = (load_file(path / "exported" / "model.safetensors") for path in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for path in (whole, cut):
        about = json.loads((path / "environment.json").read_text())
        assert about["data"]["description"].startswith(f"{folder}: 24 prepared images")
    shutil.rmtree(folder)
    other = prepare(**asked, out=folder, short_side=16)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    with pytest.raises(RunError, match=r"3 added: shard-00000\.bin sha256:"):
        pretrain(resume=cut, quiet=True)
    assert other == folder


def losses(folder: Path) -> list[str]:
    return [row["loss"] for row in read_metrics(folder / "metrics.csv")]


def test_knn_and_embed_read_them(asked: dict[str, Any], run: Path, tmp_path: Path) -> None:
    folder = prepare(**asked, out=tmp_path / "made")
    found = [embed(run=run, images=str(spec), device="cpu", workers=0, quiet=True) for spec in (asked["data"], folder)]
    assert found[0].names == found[1].names  # type: ignore[union-attr]
    assert np.array_equal(found[0].features, found[1].features)  # type: ignore[union-attr]
    accuracies = [
        knn(run=run, data={"train": str(spec), "val": str(spec)}, k=[3], device="cpu", quiet=True)
        for spec in (asked["data"], folder)
    ]
    assert accuracies[0] == accuracies[1]
