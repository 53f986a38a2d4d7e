"""File operations, recorded, made to fail, and played again on a disk that forgets what was not flushed.

The disk that is played: what a file holds is kept from its last flush on; a name that is made, changed or removed is
kept when its folder is flushed. All else may be there after a loss of power, or not, each by itself: more than any
file system in use does, and no less than POSIX allows.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

MOST_SUBSETS = 64


@dataclass(frozen=True)
class Operation:
    """kind: "mkdir", "create", "write", "truncate", "flush", "rename", "unlink" or "rmdir". path, to: from the root.
    content: what is written at `offset`."""

    kind: str
    path: str
    to: str = ""
    offset: int = 0
    content: bytes = b""


class Recorder:
    """Sees the operations below `root`; the one with the number `fails_at` raises `error` instead."""

    def __init__(self, root: Path, fails_at: int = -1, error: OSError | None = None) -> None:
        self.root, self.fails_at, self.error = str(root.resolve()), fails_at, error
        self.operations: list[Operation] = []

    def inside(self, path: Any) -> str | None:
        """`path` from the root, None when it is elsewhere; "" is the root."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.path.abspath(os.fspath(path))
        if path != self.root and not path.startswith(self.root + os.sep):
            return None
        return path[len(self.root) + 1 :]

    def add(self, kind: str, path: Any, **more: Any) -> None:
        inside = self.inside(path)
        if inside is None:
            return
        if len(self.operations) == self.fails_at and self.error is not None:
            self.fails_at = -2  # once
            raise self.error
        self.operations.append(Operation(kind, inside, **more))


class _Raw(io.FileIO):
    """What reaches the operating system, after Python's own buffers."""

    recorder: Recorder

    def write(self, content: Any) -> int:
        data = bytes(content)
        self.recorder.add("write", self.name, offset=self.tell(), content=data)
        return super().write(data)


def _opened(recorder: Recorder, real: Callable[..., Any]) -> Callable[..., Any]:
    def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if isinstance(file, int) or recorder.inside(file) is None or not set(mode) & set("wax+"):
            return real(file, mode, *arguments, **options)
        if not os.path.exists(file):
            recorder.add("create", file)
        elif "w" in mode:
            recorder.add("truncate", file)
        raw = _Raw(os.fspath(file), mode.replace("b", "").replace("t", ""))
        raw.recorder = recorder
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        kept = {name: options[name] for name in ("encoding", "errors", "newline") if name in options}
        return io.TextIOWrapper(buffered, **kept)

    return opened


@contextmanager
def recorded(recorder: Recorder) -> Iterator[list[Operation]]:
    """All that Python code does to files below the recorder's root."""
    real = {name: getattr(os, name) for name in ("open", "write", "fsync", "mkdir", "unlink", "rmdir", "rename")}

    def before(name: str, kind: str) -> Callable[..., Any]:
        def called(path: Any, *arguments: Any, **options: Any) -> Any:
            count = len(recorder.operations)
            recorder.add(kind, path)
            try:
                return real[name](path, *arguments, **options)
            except OSError:
                del recorder.operations[count:]  # a folder whose parent is not there yet, for example
                raise

        return called

    def renamed(a: Any, b: Any) -> None:
        target = recorder.inside(b)
        assert target is not None
        recorder.add("rename", a, to=target)
        real["rename"](a, b)

    def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT and not os.path.exists(path):
            recorder.add("create", path)
        return int(real["open"](path, flags, *arguments, **options))

    def written(handle: int, content: Any) -> int:
        recorder.add("write", handle, offset=os.fstat(handle).st_size, content=bytes(content))
        return int(real["write"](handle, content))

    def removed(path: Any, ignore_errors: bool = False) -> None:
        try:
            for entry in sorted(os.listdir(path)):
                inner = os.path.join(path, entry)
                removed(inner) if os.path.isdir(inner) else os.unlink(inner)
            os.rmdir(path)
        except OSError:
            if not ignore_errors:
                raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", _opened(recorder, builtins.open))
        patch.setattr(io, "open", _opened(recorder, io.open))
        for name, kind in (("fsync", "flush"), ("mkdir", "mkdir"), ("unlink", "unlink"), ("rmdir", "rmdir")):
            patch.setattr(os, name, before(name, kind))
        patch.setattr(os, "remove", os.unlink)
        patch.setattr(os, "rename", renamed)
        patch.setattr(os, "replace", renamed)
        patch.setattr(os, "open", opened)
        patch.setattr(os, "write", written)
        patch.setattr(shutil, "rmtree", removed)
        yield recorder.operations


@dataclass
class _Node:
    """A file or folder: as the system shows it, and as the disk keeps it."""

    is_folder: bool
    shown: dict[str, _Node] = field(default_factory=dict)
    kept: dict[str, _Node] = field(default_factory=dict)
    content: bytes = b""
    kept_content: bytes = b""


