"""Every odd file has one defined result, and a broken one is a SampleError."""

import contextlib
import errno
import io
import struct
import warnings
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image, ImageFile

from nextblock.data import decode as decode_module
from nextblock.data.bombs import scans
from nextblock.data.decode import decode, read_bytes
from nextblock.data.decoders import decode_crop
from nextblock.errors import DataError, SampleError

RED = np.full((6, 8, 3), (255, 0, 0), dtype=np.uint8)


def encoded(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, fmt, **options)
    return out.getvalue()


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_accepted_format(fmt: str, channels: int) -> None:
    pixels = decode(encoded(Image.fromarray(RED), fmt), "x", channels=channels)
    assert pixels.shape == (6, 8, channels)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - ([255, 0, 0] if channels == 3 else [76])).max() <= 3


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "PPM"])
def test_16_bit_gray_is_scaled_not_clipped(fmt: str) -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert decode(encoded(Image.fromarray(values), fmt), "x", channels=1)[0, :, 0].tolist() == [0, 1, 128, 255]
    assert decode(encoded(Image.fromarray(values), fmt), "x")[0, :, 2].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 99.6, 200.0], [0, 100, 200])],
)
def test_float_pixels(values: list[float], expected: list[int]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    assert decode(encoded(image, "TIFF"), "x", channels=1)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("values", [[-1.0, 3.0], [0.0, 256.0], [0.0, float("nan")]])
def test_a_float_range_without_white_is_refused(values: list[float]) -> None:
    image = Image.fromarray(np.array([values], dtype=np.float32))
    with pytest.raises(SampleError, match="no defined white"):
        decode(encoded(image, "TIFF"), "x")


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (8, 6), (0, 255, 255, 0))
    pixel = decode(encoded(image, "JPEG"), "x")[3, 3].astype(int)
    assert np.abs(pixel - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_is_composited_on_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image = image if mode == "RGBA" else image.convert(mode)
    content = image if mode == "PA" else encoded(image)
    assert decode(content, "x")[0, 0].tolist() == [255, 255, 255]
    assert decode(content, "x", channels=1)[0, 0].tolist() == [255]


def test_palette_with_a_transparent_colour() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.putpixel((1, 0), 1)
    assert decode(encoded(image, transparency=0), "x")[0].tolist() == [[255, 255, 255], [10, 200, 30]]
    assert decode(encoded(image), "x")[0].tolist() == [[0, 0, 0], [10, 200, 30]]


def test_one_bit() -> None:
    image = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    assert decode(encoded(image), "x")[0].tolist() == [[0, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV", "RGBX", "La", "RGBa", "I;16B"])
def test_other_pillow_modes(mode: str) -> None:
    assert decode(Image.new(mode, (5, 4)), "x").shape == (4, 5, 3)


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "TIFF"])
def test_first_frame_of_several(fmt: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    pixels = decode(encoded(frames[0], fmt, save_all=True, append_images=frames[1:]), "x")
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 3


def test_content_decides_not_the_extension(tmp_path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encoded(Image.fromarray(RED)))
    assert np.array_equal(decode(path, "x"), RED)
    assert np.array_equal(decode(str(path), "x"), RED)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation(orientation: int, fmt: str) -> None:
    stored = np.zeros((16, 24), dtype=np.uint8)
    stored[:8, :8] = 255  # a white corner: top left as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(stored).convert("RGB"), fmt, exif=exif)
    upright = decode(content, "x")[:, :, 0] > 127
    height, width = (24, 16) if orientation >= 5 else (16, 24)
    assert upright.shape == (height, width)
    # EXIF 2.32, table 6: which visual corner the stored top left corner is
    bottom, right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    assert upright[-4 if bottom else 3, -4 if right else 3]
    assert 40 <= upright.sum() <= 90
    as_stored = decode(content, "x", exif_orientation=False)[:, :, 0] > 127
    assert as_stored.shape == (16, 24)
    assert as_stored[3, 3]


def test_damaged_exif_does_not_break_a_whole_image() -> None:
    content = encoded(Image.fromarray(RED), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert decode(content, "x").shape == RED.shape


def test_arrays() -> None:
    assert np.array_equal(decode(RED, "x"), RED)
    assert decode(RED[:, :, 0], "x").tolist() == np.full((6, 8, 3), 255).tolist()
    assert decode(RED, "x", channels=1)[0, 0].tolist() == [76]
    assert decode(np.zeros((2, 2, 4), np.uint8), "x").min() == 255  # transparent
    assert decode(np.zeros((2, 2, 7), np.uint8), "x", channels=7).shape == (2, 2, 7)
    for wrong in (np.zeros((2, 2), np.float32), np.zeros((2, 2, 7), np.uint8), np.zeros((0, 2), np.uint8)):
        with pytest.raises(SampleError, match="x: "):
            decode(wrong, "x")


def broken_files() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = {fmt: encoded(noise, fmt) for fmt in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")}
    cut = {f"cut {fmt}": content[: len(content) // 2] for fmt, content in whole.items()}
    png = bytearray(whole["PNG"])
    png[60:80] = bytes(20)
    return {"empty": b"", "text": b"hello", "zeros": bytes(500), "flipped png": bytes(png), **cut}


@pytest.mark.parametrize("kind", broken_files())
def test_broken_files(kind: str) -> None:
    with warnings.catch_warnings(), pytest.raises(SampleError) as caught:
        warnings.simplefilter("error")
        decode(broken_files()[kind], "some/name.jpg")
    assert caught.value.name == "some/name.jpg"
    assert "\n" not in caught.value.reason
    assert " object at " not in caught.value.reason
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_damaged_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for fmt in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        whole = np.frombuffer(encoded(image, fmt), dtype=np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            places = rng.integers(0, min(len(whole), 200), 4)
            damaged[places] = rng.integers(0, 256, 4)
            with contextlib.suppress(SampleError):
                assert decode(damaged.tobytes(), "x").shape[2] == 3


def test_other_formats_are_refused() -> None:
    with pytest.raises(SampleError, match="accepted format"):
        decode(encoded(Image.fromarray(RED), "ICO"), "x")


def test_decompression_bombs_are_refused_from_the_header() -> None:
    content = encoded(Image.fromarray(RED))
    with pytest.raises(SampleError, match="8 x 6 pixels are more than the limit of 47"):
        decode(content, "x", max_pixels=47)
    with pytest.raises(SampleError, match="more pixels than the limit"):
        decode(b"P6 40000 40000 255\n", "x")
    with warnings.catch_warnings(), pytest.raises(SampleError, match="decoded"):
        warnings.simplefilter("error")  # Pillow would warn from 89 million pixels on
        decode(b"P5 9500 9500 255\n", "x")


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "TIFF", "BMP"])
@pytest.mark.parametrize("size", [(65500, 1), (1, 65500), (1, 1)])
def test_the_longest_sides_and_the_smallest_image(fmt: str, size: tuple[int, int]) -> None:
    pixels = decode(encoded(Image.new("RGB", size, (10, 200, 30)), fmt), "x")
    assert pixels.shape == (size[1], size[0], 3)
    assert np.abs(pixels.astype(int) - [10, 200, 30]).max() <= 3


def test_ycck_jpeg() -> None:
    """Red is no cyan, all magenta and yellow, no black; stored inverted, as Adobe does: 255, 0, 0 and 255.

    YCCK holds the complement of the first three, cyan, as Y, Cb, Cr (JFIF's equations): 179, 171, 0. Pillow writes no
    YCCK, so these are written as the inks of a CMYK file, which it inverts, and the Adobe marker is changed.
    """
    written = Image.new("CMYK", (16, 16), (255 - 179, 255 - 171, 255 - 0, 255 - 255))
    content = bytearray(encoded(written, "JPEG", quality=100))
    content[content.index(b"Adobe") + 11] = 2
    assert np.abs(decode(bytes(content), "x")[8, 8].astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(("fmt", "extension"), [("GIF", ".png"), ("WEBP", ".jpg"), ("JPEG", ".tif"), ("BMP", "")])
def test_every_wrong_extension(fmt: str, extension: str, tmp_path) -> None:
    path = tmp_path / f"wrong{extension}"
    path.write_bytes(encoded(Image.fromarray(RED), fmt))
    assert np.abs(decode(path, "x").astype(int) - [255, 0, 0]).max() <= 3


def test_transparency_of_large_images_is_composited_in_bands(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (37, 11, 4), dtype=np.uint8))
    palette = Image.fromarray(rng.integers(0, 256, (37, 11, 3), dtype=np.uint8)).quantize(8)
    contents = [encoded(rgba), encoded(rgba.convert("LA")), encoded(palette, transparency=2)]
    for channels in (1, 3):
        expected = [decode(content, "x", channels=channels) for content in contents]
        for pixels in (1, 40, 110):  # a row at a time, three rows, ten
            monkeypatch.setattr(decode_module, "_BAND_PIXELS", pixels)
            found = [decode(content, "x", channels=channels) for content in contents]
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
        monkeypatch.undo()


def jpeg_of_scans(count: int, height: int = 64, width: int = 64) -> bytes:
    """A progressive JPEG whose last scan is repeated until there are `count`."""
    content = encoded(Image.new("L", (width, height), 128), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * (count - scans(content) + 1) + content[-2:]


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    assert scans(jpeg_of_scans(30)) == 30
    assert decode(jpeg_of_scans(100), "x").shape == (64, 64, 3)
    for decoder in ("pillow", "pillow-scaled", *(["simplejpeg"] if find_spec("simplejpeg") else [])):
        with pytest.raises(SampleError, match="a JPEG of more than 100 scans"):
            decode_crop(jpeg_of_scans(101), "x", lambda h, w: (0, 0, h, w), (8, 8), decoder=decoder)


def test_scans_behind_an_image_are_not_its_own() -> None:
    """A film in the same file, as telephones make them, or a preview in its metadata."""
    plain = encoded(Image.fromarray(RED), "JPEG")
    film = plain + b"\xff\xda" * 1000
    preview = plain[:2] + b"\xff\xe1" + (2 + 2000).to_bytes(2, "big") + b"\xff\xda" * 1000 + plain[2:]
    for content in (film, preview):
        assert scans(content) == 1
        assert np.array_equal(decode(content, "x"), decode(plain, "x"))


def run_length_bmp(width: int, height: int) -> bytes:
    """8 bits a pixel, each row ended after its first pixel."""
    rows = b"\1\0\0\0" * height + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(rows), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + len(rows), 0, 0, 1078) + header + bytes(1024) + rows


def test_slow_bmp_and_ppm_files_are_refused() -> None:
    assert decode(run_length_bmp(30, 4), "x").shape == (4, 30, 3)
    with pytest.raises(SampleError, match=r"a run-length BMP of 4000000 x 44 pixels, more than the limit of 16777216"):
        decode(run_length_bmp(4_000_000, 44), "x")
    text = b"P3 2 1 255\n%b 1 2 3 4 5 6 "
    assert decode(text % (b"# made by hand\n" * 1000), "x").tolist() == [[[1, 2, 3], [4, 5, 6]]]
    with pytest.raises(SampleError, match="a PPM in text with more than 1000 comments"):
        decode(text % (b"# \n" * 1001), "x")


def test_bombs_in_the_metadata_of_png_are_refused() -> None:
    content = encoded(Image.fromarray(RED))
    body = b"key\0\0" + zlib.compress(bytes(2_000_000))
    for kind in (b"zTXt", b"iCCP"):
        chunk = len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
        with pytest.raises(SampleError, match="too large"):
            decode(content[:33] + chunk + content[33:], "x")


def test_transient_read_errors_are_tried_again(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"content")
    waits: list[float] = []
    failures = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]
    real = open

    def flaky(*args, **kwargs):
        if failures:
            raise failures.pop()
        return real(*args, **kwargs)

    monkeypatch.setattr("builtins.open", flaky)
    assert read_bytes(path, sleep=waits.append) == b"content"
    assert waits == [0.5, 1.0]
    failures += [OSError(errno.ETIMEDOUT, "Connection timed out")] * 4
    with pytest.raises(DataError, match=r"read error on .*a.bin after 4 attempts: Connection timed out"):
        read_bytes(path, sleep=waits.append)


def test_a_file_that_cannot_be_read_is_one_bad_sample(tmp_path, monkeypatch) -> None:
    with pytest.raises(SampleError, match="no such file"):
        read_bytes(tmp_path / "gone.png")
    with pytest.raises(SampleError, match="shown: is a directory"):
        read_bytes(tmp_path, name="shown")

    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(SampleError, match="permission denied"):
        read_bytes(tmp_path / "x.png")
