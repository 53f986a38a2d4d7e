"""From file content to a crop: who decodes, at which scale, who resizes. A run keeps to the one it began with.

| decoder | JPEG files | everything else | resized by |
|---|---|---|---|
| pillow | Pillow, at full size | Pillow | Pillow |
| pillow-scaled | Pillow, at 1/2, 1/4 or 1/8 where that is enough | Pillow | torch |
| simplejpeg | simplejpeg, at the same scales; Pillow, what it refuses | Pillow | torch |

The scale is a function of the box and the size wanted: the largest at which the box still has as many pixels. The last
two give the same pixels as far as both were built with the same libjpeg-turbo. Whatever decodes, the policy of
`decode.py` holds: the same files are broken, and orientation, colours and transparency mean the same.

Pillow and torch resize with the same filter, bicubic with antialiasing, and round differently; torch looks no further
than the box, Pillow a few pixels beyond its edges.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from nextblock.data.augment import Box, random_resized_crop, resize_by_torch
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
from nextblock.errors import ConfigError, nearest

PILLOW, PILLOW_SCALED, SIMPLEJPEG = "pillow", "pillow-scaled", "simplejpeg"
DECODERS = (PILLOW, PILLOW_SCALED, SIMPLEJPEG)

_JPEG = b"\xff\xd8"
_SCALES = (8, 4, 2)  # of those that libjpeg-turbo has, the ones that make decoding faster
_TURNED = (5, 6, 7, 8)  # orientations of EXIF that swap height and width
_PLAIN = {"L": "GRAY", "RGB": "RGB"}  # Pillow's mode of a plain JPEG -> simplejpeg's name of it
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
) -> NDArray[np.uint8]:
    """One part of an image, resized.

    Arguments:
        content, name, channels, exif_orientation: as for `decode`.
        box_of: from height and width of the upright image to the box wanted: top, left, height, width.
        size_px: height and width of the result.
        decoder: one of `DECODERS`.

    Returns uint8 [*size_px, channels]. Raises SampleError for anything that is wrong with this one image.
    """
    if decoder != PILLOW and isinstance(content, bytes) and content.startswith(_JPEG):
        with sample_errors(name):
            image = open_checked(content, name, channels, MAX_PIXELS)
            if image.mode in _PLAIN:
                orientation = orientation_of(image) if exif_orientation else 1
                part = _decoded_part(content, image, orientation, box_of, size_px, decoder)
                return resize_by_torch(_to_channels(part, channels), size_px)
    if decoder == PILLOW and not isinstance(content, np.ndarray):
        whole = decode_image(content, name, channels=channels, exif_orientation=exif_orientation)
        return random_resized_crop(whole, box_of(whole.height, whole.width), size_px)
    pixels = decode(content, name, channels=channels, exif_orientation=exif_orientation)
    box = box_of(pixels.shape[0], pixels.shape[1])
    if decoder == PILLOW:
        return random_resized_crop(pixels, box, size_px)
    top, left, h, w = box
    return resize_by_torch(pixels[top : top + h, left : left + w], size_px)


def dct_scale(box: Box, size_px: tuple[int, int]) -> int:
    """By how much (1, 2, 4, 8) a JPEG may be decoded smaller, for its `box` still to cover `size_px`."""
    for scale in _SCALES:
        if box[2] // scale >= size_px[0] and box[3] // scale >= size_px[1]:
            return scale
    return 1


def _decoded_part(
    content: bytes,
    image: Image.Image,
    orientation: int,
    box_of: Callable[[int, int], Box],
    size_px: tuple[int, int],
    decoder: str,
) -> NDArray[np.uint8]:
    """The pixels [h, w, C] in the box of a plain JPEG, of which Pillow has read the header, C as in the file."""
    width, height = image.size[::-1] if orientation in _TURNED else image.size
    top, left, h, w = box_of(height, width)
    scale = dct_scale((top, left, h, w), size_px)
    pixels = _by_simplejpeg(content, image, scale) if decoder == SIMPLEJPEG else None
    if pixels is None:
        if scale > 1:
            image.draft(None, (image.width // scale, image.height // scale))
        pixels = as_pixels(image)
    pixels = _upright(pixels, orientation)
    rows = _scaled(top, h, height, pixels.shape[0])
    columns = _scaled(left, w, width, pixels.shape[1])
    return np.ascontiguousarray(pixels[rows, columns])


def _by_simplejpeg(content: bytes, image: Image.Image, scale: int) -> NDArray[np.uint8] | None:
    """Pixels [H, W, C], or None when it refuses: it takes nothing that libjpeg has so much as a warning for."""
    width, height = (-(-side // scale) for side in image.size)
    try:
        pixels: NDArray[np.uint8] = _simplejpeg().decode_jpeg(
            content, _PLAIN[image.mode], min_height=height, min_width=width, min_factor=scale, strict=True
        )
    except (ValueError, RuntimeError):
        return None
    return pixels if pixels.shape[:2] == (height, width) else None


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
