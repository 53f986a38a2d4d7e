"""Files that try to run code while they are read. The tests make them anew; none is stored.

Whatever gets its code run makes one file, the sentinel. A payload is the part of a pickle that pushes one value; it
can stand anywhere in a stream.
"""

from __future__ import annotations

import copyreg
import io
import pickletools
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

EXTENSION = 0xF0


class Trap:
    """Makes the files named by its arguments when it is made, and that in its state when that is set."""

    def __new__(cls, *paths: str, **more: str) -> Trap:
        for path in (*paths, *more.values()):
            Path(path).touch()
        return object.__new__(cls)

    def __setstate__(self, state: dict[str, str]) -> None:
        Path(state["path"]).touch()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name_of(module: str, name: str) -> bytes:
    return b"c" + f"{module}\n{name}\n".encode()


def called(function: bytes, *args: bytes) -> bytes:
    return function + b"(" + b"".join(args) + b"tR"


def raw_bytes(value: bytes) -> bytes:
    """As protocol 2 writes bytes."""
    return called(name_of("_codecs", "encode"), text(value.decode("latin1")), text("latin1"))


def touch(path: Path) -> bytes:
    return text(f"touch '{path}'")


def code(path: Path) -> bytes:
    return text(f"open({str(path)!r}, 'w').close()")


_SYSTEM = name_of("os", "system")
_TRAP = name_of(__name__, "Trap")
_IMPORTED = called(name_of("__builtin__", "__import__"), text("os"))


def _state(path: Path) -> bytes:
    return b"}" + text("path") + text(str(path)) + b"s"


PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "os.system": lambda p: called(_SYSTEM, touch(p)),
    "posix.system": lambda p: called(name_of("posix", "system"), touch(p)),
    "os.mkdir": lambda p: called(name_of("os", "mkdir"), text(str(p))),
    "subprocess": lambda p: called(name_of("subprocess", "call"), b"(l" + text("touch") + b"a" + text(str(p)) + b"a"),
    "exec": lambda p: called(name_of("builtins", "exec"), code(p)),
    "eval": lambda p: called(name_of("__builtin__", "eval"), code(p)),
    "open": lambda p: called(name_of("io", "open"), text(str(p)), text("w")),
    "timeit": lambda p: called(name_of("timeit", "timeit"), text("pass"), code(p)),
    "import, getattr": lambda p: called(called(name_of("builtins", "getattr"), _IMPORTED, text("system")), touch(p)),
    "methodcaller": lambda p: called(called(name_of("operator", "methodcaller"), text("system"), touch(p)), _IMPORTED),
    "partial": lambda p: called(called(name_of("functools", "partial"), _SYSTEM, touch(p))),
    "runstring": lambda p: called(name_of("numpy.testing._private.utils", "runstring"), code(p), b"}"),
    "a pickle in bytes": lambda p: called(name_of("_pickle", "loads"), raw_bytes(pickled(called(_SYSTEM, touch(p))))),
    "a file in bytes": lambda p: called(
        name_of("torch.storage", "_load_from_bytes"), raw_bytes(CONTAINERS["legacy, object"](called(_SYSTEM, touch(p))))
    ),
    "tensor of a type": lambda p: called(
        name_of("torch._tensor", "_rebuild_from_type_v2"), _SYSTEM, name_of("torch", "Tensor"), touch(p) + b"\x85", b"N"
    ),
    "a hook": lambda p: called(name_of("collections", "Counter"), called(_SYSTEM, touch(p))),
    "INST": lambda p: b"(" + touch(p) + b"ios\nsystem\n",
    "OBJ": lambda p: b"(" + _SYSTEM + touch(p) + b"o",
    "NEWOBJ": lambda p: _TRAP + text(str(p)) + b"\x85\x81",
    "NEWOBJ_EX": lambda p: _TRAP + b")" + _state(p) + b"\x92",
    "BUILD": lambda p: _TRAP + b")\x81" + _state(p) + b"b",
    "STACK_GLOBAL": lambda p: called(text("os") + text("system") + b"\x93", touch(p)),
    "dotted name": lambda p: b"\x80\x04" + called(text("argparse") + text("_os.system") + b"\x93", touch(p)),
    "EXT1": lambda p: called(b"\x82" + bytes([EXTENSION]), touch(p)),
    "persistent id": lambda p: (
        b"(" + text("storage") + called(_SYSTEM, touch(p)) + text("0") + text("cpu") + b"K\x04tQ"
    ),
    "a key": lambda p: b"}" + called(_SYSTEM, touch(p)) + b"K\x01s",
    "memo": lambda p: _SYSTEM + b"q\xc8" + touch(p) + b"q\xc90" + b"0" + called(b"h\xc8", b"h\xc9"),
}


