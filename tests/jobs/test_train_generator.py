from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from nextblock.checkpoints.pretrained import load_pretrained, save_pretrained
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.errors import CheckpointError, ConfigError, DataError, RunError
from nextblock.jobs.embed import embed
from nextblock.jobs.generator_data import PixelData
from nextblock.jobs.opening_generator import OpenedGenerator, open_generator
from nextblock.jobs.pretrain import pretrain
from nextblock.jobs.starting import absolute
from nextblock.jobs.train_generator import train_generator
from nextblock.recipes.generator import typed_generator
from nextblock.training.run_folder import read_metrics
from nextblock.vae import Pixels
from nextblock.xar.model import XAR
from nextblock.xar.sampler import sample_latents
from tiny_generator import tiny
from tiny_run import write_images


def start(out: Path, train: Any, sections: dict[str, Any] | None = None, **values: Any) -> Any:
    chosen = tiny(**(sections or {}))
    chosen["data"]["train"] = train
    return train_generator(config="xar_cifar10", out=out, quiet=True, **chosen, **values)


def column(folder: Path, name: str) -> list[str]:
    return [row[name] for row in read_metrics(folder / "metrics.csv")]


@pytest.fixture(scope="session")
def generator(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run with validation images."""
    folder = tmp_path_factory.mktemp("generators") / "tiny"
    start(folder, str(images), {"data": {"val": str(images)}})
    return folder


def test_a_run_leaves_what_is_promised(generator: Path) -> None:
    names = {path.relative_to(generator).as_posix() for path in generator.rglob("*") if path.is_file()}
    assert names >= {
        "config.yaml", "environment.json", "data_manifest.txt.gz", "metrics.csv", "figures/curves.png",
        "figures/samples-ema-step-00000006.png", "figures/samples-raw-step-00000006.png",
        "figures/samples-ema-step-00000003.png", "checkpoints/step-00000006/state.pt",
        *(f"{kind}/{file}" for kind in ("exported", "exported_raw")
          for file in ("config.json", "model.safetensors", "preprocessor_config.json", "README.md")),
    }  # fmt: skip
    rows = read_metrics(generator / "metrics.csv")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert [bool(row["val_loss"] and row["ema_val_loss"]) for row in rows] == [False, False, True] * 2
    assert rows[-1]["val_loss"] != rows[-1]["ema_val_loss"]
    about = json.loads((generator / "exported" / "config.json").read_text())
    assert about["model_type"] == "xar"
    assert about["generator"] == {
        "vae": Pixels(3).identity(), "classes": ["left", "top"], "image_size_px": [8, 8], "channels": 3,
        "weights": "ema",
    }  # fmt: skip
    card = (generator / "exported" / "README.md").read_text()
    assert "48 samples seen" in card
    assert "FID was not measured" in card
    assert "nextblock sample" in card


def test_the_card_tells_what_was_done_rather_than_what_was_asked(images: Path, tmp_path: Path) -> None:
    asked = {"epochs": 0.1, "warmup_epochs": 40, "warmup_start": 0.0, "lr": 0.002}
    start(tmp_path / "one", str(images), {"training": asked, "watch": {"pictures": 0}})
    card = (tmp_path / "one" / "exported" / "README.md").read_text()
    assert "8 samples seen (0.3333 epochs, 1 step of 8)" in card
    assert "learning rate: 0.002 throughout" in card
    assert column(tmp_path / "one", "lr") == ["0.002"]
    longer = asked | {"epochs": 4, "decay_from": 0.5, "final": 0.1}
    start(tmp_path / "more", str(images), {"training": longer, "watch": {"pictures": 0}})
    card = (tmp_path / "more" / "exported" / "README.md").read_text()
    assert "96 samples seen (4 epochs, 12 steps of 8)" in card
    assert (
        "learning rate: 0.002 after 3 steps (1 epoch) of warm-up, constant until 50% of the run, cosine to 0.0002"
        in card
    )
    start(tmp_path / "flat", str(images), {"training": longer | {"decay_from": 1.0}, "watch": {"pictures": 0}})
    card = (tmp_path / "flat" / "exported" / "README.md").read_text()
    assert "learning rate: 0.002 after 3 steps (1 epoch) of warm-up, constant to the end" in card


def test_exported_weights_are_the_average_and_the_last_ones(generator: Path) -> None:
    state = torch.load(generator / "checkpoints" / "step-00000006" / "state.pt", weights_only=True)
    averaged, last = (load_file(generator / name / "model.safetensors") for name in ("exported", "exported_raw"))
    assert all(torch.equal(averaged[name], value) for name, value in state["ema"]["averages"].items())
    assert all(torch.equal(last[name], value) for name, value in state["model"].items())
    assert any(not torch.equal(averaged[name], last[name]) for name in last)
    model, _ = load_pretrained(generator / "exported")
    assert isinstance(model, XAR)


def test_without_an_average_the_last_weights_are_exported(images: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", str(images), {"training": {"ema_decay": 0.0}})
    assert not (tmp_path / "run" / "exported_raw").exists()
    assert open_generator(tmp_path / "run").about["weights"] == "raw"
    assert [path.name for path in (tmp_path / "run" / "figures").glob("samples-ema*")] == []


def test_the_stored_configuration_is_a_recipe(generator: Path, tmp_path: Path) -> None:
    train_generator(config=generator / "config.yaml", out=tmp_path / "again", quiet=True)
    assert column(tmp_path / "again", "loss") == column(generator, "loss")


def test_workers_and_accumulation_do_not_change_the_run(images: Path, tmp_path: Path) -> None:
    for name, sections in {
        "plain": {}, "workers": {"data": {"workers": 2}}, "parts": {"training": {"per_device_batch": 3}}
    }.items():  # fmt: skip
        start(tmp_path / name, str(images), {"watch": {"pictures": 0}} | sections)
    plain = [float(loss) for loss in column(tmp_path / "plain", "loss")]
    assert [float(loss) for loss in column(tmp_path / "workers", "loss")] == plain
    assert [float(loss) for loss in column(tmp_path / "parts", "loss")] == pytest.approx(plain, rel=1e-4)


def test_resume_is_bit_identical(images: Path, tmp_path: Path) -> None:
    """With dropout, which draws from torch's own generator, and with an average of the weights."""
    sections = {"model": {"dropout": 0.1, "attention_dropout": 0.1}, "training": {"decay_from": 0.5}}
    start(tmp_path / "whole", str(images), sections)
    start(tmp_path / "cut", str(images), sections)
    cut = tmp_path / "cut"
    shutil.rmtree(cut / "checkpoints" / "step-00000006")  # as if it had been killed after step 5
    for name in ("exported", "exported_raw"):
        shutil.rmtree(cut / name)
    done = train_generator(resume=cut, quiet=True)
    assert done is not None
    assert done.finished
    assert column(cut, "loss") == column(tmp_path / "whole", "loss")
    for name in ("exported", "exported_raw"):
        a, b = (load_file(folder / name / "model.safetensors") for folder in (tmp_path / "whole", cut))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_finished_run_is_exported_if_it_was_not(generator: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(generator, copy)
    for name in ("exported", "exported_raw"):
        shutil.rmtree(copy / name)
    train_generator(resume=copy, quiet=True)
    for name in ("exported", "exported_raw"):
        a, b = (load_file(folder / name / "model.safetensors") for folder in (generator, copy))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "model",
    [
        {"ordering": "patches"}, {"ordering": "subsamples"}, {"ordering": "scales"}, {"ordering": "whole"},
        {"context": "clean"}, {"context": "increasing", "times": "uniform"}, {"entity_size": [1, 4]},
    ],
)  # fmt: skip
def test_every_entity_trains_and_is_pictured(images: Path, tmp_path: Path, model: dict[str, Any]) -> None:
    start(tmp_path / "run", str(images), {"model": model, "data": {"val": str(images)}})
    losses = [float(loss) for loss in column(tmp_path / "run", "loss")]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "figures" / "samples-ema-step-00000006.png").is_file()


