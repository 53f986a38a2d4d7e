"""A generator on cached latents: what it learns, what does not fit, and where its VAE is found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from close import assert_close
from nextblock.checkpoints.vae_files import open_vae
from nextblock.data.latents import open_latents
from nextblock.errors import CheckpointError, ConfigError, RunError
from nextblock.jobs.cache_latents import cache_latents
from nextblock.jobs.generator_data import LatentData
from nextblock.jobs.opening_generator import open_generator
from nextblock.jobs.train_generator import train_generator
from nextblock.recipes.generator import typed_generator
from nextblock.training.run_folder import read_metrics
from nextblock.vae import Autoencoder
from nextblock.xar.sampler import sample_latents
from tiny_generator import tiny

LATENTS = {"latent_channels": 4, "patch_size": 1, "entity_size": 4}


def write_vae(folder: Path, seed: int = 0) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, scaling_factor=0.5,
    )  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="module")
def cache(vae: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of 16 px as latents of 8×8 with 4 channels."""
    folder = tmp_path_factory.mktemp("latents") / "cache"
    return cache_latents(dataset=str(images), vae=vae, out=folder, image_size_px=16, workers=0, quiet=True)


def start(out: Path, train: Path, sections: dict[str, Any] | None = None, **values: Any) -> Any:
    chosen = tiny(**({"model": LATENTS} | (sections or {})))
    chosen["data"]["train"] = train
    return train_generator(config="xar_b_in256", out=out, **({"quiet": True} | values), **chosen)


