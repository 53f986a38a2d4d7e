"""More images in a folder that holds some: what stays, what is made anew, and kills in between."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from killed import Killed
from nextblock.data.preprocess import Preprocessing
from nextblock.errors import ConfigError, RunError
from nextblock.jobs import sample_folder, sample_images
from nextblock.jobs.opening_generator import OpenedGenerator
from nextblock.jobs.sample_folder import SampleFolder
from nextblock.jobs.sample_images import ImageMaker
from nextblock.jobs.sample_run import SampleRun
from nextblock.jobs.sample_settings import SampleSettings
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import launch
from nextblock.vae import Pixels
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xar.passes import FastPasses
from nextblock.xar.sampler import sample_latents


def job(n: int, draw: Any = sample_latents, **values: Any) -> SampleRun:
    """Batches of 3, classes "a" and "b" in turn."""
    torch.manual_seed(0)
    model = XAR(XARConfig(4, 1, 1, entity_size=2, width=16, depth=1, num_heads=2, num_classes=2)).eval()
    opened = OpenedGenerator(model, Pixels(1), ["a", "b"], Preprocessing((4, 4), channels=1), Path("somewhere"), {})
    settings = SampleSettings(**{"classes": (0, 1), "n": n, "steps": 2, "solver": "euler", "batch_size": 3, **values})
    fabric = launch(TrainingConfig(device="cpu"))
    return SampleRun(ImageMaker(opened, settings, fabric.device, draw), fabric, console=Console(quiet=True))


def images(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def frame_width(folder: Path) -> int:
    with Image.open(folder / "entities.gif") as moving:
        return moving.width


def shown(folder: Path) -> dict[str, Any]:
    """What is made of all images."""
    with np.load(folder / "samples.npz") as arrays:
        npz = [arrays[name].tolist() for name in arrays.files]
    return {"sheet": (folder / "contact-sheet.png").read_bytes(), "width": frame_width(folder), "npz": npz}


def require_whole(folder: Path, n: int, fresh: Path) -> None:
    """As if `fresh`, of as many images from the start; those of a batch that was not full, to rounding."""
    mine, theirs = SampleFolder(folder, n), SampleFolder(fresh, n)
    assert list(images(folder)) == list(images(fresh))
    for i in range(n):
        assert abs(mine.read(i).astype(int) - theirs.read(i)).max() <= 1
    assert len(shown(folder)["npz"][0]) == n
    assert shown(folder)["npz"][1] == shown(fresh)["npz"][1]
    np.testing.assert_array_equal(shown(folder)["npz"][0][n - 1], np.repeat(mine.read(n - 1), 3, 2))
    assert frame_width(folder) == frame_width(fresh)
    with Image.open(mine.sheet) as a, Image.open(theirs.sheet) as b:
        assert a.size == b.size
    record = json.loads((folder / "sample.json").read_text())
    assert record["settings"]["n"] == n
    assert record["finished"]
    assert not list(folder.rglob(".*"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job(8).make(tmp_path_factory.mktemp("fresh") / "out", npz=True, animated=4).folder


@pytest.mark.parametrize("first", [2, 3, 4, 7])
def test_more_images_are_added_and_the_first_stay(tmp_path: Path, fresh: Path, first: int) -> None:
    folder = job(first).make(tmp_path / "out", npz=True, animated=4).folder
    before, stamps = images(folder), {path.name: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    drawn: list[int] = []

    def counted(*args: Any, indices: Tensor, **values: Any) -> Tensor:
        drawn.extend(indices.tolist())
        return sample_latents(*args, indices=indices, **values)

    made = job(8, counted).make(folder, npz=True, animated=4)
    assert (made.images, made.finished) == (8, True)
    assert min(drawn) == first // 3 * 3  # the full batches are not touched
    after = images(folder)
    assert {name: after[name] for name in before} == before
    assert all((folder / "images" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    require_whole(folder, 8, fresh)


def test_a_sample_file_that_was_there_grows_without_being_asked_for(tmp_path: Path, fresh: Path) -> None:
    folder = job(5).make(tmp_path / "out", npz=True, animated=4).folder
    job(8).make(folder, animated=4)
    require_whole(folder, 8, fresh)
    plain = job(5).make(tmp_path / "plain").folder
    job(8).make(plain)
    assert not (plain / "samples.npz").exists()


@pytest.mark.parametrize("moment", ["record", "first batch", "last image", "sheet", "sample file"])
def test_killed_while_it_grows_and_given_again(
    tmp_path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    folder = job(4).make(tmp_path / "out", npz=True, animated=4).folder
    before = images(folder)

    def killed(*args: Any, **values: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "record":
            patch.setattr(sample_folder, "write_text", killed)
        elif moment == "last image":
            write = SampleFolder.write_all
            patch.setattr(SampleFolder, "write_all", lambda self, made: killed() if 7 in made else write(self, made))
        elif moment == "sheet":
            patch.setattr("nextblock.jobs.sample_run.draw_sheet", killed)
        elif moment == "sample file":
            patch.setattr(SampleFolder, "write_npz", killed)
        with pytest.raises(Killed):
            job(8, killed if moment == "first batch" else sample_latents).make(folder, npz=True, animated=4)
    assert {name: images(folder)[name] for name in before} == before
    if moment != "record":
        with pytest.raises(RunError, match="n was 8, now 4"):
            job(4).make(folder)
    job(8).make(folder, animated=4)  # the sample file was there
    require_whole(folder, 8, fresh)


def test_a_job_that_was_not_finished_can_grow(tmp_path: Path, fresh: Path) -> None:
    folder = job(7).make(tmp_path / "out").folder
    for number in (0, 4, 5, 6):
        (folder / "images" / f"{number:06d}.png").unlink()
    (folder / "contact-sheet.png").unlink()
    job(8).make(folder, npz=True, animated=4)
    require_whole(folder, 8, fresh)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"n": 4}, "n was 5, now 4"), ({"n": 8, "seed": 1}, "n was 5, now 8; seed was 0, now 1"),
        ({"n": 1_000_001}, "n was 5, now 1000001"),
    ],
)  # fmt: skip
def test_fewer_images_or_others_are_refused(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    """A millionth image would rename the others: names have six digits, or as many as are needed."""
    folder = job(5).make(tmp_path / "out").folder
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(RunError, match=told):
        job(**values).make(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_compiled_sampling_makes_the_same_images_and_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def plain_backend(model: XAR, *, bf16: bool) -> FastPasses:
        made.append(model)
        return FastPasses(model, bf16=bf16, backend="eager")

    monkeypatch.setattr(sample_images, "FastPasses", plain_backend)
    job(5).make(tmp_path / "plain", npz=True, animated=1)
    job(5, compile=True).make(tmp_path / "compiled", npz=True, animated=1)
    require_whole(tmp_path / "compiled", 5, tmp_path / "plain")
    assert len(made) == 1  # once for all batches
    assert json.loads((tmp_path / "compiled" / "sample.json").read_text())["settings"]["compile"] is True
    with pytest.raises(RunError, match="compile was False, now True"):
        job(5, compile=True).make(tmp_path / "plain", npz=True, animated=1)


def test_a_record_that_does_not_tell_of_compiling_is_one_of_plain_sampling(tmp_path: Path) -> None:
    job(3).make(tmp_path / "made", npz=True, animated=1)
    record = json.loads((tmp_path / "made" / "sample.json").read_text())
    del record["settings"]["compile"]
    (tmp_path / "made" / "sample.json").write_text(json.dumps(record))
    job(4).make(tmp_path / "made", npz=True, animated=1)
    assert len(images(tmp_path / "made")) == 4


def test_what_cannot_be_compiled_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no C++ compiler found")

    torch.compiler.reset()  # what other tests compiled, too often for this to be tried
    monkeypatch.setattr(sample_images, "FastPasses", partial(FastPasses, backend=broken))
    with pytest.raises(ConfigError, match=r"could not be compiled: .*no C\+\+ compiler found.*Leave out --compile"):
        job(3, compile=True).make(tmp_path / "made", npz=False, animated=0)


def test_killed_before_the_first_image_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    for name in ("write_text", "claim_folder"):  # before the record, and before anything
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(sample_folder, name, killed)
            job(3).make(tmp_path / name, npz=False, animated=0)
        job(3).make(tmp_path / name, npz=False, animated=0)
        assert len(images(tmp_path / name)) == 3
