"""Is this still the same data? A run stores the answer, and what it needs to say what changed."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image

from nextblock.data.sources.protocol import Source
from nextblock.errors import DataError, SampleError

MANIFEST_LIMIT = 1_000_000
_SHOWN = 3


@dataclass(frozen=True)
class Fingerprint:
    """`count` images, `bytes` in the manifest's entries, `sha256` of the sorted manifest."""

    count: int
    bytes: int
    sha256: str


def fingerprint(source: Source) -> Fingerprint:
    """Digest the source's manifest: names and sizes, not the content of files."""
    digest, total = hashlib.sha256(), 0
    for name, size in source.manifest():
        digest.update(_line(name, size))
        total += size
    return Fingerprint(len(source), total, digest.hexdigest())


def content_digest(source: Source) -> str:
    """More than the fingerprint: what must be equal for stored features to be those of these images, in this order.

    Names in order, and what the source itself says of its content (`stamps`: times of change, columns, the choice of
    a part). Of a source that cannot say it, such as a Python object, every image's content is read.
    """
    digest = hashlib.sha256(fingerprint(source).sha256.encode())
    for index in range(len(source)):
        digest.update(_line(source.name(index), index))
    for stamp in stamps_of(source):
        digest.update(_line(stamp, 0))
    return digest.hexdigest()


def stamps_of(source: Source) -> Iterator[str]:
    """The source's own `stamps`, else a hash of each image's content."""
    own = getattr(source, "stamps", None)
    if own is not None:
        yield from own()
        return
    for index in range(len(source)):
        try:
            content = source[index].content
        except SampleError as error:
            yield f"broken: {error.reason}"
            continue
        if isinstance(content, Image.Image):
            content = np.asarray(content)
        shape = "" if isinstance(content, bytes) else f"{content.shape}{content.dtype}"
        data = content if isinstance(content, bytes) else np.ascontiguousarray(content).data
        yield f"{shape} {hashlib.sha256(data).hexdigest()}"


def write_manifest(source: Source, path: str | os.PathLike[str]) -> None:
    """Write `size<tab>name` lines, gzipped, sorted by name: the first 1,000,000 of them."""
    # No file name and time in the header: the same data give the same bytes.
    with open(path, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as out:
        for name, size in islice(source.manifest(), MANIFEST_LIMIT):
            out.write(_line(name, size))


def explain_change(manifest_path: str | os.PathLike[str], source: Source) -> str:
    """One line that says how `source` differs from a stored manifest, with up to three names of each kind."""
    try:
        with gzip.open(manifest_path, "rb") as file:
            before = dict(_parsed(line) for line in file)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"cannot read the manifest {os.fspath(manifest_path)}: {error}") from error
    last = max(before) if len(before) >= MANIFEST_LIMIT else None  # what lies behind it was not stored
    now = dict(_parsed(_line(*entry)) for entry in source.manifest())
    added = [name for name in now if name not in before and (last is None or name <= last)]
    removed = [name for name in before if name not in now]
    resized = [name for name, size in before.items() if now.get(name, size) != size]
    parts = [_part("added", added), _part("removed", removed), _part("resized", resized)]
    return "; ".join(filter(None, parts)) or "no difference found in names and sizes"


def _line(name: str, size: int) -> bytes:
    # A file name may hold anything but NUL and '/'; a line must stay a line.
    return f"{size}\t{name}".encode(errors="surrogateescape").replace(b"\n", b"?") + b"\n"


def _parsed(line: bytes) -> tuple[bytes, int]:
    size, _, name = line.rstrip(b"\n").partition(b"\t")
    return name, int(size)


def _part(what: str, names: list[bytes]) -> str:
    shown = ", ".join(name.decode(errors="backslashreplace") for name in names[:_SHOWN])
    return f"{len(names)} {what}: {shown}{', ...' if len(names) > _SHOWN else ''}" if names else ""
