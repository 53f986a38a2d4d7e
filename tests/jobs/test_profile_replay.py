"""A training that gives up keeps its batch, and `nextblock profile --replay` says what is wrong with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny_generator
from nextblock.cli import main
from nextblock.errors import ConfigError, RunError
from nextblock.jobs.cache_latents import cache_latents
from nextblock.jobs.finetune import finetune
from nextblock.jobs.pretrain import pretrain
from nextblock.jobs.profile import profile
from nextblock.jobs.train_generator import train_generator
from nextblock.training.layer_numbers import LayerWatch
from nextblock.training.replay import read_kept
from nextblock.training.run_folder import read_metrics
from nextblock.xtra.model import XTRA
from small_kl16 import write_kl16
from tiny_run import tiny

HUGE = {"lr": 1e25, "max_nonfinite_steps": 2, "epochs": 4, "checkpoint_every_steps": 0}


def kept_by(error: pytest.ExceptionInfo[RunError]) -> Path:
    found = re.search(r"nextblock profile --replay (\S+)$", str(error.value))
    assert found, str(error.value)
    return Path(found[1])


@pytest.fixture(scope="module")
def given_up(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The batch of a run that its learning rate drove to where nothing is finite."""
    out = tmp_path_factory.mktemp("runs") / "run"
    sections = tiny(data={"train": str(images)}, training=HUGE, watch={"pictures": 0})
    with pytest.raises(RunError, match="2 steps in a row") as error:
        pretrain(config="xtra_cifar10", out=out, quiet=True, **sections)
    return kept_by(error)


def test_the_batch_is_kept_with_the_weights_that_met_it(given_up: Path) -> None:
    kept, run = read_kept(given_up), given_up.parents[1]
    assert given_up == run / "nonfinite" / f"step-{kept.step:08d}"
    assert {path.name for path in given_up.iterdir()} == {
        "about.json", "batch.safetensors", "model.safetensors", "config.yaml", "environment.json", "images.png",
    }  # fmt: skip
    assert kept.batch.positions.tolist() == list(range(8 * kept.step, 8 * kept.step + 8))
    assert kept.batch.images.dtype == torch.uint8
    assert [name.rpartition(".")[2] for name in kept.names] == ["png"] * 8
    assert all(bool(torch.isfinite(value).all()) for value in kept.weights.values())
    rows = read_metrics(run / "metrics.csv")
    assert int(rows[-1]["step"]) == kept.step  # the row of the last step is not written: the run ends there
    assert float(rows[-1]["skipped"]) == 1


