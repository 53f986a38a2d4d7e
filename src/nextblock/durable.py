"""Files and folders that are there whole or not at all, also after a loss of power; hashes that show any change.

What is written lies in memory until it is flushed, and so does a new name until the folder that has it is flushed:
content first, then the name, then the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

_NOT_ASKED = (errno.EINVAL, errno.ENOTSUP)  # file systems over a network that cannot flush a folder


def flush_folder(path: Path) -> None:
    """The names in a folder, to disk. Raises OSError when the disk refuses."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NOT_ASKED:
            raise
    finally:
        os.close(handle)


def flush_file(path: Path) -> None:
    """What a file holds, to disk. Raises OSError."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def flush_tree(folder: Path) -> None:
    """All that a folder holds, and their names, to disk. Raises OSError."""
    for path in folder.rglob("*"):
        flush_folder(path) if path.is_dir() else flush_file(path)
    flush_folder(folder)


def give_name(beside: Path, final: Path) -> None:
    """Rename what was written and flushed `beside`, and flush the name. Raises OSError."""
    beside.replace(final)
    flush_folder(final.parent)


def make_folder(path: Path) -> None:
    """A folder and those above it, where they are missing, each with its name on disk. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush_folder(folder.parent)


def write_whole(path: Path, content: bytes) -> None:
    """A small file: written beside, flushed, renamed, and its folder flushed. Raises OSError, `path` as it was."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def sha256_of(values: Any) -> str:
    """Of plain values, however they are written down: a tuple is a list, a name that is a number is a text."""
    plain = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Of what a file holds, read in parts. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_whole(path: Path, content: bytes) -> None:
    """Add to the end of a file, which is made when missing; what the disk takes only in part is taken back.

    Not flushed: after a loss of power the end may be missing. Raises OSError.
    """
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(handle).st_size
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(handle, rest) :]
        except OSError:
            os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)
