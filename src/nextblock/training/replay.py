"""A batch whose loss was not finite, kept in the run folder with the weights that met it, to be run again.

============================  =========================================================
about.json                    step, positions, seed, processes, names; SHA-256 of the others
batch.safetensors             the whole global batch as it left the loader: pixels are uint8
model.safetensors             the weights, which the step left alone
config.yaml, environment.json of the run
images.png                    the images, where they are images
============================  =========================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextblock.data.latents import LatentBatch
from nextblock.data.stream import Batch
from nextblock.durable import flush_tree, give_name, make_folder
from nextblock.errors import RunError

FOLDER = "nonfinite"  # in the run folder
KeptBatch = Batch | LatentBatch
_BATCHES: dict[str, type[KeptBatch]] = {"Batch": Batch, "LatentBatch": LatentBatch}


@dataclass(frozen=True)
class Kept:
    """What was kept.

    Attributes:
        step: counted from 0; its positions are step · images .. (step + 1) · images - 1.
        since: steps done with other batches until the weights were kept; 0: they are those that met the batch.
        seed: of the run.
        world: processes that shared the batch.
        names: of the images, in the batch's order; empty where they have none.
        batch, weights: as they were.
    """

    step: int
    since: int
    seed: int
    world: int
    names: tuple[str, ...]
    batch: KeptBatch
    weights: dict[str, Tensor]


def keep(run: Path, kept: Kept, more: Callable[[Path], None] = lambda folder: None) -> Path:
    """Write `kept` below the run folder, whole or not at all, and return its folder; an older one is replaced.

    more: writes what else shall be there. Raises OSError when the disk refuses.
    """
    final = run / FOLDER / f"step-{kept.step:08d}"
    partial = final.with_name(f".partial-{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial.parent)
    partial.mkdir()
    try:
        save_file(_tensors(kept.batch), partial / "batch.safetensors")
        save_file({k: v.detach().cpu().contiguous() for k, v in kept.weights.items()}, partial / "model.safetensors")
        for name in ("config.yaml", "environment.json"):
            shutil.copyfile(run / name, partial / name)
        about = {name: getattr(kept, name) for name in ("step", "since", "seed", "world", "names")}
        about |= {"images": len(kept.batch), "batch": type(kept.batch).__name__, "sha256": _digests(partial)}
        (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        more(partial)
        flush_tree(partial)
        if final.exists():
            shutil.rmtree(final)
        give_name(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def read_kept(folder: Path) -> Kept:
    """The inverse of `keep`. Raises RunError when the folder is none of its kind, or damaged."""
    if not (folder / "about.json").is_file():
        found = sorted(path.name for path in (folder / FOLDER).glob("step-*"))
        hint = f" There is {folder / FOLDER / found[-1]}." if found else ""
        raise RunError(f"{folder} holds no batch of a run to replay; they are in RUN/{FOLDER}/step-NUMBER.{hint}")
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if about["sha256"] != _digests(folder):
            raise RunError(f"{folder} is damaged: a file's SHA-256 is not the one recorded when it was written.")
        tensors: dict[str, Any] = dict(load_file(folder / "batch.safetensors"))
        batch = _BATCHES[about["batch"]](**tensors, bad=[])
        step, since, seed, world = (int(about[name]) for name in ("step", "since", "seed", "world"))
        names = tuple(map(str, about["names"]))
        return Kept(step, since, seed, world, names, batch, load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RunError(f"{folder} is damaged: {(str(error).splitlines() or [type(error).__name__])[0]}.") from error


def chosen(batch: KeptBatch, rows: Sequence[int]) -> KeptBatch:
    """The samples `rows` of a batch, in that order."""
    at = torch.tensor(rows, dtype=torch.int64)
    taken: dict[str, Any] = {name: value[at] for name, value in _tensors(batch).items()}
    return dataclasses.replace(batch, **taken)


def _tensors(batch: Any) -> dict[str, Tensor]:
    fields: Mapping[str, Any] = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return {name: value.cpu().contiguous() for name, value in fields.items() if isinstance(value, Tensor)}


def _digests(folder: Path) -> dict[str, str]:
    found = {}
    for name in ("batch.safetensors", "model.safetensors"):
        with open(folder / name, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
