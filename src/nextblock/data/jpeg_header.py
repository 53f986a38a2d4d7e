"""The header of a JPEG file that has nothing unusual in it, read in microseconds; whatever else is Pillow's to judge.

Source: ITU-T T.81 (1992), annex B.
"""

from __future__ import annotations

import re
from typing import NamedTuple

SOI, EOI = b"\xff\xd8", b"\xff\xd9"
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]")  # among coded pixels, 0xFF stands before 0 or a restart's number
LEAST_SAVED = 0.92  # of the height; looking through the file and copying it are not worth less

_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive
_SCAN = 0xDA
_TABLES, _TABLE = 0xDB, 65  # quantization tables, and bytes of one
_SKIPPED = {0xC4, 0xDD, 0xFE, 0xEF, *range(0xE3, 0xED)}  # other tables, a comment, what programs keep for themselves
# What Pillow looks into: marker -> the name that a segment of it must begin with, and its least length, shorter than
# which Pillow may refuse the file. EXIF, XMP and Photoshop's segments are not here: they can turn the image.
_NAMED = {0xE0: (b"JFIF\0", 14), 0xE2: (b"ICC_PROFILE\0", 14), 0xEE: (b"Adobe", 12)}


class JpegHeader(NamedTuple):
    """Of an upright JPEG with 8 bits.

    height, width: in pixels. components: 1 (gray) or 3 (colour). unit: height and width in pixels of what is coded
    together. frame: offset of height and width, 2 bytes each. scan: offset of the coded pixels.
    """

    height: int
    width: int
    components: int
    unit: tuple[int, int]
    frame: int
    scan: int


def plain_header(content: bytes) -> JpegHeader | None:
    """None where there is anything that this does not know for sure."""
    if not content.startswith(SOI):
        return None
    try:
        return _read(content)
    except IndexError:  # it is cut off
        return None


def is_one_scan(content: bytes, header: JpegHeader) -> bool:
    """Whether all components are coded together, from top to bottom; libjpeg then refuses a second scan."""
    scan = header.scan - 8 - 2 * header.components
    together = content[scan : scan + 2] == bytes([0xFF, _SCAN]) and content[scan + 4] == header.components
    return together and content[header.frame - 4] == _FRAMES[0]


def shortened(content: bytes, header: JpegHeader, bottom: int) -> bytearray | None:
    """A copy that says it ends soon below row `bottom`, so that a decoder stops there; the rows above are the same.

    None where little is saved, where anything but the end of the file follows the coded pixels (a file may be cut off
    or hold what a decoder refuses, which must be noticed whatever is wanted of it), and where pixels are not coded from
    top to bottom in one scan. What is coded below the last row is left in place: a decoder has a warning for it, and
    must be told to go on.
    """
    unit = header.unit[0]
    height = (-(-bottom // unit) + 1) * unit  # a unit more: colours are interpolated across the edge of units
    if height > LEAST_SAVED * header.height or not is_one_scan(content, header):
        return None
    marker = _MARKER.search(content, header.scan)
    if marker is None or content[marker.start() :] != EOI:
        return None
    made = bytearray(content)
    made[header.frame : header.frame + 2] = height.to_bytes(2, "big")
    return made


def _read(content: bytes) -> JpegHeader | None:
    at, frame = 2, 0
    while True:
        marker, end = content[at + 1], at + 2 + _number(content, at + 2)
        if content[at] != 0xFF or end < at + 4 or end > len(content):
            return None
        if marker == _SCAN:
            return _header(content, frame, end) if frame else None
        if marker in _FRAMES:
            if frame:
                return None
            frame = at + 5
        elif marker in _NAMED:
            name, least = _NAMED[marker]
            if not content.startswith(name, at + 4) or end - at - 4 < least:
                return None
        elif marker == _TABLES:
            if (end - at - 4) % _TABLE or any(first >> 4 for first in content[at + 4 : end : _TABLE]):
                return None
        elif marker not in _SKIPPED:
            return None
        at = end


def _header(content: bytes, frame: int, scan: int) -> JpegHeader | None:
    bits, components = content[frame - 1], content[frame + 4]
    height, width = _number(content, frame), _number(content, frame + 2)
    if bits != 8 or components not in (1, 3) or not height * width:
        return None
    if _number(content, frame - 3) != 8 + 3 * components:
        return None
    sampling = content[frame + 6 : frame + 5 + 3 * components : 3] if components == 3 else b"\x11"
    unit = 8 * max(each & 15 for each in sampling), 8 * max(each >> 4 for each in sampling)
    return JpegHeader(height, width, components, unit, frame, scan)


def _number(content: bytes, at: int) -> int:
    return content[at] << 8 | content[at + 1]