def test_the_validation_loss_is_of_the_same_times_and_noise_every_time(images: Path, tmp_path: Path) -> None:
    still = {"training": {"lr": 1e-20}, "data": {"val": str(images)}, "model": {"dropout": 0.5}}
    start(tmp_path / "run", str(images), still)
    measured = {row["val_loss"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if row["val_loss"]}
    assert len(measured) == 1


def test_the_same_noise_in_every_sheet(images: Path, tmp_path: Path) -> None:
    start(tmp_path / "run", str(images), {"training": {"lr": 1e-20}})
    sheets = [path.read_bytes() for path in (tmp_path / "run" / "figures").glob("samples-*.png")]
    assert len(sheets) == 4
    assert len(set(sheets)) == 1


def test_a_gray_unconditional_run_of_arrays(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 16, 16), dtype=np.uint8)
    sections = tiny(data={"train": pixels}, model={"latent_channels": 1}, watch={"guidance": 3.0})
    del sections["model"]["num_classes"]
    train_generator(config="xar_digits", out=tmp_path / "run", quiet=True, **sections)
    opened = open_generator(tmp_path / "run")
    assert opened.model.config.num_classes == 0
    assert opened.classes == []
    assert isinstance(opened.decoder, Pixels)
    assert (tmp_path / "run" / "figures" / "samples-raw-step-00000005.png").is_file()


