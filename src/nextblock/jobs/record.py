"""What every training job writes down when it starts: claimed folder, versions, data, configuration."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nextblock.data.sources import Source, fingerprint
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
