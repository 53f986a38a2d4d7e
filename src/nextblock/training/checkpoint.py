"""Checkpoints of a run: written beside, flushed to disk, then renamed; checked by hash before use.

`checkpoints/step-00001200/` holds `state.pt` (plain tensors and numbers) and `checkpoint.json` with its
SHA-256. A folder of that name is whole by construction: it appears by one rename, after its files and itself
have reached the disk, and disappears by one. `step-00001200.1` is the same step saved once more, until it has taken
the place of the first: at no moment is there less than one whole checkpoint.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nextblock.durable import flush_folder, make_folder
from nextblock.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


class _HashingWriter:
    """Passes bytes on to a file and hashes them on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write(path: Path, fill: Callable[[Any], None]) -> str:
    with open(path, "wb") as file:
        writer = _HashingWriter(file)
        fill(writer)
        file.flush()
        os.fsync(file.fileno())
    return writer.sha256.hexdigest()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step`, then remove all but the newest `keep` up to this step.

    Later ones are removed, too: a run that comes to this step again could not read them.
    Raises CheckpointError, with the older checkpoints untouched, when the disk refuses.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}"
    try:
        make_folder(folder)
        for left_over in folder.glob(".partial-step-*"):  # of a save that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir()
        digest = _write(partial / "state.pt", lambda file: torch.save(state, file))
        about = json.dumps({"step": step, "sha256": digest}).encode()
        _write(partial / "checkpoint.json", lambda file: file.write(about))
        flush_folder(partial)
        whole = _free_name(final)
        partial.rename(whole)
        flush_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        earlier = " Earlier checkpoints are untouched." if list_checkpoints(folder) else ""
        raise CheckpointError(f"could not save {final}: {_reason(error)}.{earlier}") from error
    return _made_room(folder, whole, step, keep)


def _reason(error: BaseException) -> str:
    """What the system said; torch puts an error of its own, of positions in the file, over it."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError):
            return found.strerror or str(found)
        found = found.__cause__ or found.__context__
    return str(error)


def _free_name(final: Path) -> Path:
    """`final`, or with a number behind it where the same step has been saved before."""
    tries = (final if number == 0 else final.with_name(f"{final.name}.{number}") for number in itertools.count())
    return next(path for path in tries if not path.exists())


def _made_room(folder: Path, whole: Path, step: int, keep: int) -> Path:
    """Remove what `whole` replaces and what is too much, and give it its plain name; returns where it is then.

    What the disk refuses here costs room, no checkpoint: the next save tries again.
    """
    final = folder / f"step-{step:08d}"
    found = [path for path in list_checkpoints(folder) if path != whole]
    earlier = [path for path in found if _numbers(path)[0] < step]
    too_many = earlier if keep == 1 else earlier[: 1 - keep]
    try:
        for path in (path for path in found if path in too_many or path not in earlier):
            removed = folder / f".partial-{path.name}"
            path.rename(removed)  # in one step: a folder that is half removed has not the name of a whole one
            shutil.rmtree(removed)
        if whole != final:
            whole.rename(final)
            flush_folder(folder)
    except OSError:
        return final if final.exists() else whole
    return final


def _numbers(path: Path) -> tuple[int, int]:
    """The step of a checkpoint, and how often it had been saved before."""
    found = _NAME.fullmatch(path.name)
    assert found
    return int(found[1]), int(found[2] or 0)


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_numbers)


# what a file raises that is no checkpoint of ours, whatever its hash
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, RecursionError, pickle.UnpicklingError, EOFError)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state, after its hash has been checked. Raises CheckpointError when it is damaged."""
    try:
        about = json.loads((path / "checkpoint.json").read_text())
        with open(path / "state.pt", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != about["sha256"]:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one recorded when it was saved.")
        named = _NAME.fullmatch(path.name)
        if about["step"] != (int(named[1]) if named else about["step"]):
            raise CheckpointError(f"{path} is damaged: its record is of step {about['step']}.")
        state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged: {why}") from error
    return state


def newest_checkpoint(folder: Path, warn: Callable[[str], None] = lambda message: None) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint; a damaged one is reported through `warn` and the one before it taken.

    Raises CheckpointError when there is none.
    """
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            warn(str(error))
    reason = "all are damaged" if found else "there is none"
    raise CheckpointError(
        f"No checkpoint to continue from in {folder}: {reason}. Bring one back from a copy, or start a new run; "
        "--init-from takes weights that were exported."
    )
