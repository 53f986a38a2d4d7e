"""Sampling as a job: which images, in which folder, made by what; going on, refusing, and what is made of them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from rich.console import Console
from torch import Tensor

from nextblock.checkpoints.pretrained import save_pretrained
from nextblock.data.latents import adm_center_crop
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import Source, open_source
from nextblock.errors import CheckpointError, ConfigError, DataError, RunError
from nextblock.jobs.sample import sample
from nextblock.jobs.sample_classes import chosen_classes
from nextblock.jobs.sample_folder import SampleFolder
from nextblock.jobs.sample_images import ImageMaker
from nextblock.jobs.sample_run import SampleRun
from nextblock.jobs.sample_settings import SampleSettings
from nextblock.training.config import TrainingConfig
from nextblock.training.launch import launch
from nextblock.vae import Pixels
from nextblock.xar.config import XARConfig
from nextblock.xar.model import XAR
from nextblock.xar.sampler import sample_latents

NAMES = ["apple", "Pear", "10", "fig, common"]


@dataclass
class Opened:
    """What `open_generator` gives."""

    model: XAR
    decoder: Any
    classes: list[str]
    preprocessing: Preprocessing
    where: Path


class Doubled(Pixels):
    """Stands in for a VAE: twice as many pixels, and latents of half their size."""

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        assert noise is not None
        assert not noise.any()
        return images[:, :, ::2, ::2] / 2

    def identity(self) -> dict[str, Any]:
        return {"kind": "doubled", "path": "anywhere"}

    def decode(self, latents: Tensor) -> Tensor:
        return (latents * 2).repeat_interleave(2, 2).repeat_interleave(2, 3)


def opened(classes: Sequence[str] = NAMES, channels: int = 3, decoder: Any = None, **model: Any) -> Opened:
    torch.manual_seed(0)
    sizes = {"latent_size": (4, 8), "patch_size": 1, "entity_size": (2, 4), "width": 16, "depth": 2, "num_heads": 2}
    config = XARConfig(**{**sizes, "latent_channels": channels, "num_classes": len(classes), **model})
    factor = 2 if decoder is not None else 1
    preprocessing = Preprocessing((config.latent[0] * factor, config.latent[1] * factor), channels=channels)
    return Opened(XAR(config).eval(), decoder or Pixels(channels), list(classes), preprocessing, Path("somewhere"))


def settings(**values: Any) -> SampleSettings:
    return SampleSettings(**{"classes": (0, 3), "n": 7, "steps": 2, "solver": "euler", "batch_size": 3, **values})


def job(
    found: Opened | None = None, known: Source | None = None, draw: Any = sample_latents, **values: Any
) -> SampleRun:
    found = opened() if found is None else found
    fabric = launch(TrainingConfig(device="cpu"))
    maker = ImageMaker(found, settings(**values), fabric.device, draw, known)  # type: ignore[arg-type]
    return SampleRun(maker, fabric, console=Console(quiet=True))


def pixels(folder: Path) -> dict[str, bytes]:
    return {file.name: np.asarray(Image.open(file)).tobytes() for file in sorted((folder / "images").iterdir())}


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (None, (0, 1, 2, 3)), ("all", (0, 1, 2, 3)), ("apple", (0,)), ("APPLE, pear", (0, 1)), ("3,apple,3", (3, 0, 3)),
        ("10", (2,)), (["10", 1], (2, 1)), (2, (2,)), ("fig, common", (3,)), ("1,Fig,common,0", (1, 3, 0)),
    ],
)  # fmt: skip
def test_classes_are_named_or_numbered(given: Any, numbers: tuple[int, ...]) -> None:
    assert chosen_classes(given, NAMES) == numbers


@pytest.mark.parametrize(
    ("given", "names", "told"),
    [
        ("aple", NAMES, "no class 'aple'. Did you mean 'apple'"), ("4", NAMES, "class 4 is out of range: .* 0 to 3"),
        ("-1", NAMES, "class -1 is out of range"), ([True], NAMES, "out of range"), ("a", ["A", "a", "b"], None),
        ("CAT", ["Cat", "cat"], "any of Cat, cat"), ("0", [], "unconditional"), (" , ", NAMES, "names no class"),
    ],
)  # fmt: skip
def test_classes_that_are_not_there_are_told(given: Any, names: list[str], told: str | None) -> None:
    if told is None:
        assert chosen_classes(given, names) == (1,)
        return
    with pytest.raises(ConfigError, match=told):
        chosen_classes(given, names)


def test_every_image_is_the_samplers_own_for_its_number_and_class(tmp_path: Path) -> None:
    found = opened()
    made = job(found, guidance=2.0, guidance_interval=(0.0, 0.9)).make(tmp_path / "out", npz=True, animated=2)
    assert (made.images, made.finished, made.signal) == (7, True, 0)
    labels = torch.tensor([0, 3, 0, 3, 0, 3, 0])
    with torch.no_grad():
        latents = sample_latents(
            found.model, labels, steps=2, solver="euler", guidance=2.0, guidance_interval=(0.0, 0.9), seed=0
        )
    expected = ((latents.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    folder = SampleFolder(tmp_path / "out", 7)
    assert [file.name for file in sorted(folder.images.iterdir())] == [f"{i:06d}.png" for i in range(7)]
    for i in range(7):
        assert abs(folder.read(i) - expected[i]).max() <= 0.51  # batches of 3, not 7: rounding
    with np.load(folder.npz) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(arrays["arr_0"], np.stack([folder.read(i) for i in range(7)]))
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(arrays["arr_1"], labels.numpy())
    assert zipfile.ZipFile(folder.npz).testzip() is None
    record = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert record["settings"]["guidance"] == 2.0
    assert record["class_names"] == ["apple", "fig, common"]
    assert record["finished"]
    assert len(record["source"]["weights_sha256"]) == 64
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"images", "sample.json", "contact-sheet.png", "entities.gif", "samples.npz"}


def test_other_seeds_and_classes_are_other_images(tmp_path: Path) -> None:
    for name, values in {"a": {}, "b": {"seed": 1}, "c": {"classes": (1, 2)}}.items():
        job(**values).make(tmp_path / name)
    a, b, c = (pixels(tmp_path / name) for name in "abc")
    assert len(set(a.values())) == 7
    assert all(a[name] != b[name] and a[name] != c[name] for name in a)


def test_gray_and_unconditional(tmp_path: Path) -> None:
    found = opened([], channels=1)
    made = job(found, classes=(), n=2).make(tmp_path / "out", npz=True, animated=1)
    with Image.open(made.folder / "images" / "000001.png") as image:
        assert image.mode == "L"
        gray = np.asarray(image)
    with np.load(made.folder / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"]
        np.testing.assert_array_equal(arrays["arr_0"][1], np.repeat(gray[:, :, None], 3, 2))


def test_what_is_missing_is_made_again_to_the_bit_and_nothing_else(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    job().make(whole, animated=1)
    before = pixels(whole)
    images = whole / "images"
    (images / "000002.png").unlink()
    cut = (images / "000004.png").read_bytes()
    (images / "000004.png").write_bytes(cut[:-20])  # as after a loss of power
    untouched = {file.name: file.stat().st_mtime_ns for file in images.iterdir() if file.name != "000004.png"}
    numbers = []

    def counted(*args: Any, indices: Tensor, **values: Any) -> Tensor:
        numbers.append(indices.tolist())
        return sample_latents(*args, indices=indices, **values)

    assert job(draw=counted).make(whole, animated=1).finished
    assert numbers == [[0, 1, 2], [3, 4, 5]]
    assert pixels(whole) == before
    assert {name: (images / name).stat().st_mtime_ns for name in untouched} == untouched


def test_a_finished_folder_is_told_and_gets_what_else_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job().make(tmp_path / "out")
    before = (tmp_path / "out" / "sample.json").read_text()

    def never(*args: Any, **values: Any) -> Tensor:
        raise AssertionError("nothing is to be made")

    again = job(draw=never)
    again.console = Console()
    assert again.make(tmp_path / "out", npz=True).finished
    assert "holds all 7 images" in capsys.readouterr().out
    assert (tmp_path / "out" / "samples.npz").exists()
    assert (tmp_path / "out" / "sample.json").read_text() == before


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"guidance": 3.0}, "guidance was 1.0, now 3.0"), ({"n": 6}, "n was 7, now 6"),
        ({"n": 8, "seed": 2}, "seed was 0, now 2"),
        ({"classes": (1,)}, r"classes was \[0, 3\], now \[1\]"), ({"batch_size": 4}, "batch_size was 3, now 4"),
    ],
)  # fmt: skip
def test_other_settings_are_refused_by_name(tmp_path: Path, values: dict[str, Any], told: str) -> None:
    job().make(tmp_path / "out")
    with pytest.raises(RunError, match=told):
        job(**values).make(tmp_path / "out")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    job().make(tmp_path / "out")
    other = opened()
    torch.nn.init.ones_(other.model.position1)
    with pytest.raises(RunError, match="weights_sha256 was"):
        job(other).make(tmp_path / "out")


def test_settings_may_change_as_long_as_there_is_no_image(tmp_path: Path) -> None:
    def failing(*args: Any, **values: Any) -> Tensor:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        job(draw=failing).make(tmp_path / "out")
    job(n=2).make(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "sample.json").read_text())["settings"]["n"] == 2


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("dear")
    with pytest.raises(RunError, match="not empty"):
        job().make(tmp_path / "out")
    (tmp_path / "out" / "sample.json").write_text("{}")
    with pytest.raises(RunError, match="not what was written: it lacks settings, source"):
        job().make(tmp_path / "out")
    (tmp_path / "out" / "sample.json").write_text("{")
    with pytest.raises(RunError, match="cannot be read"):
        job().make(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"thesis.tex", "sample.json"}


def test_numbers_that_are_not_finite_are_told_and_not_written(tmp_path: Path) -> None:
    def broken(model: XAR, labels: Tensor, **values: Any) -> Tensor:
        return torch.full((len(labels), 3, 4, 8), float("nan"))

    with pytest.raises(CheckpointError, match=r"not finite: the training diverged .*guidance 9 is too strong"):
        job(draw=broken, guidance=9.0).make(tmp_path / "out")
    assert not list((tmp_path / "out" / "images").iterdir())


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"guidance": -1.5}, "guidance must be 0 or more .* got -1.5"),
        ({"classes": (), "guidance": 2.0}, "unconditional"), ({"steps": 0}, "--steps must be at least 1; got 0"),
        ({"solver": "huen"}, "Did you mean 'heun'"), ({"n": 0}, "--n must be"), ({"batch_size": 0}, "--batch_size"),
        ({"state": "float16"}, "'float64' or 'float32'"),
        ({"guidance_schedule": "linaer"}, "'linear'"), ({"guidance_interval": (0.5, 0.1)}, "guidance_interval"),
        ({"time_grid": "publshed"}, "'published'"), ({"precision": "fp8"}, "precision must be"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        settings(**values)


def test_the_animation_starts_gray_and_ends_with_the_images(tmp_path: Path) -> None:
    made = job(n=3, steps=3).make(tmp_path / "out", animated=2)
    with Image.open(made.folder / "entities.gif") as moving:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(moving)]
    # 4 entities of 3 steps, and the finished images (equal to the last step: one frame that stays longer).
    assert len(frames) in (12, 13)
    scale, gap = 24, 6
    first, last = (
        frame[gap + scale // 2 : -gap : scale, gap + scale // 2 : gap + 8 * scale : scale]
        for frame in (frames[0], frames[-1])
    )
    assert first.shape == (4, 8, 3)
    assert (first[2:] == 128).all()
    assert (first[:2, 4:] == 128).all()
    assert not (first[:2, :4] == 128).all()
    assert abs(last.astype(int) - SampleFolder(made.folder, 3).read(0)).max() <= 2


@pytest.mark.parametrize("ordering", ["scales", "whole", "subsamples", "patches"])
def test_every_ordering_is_sampled_and_shown(tmp_path: Path, ordering: str) -> None:
    found = opened(ordering=ordering, entity_size=2, decoder=Doubled())
    made = job(found, n=2).make(tmp_path / "out", animated=2)
    assert SampleFolder(made.folder, 2).read(1).shape == (8, 16, 3)
    with Image.open(made.folder / "entities.gif") as moving:
        assert getattr(moving, "n_frames", 1) >= 2


def pictures(folder: Path, count: int = 2) -> Source:
    folder.mkdir()
    for i in range(count):
        values = np.random.default_rng(i).integers(0, 256, (4, 8, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{i}.png")
    return open_source(str(folder))


def test_known_entities_come_from_the_images_and_the_rest_does_not(tmp_path: Path) -> None:
    found, known = opened(), pictures(tmp_path / "given")
    found.preprocessing = Preprocessing((4, 8), resize_px=4)
    job(found, known, known_entities=3, n=5).make(tmp_path / "out", animated=1)
    folder = SampleFolder(tmp_path / "out", 5)
    for i in range(5):
        given = np.asarray(Image.open(tmp_path / "given" / f"{i % 2}.png"))
        np.testing.assert_array_equal(folder.read(i)[:2], given[:2])
        np.testing.assert_array_equal(folder.read(i)[2:, :4], given[2:, :4])
        assert (folder.read(i)[2:, 4:] != given[2:, 4:]).any()
    other = pictures(tmp_path / "others", 3)
    with pytest.raises(RunError, match="continue_from was"):
        job(found, other, known_entities=3, n=5).make(tmp_path / "out")


def test_known_images_are_cropped_as_those_of_a_cache_and_encoded_without_noise(tmp_path: Path) -> None:
    found = opened(decoder=Doubled(), latent_size=4, entity_size=2)
    (tmp_path / "given").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "given" / "0.png")
    job(found, open_source(str(tmp_path / "given")), known_entities=2, n=1).make(tmp_path / "out")
    shown = SampleFolder(tmp_path / "out", 1).read(0)
    crop = adm_center_crop(values, 8)
    np.testing.assert_array_equal(shown[:4], crop[:4:2, ::2].repeat(2, 0).repeat(2, 1))
    assert (shown[4:] != crop[4::2, ::2].repeat(2, 0).repeat(2, 1)).any()


def test_a_broken_image_cannot_be_continued(tmp_path: Path) -> None:
    known = pictures(tmp_path / "given")
    (tmp_path / "given" / "1.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"1\.png cannot be continued"):
        job(known=known, known_entities=1).make(tmp_path / "out")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported weights of a tiny generator that has learned nothing."""
    found = opened(channels=1)
    about = {"vae": Pixels(1).identity(), "classes": NAMES, "image_size_px": [4, 8], "channels": 1, "weights": "ema"}
    folder = tmp_path_factory.mktemp("generator") / "exported"
    return save_pretrained(folder, found.model, found.preprocessing.to_dict(), "", {"generator": about})