@contextmanager
def extension() -> Iterator[None]:
    """os.system under a number of the extension registry, which "EXT1" asks for."""
    copyreg.add_extension("posix", "system", EXTENSION)
    try:
        yield
    finally:
        copyreg.remove_extension("posix", "system", EXTENSION)


def pickled(payload: bytes) -> bytes:
    """A stream of its own: a dict with the payload under "w"."""
    return b"\x80\x02}" + text("w") + payload + b"s."


def _entries(path_or_file: Any) -> dict[str, bytes]:
    with zipfile.ZipFile(path_or_file) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def _saved(**how: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"w": torch.ones(2)}}, buffer, **how)
    buffer.seek(0)
    return buffer


def zipped(stream: bytes, packing: int = zipfile.ZIP_STORED, more: dict[str, bytes] | None = None) -> bytes:
    """A PyTorch file with this stream as its data.pkl."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", packing) as archive:
        for name, content in _entries(_saved()).items():
            archive.writestr(name, stream if name.endswith("/data.pkl") else content)
        for name, content in (more or {}).items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o120777 << 16  # a symbolic link, to its content
            archive.writestr(entry, content)
    return buffer.getvalue()


def beside(payload: bytes) -> bytes:
    """The stream of an honest file, with the payload under one more name."""
    stream = next(content for name, content in _entries(_saved()).items() if name.endswith("/data.pkl"))
    return stream[:-1] + text("args") + payload + b"s."


def _legacy(payload: bytes, part: int) -> bytes:
    """A file of PyTorch before 1.6, with one of its five pickles replaced: magic, protocol, system, object, keys."""
    file = _saved(_use_new_zipfile_serialization=False)
    parts = []
    for _ in range(5):
        start = file.tell()
        for _ in pickletools.genops(file):
            pass
        parts.append(file.getvalue()[start : file.tell()])
    rest = file.read()
    parts[part] = pickled(payload)
    return b"".join(parts) + rest


def _tar(payload: bytes) -> bytes:
    """A file of PyTorch before 0.2, with a name that leads out of the folder."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors", "../../hostile"):
            content = pickled(payload)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def _nested(payload: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("weights.pt", zipped(pickled(payload)))
    return buffer.getvalue()


CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "zip": lambda payload: zipped(pickled(payload)),
    "zip, beside tensors": lambda payload: zipped(beside(payload)),
    "zip, packed": lambda payload: zipped(pickled(payload), zipfile.ZIP_DEFLATED),
    "zip, paths": lambda p: zipped(pickled(p), more={"../../hostile": b"x", "/hostile": b"x", "link": b"/etc/passwd"}),
    "zip in zip": _nested,
    "legacy, magic": lambda payload: _legacy(payload, 0),
    "legacy, system": lambda payload: _legacy(payload, 2),
    "legacy, object": lambda payload: _legacy(payload, 3),
    "legacy, keys": lambda payload: _legacy(payload, 4),
    "tar": _tar,
    "bare pickle": pickled,
    "safetensors, then a pickle": lambda payload: struct.pack("<Q", 2) + b"{}" + pickled(payload),
}


class Watch:
    """What the process does while `active`: files opened to write, folders, processes, connections, pickled names."""

    def __init__(self) -> None:
        self.active, self.seen = False, [""][:0]
        sys.addaudithook(self._note)  # for good: Python has no way to take it away

    def _note(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.active or event not in _EVENTS:
            return
        if event == "open" and (not isinstance(args[2], int) or not args[2] & _WRITING):
            return
        if "__pycache__" not in str(args[0]):
            self.seen.append(f"{event} {args[0]}")


_WRITING = 0o1 | 0o2 | 0o100  # O_WRONLY, O_RDWR, O_CREAT
_EVENTS = {
    "open", "os.mkdir", "os.rename", "os.symlink", "os.system", "os.exec", "os.fork", "os.posix_spawn",
    "subprocess.Popen", "socket.connect", "pickle.find_class", "tempfile.mkdtemp", "tempfile.mkstemp",
}  # fmt: skip
