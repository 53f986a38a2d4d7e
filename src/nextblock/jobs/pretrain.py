"""Pre-train an XTRA encoder on images."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from nextblock.errors import ConfigError
from nextblock.jobs.choose import choose
from nextblock.jobs.opening import initial_weights
from nextblock.jobs.run import Pretrained, Run, open_train
from nextblock.recipes.config import (
    SECTIONS,
    PretrainConfig,
    differences,
    merge,
    preset_layer,
    read_recipe,
    to_values,
    to_yaml,
    typed,
)
from nextblock.training.checkpoint import newest_checkpoint
from nextblock.training.launch import Fabric, launch, pick_device
from nextblock.training.run_folder import read_config, require_job

# What may differ when a run goes on: nothing that changes which numbers it computes.
FREE_ON_RESUME = {
    "data.train", "data.val", "data.workers", "data.max_bad_fraction", "training.per_device_batch", "training.device",
    "training.devices", "training.nodes", "training.compile", "training.checkpoint_every_steps",
    "training.checkpoint_every_minutes", "training.keep_checkpoints", "training.max_nonfinite_steps",
    "watch.every_epochs", "watch.knn_k", "watch.max_images", "watch.pictures",
}  # fmt: skip

Section = Mapping[str, Any] | None


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
            be any source of images.
        out: the run folder, new or empty; by default a dated one under runs/.
        resume: a run folder to continue, bit-identically on the same CPU.
        init_from: a run or weights folder whose weights to start from.
        print_config: print the resolved configuration as YAML and do nothing else.
        quiet: print nothing.

    Raises:
        ConfigError, DataError, RunError, CheckpointError: with what to do next.
    """
    console = Console(quiet=quiet)
    given = {
        name: dict(section)
        for name, section in (("data", data), ("model", model), ("training", training), ("watch", watch))
        if section
    }
    objects = _take_objects(given)
    if resume is not None:
        return _resume(Path(resume), given, objects, config, preset, out, init_from, console)
    base = read_recipe(config) if config is not None else {}
    values = merge(base, preset_layer(preset), given)
    if config is None and not (print_config and "train" not in given.get("data", {})):
        told = Console(stderr=True) if print_config else console
        values = _chosen(values, objects, sized=preset is not None, console=told)
    settings = typed(values)
    if print_config:
        print(to_yaml(settings), end="")
        return None
    run = Run(_absolute(settings), launch(settings.training), objects, console)
    if init_from is not None:
        initial_weights(init_from, run.model)
    folder = _new_folder(run.fabric, out, str(config or "pretrain"))
    run.write_record(folder)
    if config is None and not run.in_memory and init_from is None:
        run.say(f"the same run again: nextblock pretrain --config {folder / 'config.yaml'}")
    return run.train(folder)


def _resume(
    folder: Path,
    given: dict[str, dict[str, Any]],
    objects: dict[str, Any],
    config: str | Path | None,
    preset: str | None,
    out: str | Path | None,
    init_from: str | Path | None,
    console: Console,
) -> Pretrained:
    clash = {"config": config, "preset": preset, "out": out, "init_from": init_from}
    for name, value in clash.items():
        if value is not None:
            raise ConfigError(f"--resume continues {folder} as it is; leave out --{name.replace('_', '-')}.")
    stored = read_config(folder)
    require_job(stored, folder, "pretrain")
    settings = typed(merge(stored, given))
    changed = [d for d in differences(to_values(typed(stored)), to_values(settings)) if d[0] not in FREE_ON_RESUME]
    if changed:
        told = "; ".join(f"{name} was {old}, now {new}" for name, old, new in changed)
        raise ConfigError(
            f"{folder} was started with another configuration: {told}. Leave that out, or start a new run "
            f"(--init-from {folder} takes its weights)."
        )
    fabric = launch(settings.training)
    run = Run(settings, fabric, objects, console)
    run.check_record(folder)
    _, state = newest_checkpoint(folder / "checkpoints", run.say)
    step, total = int(state["step"]), run.plan.total_steps
    if step < total:
        run.say(f"continuing {folder} after step {step} of {total}")
        return run.train(folder, state)
    run.say(f"{folder} is trained: {step} steps.")
    if not (folder / "exported").is_dir():  # it was killed between the last step and the export
        run.model.load_state_dict(state["model"])
        run.finish(folder)
    return Pretrained(folder, step, finished=True)


def _take_objects(given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Take out of `given` the sources that are Python objects: they have no place in a YAML file."""
    section = given.get("data", {})
    found: dict[str, Any] = {name: section[name] for name in ("train", "val") if name in section}
    objects = {name: value for name, value in found.items() if not isinstance(value, (str, os.PathLike, type(None)))}
    for name in found:
        section[name] = None if name in objects or found[name] is None else os.fspath(found[name])
    return objects


def _new_folder(fabric: Fabric, out: str | Path | None, name: str) -> Path:
    """The run's folder, by the first process's clock."""
    folder = Path(out) if out is not None else Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(fabric.broadcast(str(folder)))


def _chosen(
    values: dict[str, dict[str, Any]], objects: dict[str, Any], *, sized: bool, console: Console
) -> dict[str, dict[str, Any]]:
    """The values, completed by a choice for these images that is told (by one process)."""
    first = typed({name: section for name, section in values.items() if name != "model"})
    source = open_train(first, objects)
    choice = choose(source, pick_device(first.training.device), values, sized=sized)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        lines = [f"{source.description}. No --config given, so this run is chosen for you:", *choice.reasons]
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    return merge(choice.values, values)


def _absolute(config: PretrainConfig) -> PretrainConfig:
    """With local paths as seen from anywhere, so that a run can be resumed from another folder."""

    def absolute(path: str | None) -> str | None:
        return path if path is None or path.startswith("hf:") else os.path.abspath(os.path.expanduser(path))

    data = dataclasses.replace(config.data, train=absolute(config.data.train), val=absolute(config.data.val))
    return dataclasses.replace(config, data=data)


__all__ = ["SECTIONS", "Pretrained", "pretrain"]
