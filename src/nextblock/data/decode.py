"""From file content to pixels: one policy for every source.

| the file holds | the result |
|---|---|
| gray, palette, 1-bit, CMYK, YCCK, YCbCr, LAB, HSV | converted to RGB (3 channels) or gray (1 channel) |
| transparency (alpha channel, palette or colour key) | composited on white |
| 16-bit gray, and 32-bit integers inside 0..65535 | value / 257, rounded: 65535 becomes 255, nothing is clipped |
| 16-bit RGB | the high byte (Pillow's reading) |
| float inside 0..1 | value * 255, rounded |
| float inside 0..255 | rounded |
| any other integer or float range, NaN | refused: the range does not say what white is |
| an animation or several pages | the first frame |
| a wrong file extension | ignored: the content decides |
| EXIF orientation 1 to 8 | applied, or not, as asked; TIFF's own orientation tag is always applied |
| damaged EXIF in a whole image | orientation 1 |
| damage, truncation, other formats, too many pixels, or what `bombs.py` lists | `SampleError` |
"""

from __future__ import annotations

import errno
import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nextblock.data.bombs import refuse_slow
from nextblock.data.heartbeat import reading
from nextblock.errors import DataError, SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 178_956_970  # where Pillow itself refuses to go on
_BAND_PIXELS = 2**24  # composited at once: three copies of the largest image would be two gigabytes

Content = bytes | str | os.PathLike[str] | np.ndarray | Image.Image

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSIENT = {
    errno.EIO,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.ENFILE,
    errno.EMFILE,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.EREMOTEIO,
}


def is_transient(error: OSError) -> bool:
    """True when a read that failed with `error` may succeed if it is tried again."""
    return error.errno in _TRANSIENT


def read_bytes(
    path: str | os.PathLike[str],
    *,
    name: str | None = None,
    attempts: int = 4,
    sleep: Callable[[float], Any] = time.sleep,
) -> bytes:
    """Read a whole file, trying again (after 0.5, 1, 2, ... seconds) when the storage hiccups.

    Raises SampleError (under `name`, by default the path) when this one file cannot be read: missing, no
    permission, a folder. Raises DataError when the storage still fails after `attempts`: that is not the
    file's fault, and replacing the sample would silently change the data.
    """
    for attempt in range(attempts):
        reading(name or os.fspath(path))
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            if not is_transient(error):
                raise SampleError(name or os.fspath(path), _lower_first(error.strerror)) from error
            if attempt + 1 == attempts:
                raise DataError(
                    f"read error on {os.fspath(path)} after {attempts} attempts: {error.strerror}. "
                    "Check the disk or the network file system, then resume."
                ) from error
            sleep(0.5 * 2**attempt)
    raise ValueError(f"attempts must be at least 1, got {attempts}")


def decode(
    content: Content,
    name: str,
    *,
    channels: int = 3,
    exif_orientation: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.uint8]:
    """Decode one image by the table above.

    Arguments:
        content: encoded bytes, a path, a Pillow image, or uint8 pixels [H, W] or [H, W, C].
        name: what errors call the sample.
        channels: 1 (gray) or 3 (RGB); pixels given as an array may have any number and must then have it.
        exif_orientation: turn the image as its EXIF orientation says.
        max_pixels: larger images are refused from their header. Pillow's own limit holds as well.

    Returns uint8 [H, W, channels]. Raises SampleError for anything that is wrong with this one image.
    """
    if isinstance(content, np.ndarray):
        return _from_array(content, name, channels)
    image = decode_image(content, name, channels=channels, exif_orientation=exif_orientation, max_pixels=max_pixels)
    with sample_errors(name):
        return as_pixels(image)


def decode_image(
    content: bytes | str | os.PathLike[str] | Image.Image,
    name: str,
    *,
    channels: int = 3,
    exif_orientation: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """`decode` of what is no array, as a Pillow image of mode L or RGB: one copy less where Pillow goes on with it."""
    if isinstance(content, str | os.PathLike):
        content = read_bytes(content, name=name)
    with sample_errors(name):
        image = open_checked(content, name, channels, max_pixels)
        image.load()  # before EXIF: Pillow turns a TIFF while loading, and then drops the tag
        orientation = orientation_of(image) if exif_orientation else 1
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_to_8_bit(np.asarray(image), name))
        if orientation in _UPRIGHT:
            image = image.transpose(_UPRIGHT[orientation])
        return to_channels(image, channels)


@contextmanager
def sample_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong inside, with this one image, becomes its SampleError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about odd metadata; the table above decides
            yield
    except SampleError:
        raise
    # A damaged file can make Pillow's plugins raise nearly anything: OSError, SyntaxError, struct.error,
    # KeyError, ZeroDivisionError, MemoryError, ... All of them mean the same here.
    except Exception as error:
        raise SampleError(name, _reason(error)) from error


def _from_array(pixels: NDArray[Any], name: str, channels: int) -> NDArray[np.uint8]:
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or not pixels.size:
        found = f"{pixels.dtype} {list(pixels.shape)}"
        raise SampleError(name, f"pixels must be uint8 [H, W] or [H, W, C], got {found}")
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    given = pixels.shape[2]
    if given == channels:
        return np.ascontiguousarray(pixels)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}.get(given)
    if mode is None or channels not in (1, 3):
        raise SampleError(name, f"pixels have {given} channels, but {channels} are wanted")
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if given == 1 else pixels))
    return as_pixels(to_channels(image, channels))


def open_checked(content: bytes | Image.Image, name: str, channels: int, max_pixels: int) -> Image.Image:
    """The image, not yet decoded. Raises SampleError, or nearly anything, where its header is refused."""
    if channels not in (1, 3):
        raise SampleError(name, f"an encoded image gives 1 or 3 channels, not {channels}")
    if isinstance(content, Image.Image):
        image = content
    elif not content:
        raise SampleError(name, "the file is empty")
    else:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise SampleError(name, f"{width} x {height} pixels are more than the limit of {max_pixels}")
    if not width * height:
        raise SampleError(name, "the image has no pixels")
    if isinstance(content, bytes):
        refuse_slow(image, content, name)
    return image


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8 where the file is right; 1 where it says nothing readable."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # the metadata are damaged, in one of many ways; the pixels are fine
        return 1


def _to_8_bit(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    if values.dtype.kind in "iu" and low >= 0 and high <= 65535:
        return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if values.dtype.kind == "f" and low >= 0 and high <= 255:
        return np.rint(values * (255.0 if high <= 1 else 1.0)).astype(np.uint8)
    reason = f"{values.dtype} values from {low:g} to {high:g} have no defined white; save it with 8 or 16 bits"
    raise SampleError(name, reason)


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """The image in mode L (1 channel) or RGB (3), what is transparent on white."""
    mode = "RGB" if channels == 3 else "L"
    if not image.has_transparency_data:
        return image if image.mode == mode else image.convert(mode)
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    if rows >= height:
        return _on_white(image).convert(mode)
    whole = Image.new(mode, image.size)
    for top in range(0, height, rows):
        band = image.crop((0, top, width, min(height, top + rows)))
        whole.paste(_on_white(band).convert(mode), (0, top))
    return whole


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("LA") if image.mode == "La" else image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def as_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """uint8 [H, W, 1] of mode L, [H, W, 3] of mode RGB; a copy that may be written to."""
    pixels = np.array(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image in an accepted format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than the limit"
    text = str(error).strip().partition("\n")[0]
    return f"cannot be decoded: {_lower_first(text) or type(error).__name__}"


def _lower_first(text: str | None) -> str:
    return text[:1].lower() + text[1:] if text else ""