Change = tuple[_Node, str, _Node | None]  # in a folder, a name stands for something, or for nothing
Tree = dict[str, bytes | None]  # files and folders (None) by path


class Disk:
    """Begins with what is in a folder, all of it flushed."""

    def __init__(self, start: Tree) -> None:
        self.root = _Node(True)
        self.pending: list[list[Change]] = []
        for path, content in sorted(start.items()):
            folder, name = self._place(path)
            node = _Node(content is None, content=content or b"", kept_content=content or b"")
            folder.shown[name] = folder.kept[name] = node

    def play(self, operation: Operation) -> None:
        kind = operation.kind
        if kind == "flush":
            self._flush(self._at(operation.path))
            return
        folder, name = self._place(operation.path)
        if kind in ("mkdir", "create"):
            self._change([(folder, name, _Node(kind == "mkdir"))])
        elif kind in ("unlink", "rmdir"):
            self._change([(folder, name, None)])
        elif kind == "rename":
            to, new = self._place(operation.to)
            self._change([(to, new, folder.shown[name]), (folder, name, None)])
        elif kind == "truncate":
            folder.shown[name].content = b""
        else:
            node = folder.shown[name]
            filled = node.content.ljust(operation.offset, b"\0")
            node.content = (
                filled[: operation.offset] + operation.content + filled[operation.offset + len(operation.content) :]
            )

    def after_a_loss_of_power(self, draw: random.Random) -> Iterator[Tree]:
        """What may be found then, every combination where they are few."""
        count = len(self.pending)
        chosen: Iterator[tuple[bool, ...]] = itertools.product((False, True), repeat=count)
        if 2**count > MOST_SUBSETS:
            some = [tuple(draw.random() < 0.5 for _ in range(count)) for _ in range(MOST_SUBSETS)]
            chosen = iter([*some, *((i < n for i in range(count)) for n in range(count + 1))])  # type: ignore[list-item]
        for applied in chosen:
            entries = self._entries([change for change, yes in zip(self.pending, applied, strict=True) if yes])
            for data in ("lost", "half", "kept"):
                yield self._tree(self.root, entries, data)

    def _entries(self, changes: list[list[Change]]) -> dict[int, dict[str, _Node]]:
        entries: dict[int, dict[str, _Node]] = {}
        for folder, name, node in itertools.chain.from_iterable(changes):
            names = entries.setdefault(id(folder), dict(folder.kept))
            names.pop(name, None)
            if node is not None:
                names[name] = node
        return entries

    def _tree(self, node: _Node, entries: dict[int, dict[str, _Node]], data: str, at: str = "") -> Tree:
        found: Tree = {}
        for name, inner in entries.get(id(node), node.kept).items():
            path = f"{at}/{name}" if at else name
            if inner.is_folder:
                found[path] = None
                found |= self._tree(inner, entries, data, path)
            else:
                half = inner.content[: len(inner.content) // 2]
                unflushed = inner.content != inner.kept_content
                found[path] = {"lost": inner.kept_content, "half": half, "kept": inner.content}[
                    data if unflushed else "kept"
                ]
        return found

    def _flush(self, node: _Node) -> None:
        node.kept_content = node.content
        if not node.is_folder:
            return
        rest = []
        for changes in self.pending:
            if any(folder is node for folder, _, _ in changes):
                for folder, name, made in changes:
                    folder.kept.pop(name, None)
                    if made is not None:
                        folder.kept[name] = made
            else:
                rest.append(changes)
        self.pending = rest

    def _change(self, changes: list[Change]) -> None:
        for folder, name, node in changes:
            folder.shown.pop(name, None)
            if node is not None:
                folder.shown[name] = node
        self.pending.append(changes)

    def _at(self, path: str) -> _Node:
        node = self.root
        for part in filter(None, path.split("/")):
            node = node.shown[part]
        return node

    def _place(self, path: str) -> tuple[_Node, str]:
        folder, _, name = path.rpartition("/")
        return self._at(folder), name


def tree_of(folder: Path) -> Tree:
    """What is in a folder, hidden things too."""
    paths = (path for path in folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in paths}


def build(tree: Tree, folder: Path) -> Path:
    """The tree as files, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
    return folder


def every_loss_of_power(start: Tree, operations: list[Operation], scratch: Path) -> Iterator[tuple[int, Path]]:
    """After how many operations the power went, and a folder with what may be found then; each folder once."""
    disk, draw, seen = Disk(start), random.Random(0), set()
    for done in range(len(operations) + 1):
        if done:
            disk.play(operations[done - 1])
        for tree in disk.after_a_loss_of_power(draw):
            key = (done == len(operations), tuple(sorted(tree.items())))
            if key not in seen:
                seen.add(key)
                yield done, build(tree, scratch)
