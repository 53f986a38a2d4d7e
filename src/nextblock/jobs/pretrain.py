"""Pre-train an XTRA encoder on images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from nextblock.jobs.choose import choose
from nextblock.jobs.opening import initial_weights
from nextblock.jobs.run import Pretrained
from nextblock.jobs.starting import (
    FREE_ON_RESUME,
    Section,
    absolute,
    continued,
    given_sections,
    new_folder,
    take_objects,
)
from nextblock.jobs.streamed_run import images_of, run_on
from nextblock.recipes.config import PRETRAIN, SECTIONS, merge, preset_layer, read_recipe, to_yaml, typed
from nextblock.training.launch import launch, pick_device
from nextblock.training.launcher import is_first

WATCHED = {"watch.every_epochs", "watch.knn_k", "watch.max_images", "watch.pictures"}


def pretrain(
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
) -> Pretrained | None:
    """Train an encoder (and its predictor) on images, in a run folder.

    Args:
        config: a recipe's name or a YAML file. Without one, sizes, batch and length are chosen from the images
            and the device, and told.
        preset: the sizes of a named model, over those of the recipe.
        data, model, training, watch: values of the recipe's sections, over everything else; `data["train"]` may
            be any source of images, or, with `data["length"]`, a stream: such a run goes on with the same number of
            processes and workers only.
        out: the run folder, new or empty; by default a dated one under runs/.
        resume: a run folder to continue, bit-identically on the same CPU; or "auto": continue the run in `out` where
            there is one, else begin it, so that a launcher can start the same command again.
        init_from: a run or weights folder whose weights to start from.
        print_config: print the resolved configuration as YAML and do nothing else.
        quiet: print nothing.

    Raises:
        ConfigError, DataError, RunError, CheckpointError: with what to do next.
    """
    console = Console(quiet=quiet)
    given = given_sections(data=data, model=model, training=training, watch=watch)
    objects = take_objects(given)
    found = continued(
        PRETRAIN, given, FREE_ON_RESUME | WATCHED, resume=resume, out=out, config=config, preset=preset,
        init_from=init_from,
    )  # fmt: skip
    if found is not None:
        folder, settings = found
        return run_on(settings, launch(settings.training), objects, console).go_on(folder)
    base = read_recipe(config) if config is not None else {}
    values = merge(base, preset_layer(preset), given)
    if config is None and not (print_config and "train" not in given.get("data", {})):
        told = Console(stderr=True) if print_config else console
        values = _chosen(values, objects, sized=preset is not None, console=told)
    settings = typed(values)
    if print_config:
        print(to_yaml(settings), end="")
        return None
    run = run_on(absolute(settings), launch(settings.training), objects, console)
    if init_from is not None:
        initial_weights(init_from, run.model)
    run.require_room()
    folder = new_folder(run.fabric, out, str(config or "pretrain"))
    if config is None and not run.in_memory and init_from is None:
        run.say(f"the same run again: nextblock pretrain --config {folder / 'config.yaml'}")
    return run.begin(folder)


def _chosen(
    values: dict[str, dict[str, Any]], objects: dict[str, Any], *, sized: bool, console: Console
) -> dict[str, dict[str, Any]]:
    """The values, completed by a choice for these images that is told (by one process)."""
    first = typed({name: section for name, section in values.items() if name != "model"})
    source = images_of(first, objects)
    choice = choose(source, pick_device(first.training.device), values, sized=sized)
    if is_first():
        lines = [f"{source.description}. No --config given, so this run is chosen for you:", *choice.reasons]
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    return merge(choice.values, values)


__all__ = ["SECTIONS", "Pretrained", "pretrain"]