def test_classes_are_those_of_the_images(images: Path, tmp_path: Path) -> None:
    sections = tiny(data={"train": str(images)}, training={"epochs": 0.1}, watch={"pictures": 0})
    del sections["model"]["num_classes"]
    sections["model"]["latent_channels"] = 1
    train_generator(config="xar_digits", out=tmp_path / "run", quiet=True, **sections)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["model"]["num_classes"] == 2
    numbered = (np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1]))
    start(tmp_path / "fewer", numbered, {"model": {"num_classes": 3}, "watch": {"pictures": 0}})
    assert open_generator(tmp_path / "fewer").classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_classes": 3}}, r"has 2 classes, the model is made for 3\. Set model\.num_classes to 2"),
        ({"model": {"latent_channels": 16}}, r"1 or 3 channels, but model\.latent_channels is 16"),
        ({"model": {"entity_size": 3}}, "do not fit"),
        ({"training": {"ema_decay": 1.0}}, r"training\.ema_decay"),
        ({"watch": {"steps": 0}}, r"watch\.steps"),
        ({"model": {"widht": 3}}, r"model\.widht.*Did you mean 'width'"),
    ],
)
def test_what_does_not_fit_is_told_and_leaves_no_folder(
    images: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(tmp_path / "run", str(images), sections)
    assert not (tmp_path / "run").exists()


def test_unlabelled_images_need_an_unconditional_model(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"12 of the 12 images.*no label.*num_classes to 0"):
        start(tmp_path / "run", str(images / "top"))
    partly = (np.zeros((5, 8, 8, 3), np.uint8), np.array([0, 1, -1, -1, 0]))
    with pytest.raises(ConfigError, match="2 of the 5 images"):
        start(tmp_path / "run", partly)


def test_validation_images_are_numbered_by_their_class_names(images: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(images / "top", other / "top")
    start(tmp_path / "run", str(images), {"data": {"val": str(other)}, "training": {"epochs": 1}})
    assert column(tmp_path / "run", "val_loss")[-1]
    shutil.copytree(images / "left", other / "right")
    with pytest.raises(DataError, match=r"not among the 2.*right"):
        start(tmp_path / "another", str(images), {"data": {"val": str(other)}})


def test_images_are_never_distorted() -> None:
    """The training crop is the largest central one of the model's own proportions."""
    wide = np.zeros((1, 8, 32, 3), np.uint8)
    wide[:, :, 12:20] = np.arange(8, dtype=np.uint8)[:, None] * 30
    config = typed_generator(tiny(model={"num_classes": 0}))
    data = PixelData(config, open_source(wide))
    batch = data.stream.load([0, 1, 2, 3])
    assert all(np.array_equal(image.numpy(), wide[0, :, 12:20]) for image in batch.images)
    latents = data.latents(batch)
    assert latents.shape == (4, 3, 8, 8)
    assert latents.min() == -1
    oblong = typed_generator(tiny(model={"num_classes": 0, "latent_size": [4, 16]}))
    assert PixelData(oblong, open_source(wide)).stream.load([0]).images.shape == (1, 4, 16, 3)


def test_recipes_and_runs_of_another_kind_name_the_right_verb(generator: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nextblock pretrain --config xtra_digits"):
        train_generator(config="xtra_digits", quiet=True)
    with pytest.raises(ConfigError, match="nextblock train-generator --config xar_digits"):
        pretrain(config="xar_digits", quiet=True)
    with pytest.raises(ConfigError, match="nextblock train-generator --config"):
        pretrain(config=generator / "config.yaml", quiet=True)
    with pytest.raises(RunError, match="nextblock train-generator --resume"):
        pretrain(resume=generator, quiet=True)
    with pytest.raises(RunError, match="nextblock pretrain --resume"):
        train_generator(resume=run, quiet=True)
    with pytest.raises(ConfigError, match="xar_digits"):
        train_generator(data={"train": "x"}, quiet=True)


def test_presets_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    train_generator(
        config="xar_b_in256", preset="xar_ti", model={"ordering": "scales", "scales": [1, [4, 4], 16]},
        training={"epochs": 5}, print_config=True,
    )  # fmt: skip
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["width"] == 128
    assert printed["model"]["scales"] == [1, [4, 4], 16]
    assert printed["training"]["decay_from"] == 0.75
    with pytest.raises(ConfigError, match="Did you mean 'xar_b'"):
        train_generator(preset="xarb", quiet=True)


def test_a_run_is_never_overwritten_and_resumed_only_as_it_was(generator: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing is ever overwritten"):
        start(generator, str(images))
    with pytest.raises(ConfigError, match=r"model\.width was 16, now 32"):
        train_generator(resume=generator, model={"width": 32}, quiet=True)
    with pytest.raises(ConfigError, match="leave out --out"):
        train_generator(resume=generator, out="elsewhere", quiet=True)
    folder = write_images(tmp_path / "images")
    start(tmp_path / "run", str(folder), {"watch": {"pictures": 0}})
    (folder / "top" / "001.png").unlink()
    with pytest.raises(RunError, match=r"top/001\.png"):
        train_generator(resume=tmp_path / "run", quiet=True)


def test_init_from_starts_from_the_averaged_weights(generator: Path, images: Path, tmp_path: Path) -> None:
    slow = {"training": {"lr": 1e-12}, "model": {"dropout": 0.3}, "watch": {"pictures": 0}}
    start(tmp_path / "next", str(images), slow, init_from=generator)
    a, b = (
        load_file(generator / "exported" / "model.safetensors"),
        load_file(tmp_path / "next" / "exported_raw" / "model.safetensors"),
    )
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)
    with pytest.raises(CheckpointError, match="width 16 there, 32 here"):
        start(tmp_path / "other", str(images), {"model": {"width": 32}}, init_from=generator)


def test_init_from_takes_the_weights_of_a_generator_only(run: Path, images: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "exported")
    for place in (run, run / "exported", unfinished):
        with pytest.raises(RunError, match=r"is an? (pre-training run|encoder with its).*must be those of a generator"):
            start(tmp_path / "run", str(images), init_from=place)
    assert not (tmp_path / "run").exists()


def test_watching_never_ends_a_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = tiny(data={"train": str(images)}, watch={"vae": "nowhere"})
    done = train_generator(config="xar_cifar10", out=tmp_path / "run", **chosen)
    assert done is not None
    assert done.finished
    assert capsys.readouterr().out.count("not looked at while training: this generator makes pixels") == 1


def test_opening_a_finished_run_one_that_goes_on_and_an_exported_folder(generator: Path, tmp_path: Path) -> None:
    finished = open_generator(generator)
    assert isinstance(finished, OpenedGenerator)
    assert not finished.model.training
    assert finished.classes == ["left", "top"]
    assert finished.preprocessing.mean == (0.5, 0.5, 0.5)
    assert finished.where == generator / "exported"
    going = tmp_path / "going"
    shutil.copytree(generator, going)
    for name in ("exported", "exported_raw"):
        shutil.rmtree(going / name)
    raw = open_generator(generator, weights="raw")
    assert raw.where == generator / "exported_raw"
    for weights, ours in (("ema", finished), ("raw", raw)):
        for place in (going, generator / ("exported" if weights == "ema" else "exported_raw")):
            other = open_generator(place, weights=weights)  # type: ignore[arg-type]
            assert other.about == ours.about
            assert other.preprocessing == ours.preprocessing
            mine, theirs = ours.model.state_dict(), other.model.state_dict()
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    samples = sample_latents(finished.model, torch.tensor([0, 1]), steps=2)
    assert finished.decoder.decode(samples).shape == (2, 3, 8, 8)


def test_opening_what_is_no_generator_says_what_it_is(generator: Path, run: Path, tmp_path: Path) -> None:
    for place in (run, run / "exported"):
        with pytest.raises(RunError, match=r"is an? (pre-training run|encoder with its).*nextblock train-generator"):
            open_generator(place)
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "exported")
    with pytest.raises(RunError, match="is a pre-training run"):
        open_generator(unfinished)
    with pytest.raises(RunError, match="Did you mean 'tiny'"):
        open_generator(generator.with_name("tinny"))
    with pytest.raises(ConfigError, match="'ema'"):
        open_generator(generator, weights="best")  # type: ignore[arg-type]
    alone = shutil.copytree(generator / "exported", tmp_path / "alone")
    with pytest.raises(RunError, match="averaged weights only"):
        open_generator(alone, weights="raw")


def test_a_generator_gives_no_features(generator: Path, images: Path, tmp_path: Path) -> None:
    going = tmp_path / "going"
    shutil.copytree(generator, going)
    shutil.rmtree(going / "exported")
    for place in (generator, generator / "exported_raw", going):
        with pytest.raises(RunError, match=r"no encoder.*nextblock sample"):
            embed(run=place, images=str(images), quiet=True)


def test_broken_images_are_replaced_and_counted(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    (folder / "top" / "000.png").write_bytes(b"")
    start(tmp_path / "run", str(folder), {"watch": {"pictures": 0}})
    assert "top/000.png" in (tmp_path / "run" / "bad_samples.csv").read_text()


def test_python_sources_must_be_given_again(tmp_path: Path) -> None:
    class Mine:
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.fromarray(np.full((8, 8, 3), 10 * index, np.uint8)), index % 2

    start(tmp_path / "run", Mine(), {"watch": {"pictures": 0}})
    with pytest.raises(ConfigError, match=r"--data\.train"):
        train_generator(resume=tmp_path / "run", quiet=True)
    assert train_generator(resume=tmp_path / "run", data={"train": Mine()}, quiet=True).finished  # type: ignore[union-attr]


def test_a_printed_recipe_leaves_open_what_only_the_images_tell(capsys: pytest.CaptureFixture[str]) -> None:
    train_generator(config="xar_digits", print_config=True)
    assert "num_classes" not in yaml.safe_load(capsys.readouterr().out)["model"]
    train_generator(config="xar_digits", model={"num_classes": 3}, print_config=True)
    assert yaml.safe_load(capsys.readouterr().out)["model"]["num_classes"] == 3


def test_the_name_of_a_benchmark_data_set_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="name of a benchmark data set"):
        start(tmp_path / "run", "cifar10")


def test_weights_that_do_not_say_what_decodes_them(tmp_path: Path) -> None:
    model = XAR(typed_generator(tiny()).model)
    save_pretrained(tmp_path / "weights", model, Preprocessing((8, 8)).to_dict(), "a card")
    with pytest.raises(CheckpointError, match="what decodes these latents"):
        open_generator(tmp_path / "weights")


def test_a_vae_is_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vae.ckpt").touch()
    config = absolute(typed_generator(tiny(watch={"vae": "vae.ckpt"}, data={"train": "images"})))
    assert config.watch.vae == str(tmp_path / "vae.ckpt")
    assert config.data.train == str(tmp_path / "images")
    assert absolute(typed_generator(tiny(watch={"vae": "owner/name"}))).watch.vae == "owner/name"
