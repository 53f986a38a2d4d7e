"""From file content to a crop: who decodes, at which scale, who resizes. A run keeps to the one it began with.

| decoder | JPEG files | everything else | resized by |
|---|---|---|---|
| pillow | Pillow, at full size | Pillow | Pillow |
| pillow-scaled | Pillow, at 1/2, 1/4 or 1/8 where that is enough | Pillow | torch |
| simplejpeg | simplejpeg, at the same scales; Pillow, what it refuses | Pillow | torch |

The scale is a function of the box and the size wanted: the largest at which the box still has as many pixels. The last
two give the same pixels as far as both were built with the same libjpeg-turbo, and decode of a prepared JPEG only what
the box needs (`jpeg_units`); simplejpeg stops below the box in any JPEG coded from top to bottom (`shortened`). That
changes no pixel. Whatever decodes, the policy of
`decode.py` holds: the same files are broken, and orientation, colours and transparency mean the same.

Pillow and torch resize with the same filter, bicubic with antialiasing, and round differently; torch looks no further
than the box, Pillow a few pixels beyond its edges.
"""

from __future__ import annotations

import importlib
import io
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nextblock.data.augment import Box, random_resized_crop, resize_by_torch
from nextblock.data.bombs import has_many_scans
from nextblock.data.decode import (
    MAX_PIXELS,
    Content,
    as_pixels,
    decode,
    decode_image,
    open_checked,
    orientation_of,
    sample_errors,
    to_channels,
)
from nextblock.data.jpeg_header import SOI, is_one_scan, plain_header, shortened
from nextblock.data.jpeg_units import UnitJpeg, cut_units
from nextblock.errors import ConfigError, nearest

PILLOW, PILLOW_SCALED, SIMPLEJPEG = "pillow", "pillow-scaled", "simplejpeg"
DECODERS = (PILLOW, PILLOW_SCALED, SIMPLEJPEG)

_SCALES = (8, 4, 2)  # of those that libjpeg-turbo has, the ones that make decoding faster
_TURNED = (5, 6, 7, 8)  # orientations of EXIF that swap height and width
_PLAIN = {"L": 1, "RGB": 3}  # Pillow's mode of a plain JPEG -> its channels
_NAMES = {1: "GRAY", 3: "RGB"}  # simplejpeg's
_KEPT_BYTES = 2**24
_KEPT = threading.local()
_TORCH_IS_FAST = ("AVX2", "AVX512")  # elsewhere its kernel for bytes takes longer than Pillow's


def chosen_decoder(name: str = "auto") -> str:
    """One of `DECODERS`, for a run to record; `auto` takes the fastest that is installed.

    Raises ConfigError for an unknown name, and for simplejpeg where it is not installed.
    """
    if name == "auto":
        if torch.backends.cpu.get_cpu_capability() not in _TORCH_IS_FAST:
            return PILLOW
        return PILLOW_SCALED if _simplejpeg() is None else SIMPLEJPEG
    if name not in DECODERS:
        known = ("auto", *DECODERS)
        raise ConfigError(f"decoder must be one of {', '.join(known)}; got {name!r}.{nearest(name, known)}")
    if name == SIMPLEJPEG and _simplejpeg() is None:
        raise ConfigError(
            f"decoder is simplejpeg, which is not installed: pip install simplejpeg. Or take {PILLOW_SCALED}: slower, "
            "the same pixels."
        )
    return name


