"""Which training a profile is of: a recipe of any kind, its sections, and the run that the job itself would make."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console

from nextblock.errors import ConfigError, nearest
from nextblock.jobs.choose import choose
from nextblock.jobs.generator_data import fitted, open_material
from nextblock.jobs.generator_run import GeneratorRun
from nextblock.jobs.run import Run, open_train
from nextblock.jobs.starting import absolute
from nextblock.jobs.training_run import TrainingRun
from nextblock.recipes.config import PRETRAIN, Kind, kinds, merge, preset_layer, read_recipe, recipe_names, typed
from nextblock.recipes.generator import GENERATOR, typed_generator
from nextblock.training.launch import launch, pick_device


def _either(section: str) -> type:
    """A section of any kind of recipe, for the shell: the fields of all kinds.

    A field that several have is told as the last one tells it, and its default is that of the first.
    """
    fields: dict[str, Any] = {}
    told: dict[str, str] = {}
    for kind in kinds():
        of = kind.sections[section]
        types = get_type_hints(of)
        for field in dataclasses.fields(of):
            if field.name not in fields:
                fields[field.name] = (field.name, types[field.name], _default(field))
        for base in reversed(of.__mro__):
            told |= _told(base)
    made = dataclasses.make_dataclass(section.capitalize(), list(fields.values()), frozen=True)
    lines = (f"    {name}: {text}" for name, text in told.items())
    made.__doc__ = "\n".join(["A section of a recipe.", "", "Attributes:", *lines])
    return made


def _default(field: dataclasses.Field[Any]) -> Any:
    return dataclasses.field(default=field.default)


def _told(of: type) -> dict[str, str]:
    """What a class's docstring says of its attributes."""
    _, _, rest = (of.__doc__ or "").partition("Attributes:\n")
    found = re.findall(r"^ {8}(\w+): (.+?)(?=^ {8}\w|^\s*$|\Z)", rest, flags=re.M | re.S)
    return {name: " ".join(text.split()) for name, text in found}


SECTIONS: dict[str, type] = {name: _either(name) for name in PRETRAIN.sections}


def read(
    config: str | Path | None, preset: str | None, given: Mapping[str, Mapping[str, Any]]
) -> tuple[Kind[Any], dict[str, Any]]:
    """The kind of training that recipe, preset and sections are of, and their values merged.

    Raises ConfigError for a recipe that is none of any kind, or a preset that there is not.
    """
    if config is None:
        kind = _kind_of(preset, given)
        return kind, merge(preset_layer(preset, kind), given)
    kind, values = _read_any(config)
    return kind, merge(values, preset_layer(preset, kind), given)


def _kind_of(preset: str | None, given: Mapping[str, Mapping[str, Any]]) -> Kind[Any]:
    if preset is None:
        return max(kinds(), key=lambda kind: kind.count(given))  # the first of equals: pre-training
    found = [kind for kind in kinds() if preset in kind.presets]
    if not found:
        known = [name for kind in kinds() for name in kind.presets]
        raise ConfigError(f"No preset '{preset}'.{nearest(preset, known)} Presets: {', '.join(known)}.")
    return found[0]


def _read_any(config: str | Path) -> tuple[Kind[Any], dict[str, Any]]:
    names = [name for kind in kinds() for name in recipe_names(kind)]
    is_file = Path(config).suffix in (".yaml", ".yml") or Path(config).is_file()
    if not is_file and str(config) not in names:
        raise ConfigError(
            f"No recipe '{config}' and no such file.{nearest(str(config), names)} Recipes: {', '.join(names)}."
        )
    problems = []
    for kind in kinds():
        try:
            return kind, read_recipe(config, kind)
        except ConfigError as error:
            problems.append(error)
    # Of a recipe with a mistake each kind says that it belongs to the other, but for the one that it is nearest to.
    raise next((problem for problem in problems if "another verb" not in str(problem)), problems[0])


def make_run(
    kind: Kind[Any], values: dict[str, Any], objects: dict[str, Any], console: Console, *, chosen: bool, sized: bool
) -> TrainingRun:
    """The run as its own job makes it, without validation images.

    Args:
        chosen: no recipe was given, so what is left out is chosen for the images, as `nextblock pretrain` does.
        sized: a preset gives the model's sizes.
    """
    values = merge(values, {"data": {"val": None}})
    objects = {name: value for name, value in objects.items() if name == "train"}
    if kind is GENERATOR:
        return _generator(values, objects, console)
    if chosen:
        first = typed({name: section for name, section in values.items() if name != "model"})
        choice = choose(open_train(first, objects), pick_device(first.training.device), values, sized=sized)
        values = merge(choice.values, values)
    settings = typed(values)
    return Run(absolute(settings), launch(settings.training), objects, console)


def _generator(values: dict[str, Any], objects: dict[str, Any], console: Console) -> GeneratorRun:
    data = typed_generator({"data": values["data"]}).data
    train = open_material(data, "train", objects)
    if train is None:
        raise ConfigError(
            "No images to train on. Give a folder, Parquet files, hf:NAME or a folder of cached latents with "
            "--data.train PATH."
        )
    settings = typed_generator(fitted(values, train))
    return GeneratorRun(
        absolute(settings), launch(settings.training), train, None, console, in_memory="train" in objects
    )