@pytest.fixture(scope="module")
def generator(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generators") / "latents"
    start(folder, cache, {"data": {"val": str(cache)}})
    return folder


def test_a_run_on_latents_leaves_what_one_on_pixels_does(generator: Path, cache: Path) -> None:
    rows = read_metrics(generator / "metrics.csv")
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert rows[-1]["val_loss"]
    assert rows[-1]["ema_val_loss"]
    assert (generator / "figures" / "samples-ema-step-00000006.png").is_file()
    about = json.loads((generator / "exported" / "config.json").read_text())["generator"]
    assert about["vae"] == open_latents(cache).vae
    assert (about["classes"], about["image_size_px"], about["channels"]) == (["left", "top"], [16, 16], 3)
    stored = yaml.safe_load((generator / "config.yaml").read_text())
    assert stored["data"]["train"] == str(cache)


def test_what_is_learned_are_scaled_posterior_samples(cache: Path, vae: Path) -> None:
    config = typed_generator(tiny(model=LATENTS))
    data = LatentData(config, open_latents(cache))
    batch = data.stream.load(range(24))
    latents = data.latents(batch)
    assert latents.shape == (24, 4, 8, 8)
    opened = open_vae(vae)
    assert isinstance(opened, Autoencoder)
    means = batch.moments[:, :4] * opened.scale_factor
    spread = (0.5 * batch.moments[:, 4:]).exp() * opened.scale_factor
    assert 0.8 < ((latents - means) / spread).std() < 1.2
    assert_close(data.latents(data.stream.load(range(3, 5))), latents[3:5], 1e-6)


def test_resume_is_bit_identical_and_other_latents_are_refused(
    generator: Path, cache: Path, images: Path, vae: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(generator, cut)
    shutil.rmtree(cut / "checkpoints" / "step-00000006")
    shutil.rmtree(cut / "exported")
    train_generator(resume=cut, quiet=True)
    a, b = (read_metrics(folder / "metrics.csv") for folder in (generator, cut))
    assert [row["ema_val_loss"] for row in a] == [row["ema_val_loss"] for row in b]
    shutil.rmtree(cut / "exported")
    part = shutil.copytree(images, tmp_path / "part")
    (part / "top" / "000.png").unlink()
    fewer = cache_latents(dataset=str(part), vae=vae, out=tmp_path / "fewer", image_size_px=16, workers=0, quiet=True)
    with pytest.raises(RunError, match=r"not those that .* was started on: the fingerprint"):
        train_generator(resume=cut, data={"train": str(fewer)}, quiet=True)


def test_a_model_of_another_size_is_told_both_sizes(cache: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"8×8 with 4 channels.*16×16 with 4\. Set model\.latent_size"):
        start(tmp_path / "run", cache, {"model": LATENTS | {"latent_size": 16}})
    with pytest.raises(ConfigError, match=r"8×8 with 4 channels.*8×8 with 16\."):
        start(tmp_path / "run", cache, {"model": LATENTS | {"latent_channels": 16}})
    with pytest.raises(ConfigError, match="one holds latents, the other images"):
        start(tmp_path / "run", cache, {"data": {"val": str(images)}})
    assert not (tmp_path / "run").exists()


def test_sizes_that_are_left_out_are_those_of_the_cache(cache: Path, tmp_path: Path) -> None:
    small = {"width": 16, "depth": 2, "num_heads": 2, "entity_size": 4}
    train_generator(
        preset="xar_ti", model=small, data={"train": str(cache), "workers": 0}, watch={"pictures": 0},
        training={"epochs": 0.3, "batch_size": 8}, out=tmp_path / "run", quiet=True,
    )  # fmt: skip
    model = open_generator(tmp_path / "run").model.config
    assert (model.latent, model.latent_channels, model.num_classes) == ((8, 8), 4, 2)


def test_the_vae_is_found_again_and_no_other_is_taken(generator: Path, vae: Path, tmp_path: Path) -> None:
    opened = open_generator(generator)
    assert isinstance(opened.decoder, Autoencoder)
    latents = sample_latents(opened.model, torch.tensor([0, 1]), steps=2)
    assert opened.decoder.decode(latents).shape == (2, 3, 16, 16)
    moved = shutil.copytree(vae, tmp_path / "moved")
    assert isinstance(open_generator(generator, vae=moved).decoder, Autoencoder)
    other = write_vae(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match=r"is not the VAE.*SHA-256.*--vae"):
        open_generator(generator, vae=other)
    copy = shutil.copytree(generator / "exported", tmp_path / "exported")
    config = json.loads((copy / "config.json").read_text())
    config["generator"]["vae"]["path"] = str(tmp_path / "gone")
    del config["about_sha256"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"gone.*--vae"):
        open_generator(copy)
    assert isinstance(open_generator(copy, vae=moved).decoder, Autoencoder)


def test_weights_of_another_vae_are_no_start(generator: Path, cache: Path, images: Path, tmp_path: Path) -> None:
    other = write_vae(tmp_path / "other", seed=1)
    theirs = cache_latents(
        dataset=str(images), vae=other, out=tmp_path / "cache", image_size_px=16, workers=0, quiet=True
    )
    with pytest.raises(CheckpointError, match=r"exported is of another VAE than .*SHA-256 .* there, .*SHA-256 .* here"):
        start(tmp_path / "run", theirs, init_from=generator)
    assert not (tmp_path / "run").exists()
    going = shutil.copytree(generator, tmp_path / "going")
    for name in ("exported", "exported_raw"):
        shutil.rmtree(going / name)
    with pytest.raises(CheckpointError, match="is of another VAE than"):
        start(tmp_path / "run", theirs, init_from=going)
    assert start(tmp_path / "next", cache, {"watch": {"pictures": 0}}, init_from=generator).finished


def test_a_lost_vae_ends_no_run(
    cache: Path, vae: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = shutil.copytree(vae, tmp_path / "lost")
    of_lost = cache_latents(
        dataset=str(images), vae=lost, out=tmp_path / "cache", image_size_px=16, workers=0, quiet=True
    )
    shutil.rmtree(lost)
    done = start(tmp_path / "run", of_lost, quiet=False)
    assert done.finished
    assert capsys.readouterr().out.count("not looked at while training") == 1
    again = start(tmp_path / "given", of_lost, {"watch": {"vae": str(vae)}})
    assert again.finished
    assert (tmp_path / "given" / "figures" / "samples-raw-step-00000006.png").is_file()


def test_mirrored_latents_follow_the_recipe(cache: Path) -> None:
    still = LatentData(typed_generator(tiny(model=LATENTS, data={"flip": 0.0})), open_latents(cache))
    mirrored = LatentData(typed_generator(tiny(model=LATENTS, data={"flip": 1.0})), open_latents(cache))
    a, b = (data.stream.load(range(6)).moments.numpy() for data in (still, mirrored))
    assert not np.array_equal(a, b)
