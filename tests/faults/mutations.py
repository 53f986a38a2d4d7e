"""Damaged images: what is damaged, and how, is a function of (seed, number)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from .base_images import base_images

_HUGE = (0, 1, 255, 4096, 13_000, 32_767, 65_500, 65_535, 2**20, 2**24 - 1, 2**31 - 1, 2**32 - 1)


class Mutated(NamedTuple):
    """content: of the file. base: the whole image it comes from. what: was done to it, a word and brackets each."""

    content: bytes
    base: str
    what: str

    @property
    def kind(self) -> str:
        """What was done, without where."""
        return " + ".join(part.partition("(")[0] for part in self.what.split(" + "))


def mutated(seed: int, number: int) -> Mutated:
    """One image, damaged once, or (one in five) twice."""
    rng = np.random.default_rng([seed, number])
    bases = base_images()
    base = list(bases)[rng.integers(len(bases))]
    content, said = bases[base], []
    for _ in range(2 if rng.random() < 0.2 else 1):
        mutation = _MUTATIONS[rng.integers(len(_MUTATIONS))]
        content, what = mutation(content, rng)
        said.append(f"{mutation.__name__.lstrip('_')}({what})")
    return Mutated(content, base, " + ".join(said))


Mutation = Callable[[bytes, np.random.Generator], tuple[bytes, str]]


def _flip_bits(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    changed, count = bytearray(content), int(rng.integers(1, 65))
    reach = min(len(changed), 700) if rng.random() < 0.5 else len(changed)  # half of them in the header
    for place in rng.integers(0, max(1, reach), count if changed else 0).tolist():
        changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed), f"{count} in the first {reach}"


def _overwrite(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    start, length = _range(content, rng)
    value = (b"\0", b"\xff")[rng.integers(2)]
    return content[:start] + value * length + content[start + length :], f"{start}:{start + length} {value!r}"


def _scramble(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    start, length = _range(content, rng)
    return content[:start] + rng.bytes(length) + content[start + length :], f"{start}:{start + length}"


def _truncate(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    end = int(rng.integers(len(content) + 1))
    return content[:end], f"{end} of {len(content)}"


def _splice(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    bases = base_images()
    name = list(bases)[rng.integers(len(bases))]
    end, start = int(rng.integers(len(content) + 1)), int(rng.integers(len(bases[name])))
    return content[:end] + bases[name][start:], f"{end}, then {name} from {start}"


def _append(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    count = int(rng.integers(1, 5000))
    return content + rng.bytes(count), f"{count}"


def _repeat_part(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    start, end = _part(content, rng)
    times = (1, 2, 50)[rng.integers(3)]
    return content[:end] + content[start:end] * times + content[end:], f"{start}:{end} {times} times"


def _remove_part(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    start, end = _part(content, rng)
    return content[:start] + content[end:], f"{start}:{end}"


def _resize_header(content: bytes, rng: np.random.Generator) -> tuple[bytes, str]:
    """Another width or height in the header, or both, with what would notice it (PNG's check sum) made right."""
    fields = list(_size_fields(content))
    if not fields:
        return _flip_bits(content, rng)
    changed = bytearray(content)
    for place, layout in [field for field in fields if rng.random() < 0.7] or fields[:1]:
        size = struct.calcsize(layout)
        if place + size > len(content):  # it was truncated before
            continue
        value = _HUGE[rng.integers(len(_HUGE))] & (2 ** (8 * size) - 1)
        struct.pack_into(layout, changed, place, value)
    if content.startswith(b"\x89PNG") and len(content) >= 33:
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    return bytes(changed), ", ".join(f"{place}" for place, _ in fields)


_MUTATIONS: tuple[Mutation, ...] = (
    _flip_bits, _overwrite, _scramble, _truncate, _splice, _append, _repeat_part, _remove_part, _resize_header,
)  # fmt: skip


def _range(content: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(len(content) + 1))
    return start, int(min(rng.integers(1, 200), len(content) - start))


def _part(content: bytes, rng: np.random.Generator) -> tuple[int, int]:
    """Where one part of a file begins and ends: a chunk or segment, or, in formats without such, some bytes."""
    parts = list(_parts(content))
    if parts:
        return parts[rng.integers(len(parts))]
    start, length = _range(content, rng)
    return start, start + length


def _parts(content: bytes) -> Iterator[tuple[int, int]]:
    place = {b"\x89P": 8, b"\xff\xd8": 2, b"RI": 12}.get(content[:2], len(content))
    while place + 8 <= len(content):
        if content[0] == 0x89:
            end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        elif content[0] == 0xFF:
            end = place + 2 + int.from_bytes(content[place + 2 : place + 4], "big")
        else:
            end = place + 8 + int.from_bytes(content[place + 4 : place + 8], "little") // 2 * 2
        if end > len(content) or (content[0] == 0xFF and content[place] != 0xFF):
            return
        yield place, end
        place = end


def _size_fields(content: bytes) -> Iterator[tuple[int, str]]:
    """Where width and height stand, and how `struct` calls what stands there."""
    if content.startswith(b"\x89PNG"):
        yield from ((16, ">I"), (20, ">I"))
    elif content.startswith(b"GIF8"):
        yield from ((6, "<H"), (8, "<H"))
    elif content.startswith(b"BM"):
        yield from ((18, "<I"), (22, "<I"))
    elif content.startswith(b"RIFF"):
        yield from ((24, "<H"), (27, "<H")) if content[12:16] == b"VP8X" else ((26, "<H"), (28, "<H"))
    elif content.startswith(b"\xff\xd8"):
        for start, _ in _parts(content):
            if content[start + 1] in (0xC0, 0xC1, 0xC2):
                yield from ((start + 5, ">H"), (start + 7, ">H"))
    elif content.startswith(b"II*\0"):
        (first,) = struct.unpack_from("<I", content, 4) if len(content) >= 8 else (0,)
        for place in range(first + 2, min(first + 2 + 12 * 20, len(content) - 12), 12):
            tag = struct.unpack_from("<H", content, place)[0]
            if tag in (256, 257, 277, 278, 322, 323):  # sides of the image, a strip's rows, sides of a tile
                yield place + 8, "<I"
            elif tag in (258, 273, 324):  # how many values there are of bits, strips, tiles
                yield place + 4, "<I"
