"""Whole images of every accepted kind, small and made here: what is mutated.

Pillow writes most of them; what it cannot write (interlaced and 16-bit colour PNG, tiled TIFF, YCCK) is put together by
hand, by the PNG and TIFF 6.0 specifications.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SAMPLES_VARIABLE = "NEXTBLOCK_SAMPLES"  # a folder of JPEGs to mutate as well
_MOST_SAMPLES = 40
HEIGHT, WIDTH = 90, 121


def photograph(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Image.Image:
    """Waves, edges and some noise: its files have the parts that files of photographs have."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(9 * x + 5 * y), np.cos(7 * x * y + 3 * y), np.sin(11 * y - 4 * x)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 9, waves.shape)
    edges = 40.0 * ((x * 6).astype(int) % 2)[..., None]
    return Image.fromarray((127 + 70 * waves + noise + edges).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, fmt: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


@cache
def base_images() -> dict[str, bytes]:
    """Name -> content. The same in every process of one machine."""
    return _jpegs() | _pngs() | _others() | _tiffs() | _samples()


def _jpegs() -> dict[str, bytes]:
    image, exif = photograph(), Image.Exif()
    exif[0x0112] = 6
    cmyk = encoded(image.convert("CMYK"), "JPEG")
    ycck = bytearray(cmyk)
    ycck[cmyk.index(b"Adobe") + 11] = 2  # the marker's colour transform: 0 is CMYK, 2 is YCCK
    return {
        "jpeg 4:2:0": encoded(image, "JPEG"),
        "jpeg 4:4:4": encoded(image, "JPEG", quality=95, subsampling=0),
        "jpeg progressive": encoded(image, "JPEG", progressive=True),
        "jpeg restarts": encoded(image, "JPEG", restart_marker_blocks=4),
        "jpeg gray": encoded(image.convert("L"), "JPEG"),
        "jpeg exif": encoded(image, "JPEG", exif=exif, comment=b"a comment", icc_profile=bytes(300)),
        "jpeg cmyk": cmyk,
        "jpeg ycck": bytes(ycck),
        "jpeg large": encoded(photograph(600, 480), "JPEG", quality=80),
    }


def _pngs() -> dict[str, bytes]:
    image = photograph()
    alpha = image.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    pixels = np.asarray(image)
    deep = pixels.astype(np.uint16) * 257
    frames = [photograph(40, 50, seed) for seed in range(3)]
    return {
        "png rgb": encoded(image, "PNG"),
        "png alpha": encoded(alpha, "PNG"),
        "png gray 16": encoded(Image.fromarray(deep[:, :, 0]), "PNG"),
        "png rgb 16": png(deep),
        "png interlaced": png(pixels, interlaced=True),
        "png palette": encoded(image.quantize(16), "PNG", transparency=3),
        "png 1 bit": encoded(image.convert("1"), "PNG"),
        "png animated": encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]),
    }


def png(pixels: NDArray[Any], interlaced: bool = False) -> bytes:
    """uint8 or uint16 pixels [H, W, 3]; interlaced by Adam7."""
    steps = [(0, 0, 1, 1)]  # first row, first column, row step, column step
    if interlaced:
        steps = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = (pixels[top::down, left::across] for top, left, down, across in steps)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for part in parts for row in part)
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, 2, 0, 0, int(interlaced))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(*chunk) for chunk in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _others() -> dict[str, bytes]:
    image = photograph()
    alpha = image.copy()
    alpha.putalpha(200)
    frames = [photograph(60, 70, seed) for seed in range(3)]
    several: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    return {
        "webp lossy": encoded(image, "WEBP"),
        "webp lossless": encoded(image, "WEBP", lossless=True),
        "webp alpha": encoded(alpha, "WEBP"),
        "webp animated": encoded(frames[0], "WEBP", **several),
        "gif": encoded(image.quantize(32), "GIF"),
        "gif animated": encoded(frames[0], "GIF", **several),
        "bmp": encoded(image, "BMP"),
        "bmp palette": encoded(image.quantize(64), "BMP"),
        "ppm": encoded(image, "PPM"),
    }


def _tiffs() -> dict[str, bytes]:
    image = photograph()
    deep = Image.fromarray(np.asarray(image)[:, :, 0].astype(np.uint16) * 257)
    frames = [photograph(60, 70, seed) for seed in range(2)]
    ways = {"lzw": "tiff_lzw", "deflate": "tiff_adobe_deflate", "packbits": "packbits", "jpeg": "jpeg"}
    found = {f"tiff {name}": encoded(image, "TIFF", compression=way) for name, way in ways.items()}
    found["tiff 1 bit fax"] = encoded(image.convert("1"), "TIFF", compression="group4")
    found["tiff 16"] = encoded(deep, "TIFF")
    found["tiff pages"] = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:], compression="tiff_lzw")
    return found | {"tiff tiled": tiled_tiff(np.asarray(image))}


def tiled_tiff(pixels: NDArray[np.uint8], side: int = 32) -> bytes:
    """uint8 pixels [H, W, 3] in uncompressed tiles of `side` pixels, little-endian."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % side), (0, -width % side), (0, 0)))
    tiles = [
        padded[top : top + side, left : left + side].tobytes()
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    fields = {
        256: [width], 257: [height], 258: [8, 8, 8], 259: [1], 262: [2], 277: [3], 284: [1], 322: [side], 323: [side],
        324: [0] * len(tiles), 325: [len(tile) for tile in tiles],
    }  # fmt: skip
    behind = 8 + 2 + 12 * len(fields) + 4
    first_tile = behind + sum(4 * len(values) for values in fields.values() if len(values) > 1)
    fields[324] = [first_tile + sum(map(len, tiles[:i])) for i in range(len(tiles))]
    entries, longer = b"", b""
    for tag, values in fields.items():
        place = values[0] if len(values) == 1 else behind + len(longer)
        entries += struct.pack("<HHII", tag, 4, len(values), place)
        longer += struct.pack(f"<{len(values)}I", *values) if len(values) > 1 else b""
    header = b"II*\0" + struct.pack("<IH", 8, len(fields))
    return header + entries + struct.pack("<I", 0) + longer + b"".join(tiles)


def _samples() -> dict[str, bytes]:
    folder = os.environ.get(SAMPLES_VARIABLE)
    if not folder:
        return {}
    files = sorted(Path(folder).rglob("*.[jJ][pP]*[gG]"))[:_MOST_SAMPLES]
    return {f"sample {number}": file.read_bytes() for number, file in enumerate(files)}