def decode_crop(
    content: Content,
    name: str,
    box_of: Callable[[int, int], Box],
    size_px: tuple[int, int],
    *,
    decoder: str = PILLOW,
    channels: int = 3,
    exif_orientation: bool = True,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """One part of an image, resized.

    Arguments:
        content, name, channels, exif_orientation: as for `decode`.
        box_of: from height and width of the upright image to the box wanted: top, left, height, width.
        size_px: height and width of the result.
        decoder: one of `DECODERS`.
        out: uint8 [*size_px, channels], contiguous, which is filled and returned where it is given.

    Returns uint8 [*size_px, channels]. Raises SampleError for anything that is wrong with this one image.
    """
    if decoder != PILLOW and isinstance(content, bytes) and content.startswith(SOI):
        with sample_errors(name):
            part = _plain_part(content, box_of, size_px, decoder) if channels in (1, 3) else None
        if part is None:
            part = _checked_part(content, name, box_of, size_px, decoder, channels, exif_orientation)
        if part is not None:
            return resize_by_torch(_to_channels(part, channels), size_px, out)
    if decoder == PILLOW:
        return _into(out, _by_pillow_alone(content, name, box_of, size_px, channels, exif_orientation))
    pixels = decode(content, name, channels=channels, exif_orientation=exif_orientation)
    top, left, h, w = box_of(pixels.shape[0], pixels.shape[1])
    return resize_by_torch(pixels[top : top + h, left : left + w], size_px, out)


def dct_scale(box: Box, size_px: tuple[int, int]) -> int:
    """By how much (1, 2, 4, 8) a JPEG may be decoded smaller, for its `box` still to cover `size_px`."""
    for scale in _SCALES:
        if box[2] // scale >= size_px[0] and box[3] // scale >= size_px[1]:
            return scale
    return 1


def _by_pillow_alone(
    content: Content,
    name: str,
    box_of: Callable[[int, int], Box],
    size_px: tuple[int, int],
    channels: int,
    exif_orientation: bool,
) -> NDArray[np.uint8]:
    if isinstance(content, np.ndarray):
        pixels = decode(content, name, channels=channels)
        return random_resized_crop(pixels, box_of(pixels.shape[0], pixels.shape[1]), size_px)
    image = decode_image(content, name, channels=channels, exif_orientation=exif_orientation)
    return random_resized_crop(image, box_of(image.height, image.width), size_px)


def _into(out: NDArray[np.uint8] | None, crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if out is None:
        return crop
    out[...] = crop
    return out


def _plain_part(
    content: bytes, box_of: Callable[[int, int], Box], size_px: tuple[int, int], decoder: str
) -> NDArray[np.uint8] | None:
    """The pixels [h, w, C] in the box, C as in the file; None where Pillow is to judge the file."""
    if decoder != SIMPLEJPEG and not isinstance(content, UnitJpeg):
        return None  # Pillow reads the header anyway
    header = plain_header(content)
    if header is None or header.height * header.width > MAX_PIXELS:
        return None
    if not is_one_scan(content, header) and has_many_scans(content):
        return None
    box = box_of(header.height, header.width)
    scale = dct_scale(box, size_px)
    rows = _scaled(box[0], box[2], header.height, -(-header.height // scale))
    columns = _scaled(box[1], box[3], header.width, -(-header.width // scale))
    coded: bytes | bytearray = content
    if isinstance(content, UnitJpeg):
        coded, header, above, left = cut_units(content, header, rows, columns, scale)
        rows = slice(rows.start - above, rows.stop - above)
        columns = slice(columns.start - left, columns.stop - left)
    elif (short := shortened(content, header, rows.stop * scale)) is not None:
        height = int.from_bytes(short[header.frame : header.frame + 2], "big")
        pixels = _by_simplejpeg(short, (height, header.width), header.components, scale, strict=False)
        if pixels is not None:
            return pixels[rows, columns]
    decoded = _by_simplejpeg if decoder == SIMPLEJPEG else _by_pillow
    pixels = decoded(coded, (header.height, header.width), header.components, scale)
    return None if pixels is None else pixels[rows, columns]


def _checked_part(
    content: bytes,
    name: str,
    box_of: Callable[[int, int], Box],
    size_px: tuple[int, int],
    decoder: str,
    channels: int,
    exif_orientation: bool,
) -> NDArray[np.uint8] | None:
    """`_plain_part` of a JPEG of which Pillow reads the header, turned upright; None for one with inks.

    Raises SampleError for one that is broken.
    """
    with sample_errors(name):
        image = open_checked(content, name, channels, MAX_PIXELS)
        if image.mode not in _PLAIN:
            return None
        orientation = orientation_of(image) if exif_orientation else 1
        width, height = image.size[::-1] if orientation in _TURNED else image.size
        top, left, h, w = box_of(height, width)
        scale = dct_scale((top, left, h, w), size_px)
        pixels = None
        if decoder == SIMPLEJPEG:
            pixels = _by_simplejpeg(content, (image.height, image.width), _PLAIN[image.mode], scale)
        if pixels is None:
            pixels = _drafted(image, scale)
        pixels = _upright(pixels, orientation)
        rows = _scaled(top, h, height, pixels.shape[0])
        columns = _scaled(left, w, width, pixels.shape[1])
        return np.ascontiguousarray(pixels[rows, columns])


def _by_simplejpeg(
    content: bytes | bytearray, sides: tuple[int, int], channels: int, scale: int, *, strict: bool = True
) -> NDArray[np.uint8] | None:
    """Pixels [H, W, C], or None when it refuses: if `strict`, whatever libjpeg has so much as a warning for.

    They are good until the next call in this thread.
    """
    height, width = (-(-side // scale) for side in sides)
    try:
        pixels: NDArray[np.uint8] = _simplejpeg().decode_jpeg(
            content, _NAMES[channels], min_height=height, min_width=width, min_factor=scale, strict=strict,
            buffer=_buffer(height * width * channels),
        )  # fmt: skip
    except (ValueError, RuntimeError):
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


def _by_pillow(
    content: bytes | bytearray, sides: tuple[int, int], channels: int, scale: int
) -> NDArray[np.uint8] | None:
    """The same by Pillow; None when something is wrong."""
    try:
        return _drafted(Image.open(io.BytesIO(content), formats=["JPEG"]), scale)
    except (OSError, SyntaxError, ValueError):
        return None


def _drafted(image: Image.Image, scale: int) -> NDArray[np.uint8]:
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    return as_pixels(image)


def _buffer(size: int) -> NDArray[np.uint8] | None:
    """This thread's own of at least so many bytes, still in the processor's cache; None where it would be too large
    to keep."""
    if size > _KEPT_BYTES:
        return None
    found: NDArray[np.uint8] | None = getattr(_KEPT, "buffer", None)
    if found is None or len(found) < size:
        found = _KEPT.buffer = np.empty(size, dtype=np.uint8)
    return found


@lru_cache(maxsize=1)
def _simplejpeg() -> Any:
    """The module, None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """A view of `pixels` [H, W, C], turned and mirrored as EXIF's orientation says."""
    if orientation in _TURNED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _scaled(start: int, length: int, whole: int, decoded: int) -> slice:
    """Where `start` and `start + length` of `whole` pixels lie among the `decoded` ones, to the nearest pixel."""
    first, last = ((2 * place * decoded + whole) // (2 * whole) for place in (start, start + length))
    return slice(first, last)


def _to_channels(pixels: NDArray[np.uint8], channels: int) -> NDArray[np.uint8]:
    if pixels.shape[2] == channels:
        return pixels
    return as_pixels(to_channels(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), channels))
