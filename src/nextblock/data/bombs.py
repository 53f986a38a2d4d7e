"""Small files that would keep a decoder busy for minutes, though their images are no larger than is allowed.

| the file | what it costs | refused |
|---|---|---|
| JPEG | each scan goes over all pixels again, and may hold next to nothing | with more than 100 scans |
| run-length BMP | Pillow skips to a row's end pixel by pixel, in Python | with more than 16,777,216 pixels |
| PPM written as text | Pillow copies all that follows a comment | with more than 1,000 comments |

Encoders of JPEG write 1 to about 20 scans. Found by `tests/faults/images.py` and its like: 30 s to hours each.
"""

from __future__ import annotations

from PIL import Image

from nextblock.errors import SampleError

MOST_SCANS = 100
MOST_RUN_LENGTH_PIXELS = 2**24
MOST_COMMENTS = 1000

_SCAN = b"\xff\xda"


def refuse_slow(image: Image.Image, content: bytes, name: str) -> None:
    """Raise SampleError when `content`, whose header `image` shows, is one of the files above."""
    if image.format in ("JPEG", "MPO"):
        # What lies behind the image (a film, more images) holds scans of its own: counted apart, but only then.
        if has_many_scans(content) and scans(content) > MOST_SCANS:
            raise SampleError(name, f"a JPEG of more than {MOST_SCANS} scans")
        return
    tiles = getattr(image, "tile", None)  # what Pillow's own decoders will do
    codec = tiles[0][0] if tiles else ""
    if codec == "bmp_rle" and image.width * image.height > MOST_RUN_LENGTH_PIXELS:
        size = f"{image.width} x {image.height} pixels"
        raise SampleError(name, f"a run-length BMP of {size}, more than the limit of {MOST_RUN_LENGTH_PIXELS}")
    if codec == "ppm_plain" and content.count(b"#") > MOST_COMMENTS:
        raise SampleError(name, f"a PPM in text with more than {MOST_COMMENTS} comments")


def has_many_scans(content: bytes) -> bool:
    """Whether a JPEG file may have more scans than are allowed; what lies behind its image is counted as well."""
    return content.count(_SCAN) > MOST_SCANS


def scans(content: bytes) -> int:
    """Scans of the first image in a JPEG file (ITU T.81, B.1.1: 0xFF and what is neither 0 nor 0xFF is a marker)."""
    count, place = 0, 2
    while (place := content.find(b"\xff", place)) >= 0 and place + 1 < len(content):
        marker = content[place + 1]
        if marker == 0xD9 or count > MOST_SCANS:  # the end; and no more need to be counted
            return count
        if marker == 0xFF:
            place += 1
        elif marker <= 0x01 or 0xD0 <= marker <= 0xD8:  # no marker, or one without a length
            place += 2
        else:
            count += marker == 0xDA
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return count
