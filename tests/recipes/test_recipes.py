from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from close import assert_close
from nextblock.errors import ConfigError
from nextblock.jobs.pretrain import pretrain
from nextblock.recipes.config import merge, read_recipe, recipe_names, to_values, to_yaml, typed
from nextblock.training.run_folder import read_metrics
from nextblock.xtra.config import PRESETS

TWINS = Path(__file__).parents[1] / "data" / "tiny_twins.json"
SMALL = {
    "width": 32, "depth": 2, "num_heads": 2, "projection_hidden": 64, "predictor_width": 32, "predictor_depth": 1,
    "predictor_heads": 2, "head_hidden": 64, "image_size_px": 32, "patch_size_px": 4, "cell_size": 2,
}  # fmt: skip


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_whole_and_keeps_a_lab_record(name: str) -> None:
    values = read_recipe(name)
    config = typed(values)
    assert typed(to_values(config)) == config
    text = (Path(__file__).parents[2] / "src/nextblock/recipes" / f"{name}.yaml").read_text()
    header = text[: text.index("\ndata:")]
    assert "nextblock " in header
    assert all(line.startswith("#") for line in header.splitlines())


def test_the_recipes_of_the_released_weights_use_the_published_models() -> None:
    for recipe, preset in (("xtra_b16_in1k", "xtra_b16"), ("xtra_h14_in21k", "xtra_h14")):
        model = read_recipe(recipe)["model"]
        assert {k: model[k] for k in PRESETS[preset]} == PRESETS[preset]
        assert typed(read_recipe(recipe)).training.batch_size == 2088


def test_later_layers_win_and_the_rest_stays() -> None:
    merged = merge({"model": {"width": 1, "depth": 2}}, {"model": {"width": 3}}, {"data": {"flip": 0.0}})
    assert merged == {"model": {"width": 3, "depth": 2}, "data": {"flip": 0.0}}


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = typed(merge(read_recipe("xtra_b16_in1k"), {"data": {"train": "x", "mean": [0.1, 0.2, 0.3]}}))
    (tmp_path / "a.yaml").write_text(to_yaml(config, "two\nlines"))
    assert typed(read_recipe(tmp_path / "a.yaml")) == config


def test_types_are_checked_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"training\.epochs"):
        typed({"training": {"epochs": "long"}})


@pytest.mark.parametrize("name", recipe_names())
def test_the_first_ten_losses_of_a_tiny_twin_never_change(name: str, tmp_path: Path) -> None:
    """The recipe with a tiny model on fixed noise images; a changed number means changed training."""
    channels = read_recipe(name)["model"].get("channels", 3)
    pixels = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (40, 36, 40, channels), dtype=np.uint8)
    pixels = pixels // 4 + (np.arange(36)[:, None, None] * 5).astype(np.uint8)
    pretrain(
        config=name, model=SMALL, data={"train": pixels, "resize_px": 32, "workers": 0}, watch={"pictures": 0},
        training={"epochs": 2, "batch_size": 8, "lr_at_batch": 8, "log_every_steps": 1, "warmup_epochs": 0.2},
        out=tmp_path / "run", quiet=True,
    )  # fmt: skip
    losses = [float(row["loss"]) for row in read_metrics(tmp_path / "run" / "metrics.csv")]
    assert len(losses) == 10
    assert losses[-1] < losses[0]
    known = json.loads(TWINS.read_text())
    assert name in known, f"a new recipe: add to {TWINS.name}: {json.dumps({name: losses})}"
    assert_close(losses, known[name], 1e-4)
