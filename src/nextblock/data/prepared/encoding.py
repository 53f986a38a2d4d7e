"""One image of any source, as it is kept in a shard."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nextblock.data.decode import decode
from nextblock.data.jpeg_units import UnitJpeg, are_as_listed, has_units, with_units
from nextblock.errors import ConfigError, nearest

FORMATS = ("auto", "jpeg", "png", "raw")
CHROMA = ("4:2:0", "4:4:4")
SMALL_PX = 64  # below, JPEG's 16 px squares of colour are a quarter of the image, and its headers half of the file
JPEG_LIMIT_PX = 65_500
_REDUCING_GAP = 3.0  # averaged to three times the size first: several times faster for photographs of many megapixels
_ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Encoding:
    """How images are kept.

    short_side: the shorter side, in pixels, that larger images are reduced to (Lanczos, antialiased); smaller ones
    stay as they are. quality: of JPEG. format: "jpeg" (baseline, with a list of
    its units, so that a crop alone can be decoded), "png" or "raw" (pixels; the fastest to load, and the
    largest), or "auto": raw for images whose shorter side is below 64 px, else JPEG. With "auto" and "jpeg", a JPEG
    file that is small enough, upright and not progressive is copied as it is. chroma: of JPEG, "4:2:0" keeps colour at
    half the resolution (smaller, faster), "4:4:4" at the full one. exif_orientation: turn images as their EXIF
    orientation says.
    """

    short_side: int = 320
    quality: int = 90
    format: str = "auto"
    chroma: str = "4:2:0"
    exif_orientation: bool = True

    def __post_init__(self) -> None:
        if self.short_side < 1:
            raise ConfigError(f"short_side must be at least 1 pixel; got {self.short_side!r}.")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality must lie between 1 and 100; got {self.quality!r}.")
        for name, value, known in (("format", self.format, FORMATS), ("chroma", self.chroma, CHROMA)):
            if value not in known:
                accepted = ", ".join(map(repr, known))
                raise ConfigError(f"{name} must be one of {accepted}; got {value!r}.{nearest(str(value), known)}")

    @property
    def told(self) -> str:
        """For a person: "shorter side at most 320 px, JPEG quality 90 (4:2:0)"."""
        jpeg = f"JPEG quality {self.quality} ({self.chroma})"
        how = {"jpeg": jpeg, "png": "PNG", "raw": "raw pixels", "auto": f"{jpeg}, below {SMALL_PX} px raw pixels"}
        return f"shorter side at most {self.short_side} px, {how[self.format]}"


class Encoded(NamedTuple):
    """What is stored of an image, and as what: "copied", "jpeg", "png" or "raw"."""

    content: bytes
    kind: str


def encode(content: bytes | NDArray[Any] | Image.Image, name: str, encoding: Encoding) -> Encoded:
    """Decode an image by the one policy (`nextblock.data.decode`), reduce it, and encode it.

    Gray images, and colour images whose three channels are equal, are kept with one channel: they decode to the same
    three. Raises SampleError, under `name`, for an image that cannot be decoded.
    """
    pixels = decode(content, name, channels=3, exif_orientation=encoding.exif_orientation)  # [H, W, 3]
    may_stay = encoding.format in ("auto", "jpeg") and min(pixels.shape[:2]) <= encoding.short_side
    if may_stay and isinstance(content, bytes) and _is_plain_jpeg(content):
        return Encoded(content, "copied")
    image = _reduced(Image.fromarray(pixels), encoding.short_side)
    image = image.getchannel(0) if _is_gray(np.asarray(image)) else image
    kind = encoding.format
    if kind == "auto":
        kind = "raw" if min(image.size) < SMALL_PX else "jpeg"
    if kind == "jpeg" and max(image.size) > JPEG_LIMIT_PX:
        kind = "png"
    return Encoded(_written(image, kind, encoding), kind)


def original_bytes(content: bytes | NDArray[Any] | Image.Image) -> int:
    """Bytes of an image as its source gives it."""
    if isinstance(content, bytes):
        return len(content)
    if isinstance(content, Image.Image):
        return content.width * content.height * len(content.getbands())
    return int(content.nbytes)


def stored(content: bytes) -> bytes | NDArray[np.uint8]:
    """What was stored, as a source gives it: raw pixels as uint8 [H, W, C], else the encoded bytes, as `UnitJpeg` where
    a part can be decoded alone: `content` must be what was written.

    Raises ValueError when raw pixels are not as many as their header says.
    """
    if content[:3] not in (b"P5\n", b"P6\n"):
        return UnitJpeg(content) if has_units(content) else content
    end = content.index(b"\n255\n") + 5
    width, height = map(int, content[3 : end - 5].split())
    return np.frombuffer(content, dtype=np.uint8, offset=end).reshape(height, width, 1 if content[1:2] == b"5" else 3)


def _is_plain_jpeg(content: bytes) -> bool:
    """One that decodes as fast as those written here, and the same whether EXIF orientation is applied or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd metadata
        image = Image.open(io.BytesIO(content))
        if image.format != "JPEG" or image.mode not in ("L", "RGB") or image.info.get("progressive"):
            return False
        if has_units(content) and not are_as_listed(content):
            return False
        try:
            return int(image.getexif().get(_ORIENTATION_TAG, 1)) == 1
        except Exception:  # damaged metadata, in one of many ways
            return False


def _reduced(image: Image.Image, short_side: int) -> Image.Image:
    shorter = min(image.size)
    if shorter <= short_side:
        return image
    width, height = (max(short_side, round(side * short_side / shorter)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=_REDUCING_GAP)


def _is_gray(pixels: NDArray[np.uint8]) -> bool:
    first = pixels[:, :, 0]
    return bool((first == pixels[:, :, 1]).all() and (first == pixels[:, :, 2]).all())


def _written(image: Image.Image, kind: str, encoding: Encoding) -> bytes:
    if kind == "raw":  # a binary PPM or PGM: every program that takes a shard apart can read it
        magic = b"P5" if image.mode == "L" else b"P6"
        return b"%b\n%d %d\n255\n" % (magic, *image.size) + image.tobytes()
    out = io.BytesIO()
    if kind == "png":
        image.save(out, "PNG")
    else:
        colour = {} if image.mode == "L" else {"subsampling": encoding.chroma}
        image.save(out, "JPEG", quality=encoding.quality, restart_marker_blocks=1, **colour)
        return with_units(out.getvalue())
    return out.getvalue()
