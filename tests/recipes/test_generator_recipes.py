from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from close import assert_close
from nextblock.data.digits import plain_digits
from nextblock.errors import ConfigError
from nextblock.jobs.train_generator import train_generator
from nextblock.recipes.config import merge, read_recipe, recipe_names, to_values, to_yaml
from nextblock.recipes.generator import GENERATOR, GeneratorTraining, typed_generator
from nextblock.training.plan import Plan
from nextblock.training.run_folder import read_metrics
from nextblock.xar.config import PRESETS
from nextblock.xar.model import XAR

TWINS = Path(__file__).parents[1] / "data" / "tiny_twins.json"
RECIPES = Path(__file__).parents[2] / "src/nextblock/recipes"
SMALL = {"latent_size": 16, "latent_channels": 3, "patch_size": 2, "entity_size": 4, "width": 32, "depth": 2,
         "num_heads": 2, "num_classes": 4}  # fmt: skip
NAMES = recipe_names(GENERATOR)


def test_generators_and_encoders_have_recipes_of_their_own() -> None:
    assert NAMES == ["xar_b_in256", "xar_cifar10", "xar_digits", "xar_h_in256", "xar_l_in256"]
    assert not set(NAMES) & set(recipe_names())


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_whole_and_keeps_a_lab_record(name: str) -> None:
    config = typed_generator(read_recipe(name, GENERATOR))
    assert typed_generator(to_values(config)) == config
    text = (RECIPES / f"{name}.yaml").read_text()
    header = text[: text.index("\ndata:")]
    assert "nextblock " in header
    assert all(line.startswith("#") for line in header.splitlines())
    assert "easured" in header or "Not reproduced by us" in header


@pytest.mark.parametrize("size", ["b", "l", "h"])
def test_the_published_models_have_the_published_schedule(size: str) -> None:
    config = typed_generator(read_recipe(f"xar_{size}_in256", GENERATOR))
    assert {name: getattr(config.model, name) for name in PRESETS[f"xar_{size}"]} == PRESETS[f"xar_{size}"]
    training = config.training
    assert (training.betas, training.weight_decay, training.batch_size) == ((0.9, 0.96), 0.02, 2048)
    assert (training.peak_lr, training.ema_decay, training.clip_grad_norm) == (4e-4, 0.9999, 1.0)
    assert (config.model.dropout, config.model.attention_dropout, config.model.label_dropout) == (0.1, 0.1, 0.1)
    plan = Plan(1_281_167, training)
    steps = [round(epoch * plan.steps_per_epoch) for epoch in (100, 350, 599, 700)]
    assert [plan.lr(step) for step in steps[:3]] == pytest.approx([4e-4] * 3, rel=1e-3)
    assert 1e-5 < plan.lr(steps[3]) < 4e-4
    assert plan.lr(plan.total_steps - 1) == pytest.approx(1e-5)


@pytest.mark.parametrize(("name", "most"), [("xar_cifar10", 5_000_000), ("xar_digits", 2_000_000)])
def test_the_small_models_are_small(name: str, most: int) -> None:
    model = XAR(typed_generator(merge(read_recipe(name, GENERATOR), {"model": {"num_classes": 10}})).model)
    assert sum(p.numel() for p in model.parameters()) <= most


def test_the_average_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"training\.ema_decay"):
        GeneratorTraining(ema_decay=-0.1)


def test_a_recipe_of_another_kind_names_its_verb(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nextblock pretrain --config xtra_b16_in1k"):
        read_recipe("xtra_b16_in1k", GENERATOR)
    mine = tmp_path / "mine.yaml"
    mine.write_text(to_yaml(typed_generator(read_recipe("xar_digits", GENERATOR))))
    with pytest.raises(ConfigError, match=f"nextblock train-generator --config {mine}"):
        read_recipe(mine)
    mine.write_text(yaml.safe_dump({"training": {"epochs": 3}}))
    assert read_recipe(mine) == read_recipe(mine, GENERATOR)
    with pytest.raises(ConfigError, match="Did you mean 'xar_digits'"):
        read_recipe("xar_digit", GENERATOR)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_ten_losses_of_a_tiny_twin_never_change(name: str, tmp_path: Path) -> None:
    """The recipe with a tiny model on fixed noise images; a changed number means changed training."""
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (40, 18, 20, 3), dtype=np.uint8)
    pixels = pixels // 4 + (np.arange(18)[:, None, None] * 10).astype(np.uint8)
    train_generator(
        config=name, model=SMALL, data={"train": (pixels, np.arange(40) % 4), "workers": 0}, watch={"pictures": 0},
        training={"epochs": 2, "batch_size": 8, "lr_at_batch": 8, "log_every_steps": 1, "warmup_epochs": 0.2},
        out=tmp_path / "run", quiet=True,
    )  # fmt: skip
    losses = [float(row["loss"]) for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    known = json.loads(TWINS.read_text())
    assert name in known, f"a new recipe: add to {TWINS.name}: {json.dumps({name: losses})}"
    assert_close(losses, known[name], 1e-4)


def test_plain_digits_are_split_like_the_scattered_ones() -> None:
    train, held_out = plain_digits(16)
    assert train.images.shape == (1437, 16, 16)
    assert held_out.images.shape == (360, 16, 16)
    assert not set(train.originals) & set(held_out.originals)
    assert train.images.dtype == np.uint8
    assert train.images.max() == 255
    assert set(held_out.labels) == set(range(10))
    assert np.array_equal(plain_digits(16)[0].images, train.images)
    assert plain_digits(8)[0].images.shape == (1437, 8, 8)
