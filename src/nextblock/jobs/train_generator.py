"""Train an xAR generator on images or on cached latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from nextblock.errors import ConfigError
from nextblock.jobs.generator_data import Material, fitted, open_material
from nextblock.jobs.generator_run import GeneratorRun
from nextblock.jobs.opening_generator import initial_generator
from nextblock.jobs.starting import (
    FREE_ON_RESUME,
    Section,
    absolute,
    continued,
    given_sections,
    new_folder,
    take_objects,
)
from nextblock.jobs.training_run import Trained
from nextblock.recipes.config import merge, preset_layer, read_recipe, recipe_names, to_yaml
from nextblock.recipes.generator import GENERATOR, SECTIONS, GeneratorConfig, GeneratorDataConfig, typed_generator
from nextblock.training.launch import launch
from nextblock.training.run_record import require_free

WATCHED = {f"watch.{name}" for name in ("every_epochs", "max_images", "pictures", "steps", "guidance", "solver", "vae")}


def train_generator(
    *,
    config: str | Path | None = None,
    preset: str | None = None,
    data: Section = None,
    model: Section = None,
    training: Section = None,
    watch: Section = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    init_from: str | Path | None = None,
    print_config: bool = False,
    quiet: bool = False,
) -> Trained | None:
    """Train a generator on images (it then works on pixels) or on cached latents, in a run folder.

    Args:
        config: a recipe's name or a YAML file.
        preset: the sizes of a named model, over those of the recipe.
        data, model, training, watch: values of the recipe's sections, over everything else; `data["train"]` may
            be any source of images, or a folder made by `nextblock cache-latents`. Where `model` leaves out
            num_classes, the data's classes are taken (0, unconditional, where nothing is labelled).
        out: the run folder, new or empty; by default a dated one under runs/.
        resume: a run folder to continue, bit-identically on the same CPU; or "auto": continue the run in `out` where
            there is one, else begin it, so that a launcher can start the same command again.
        init_from: a run or weights folder of a generator whose weights to start from.
        print_config: print the resolved configuration as YAML and do nothing else.
        quiet: print nothing.

    Raises:
        ConfigError, DataError, RunError, CheckpointError: with what to do next.
    """
    console = Console(quiet=quiet)
    given = given_sections(data=data, model=model, training=training, watch=watch)
    objects = take_objects(given)
    found = continued(
        GENERATOR, given, FREE_ON_RESUME | WATCHED, resume=resume, out=out, config=config, preset=preset,
        init_from=init_from,
    )  # fmt: skip
    if found is not None:
        folder, settings = found
        train = open_material(settings.data, "train", objects)
        return _run(settings, train, objects, console).go_on(folder)
    if config is None and preset is None and not model:
        names = recipe_names(GENERATOR)
        raise ConfigError(f"a generator needs a recipe, --config NAME_OR_FILE. Recipes: {', '.join(names)}.")
    base = read_recipe(config, GENERATOR) if config is not None else {}
    values = merge(base, preset_layer(preset, GENERATOR), given)
    if out is not None and not print_config:
        require_free(Path(out))
    train = open_material(_data_of(values), "train", objects)
    settings = typed_generator(values if train is None else fitted(values, train))
    if print_config:
        open_ends = () if train or "num_classes" in values.get("model", {}) else ("model.num_classes",)
        print(to_yaml(settings, leave_out=open_ends), end="")
        return None
    run = _run(absolute(settings), train, objects, console)
    if "num_classes" not in values.get("model", {}):
        count = len(run.data.classes)
        told = f"learns {count:,} class{'' if count == 1 else 'es'}" if count else "is unconditional: no labels"
        run.say(f"{run.data.description}. The model {told}.")
    if init_from is not None:
        initial_generator(init_from, run.model, run.data.vae)
    run.require_room()
    folder = new_folder(run.fabric, out, str(config or preset or "generator"))
    return run.begin(folder)


def _data_of(values: dict[str, Any]) -> GeneratorDataConfig:
    """The data section alone: what the model leaves open is not known yet."""
    return typed_generator({"data": values.get("data", {})}).data


def _run(settings: GeneratorConfig, train: Material | None, objects: dict[str, Any], console: Console) -> GeneratorRun:
    if train is None:
        raise ConfigError(
            "No images to train on. Give a folder, Parquet files, hf:NAME or a folder of cached latents with "
            "--data.train PATH."
        )
    val = open_material(settings.data, "val", objects)
    return GeneratorRun(settings, launch(settings.training), train, val, console, in_memory="train" in objects)


__all__ = ["SECTIONS", "Trained", "train_generator"]
