"""Whoever decodes: the same files are broken, and a crop shows the same part of the image, the right way up.

Without simplejpeg its rows are skipped; `pillow-scaled`, which is to give the same pixels, is always tested.
"""

import importlib.util
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from nextblock.data import decoders
from nextblock.data.augment import Box, CropConfig, random_resized_crop, resize_by_torch
from nextblock.data.decode import decode
from nextblock.data.decoders import chosen_decoder, dct_scale, decode_crop
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.data.stream import TrainingStream
from nextblock.errors import ConfigError, SampleError

needs_simplejpeg = pytest.mark.skipif(not importlib.util.find_spec("simplejpeg"), reason="simplejpeg is not installed")
SCALED = ["pillow-scaled", pytest.param("simplejpeg", marks=needs_simplejpeg)]
ORIENTATION = 0x0112


def picture(height: int, width: int) -> Image.Image:
    """Smooth, and nowhere symmetric."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(9 * x + 5 * y), np.cos(7 * x * y + 3 * y), np.sin(11 * y - 4 * x) + x - 0.5]
    return Image.fromarray(np.stack([127 + 80 * wave for wave in waves], axis=-1).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def part(height: int, width: int) -> Box:
    return height // 5, width // 7, height // 2, width // 2


def whole(height: int, width: int) -> Box:
    return 0, 0, height, width


def distance(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[int, float]:
    apart = np.abs(a.astype(int) - b.astype(int))
    return int(apart.max()), float(apart.mean())


@pytest.mark.parametrize(
    ("sides", "scale"),
    [((16, 16), 1), ((31, 400), 1), ((32, 32), 2), ((63, 64), 2), ((64, 64), 4), ((127, 999), 4), ((999, 128), 8)],
)
def test_the_scale_is_the_largest_that_still_covers_the_output(sides: tuple[int, int], scale: int) -> None:
    assert dct_scale((3, 5, *sides), (16, 16)) == scale


def test_pillow_is_decoding_whole_and_resizing() -> None:
    for image in (picture(90, 70), picture(40, 50).convert("L"), picture(40, 50).convert("CMYK")):
        content = jpeg(image)
        for channels in (1, 3):
            pixels = decode(content, "x", channels=channels)
            expected = random_resized_crop(pixels, part(*pixels.shape[:2]), (24, 20))
            assert np.array_equal(decode_crop(content, "x", part, (24, 20), channels=channels), expected)


@pytest.mark.parametrize("decoder", SCALED)
@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize(("height", "width"), [(60, 44), (331, 254)])
def test_a_scaled_crop_shows_the_same_part_the_same_way_up(
    decoder: str, orientation: int, height: int, width: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = jpeg(picture(height, width), quality=98, exif=exif)
    for turned in (True, False):
        scaled, full = (
            decode_crop(content, "x", part, (24, 20), decoder=each, exif_orientation=turned)
            for each in (decoder, "pillow")
        )
        assert scaled.shape == (24, 20, 3)
        assert distance(scaled, full)[1] < 3
        assert distance(scaled[::-1], full)[1] > 10  # what a wrong orientation gives


@pytest.mark.parametrize("decoder", SCALED)
def test_the_scale_makes_large_files_small(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content, seen, scaled = jpeg(picture(800, 600)), [], decoders._scaled
    monkeypatch.setattr(decoders, "_scaled", lambda *given: seen.append(given[3]) or scaled(*given))
    decode_crop(content, "x", whole, (90, 70), decoder=decoder)
    decode_crop(content, "x", part, (90, 70), decoder=decoder)
    assert seen == [100, 75, 200, 150]


KINDS = {
    "4:2:0": (picture(333, 257), {"quality": 85}),
    "4:4:4": (picture(333, 257), {"quality": 95, "subsampling": 0}),
    "4:2:2": (picture(258, 331), {"subsampling": 1}),
    "progressive": (picture(333, 257), {"progressive": True}),
    "restarts": (picture(250, 300), {"restart_marker_blocks": 3}),
    "gray": (picture(333, 257).convert("L"), {}),
    "RGB in the file": (picture(133, 157), {"keep_rgb": True, "subsampling": 0}),
    "noise": (Image.fromarray(np.random.default_rng(0).integers(0, 256, (129, 143, 3), dtype=np.uint8)), {}),
}


@needs_simplejpeg
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 40, 80, 300])
def test_simplejpeg_gives_the_pixels_of_pillow(kind: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image, options = KINDS[kind]
    content = jpeg(image, **options)
    for channels in (1, 3):
        crops = [
            decode_crop(content, "x", whole, (size, size), decoder=decoder, channels=channels)
            for decoder in ("simplejpeg", "pillow-scaled")
        ]
        assert distance(*crops)[0] <= 2
    monkeypatch.setattr(decoders, "as_pixels", None)  # it did not fall back to Pillow
    decode_crop(content, "x", whole, (size, size), decoder="simplejpeg", channels=3 if kind != "gray" else 1)


def damaged() -> list[bytes]:
    content, rng = jpeg(picture(200, 160)), np.random.default_rng(0)
    found = [b"", b"\xff\xd8", content[: len(content) // 2], content[:-2], content[:300], content + b"more"]
    for _ in range(60):
        changed = bytearray(content)
        changed[rng.integers(2, len(changed))] = rng.integers(256)
        found.append(bytes(changed))
    return found


def damaged_below() -> list[bytes]:
    """Markers that do not belong there, in the lower half of the coded pixels."""
    content = jpeg(picture(400, 300))
    middle = len(content) * 3 // 4
    markers = [bytes([0xFF, number]) for number in (0xC0, 0xC4, 0xDB, 0xDD, 0xD8, 0xD9, 0xDA, 0xE0, 0x01, 0xC8)]
    return [content[:middle] + marker + content[middle + 2 * over :] for marker in markers for over in (0, 1)]


def above(height: int, width: int) -> Box:
    return 0, 0, height // 4, width * 2 // 3


@pytest.mark.parametrize("decoder", SCALED)
@pytest.mark.parametrize(
    ("size", "box", "of"), [(20, whole, damaged), (100, whole, damaged), (40, above, damaged_below)]
)
def test_the_same_files_are_broken(decoder: str, size: int, box: Any, of: Callable[[], list[bytes]]) -> None:
    verdicts: dict[str, list[str]] = {decoder: [], "pillow": []}
    for content in of():
        for each, said in verdicts.items():
            try:
                decode_crop(content, "x", box, (size, size), decoder=each)
                said.append("")
            except SampleError as error:
                said.append(error.reason)
    assert verdicts[decoder] == verdicts["pillow"]
    assert 3 < sum(map(bool, verdicts["pillow"])) < 40


@needs_simplejpeg
def test_what_simplejpeg_refuses_has_the_pixels_of_pillow() -> None:
    read = 0
    for content in damaged():
        try:
            expected = decode_crop(content, "x", whole, (60, 60), decoder="pillow-scaled")
        except SampleError:
            continue
        assert distance(decode_crop(content, "x", whole, (60, 60), decoder="simplejpeg"), expected)[0] <= 2
        read += 1
    assert read > 20


def test_a_refusal_by_simplejpeg_is_no_broken_image(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strict:
        def decode_jpeg(self, *_: object, **__: object) -> None:
            raise ValueError("it is not to my liking")

    content = jpeg(picture(200, 160))
    expected = decode_crop(content, "x", part, (20, 20), decoder="pillow-scaled")
    monkeypatch.setattr(decoders, "_simplejpeg", Strict)
    assert np.array_equal(decode_crop(content, "x", part, (20, 20), decoder="simplejpeg"), expected)


@pytest.mark.parametrize("decoder", SCALED)
@pytest.mark.parametrize("channels", [1, 3])
def test_other_files_keep_to_the_policy(decoder: str, channels: int) -> None:
    alpha = picture(50, 40)
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    deep = Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(50, 40) * 32)
    contents: list[object] = [jpeg(picture(50, 40).convert("CMYK")), np.asarray(picture(50, 40)), picture(50, 40)]
    for image, fmt in ((alpha, "PNG"), (deep, "PNG"), (picture(50, 40).quantize(), "GIF"), (deep, "TIFF")):
        out = io.BytesIO()
        image.save(out, fmt)
        contents.append(out.getvalue())
    for content in contents:
        pixels = decode(content, "x", channels=channels)
        expected = resize_by_torch(pixels[10:35, 5:25], (16, 18))
        crop = decode_crop(content, "x", lambda h, w: (10, 5, 25, 20), (16, 18), decoder=decoder, channels=channels)
        assert np.array_equal(crop, expected)


@pytest.mark.parametrize("sides", [(50, 40), (12, 17), (700, 300)])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_torch_resizes_as_pillow_does(sides: tuple[int, int], channels: int) -> None:
    pixels = np.asarray(picture(*sides))[:, :, [0, 1, 2, 0, 1][:channels]]
    frozen = np.ascontiguousarray(pixels)
    frozen.setflags(write=False)
    resized = resize_by_torch(frozen, (31, 23))
    assert resized.flags.c_contiguous
    assert distance(resized, random_resized_crop(pixels, (0, 0, *sides), (31, 23)))[0] <= 1
    assert (resize_by_torch(np.full((*sides, channels), 255, np.uint8), (31, 23)) == 255).all()


def test_torch_resizes_as_its_public_function_does_and_into_what_is_given() -> None:
    pixels = np.asarray(picture(70, 91))
    image = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, (31, 23), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
    batch = np.zeros((3, 31, 23, 3), dtype=np.uint8)
    assert np.shares_memory(resize_by_torch(pixels, (31, 23), batch[1]), batch)
    assert np.array_equal(batch[1], expected.numpy())
    assert not batch[::2].any()


@pytest.mark.parametrize("decoder", ["pillow", *SCALED])
def test_a_crop_is_written_where_it_is_wanted(decoder: str) -> None:
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    pixels = np.asarray(picture(50, 40))
    for content in (jpeg(picture(50, 40)), jpeg(picture(50, 40), exif=turned), pixels, picture(50, 40)):
        out = np.zeros((16, 18, 3), dtype=np.uint8)
        given, made = (decode_crop(content, "x", part, (16, 18), decoder=decoder, out=each) for each in (out, None))
        assert given is out
        assert np.array_equal(out, made)


@needs_simplejpeg
def test_crops_do_not_share_memory() -> None:
    contents = [jpeg(picture(90, 70)), jpeg(Image.new("RGB", (300, 300)))]
    first, _ = (decode_crop(content, "x", whole, (60, 60), decoder="simplejpeg") for content in contents)
    assert np.array_equal(first, decode_crop(contents[0], "x", whole, (60, 60), decoder="simplejpeg"))
    assert first.any()


@needs_simplejpeg
def test_images_too_large_for_the_kept_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    content = jpeg(picture(90, 70))
    expected = decode_crop(content, "x", part, (20, 20), decoder="simplejpeg")
    monkeypatch.setattr(decoders, "_KEPT_BYTES", 1000)
    assert np.array_equal(decode_crop(content, "x", part, (20, 20), decoder="simplejpeg"), expected)


def test_an_unknown_decoder_and_one_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"got 'pilow'\. Did you mean 'pillow'"):
        chosen_decoder("pilow")
    monkeypatch.setattr(decoders, "_simplejpeg", lambda: None)
    with pytest.raises(ConfigError, match="pip install simplejpeg"):
        chosen_decoder("simplejpeg")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert chosen_decoder() == "pillow-scaled"
    monkeypatch.setattr(decoders, "_simplejpeg", lambda: math)
    assert chosen_decoder() == "simplejpeg"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert chosen_decoder() == "pillow"


def test_a_stream_keeps_its_decoder_and_is_a_function_of_the_position(tmp_path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(picture(90 + 7 * number, 80)))
    (tmp_path / "broken.jpg").write_bytes(jpeg(picture(90, 90))[:400])
    streams = {
        decoder: TrainingStream(
            open_source(str(tmp_path)), 0, CropConfig((16, 16)), Preprocessing((16, 16)), decoder=decoder
        )
        for decoder in ("pillow", "pillow-scaled")
    }
    batches = {decoder: stream.load(range(12)) for decoder, stream in streams.items()}
    ours, exact = batches["pillow-scaled"], batches["pillow"]
    again = [streams["pillow-scaled"].load([position]).images for position in range(12)]
    assert torch.equal(ours.images, torch.cat(again))
    assert ours.bad == exact.bad
    assert len(ours.bad) == 2
    assert torch.equal(ours.indices, exact.indices)
    assert 0 < distance(ours.images.numpy(), exact.images.numpy())[1] < 3
    assert streams["pillow-scaled"].decoder == "pillow-scaled"
    assert TrainingStream(streams["pillow"].source, 0, CropConfig((8, 8)), Preprocessing((8, 8))).decoder == "pillow"
    with pytest.raises(ConfigError, match="decoder"):
        TrainingStream(streams["pillow"].source, 0, CropConfig((8, 8)), Preprocessing((8, 8)), decoder="fast")