def test_the_replay_names_the_first_layer_that_is_not_finite(
    given_up: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "--replay", str(given_up)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    found = profile(replay=given_up, quiet=True).values
    first = next(row for row in found["pass"]["layers"] if row["share"])
    assert not found["finite"]
    assert f"are the output of layer {first['name']} (" in said
    assert "None of these 8 images is finite alone, so it is the weights, not the images" in said
    assert all(row["name"] in said for row in found["by_image"])
    kept, model = read_kept(given_up), XTRA(_config(given_up))
    model.load_state_dict(kept.weights)
    with LayerWatch(model) as watch:
        model(torch.zeros(1, 3, 16, 16))
    assert first["name"] in [numbers.name for numbers in watch.seen]


def _config(folder: Path) -> Any:
    from nextblock.recipes.config import read_recipe, typed

    return typed(read_recipe(folder / "config.yaml")).model


def test_the_image_that_is_the_cause_is_named(tmp_path: Path) -> None:
    """Weights that only a bright pixel drives out of bounds."""
    pixels = np.zeros((8, 16, 16, 3), dtype=np.uint8)
    pixels[5, 3, 3] = 255

    class Bright(XTRA):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            with torch.no_grad():
                self.encoder.patch_embed.weight.fill_(3e38)

    from nextblock.jobs import run as home

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(home, "XTRA", Bright)
        sections = tiny(
            data={"train": pixels, "mean": [0.0] * 3, "std": [0.25] * 3, "flip": 0.0, "crop_scale": [1.0, 1.0]},
            training=HUGE | {"lr": 1e-3, "batch_size": 8, "per_device_batch": 3}, watch={"pictures": 0},
        )  # fmt: skip
        sections["data"]["crop_ratio"] = [1.0, 1.0]
        with pytest.raises(RunError) as error:
            pretrain(config="xtra_cifar10", out=tmp_path / "run", quiet=True, **sections)
    found = profile(replay=kept_by(error), quiet=True).values
    wrong = [row for row in found["by_image"] if not row["finite"]]
    assert [row["name"] for row in wrong] == ["array[5]"]
    assert len(found["by_image"]) in (2, 3)  # those of the pass that it was in
    first = next(row for row in found["pass"]["layers"] if row["share"])
    assert (first["name"], first["what"]) == ("encoder.patch_embed", "output")


def test_where_all_is_finite_now_that_is_said(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        forward = XTRA.forward

        def wrong_device(self: XTRA, *args: Any) -> Tensor:
            return forward(self, *args) * (float("nan") if self.training else 1.0)

        patch.setattr(XTRA, "forward", wrong_device)
        sections = tiny(data={"train": str(images)}, training=HUGE | {"lr": 0.01}, watch={"pictures": 0})
        with pytest.raises(RunError) as error:
            pretrain(config="xtra_cifar10", out=tmp_path / "run", quiet=True, **sections)
    found = profile(replay=kept_by(error)).values
    assert found["finite"]
    assert "Everything is finite here: loss" in capsys.readouterr().out


def test_a_generator_is_replayed(images: Path, tmp_path: Path) -> None:
    sections = tiny_generator.tiny(data={"train": str(images)}, training=HUGE, watch={"pictures": 0})
    with pytest.raises(RunError) as error:
        train_generator(config="xar_cifar10", out=tmp_path / "run", quiet=True, **sections)
    found = profile(replay=kept_by(error), quiet=True).values
    assert not found["finite"]
    assert len(found["by_image"]) == 8


def test_cached_latents_are_replayed(images: Path, tmp_path: Path) -> None:
    write_kl16(tmp_path / "kl16.ckpt")
    cache_latents(
        dataset=str(images), vae=str(tmp_path / "kl16.ckpt"), out=tmp_path / "l", image_size_px=32, workers=0,
        quiet=True,
    )  # fmt: skip
    sections = tiny_generator.tiny(data={"train": str(tmp_path / "l")}, training=HUGE, watch={"pictures": 0})
    for name in ("latent_size", "latent_channels", "patch_size", "num_classes"):
        del sections["model"][name]
    sections["model"] |= {"entity_size": 1}
    with pytest.raises(RunError) as error:
        train_generator(preset="xar_ti", out=tmp_path / "run", quiet=True, **sections)
    folder = kept_by(error)
    assert not (folder / "images.png").exists()
    found = profile(replay=folder, quiet=True).values
    assert not found["finite"]
    assert all(row["name"].endswith(".png") for row in found["by_image"])


def test_a_fine_tuning_is_replayed(run: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError) as error:
        finetune(
            run=run, dataset=images, out=tmp_path / "tuned", quiet=True,
            finetune={"workers": 0, "num_heads": 2}, training=HUGE | {"batch_size": 6},
        )  # fmt: skip
    found = profile(replay=kept_by(error), quiet=True).values
    assert not found["finite"]
    assert found["images"] == 6


def test_a_first_gradient_that_is_not_finite_is_told_as_one() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(min=0).sqrt()  # no finite slope at 0

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), Root())
    with LayerWatch(model) as watch:
        model(torch.randn(5, 3)).sum().backward()
    first = next(numbers for numbers in watch.seen if not numbers.finite)
    assert (first.name, first.what) == ("1", "gradient")


def test_what_cannot_be_replayed_is_told(given_up: Path, images: Path, tmp_path: Path) -> None:
    run = given_up.parents[1]
    assert profile(replay=run, quiet=True).folder == given_up
    with pytest.raises(RunError, match=f"holds no batch of a run.*There is {given_up}"):
        read_kept(run)
    with pytest.raises(RunError, match="holds no batch of a run"):
        profile(replay=images, quiet=True)
    with pytest.raises(ConfigError, match="leave out --config"):
        profile(replay=given_up, config="xtra_cifar10", quiet=True)
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in given_up.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    profile(replay=copy, quiet=True)  # it may stand anywhere
    changed = bytearray((copy / "model.safetensors").read_bytes())
    changed[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(changed))
    with pytest.raises(RunError, match="is damaged: a file's SHA-256"):
        profile(replay=copy, quiet=True)
    about = json.loads((copy / "about.json").read_text())
    del about["names"]
    (copy / "about.json").write_text(json.dumps(about))
    with pytest.raises(RunError, match="is damaged"):
        profile(replay=copy, quiet=True)
