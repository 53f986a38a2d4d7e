"""How a training is started or continued: from what a person gave to a configuration and a folder."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nextblock.data.decoders import chosen_decoder
from nextblock.data.sources import is_local
from nextblock.errors import ConfigError
from nextblock.recipes.config import Kind, differences, merge, preset_layer, read_recipe, to_values, typed_as
from nextblock.training.launch import Fabric
from nextblock.training.run_record import read_config, require_job

Section = Mapping[str, Any] | None
Config = TypeVar("Config")

AUTO = "auto"  # `resume`: continue the run in `out`, or begin it

# What may differ when a run goes on: nothing that changes which numbers it computes.
FREE_ON_RESUME = {
    "data.train", "data.val", "data.workers", "data.timeout_s", "data.max_bad_fraction", "training.per_device_batch",
    "training.device", "training.devices", "training.nodes", "training.compile", "training.activation_checkpointing",
    "training.checkpoint_every_steps", "training.checkpoint_every_minutes", "training.keep_checkpoints",
    "training.max_nonfinite_steps",
}  # fmt: skip


def given_sections(**sections: Section) -> dict[str, dict[str, Any]]:
    """The sections that hold something, as dictionaries of one's own."""
    return {name: dict(section) for name, section in sections.items() if section}


def take_objects(given: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Take out of `given` the sources that are Python objects: they have no place in a YAML file."""
    section = given.get("data", {})
    found: dict[str, Any] = {name: section[name] for name in ("train", "val") if name in section}
    objects = {name: value for name, value in found.items() if not isinstance(value, (str, os.PathLike, type(None)))}
    for name in found:
        section[name] = None if name in objects or found[name] is None else os.fspath(found[name])
    return objects


def resumed(
    kind: Kind[Config],
    folder: Path,
    given: Mapping[str, Mapping[str, Any]],
    clash: Mapping[str, Any],
    free: Iterable[str],
) -> Config:
    """The configuration of a run that goes on: the stored one with what is `given`.

    Args:
        clash: options that a resumed run does not take -> what was given, or None.
        free: keys that may differ.

    Raises RunError when `folder` holds no run of this kind, ConfigError when something else is given.
    """
    for name, value in clash.items():
        if value is not None:
            raise ConfigError(f"--resume continues {folder} as it is; leave out --{name.replace('_', '-')}.")
    stored = read_config(folder)
    require_job(stored, folder, kind.verb)
    settings = typed_as(kind, merge(stored, given))
    changed = [d for d in differences(to_values(typed_as(kind, stored)), to_values(settings)) if d[0] not in free]
    if changed:
        told = "; ".join(f"{name} was {old}, now {new}" for name, old, new in changed)
        raise ConfigError(
            f"{folder} was started with another configuration: {told}. Leave that out, or start a new run "
            f"(--init-from {folder} takes its weights)."
        )
    return settings


def continued(
    kind: Kind[Config],
    given: Mapping[str, Mapping[str, Any]],
    free: Iterable[str],
    *,
    resume: str | Path | None,
    out: str | Path | None,
    config: str | Path | None,
    preset: str | None,
    init_from: str | Path | None,
) -> tuple[Path, Config] | None:
    """The folder and configuration of the run that `resume` continues; None where a new one is to begin.

    With `resume` "auto", the run in `out` is continued where there is one, and begun otherwise, so that a launcher may
    start one command again and again; what the recipe and the preset say must then be what the run was started with.
    Every process decides alike: the first one makes a run only after all have come to this point.

    Raises ConfigError for "auto" without `out`, and what `resumed` raises.
    """
    if resume is None:
        return None
    if str(resume) != AUTO:
        clash = {"config": config, "preset": preset, "out": out, "init_from": init_from}
        return Path(resume), resumed(kind, Path(resume), given, clash, free)
    if out is None:
        raise ConfigError("--resume auto needs --out FOLDER, the run to continue or to begin.")
    if not (Path(out) / "config.yaml").is_file():
        return None
    asked = merge(read_recipe(config, kind) if config is not None else {}, preset_layer(preset, kind), given)
    if asked.get("data", {}).get("decoder") == "auto":  # the one that the run began with
        del asked["data"]["decoder"]
    return Path(out), resumed(kind, Path(out), asked, {}, free)


def new_folder(fabric: Fabric, out: str | Path | None, name: str) -> Path:
    """The run's folder, by the first process's clock."""
    folder = Path(out) if out is not None else Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(fabric.broadcast(str(folder)))


def absolute(config: Any) -> Any:
    """With local paths as seen from anywhere, so that a run can be resumed from another folder, and with the decoder
    that is meant on this machine."""

    def everywhere(path: str | None) -> str | None:
        return path if path is None or not is_local(path) else os.path.abspath(os.path.expanduser(path))

    data = dataclasses.replace(
        config.data, train=everywhere(config.data.train), val=everywhere(config.data.val),
        decoder=chosen_decoder(config.data.decoder),
    )  # fmt: skip
    changed: dict[str, Any] = {"data": data}
    vae = getattr(config.watch, "vae", None)
    if vae is not None and os.path.exists(os.path.expanduser(vae)):  # otherwise a name on the hub
        changed["watch"] = dataclasses.replace(config.watch, vae=everywhere(vae))
    return dataclasses.replace(config, **changed)
