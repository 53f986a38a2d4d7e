"""A run on a stream goes on exactly where it was, with the same processes and workers; all else is refused."""

from __future__ import annotations

import csv
import gzip
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from faults.forked_ranks import Ranks
from safetensors.torch import load_file

from killed import Killed
from nextblock.data import heartbeat
from nextblock.errors import ConfigError, DataError, RunError
from nextblock.jobs import training_run
from nextblock.jobs.knn import knn
from nextblock.jobs.pretrain import pretrain
from nextblock.jobs.profile import profile
from nextblock.jobs.run import Run
from nextblock.jobs.train_generator import train_generator
from nextblock.jobs.training_run import StopRequest, TrainingRun
from nextblock.training.checkpoint import newest_checkpoint
from nextblock.training.loop import Loss, NotFinite
from nextblock.training.run_folder import read_metrics
from tiny_run import tiny, write_images

SIZES = (9, 3, 12, 6)  # rows of the files: an epoch is no whole number of batches, and parts are not equal
STEPS = 9


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """30 images of two classes."""
    files = sorted(write_images(tmp_path_factory.mktemp("images") / "images", 15).rglob("*.png"))
    return [{"image": {"bytes": file.read_bytes(), "path": None}, "label": file.parent.name == "top"} for file in files]


@pytest.fixture(scope="module")
def parquet(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, start = tmp_path_factory.mktemp("parquet"), 0
    for number, size in enumerate(SIZES):
        pq.write_table(pa.Table.from_pylist(rows[start : start + size]), folder / f"{number}.parquet", row_group_size=4)
        start += size
    return folder


def wanted(parquet: Path, **data: Any) -> dict[str, dict[str, Any]]:
    given = {"train": f"hf-stream:parquet:{parquet}/*.parquet", "length": sum(SIZES)}
    training = {"epochs": STEPS * 8 / 30, "checkpoint_every_steps": 4, "per_device_batch": 3}
    return tiny(data=given | data, training=training, watch={"pictures": 0, "every_epochs": 100})


def started(out: Path, sections: dict[str, Any], **more: Any) -> Any:
    return pretrain(**sections, config="xtra_cifar10", out=out, quiet=True, **more)


def same(a: Path, b: Path) -> bool:
    """Losses of every step, and weights, to the bit."""
    losses = [[(row["step"], row["loss"]) for row in read_metrics(run / "metrics.csv")] for run in (a, b)]
    weights = [load_file(run / "exported" / "model.safetensors") for run in (a, b)]
    assert len(losses[0]) == STEPS
    return losses[0] == losses[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Run.loss

    def loss(run: Run) -> Loss:
        inner = make(run)

        def dying(model: Any, batch: Any, now: int) -> torch.Tensor:
            if now == step:
                raise Killed
            return inner(model, batch, now)

        return dying

    monkeypatch.setattr(Run, "loss", loss)
    monkeypatch.setattr(TrainingRun, "require_room", lambda run: None)  # which asks for a loss too


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_to_the_bit(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    sections, whole, cut = wanted(parquet, workers=workers), tmp_path / "whole", tmp_path / "cut"
    started(whole, sections)
    for step in (2, 6):  # before the first checkpoint, and after one; then to the end
        with monkeypatch.context() as patch:
            killed_at(step, patch)
            with pytest.raises(Killed):
                pretrain(resume=cut, quiet=True) if cut.exists() else started(cut, sections)
        at, _ = newest_checkpoint(cut / "checkpoints")
        assert at.name == f"step-{0 if step == 2 else 4:08d}"
    assert pretrain(resume=cut, quiet=True).finished
    assert same(cut, whole)


def stopped(out: Path, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__call__", lambda stop: True)
        assert not started(out, sections).finished


def test_what_a_stream_cannot_go_on_with_is_refused(
    parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    stopped(out, wanted(parquet, workers=2), monkeypatch)
    before = sorted(out.rglob("*"))
    with pytest.raises(RunError, match=r"with 2 workers each, now there are 1 with 1.*set data.workers to 2"):
        pretrain(resume=out, data={"workers": 1}, quiet=True)
    with pytest.raises(RunError, match=r"3 forward passes a step.* now there are 1. Set training.per_device_batch"):
        pretrain(resume=out, training={"per_device_batch": 0}, quiet=True)
    with pytest.raises(ConfigError, match=r"data.length was 30, now 31"):
        pretrain(resume=out, data={"length": 31}, quiet=True)
    fewer = f"hf-stream:parquet:{parquet}/[0-2].parquet"
    with pytest.raises(RunError, match=r"not those that .* was started on: 1 removed: 3.parquet"):
        pretrain(resume=out, data={"train": fewer}, quiet=True)
    assert sorted(out.rglob("*")) == before


def test_files_that_have_moved_are_the_same(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut, moved = tmp_path / "whole", tmp_path / "cut", tmp_path / "moved"
    started(whole, wanted(parquet))
    stopped(cut, wanted(parquet), monkeypatch)
    moved.symlink_to(parquet)
    monkeypatch.chdir(tmp_path)
    pretrain(resume=cut, data={"train": "hf-stream:parquet:moved/*.parquet"}, quiet=True)
    assert same(cut, whole)


def test_another_revision_of_the_hub_is_told(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def at(revision: str, *names: str) -> datasets.IterableDataset:
        files = [f"hf://datasets/a/b@{revision}/data/{name}.parquet" for name in names]
        return datasets.IterableDataset.from_generator(
            lambda files: (row for _ in files for row in rows), features=_features(), gen_kwargs={"files": files}
        )

    out = tmp_path / "run"
    stopped(out, wanted(Path(), train=at("1234", "y", "x")), monkeypatch)
    with gzip.open(out / "data_manifest.txt.gz", "rt") as lines:
        names = [f"hf://datasets/a/b/data/{name}.parquet" for name in "xy"]
        assert lines.read().splitlines() == [f"0\t{name}" for name in names]
    with pytest.raises(RunError, match=r"1 added: hf://datasets/a/b/data/z.parquet; 1 removed: .*/y.parquet"):
        pretrain(resume=out, data={"train": at("1234", "x", "z")}, quiet=True)
    capsys.readouterr()
    assert pretrain(resume=out, data={"train": at("5678", "y", "x")}).finished
    assert "stream is of revision 5678 now, of 1234 when the run began" in capsys.readouterr().out


def test_an_epoch_must_be_told_and_for_streams_only(parquet: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a stream.*set data.length to how many make an epoch"):
        started(tmp_path / "a", wanted(parquet, length=0))
    with pytest.raises(ConfigError, match=r"data.length is for streams; .* are counted. Leave it out"):
        started(tmp_path / "b", wanted(parquet, train=str(images)))
    with pytest.raises(ConfigError, match=r"data.length must be 0 or more; got -1"):
        started(tmp_path / "c", wanted(parquet, length=-1))
    assert not list(tmp_path.iterdir())


def test_jobs_that_need_images_by_number_refuse_streams(parquet: Path, images: Path, tmp_path: Path, run: Path) -> None:
    stream = f"hf-stream:parquet:{parquet}/*.parquet"
    small = {"training": {"device": "cpu"}, "quiet": True}
    with pytest.raises(DataError, match="is a stream"):
        train_generator(config="xar_cifar10", data={"train": stream}, out=tmp_path / "a", **small)
    with pytest.raises(DataError, match="is a stream"):
        profile(config="xtra_cifar10", data={"train": stream, "length": 30}, out=tmp_path / "b", **small)
    with pytest.raises(DataError, match="is a stream"):
        started(tmp_path / "c", wanted(parquet, val=stream))
    with pytest.raises(DataError, match="is a stream"):
        knn(run=run, data={"train": stream, "val": str(images)}, quiet=True)


def test_a_python_stream_watched_on_validation_images(
    rows: list[dict[str, Any]], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = datasets.IterableDataset.from_generator(lambda: iter(rows), features=_features())
    sections = wanted(Path(), train=made, val=str(images))
    pretrain(**sections | {"watch": {"pictures": 2}}, config="xtra_cifar10", out=tmp_path / "run")
    last = read_metrics(tmp_path / "run" / "metrics.csv")[-1]
    assert all(last[name] for name in ("val_loss", "knn", "effective_rank"))
    assert list((tmp_path / "run" / "figures").glob("reconstructions-step-*.png"))
    assert "nothing but the loss is measured" not in capsys.readouterr().out
    card = (tmp_path / "run" / "exported" / "README.md").read_text()
    assert "stream: streamed from 1 file, said to hold 30 images" in card


def _features() -> datasets.Features:
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    return datasets.Features({"image": image, "label": datasets.Value("bool")})


def test_a_recipe_is_chosen_by_the_first_images(
    parquet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"train": f"hf-stream:parquet:{parquet}/*.parquet", "length": 30, "workers": 3}
    small = {"width": 16, "depth": 1, "num_heads": 2, "predictor_width": 16, "predictor_depth": 1}
    pretrain(data=data, model=small, training={"epochs": 1, "device": "cpu"}, out=tmp_path / "run")
    told = capsys.readouterr().out
    assert "*.parquet: streamed from 4 files, said to hold 30 images. No --config given" in told
    assert "the images' shorter side is about 20 px" in told
    assert "4 files cannot be shared evenly by 3 loading processes" in told
    assert "nothing but the loss is measured while training" in told


def test_a_batch_that_is_gone_is_not_kept(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exploding(*_: Any, **__: Any) -> None:
        raise NotFinite("not finite.", 0, 0)

    monkeypatch.setattr(training_run, "train", exploding)
    with pytest.raises(RunError, match=r"not finite. The batch could not be kept: a streamed image is not read twice"):
        started(tmp_path / "run", wanted(parquet))


def test_a_stream_that_hangs_is_told_as_soon_as_any_source(
    rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck() -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            if number == 12 and multiprocessing.parent_process() is not None:
                threading.Event().wait(60)
            yield row

    monkeypatch.setattr(heartbeat, "LOOK_S", 0.2)
    made = datasets.IterableDataset.from_generator(stuck, features=_features())
    start = time.monotonic()
    with pytest.raises(DataError, match=r"data worker 0 hangs: after 1 s it is still reading stream epoch0/part0of1"):
        started(tmp_path / "run", wanted(Path(), train=made, workers=1, timeout_s=1))
    assert time.monotonic() - start < 15


def test_a_broken_image_is_listed_once(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """And does not stop a run that meets it in each of many epochs."""
    bad = {"image": {"bytes": b"no image", "path": None}, "label": False}
    made = datasets.IterableDataset.from_generator(lambda: iter([*rows[:3], bad]), features=_features())
    run = tmp_path / "run"
    started(run, wanted(Path(), train=made, length=4))
    with (run / "bad_samples.csv").open(newline="", encoding="utf-8") as file:
        (listed,) = csv.DictReader(file)
    assert listed["name"].startswith("stream sha256:")
    assert read_metrics(run / "metrics.csv")[-1]["bad_samples"] == "1.0"


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as found:
        yield found


def test_two_processes(ranks: Ranks, parquet: Path, tmp_path: Path) -> None:
    def trained(out: Path, **values: int) -> None:
        arguments = {"kind": "xtra", "sections": wanted(parquet), "out": str(out), "workers": 1} | values
        ranks.run("same_stream:train", arguments["world"], arguments)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    trained(whole, world=2)
    trained(cut, world=2, stop_after=5)
    with pytest.raises(AssertionError, match=r"to 2 processes with 1 workers each, now there are 1 with 1"):
        trained(cut, world=1)
    trained(cut, world=2)
    assert same(cut, whole)
