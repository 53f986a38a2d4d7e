"""What the quick reader says of a header is what Pillow says; what it is not sure of, it leaves to Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from nextblock.data.decode import open_checked, orientation_of
from nextblock.data.jpeg_header import plain_header, shortened


def jpeg(height: int = 50, width: int = 90, mode: str = "RGB", **options: object) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def with_segment(content: bytes, marker: int, data: bytes) -> bytes:
    return content[:2] + bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2, "big") + data + content[2:]


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


PLAIN = {
    "4:2:0": (jpeg(), (16, 16)),
    "4:2:2": (jpeg(subsampling=1), (8, 16)),
    "4:4:4": (jpeg(subsampling=0), (8, 8)),
    "gray": (jpeg(mode="L"), (8, 8)),
    "progressive": (jpeg(progressive=True), (16, 16)),
    "restarts": (jpeg(restart_marker_rows=1), (16, 16)),
    "colour profile": (jpeg(icc_profile=bytes(70_000)), (16, 16)),
    "comment": (jpeg(comment=b"\xff\xd8\xff\xda" * 9), (16, 16)),
    "no JFIF, RGB": (jpeg(keep_rgb=True, subsampling=0), (8, 8)),
    "Adobe": (with_segment(jpeg(), 0xEE, b"Adobe\0" + bytes(5) + b"\1"), (16, 16)),
    "a camera's own": (with_segment(jpeg(), 0xE7, b"anything"), (16, 16)),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_header_is_read(kind: str) -> None:
    content, unit = PLAIN[kind]
    header = plain_header(content)
    assert header is not None
    assert header[:4] == (50, 90, 1 if kind == "gray" else 3, unit)
    assert content[header.frame : header.frame + 4] == bytes([0, 50, 0, 90])
    assert content[: header.scan].rfind(b"\xff\xda") in (header.scan - 10, header.scan - 14)  # of 1 or 3 components


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff\xd8", b"\x89PNG\r\n", jpeg()[:300], b"\0" + jpeg(), jpeg(mode="CMYK"), jpeg(exif=turned(1)),
        jpeg(exif=turned(6)), with_segment(jpeg(), 0xE1, b"http://ns.adobe.com/xap/1.0/\0tiff:Orientation=\"6\""),
        with_segment(jpeg(), 0xE2, b"MPF\0" + bytes(20)), with_segment(jpeg(), 0xE2, b"ICC_PROFILE\0\1"),
        with_segment(jpeg(), 0xED, b"Photoshop 3.0\0"), with_segment(jpeg(), 0xEE, b"Adobe"),
        jpeg()[:20] + b"\0" + jpeg()[20:],
    ],
)  # fmt: skip
def test_what_is_unusual_is_left_to_pillow(content: bytes) -> None:
    assert plain_header(content) is None


@pytest.mark.parametrize("kind", ["4:2:0", "gray", "colour profile", "Adobe"])
def test_whatever_byte_is_changed_it_never_says_other_than_pillow(kind: str) -> None:
    whole, rng, read = PLAIN[kind][0], np.random.default_rng(0), 0
    header = plain_header(whole)
    assert header is not None
    places = rng.choice(header.scan - 2, min(600, header.scan - 2), replace=False) + 2
    for place, value in zip(places.tolist(), rng.integers(0, 256, len(places)).tolist(), strict=True):
        content = bytes([*whole[:place], value, *whole[place + 1 :]])
        found = plain_header(content)
        if found is not None:
            image = open_checked(content, "x", 3, 2**31)  # raises where Pillow refuses it
            assert (found.height, found.width) == (image.height, image.width)
            assert {"L": 1, "RGB": 3}[image.mode] == found.components
            assert orientation_of(image) == 1
            read += 1
    assert len(places) / 2 < read < len(places)


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["4:2:0", "4:2:2", "4:4:4", "gray", "restarts", "Adobe"])
def test_a_shortened_file_has_the_same_rows(kind: str, scale: int) -> None:
    simplejpeg = pytest.importorskip("simplejpeg")
    options: dict[str, object] = {"4:2:2": {"subsampling": 1}, "4:4:4": {"subsampling": 0}, "gray": {"mode": "L"},
                                  "restarts": {"restart_marker_rows": 1}}.get(kind, {})  # fmt: skip
    content = jpeg(333, 217, **options)
    content = with_segment(content, 0xEE, b"Adobe\0" + bytes(5) + b"\1") if kind == "Adobe" else content
    header = plain_header(content)
    assert header is not None
    colours = {"colorspace": "GRAY" if kind == "gray" else "RGB", "min_factor": scale}
    whole = simplejpeg.decode_jpeg(content, min_height=-(-333 // scale), min_width=-(-217 // scale), **colours)
    for bottom in range(scale, 300, 24 + scale):
        short = shortened(content, header, bottom)
        if short is None:
            assert bottom > 0.85 * 333
            continue
        height = int.from_bytes(short[header.frame : header.frame + 2], "big")
        assert bottom < height < 333
        part = simplejpeg.decode_jpeg(
            short, min_height=-(-height // scale), min_width=-(-217 // scale), strict=False, **colours
        )
        assert part.shape[0] == -(-height // scale)
        np.testing.assert_array_equal(part[: bottom // scale], whole[: bottom // scale])


def test_what_is_not_shortened() -> None:
    def short(content: bytes, bottom: int = 40) -> bytearray | None:
        header = plain_header(content)
        assert header is not None
        return shortened(content, header, bottom)

    whole = jpeg(200, 90)
    assert short(whole) is not None
    assert short(whole, 180) is None  # little would be saved
    assert short(whole[:-2]) is None  # cut off: who decodes must see it
    assert short(whole + b"more") is None
    assert short(whole[:-500] + b"\xff\xc4" + whole[-500:]) is None  # a marker that does not belong there
    assert short(jpeg(200, 90, restart_marker_rows=1)) is not None
    assert short(jpeg(200, 90, progressive=True)) is None  # every scan covers the whole image