def test_the_job_makes_images_from_exported_weights(weights: Path, tmp_path: Path) -> None:
    made = sample(
        run=weights, classes="Apple,10", n=3, steps=2, guidance=2, guidance_interval="0.1,0.9", out=tmp_path / "out",
        device="cpu", quiet=True,
    )  # fmt: skip
    record = json.loads((made.folder / "sample.json").read_text())
    assert record["class_names"] == ["apple", "10"]
    assert record["settings"]["guidance_interval"] == [0.1, 0.9]
    assert record["settings"]["precision"] == "fp32"
    assert record["source"]["weights"] == "ema"
    assert record["run"] == str(weights)
    assert len(pixels(made.folder)) == 3


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"guidance_interval": "0.1"}, "must be two times"), ({"guidance_interval": "a,b"}, "must be two times"),
        ({"device": "tpu"}, "device must be"), ({"devices": -1}, "--devices must be"),
        ({"animation": -1}, "--animation must be"), ({"precision": "bf16", "device": "cpu"}, "needs a CUDA device"),
        ({"classes": "appel"}, "Did you mean 'apple'"), ({"known_entities": 1}, "Give --continue_from"),
        ({"continue_from": "given"}, "between 1 and 3"),
        ({"continue_from": "x", "known_entities": 4}, "between 1 and 3"),
    ],
)  # fmt: skip
def test_what_the_job_refuses_before_it_makes_a_folder(
    weights: Path, tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        sample(**{"run": weights, "out": tmp_path / "out", "device": "cpu", "quiet": True, **values})
    assert not (tmp_path / "out").exists()


def test_the_solvers_state_can_be_float32() -> None:
    assert settings(state="float32").for_sampler()["state_dtype"] == torch.float32
    assert settings().for_sampler()["state_dtype"] == torch.float64
