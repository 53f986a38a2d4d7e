"""How much a pickle unfolds to, found without making anything of it.

A pickle can name what it made before. Thirty pairs, each of the one before it twice, are a hundred bytes and a
billion values. Making them is quick; whoever then hashes them or puts them in a message, as PyTorch's reader does,
does not come back.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

MIN_LIMIT = 1_000_000
_PER_STEP = 20  # what is named again in files of weights is small: a text, a type, a shape
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_Node = list["_Node"]  # what a value consists of; nothing for numbers and texts


def file_unfolds(path: Path) -> bool:
    """`unfolds`, of the pickles in a PyTorch file: an archive, or before 1.6 five of them one after the other."""
    with open(path, "rb") as file:
        if file.read(2) == b"PK":  # as PyTorch tells them apart; a zip archive can also begin further on
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
                return any(unfolds(io.BytesIO(archive.read(name))) for name in names)
        file.seek(0)  # magic number, version, machine, object, names of storages; then the numbers
        return any(unfolds(file) for _ in range(5))


def unfolds(stream: BinaryIO) -> bool:
    """Whether some value of the next pickle in `stream` holds itself or, counting twice what is named twice, far more
    values than the pickle has steps. Leaves the stream behind that pickle.
    """
    walk = _Walk()
    try:
        for step, argument, _ in pickletools.genops(stream):
            walk.count += 1
            if not walk.take(step, argument):
                break
    except (ValueError, IndexError, KeyError):  # damaged; what comes before will be made nevertheless
        pass
    return _largest(walk.roots()) > max(MIN_LIMIT, _PER_STEP * walk.count)


class _Walk:
    """The stack and the memo of a reader, with nodes in the place of values."""

    def __init__(self) -> None:
        self.count = 0
        self._stack: list[_Node] = []
        self._marks: list[list[_Node]] = []
        self._memo: dict[int, _Node] = {}
        self._states: list[_Node] = []

    def roots(self) -> list[_Node]:
        return [*self._stack, *(node for stack in self._marks for node in stack), *self._memo.values(), *self._states]

    def take(self, step: pickletools.OpcodeInfo, argument: object) -> bool:
        """One step of the pickle; False for one that PyTorch's reader does not know, which ends there."""
        stack, name = self._stack, step.name
        if name == "MARK":
            self._marks.append(stack)
            self._stack = []
        elif name in ("APPENDS", "SETITEMS", "TUPLE"):
            self._stack = self._marks.pop()
            self._stack.append(stack) if name == "TUPLE" else self._stack[-1].extend(stack)
        elif name in ("APPEND", "SETITEM"):
            items = _popped(stack, 1 if name == "APPEND" else 2)
            stack[-1].extend(items)
        elif name in _TUPLES:
            stack.append(_popped(stack, _TUPLES[name]))
        elif name in ("REDUCE", "NEWOBJ", "BINPERSID"):
            stack.append(_popped(stack, 1 if name == "BINPERSID" else 2))
        elif name == "BUILD":  # attributes are neither hashed nor shown; and they may lead back, as to a parent
            self._states.append(stack.pop())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[int(str(argument))] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[int(str(argument))])
        elif step.stack_after and not step.stack_before:
            stack.append([])
        else:
            return name in ("PROTO", "STOP")
        return True


def _popped(stack: list[_Node], count: int) -> _Node:
    items = [stack.pop() for _ in range(count)]
    return items[::-1]


def _largest(roots: Iterable[_Node]) -> float:
    """The most values that one of these unfolds to; infinity where one holds itself."""
    sizes: dict[int, float] = {}  # by id; infinity while a node is being gone through
    todo = [(node, False) for node in roots]
    while todo:
        node, done = todo.pop()
        if done:
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in node)
        elif id(node) not in sizes:
            sizes[id(node)] = float("inf")
            todo.append((node, True))
            todo.extend((part, False) for part in node)
    return max(sizes.values(), default=0)
