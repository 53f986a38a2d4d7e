"""Checkpoints of a run: written beside, flushed to disk, then renamed; checked by hash before use.

`checkpoints/step-00001200/` holds `state.pt` (plain tensors and numbers) and `checkpoint.json` with its
SHA-256. A folder of that name is whole by construction: it appears by one rename, after its files and itself
have reached the disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nextblock.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8,})")


class _HashingWriter:
    """Passes bytes on to a file and hashes them on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _flush_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(path: Path, fill: Callable[[Any], None]) -> str:
    with open(path, "wb") as file:
        writer = _HashingWriter(file)
        fill(writer)
        file.flush()
        os.fsync(file.fileno())
    return writer.sha256.hexdigest()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as the checkpoint of `step`, then remove all but the newest `keep`.

    Raises CheckpointError, with the older checkpoints untouched, when the disk refuses.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".partial-step-*"):  # of a save that was killed
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir()
        digest = _write(partial / "state.pt", lambda file: torch.save(state, file))
        about = json.dumps({"step": step, "sha256": digest}).encode()
        _write(partial / "checkpoint.json", lambda file: file.write(about))
        _flush_folder(partial)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        partial.rename(final)
        _flush_folder(folder)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"could not save {final}: {error}. Earlier checkpoints are untouched.") from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


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
    raise CheckpointError(f"No checkpoint to continue from in {folder}: {reason}.")
