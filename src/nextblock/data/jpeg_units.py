"""JPEGs of which a part can be decoded alone: prepared shards hold them.

A JPEG is coded in units of 8 or 16 pixels a side, one behind the other; without help, the last one is found only by
decoding all before it. Here each unit ends with a restart marker, and an APP9 segment after the first one lists their
lengths: so what a crop needs is cut out, without decoding, to a smaller JPEG with the same pixels. To every other
program it is an ordinary JPEG, 6 % larger. Source: ITU-T T.81 (1992), B.2.4.4 and E.1.4.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nextblock.data.jpeg_header import SOI, JpegHeader, is_one_scan, plain_header

_JFIF = SOI + b"\xff\xe0\x00\x10JFIF\0"
_AT = 20  # behind the JFIF segment, which is to be the first
_NAME = b"nextblock units\0"
_LENGTHS = _AT + 4 + len(_NAME)
_LENGTH = np.dtype("<u2")
_MOST = (65_535 - 2 - len(_NAME)) // _LENGTH.itemsize  # that a segment can list
_RESTARTS = (0xD0 + np.arange(_MOST) % 8).astype(np.uint8)  # the second bytes of the markers, in turn
_END = 0xD9


class UnitJpeg(bytes):
    """Bytes of a JPEG with a list of its units. Who makes one vouches that they are as they were written: what lies
    outside a crop is not looked at."""


def with_units(content: bytes) -> bytes:
    """`content`, a JFIF file with a restart marker behind each unit, with the list of its units.

    As it was when it is none, or has more units than a segment can list (32,758).
    """
    header = plain_header(content)
    if header is None or not content.startswith(_JFIF) or has_units(content):
        return content
    lengths = _found(content, header)
    if len(lengths) != np.prod(_grid(header)) or len(lengths) > _MOST or max(lengths) > np.iinfo(_LENGTH).max:
        return content
    segment = _NAME + lengths.astype(_LENGTH).tobytes()
    return b"".join((content[:_AT], b"\xff\xe9", _two_bytes(len(segment) + 2), segment, content[_AT:]))


def has_units(content: bytes) -> bool:
    """Whether it says of itself that it has a list of its units."""
    return content.startswith(_NAME, _AT + 4) and content.startswith(b"\xff\xe9", _AT)


def are_as_listed(content: bytes) -> bool:
    """Whether the units of `content`, which has a list of them, are where it says."""
    header = plain_header(content)
    if header is None or not is_one_scan(content, header) or len(_listed(content)) != np.prod(_grid(header)):
        return False
    return bool(np.array_equal(_listed(content), _found(content, header)))


def cut_units(
    content: UnitJpeg, header: JpegHeader, rows: slice, columns: slice, scale: int
) -> tuple[bytes | bytearray, JpegHeader, int, int]:
    """The units that `rows` and `columns` of the image need, decoded 1 / `scale` as large (1, 2, 4, 8), as a JPEG.

    Returns it, its height and width in its header (offsets are the old ones), and how many rows and columns of the
    decoded image lie above and left of it. Decoded by libjpeg, it has the whole image's pixels at `rows` and `columns`:
    their neighbours, of which the reading of colours at half the resolution makes use, are cut out as well.
    """
    down, across = _grid(header)
    top, bottom = _range(rows, scale, header.unit[0], down)
    left, right = _range(columns, scale, header.unit[1], across)
    if right - left == 1:  # in an image that is not three colours wide libjpeg interpolates none; two units are
        left, right = (left, right + 1) if right < across else (max(0, left - 1), right)
    if (bottom - top, right - left) == (down, across):
        return content, header, 0, 0
    lengths = _listed(content).reshape(down, across)
    ends = lengths.cumsum(dtype=np.int32).reshape(down, across)
    starts = (ends[top:bottom, left] - lengths[top:bottom, left] + header.scan).tolist()
    ends = (ends[top:bottom, right - 1] + header.scan).tolist()
    height = min(bottom * header.unit[0], header.height) - top * header.unit[0]
    width = min(right * header.unit[1], header.width) - left * header.unit[1]
    head = content[: header.frame] + _two_bytes(height) + _two_bytes(width) + content[header.frame + 4 : header.scan]
    cut = bytearray().join([head, *(content[start:end] for start, end in zip(starts, ends, strict=True))])
    markers = lengths[top:bottom, left:right].cumsum(dtype=np.int32) + (len(head) - 1)
    values = np.frombuffer(cut, dtype=np.uint8)
    values[markers] = _RESTARTS[: len(markers)]
    values[-1] = _END
    header = header._replace(height=height, width=width)
    return cut, header, top * header.unit[0] // scale, left * header.unit[1] // scale


def _range(places: slice, scale: int, unit: int, count: int) -> tuple[int, int]:
    """First unit and end of those that hold the pixels `places` of the decoded image and one more on either side."""
    return max(0, (places.start - 1) * scale) // unit, min(count, -(-(places.stop + 1) * scale // unit))


def _grid(header: JpegHeader) -> tuple[int, int]:
    """Units down and across."""
    return -(-header.height // header.unit[0]), -(-header.width // header.unit[1])


def _listed(content: bytes) -> NDArray[np.uint16]:
    size = int.from_bytes(content[_AT + 2 : _AT + 4], "big") - 2 - len(_NAME)
    return np.frombuffer(content, _LENGTH, size // _LENGTH.itemsize, _LENGTHS)


def _found(content: bytes, header: JpegHeader) -> NDArray[np.int64]:
    """Length in bytes of each unit with the two bytes of the marker behind it."""
    values = np.frombuffer(content, dtype=np.uint8, offset=header.scan)
    first = np.flatnonzero(values[:-1] == 0xFF)
    second = values[first + 1]
    ends = first[((second >= 0xD0) & (second <= 0xD7)) | (second == _END)] + 2
    return np.diff(ends, prepend=0)


def _two_bytes(number: int) -> bytes:
    return number.to_bytes(2, "big")
