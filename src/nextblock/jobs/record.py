"""What every training job writes down when it starts: claimed folder, versions, data, configuration."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextblock.data.named import data_root as data_root_of
from nextblock.data.named import is_named
from nextblock.data.sources import Source, explain_change, fingerprint, is_local, known_labels
from nextblock.errors import RunError
from nextblock.training.launch import Fabric, on_first_process
from nextblock.training.run_folder import claim_folder


def start_record(fabric: Fabric, folder: Path, write: Callable[[Path], None]) -> None:
    """Claim the folder and let the first process `write` what the run is, its `config.yaml` last.

    Raises RunError, on every process, when the folder holds something or cannot be written.
    """
    problem: RunError | None = None
    if fabric.is_global_zero:
        try:
            claim_folder(folder, f"Continue it with --resume {folder}, or choose another --out.")
            write(folder)
        except RunError as error:
            problem = error
    on_first_process(fabric, problem)


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
