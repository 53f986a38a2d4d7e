"""What every training job writes down when it starts: claimed folder, versions, data, configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nextblock.data.named import data_root as data_root_of
from nextblock.data.named import is_named
from nextblock.data.sources import Source, explain_change, fingerprint, is_local, known_labels
from nextblock.errors import CheckpointError, RunError
from nextblock.jobs.share import Share, units_of_first
from nextblock.training.checkpoint import newest_checkpoint, read_checkpoint
from nextblock.training.launch import Fabric, on_first_process, one_ends_all
from nextblock.training.run_record import claim_folder, remove_unborn, resume_or_another

OR_ANOTHER = ", or choose another --out"
SEEN_WITHIN_S = 60.0  # what the first process has written is seen by the others


def start_record(fabric: Fabric, folder: Path, write: Callable[[Path], None]) -> None:
    """Claim the folder and let the first process `write` what the run is, its `config.yaml` last.

    Raises RunError, on every process, when the folder holds something or cannot be written.
    """
    problem: RunError | None = None
    if fabric.is_global_zero:
        try:
            claim_folder(folder, resume_or_another(folder))
            write(folder)
        except RunError as error:
            problem = error
    on_first_process(fabric, problem)


@contextmanager
def alone_in(fabric: Fabric, folder: Path, instead: str = "") -> Iterator[None]:
    """Hold a run's folder. Raises RunError, on every process, while another job trains in it; `instead` is what else to
    do then. What a start has left there that ended before its config.yaml is removed: a launcher may try again.

    The hold ends with the process, however it ends; two on different machines see each other where the file system
    has locks.
    """
    problem: RunError | None = None
    with units_of_first(fabric, folder, Share()) as units:
        try:
            if units is not None and not units.claim([0]):
                raise RunError(f"another process trains in {folder}. Wait for it, or end it{instead}.")
            if units is not None and units.locks:
                remove_unborn(folder)
        except RunError as error:
            problem = error
        on_first_process(fabric, problem)
        with one_ends_all(fabric, "The same command goes on with what is there."):
            yield


def checkpoint_of_all(fabric: Fabric, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The state in the newest whole checkpoint of a run. The first process chooses it, and all read the same one.

    One that another process does not see yet, as happens on network file systems, is waited for. Raises
    CheckpointError where there is none, RunError on every process where one of several cannot read it.
    """
    if fabric.world_size == 1:
        return newest_checkpoint(folder, say)[1]
    state, name, problem = None, "", None
    if fabric.is_global_zero:
        try:
            path, state = newest_checkpoint(folder, say)
            name = path.name
        except CheckpointError as error:
            problem = RunError(str(error))
    on_first_process(fabric, problem)
    name = fabric.broadcast(name)
    if not fabric.is_global_zero:
        try:
            state = _patiently_read(folder / name)
        except CheckpointError as error:
            problem = RunError(f"process {fabric.global_rank} cannot read what the first one read: {error}")
    _on_any_process(fabric, problem)
    assert state is not None
    return state


def _on_any_process(fabric: Fabric, problem: RunError | None) -> None:
    """Raise on every process what went wrong on some; the first one tells it."""
    everyone: list[str | None] = [None] * fabric.world_size
    dist.all_gather_object(everyone, None if problem is None else str(problem))
    told = [each for each in everyone if each is not None]
    on_first_process(fabric, RunError(" ".join(told)) if told else None)


def _patiently_read(path: Path) -> dict[str, Any]:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not path.is_dir() and time.monotonic() < deadline:
        with suppress(OSError):  # not even the folder is seen
            os.listdir(path.parent)  # which makes a network file system look again
        time.sleep(0.5)
    return read_checkpoint(path)


def header(what: str) -> str:
    """The first lines of a config.yaml: when, and by which command."""
    shell = Path(sys.argv[0]).name in ("nextblock", "cli.py")
    command = "nextblock " + shlex.join(sys.argv[1:]) if shell else "from Python"
    return f"{what} of nextblock, started {time.strftime('%Y-%m-%d %H:%M:%S %z')}\n{command}"


def described(source: Source) -> dict[str, Any]:
    """A source as environment.json tells it, to notice a change."""
    return {"description": source.description, **dataclasses.asdict(fingerprint(source))}


def described_with_labels(source: Source) -> dict[str, Any]:
    """`described`, and a hash of the labels."""
    labels = hashlib.sha256(known_labels(source).astype("<i8").tobytes()).hexdigest()
    return described(source) | {"labels_sha256": labels}


def require_same(
    stored: dict[str, Any], sources: dict[str, tuple[Source, str]], folder: Path, kind: str = "run"
) -> None:
    """Raise RunError when images or labels are not those that a job was started on.

    Args:
        stored: environment.json.
        sources: its key -> (source, name of the manifest in `folder`).
        kind: of job, for the advice.
    """
    for what, (source, manifest) in sources.items():
        now = described_with_labels(source)
        changed = [name for name in ("sha256", "labels_sha256") if stored[what].get(name) != now[name]]
        if changed:
            change = explain_change(folder / manifest, source) if "sha256" in changed else "other labels"
            side = {"data": "training", "test": "test"}[what]
            raise RunError(
                f"The {side} data are not those that {folder} was started on: {change}. Bring them back, or start a "
                f"new {kind}."
            )


def where(dataset: Any, test: Any, root: str | Path | None) -> dict[str, str | None]:
    """Where the images are, as seen from any folder; None for what is a Python object."""
    named = any(isinstance(spec, str) and is_named(spec) for spec in (dataset, test))
    place = data_root_of(root) if named else root
    return {
        "dataset": _absolute(dataset),
        "test": _absolute(test),
        "data_root": None if place is None else os.path.abspath(os.path.expanduser(place)),
    }


def _absolute(spec: Any) -> str | None:
    """A path is made absolute, the name of a data set stays; None for what is neither."""
    if isinstance(spec, str) and (is_named(spec) or not is_local(spec)):
        return spec
    return os.path.abspath(os.path.expanduser(spec)) if isinstance(spec, str | os.PathLike) else None
