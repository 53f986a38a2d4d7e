"""The members of a tar, from its headers alone: v7, ustar, GNU and pax (POSIX.1-2001, "pax interchange format").

Nothing is unpacked, so no name in a tar can lead to a file. Whoever wrote it, reading stays within its own bytes, and
what is wrong is a DataError that names the tar and the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from nextblock.errors import DataError, shown

Read = Callable[[int, int], bytes]  # (offset, length) -> so many bytes, fewer only at the end

BLOCK = 512
FILE, LINK, FOLDER, DEVICE, OTHER = "file", "link", "folder", "device", "other"
_LONGEST = 2**20  # of a long name or of pax records: more is no name
_ZEROS = bytes(BLOCK)
_KINDS = {b"\0": FILE, b"0": FILE, b"7": FILE, b"1": LINK, b"2": LINK, b"3": DEVICE, b"4": DEVICE, b"5": FOLDER,
          b"6": DEVICE}  # fmt: skip
_WITHOUT_CONTENT = (LINK, DEVICE, FOLDER)
_PACKED = {b"\x1f\x8b": ("gzip", "gunzip"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ": ("xz", "unxz"),
           b"\x28\xb5\x2f\xfd": ("zstd", "unzstd")}  # fmt: skip


class Member(NamedTuple):
    """One member: the byte where its header begins, its kind, its name as it is, where its content lies."""

    header: int
    kind: str
    name: bytes
    offset: int
    size: int


def members(read: Read, size: int, where: str) -> Iterator[Member]:
    """All members of a tar of `size` bytes, in order; `read` is asked for ever later bytes.

    `where` is what errors call it. Blocks of zeros, which mark the end, are passed over wherever they are, so of tars
    that were joined with `cat` all members are found. Raises DataError for a tar that is truncated, damaged, packed or
    sparse.
    """
    _require_tar(read(0, 8), size, where)
    offset, ended = 0, False
    while offset < size:
        block = read(offset, BLOCK)
        ended = block != b"" and block == _ZEROS[: len(block)]
        if ended:
            offset += BLOCK
            continue
        found, offset = _member(read, offset, size, where)
        yield found
    if not ended:  # what was cut off between two members looks just like this
        marked = -(-size // BLOCK) * BLOCK + 2 * BLOCK
        what = f"the tar ends without a mark of its end. Fetch or copy it again; if it is whole: truncate -s {marked}"
        raise _damaged(where, size, what)


def _require_tar(start: bytes, size: int, where: str) -> None:
    for magic, (name, command) in _PACKED.items():
        if start.startswith(magic):
            raise DataError(
                f"{where} is packed with {name}, so its images cannot be read at random. Unpack it to a plain .tar "
                f"({command}): images are compressed already, little space is lost."
            )
    if not size:
        raise DataError(f"{where} is empty: not a tar file. Was it fetched or copied to its end?")


def _member(read: Read, offset: int, size: int, where: str) -> tuple[Member, int]:
    """The member whose header, or whose first extended header, is at `offset`; and where the next one begins."""
    first, name, records = offset, b"", dict[bytes, bytes]()
    while True:
        block = _header(read, offset, size, where)
        kind, length = block[156:157], _number(block[124:136], offset, where)
        if kind in (b"x", b"X", b"g", b"L", b"K"):
            content = b"" if kind in (b"g", b"K") else _content(read, offset, length, size, where)
            if kind == b"L":
                name = content.partition(b"\0")[0]
            elif content:
                records |= _records(content, offset, where)
            offset = _next(offset, length, size, where)
            continue
        if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in records):
            raise _damaged(where, offset, "a sparse file, which is not stored as it is. Pack it without --sparse")
        if b"size" in records:
            length = _whole(records[b"size"], offset, where)
        name = records.get(b"path", name) or _name(block)
        what = _KINDS.get(kind, OTHER)
        if what == FILE and name.endswith(b"/"):
            what = FOLDER
        length = 0 if what in _WITHOUT_CONTENT else length
        after = _next(offset, length, size, where)
        return Member(first, what, name, offset + BLOCK, length), after


def _header(read: Read, offset: int, size: int, where: str) -> bytes:
    block = read(offset, BLOCK)
    if len(block) < BLOCK:
        raise _truncated(where, offset, size)
    told = _number(block[148:156], offset, where)
    given = sum(block[:148]) + sum(block[156:]) + 8 * 32  # its own place counts as spaces
    if told != given and told != given - 256 * sum(
        byte > 127 for byte in block[:148] + block[156:]
    ):  # historic: signed
        raise _damaged(where, offset, "not a tar file" if offset == 0 else "a damaged header: its checksum is wrong")
    return block


def _content(read: Read, offset: int, length: int, size: int, where: str) -> bytes:
    """Of an extended header."""
    if length > _LONGEST:
        raise _damaged(where, offset, f"a damaged header: {length:,} bytes for a name")
    content = read(offset + BLOCK, length)
    if len(content) < length:
        raise _truncated(where, offset, size)
    return content


def _next(offset: int, length: int, size: int, where: str) -> int:
    """Where the header after this one is."""
    if offset + BLOCK + length > size:
        raise _truncated(where, offset, size)
    return offset + BLOCK + -(-length // BLOCK) * BLOCK


def _records(content: bytes, offset: int, where: str) -> dict[bytes, bytes]:
    """Of a pax header: lines "LENGTH KEY=VALUE", LENGTH counting all of the line."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(content) and content[at]:
        space = content.find(b" ", at, at + 20)
        length = _whole(content[at : max(at, space)], offset, where)
        key, is_record, value = content[space + 1 : at + length - 1].partition(b"=")
        if length <= space + 1 - at or at + length > len(content) or not is_record:
            raise _damaged(where, offset, "a damaged pax header")
        found[key] = value
        at += length
    return found


def _name(block: bytes) -> bytes:
    name, prefix = (field.partition(b"\0")[0] for field in (block[:100], block[345:500]))
    posix = block[257:263] == b"ustar\0"  # elsewhere these bytes hold something else
    return prefix + b"/" + name if posix and prefix else name


def _number(field: bytes, offset: int, where: str) -> int:
    """Octal digits, or for large ones base 256, as GNU has it."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.partition(b"\0")[0].strip()
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise _damaged(where, offset, "not a tar file" if offset == 0 else "a damaged header: a number is none")
    return int(digits, 8)


def _whole(digits: bytes, offset: int, where: str) -> int:
    if not digits.isdigit() or len(digits) > 20:
        raise _damaged(where, offset, "a damaged pax header")
    return int(digits)


def _damaged(where: str, offset: int, what: str) -> DataError:
    return DataError(f"{shown(where)}, byte {offset}: {what}.")


def _truncated(where: str, offset: int, size: int) -> DataError:
    return DataError(
        f"{shown(where)}, byte {offset}: the tar is truncated, it ends at byte {size}. Fetch or copy it again."
    )
