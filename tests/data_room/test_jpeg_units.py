"""A part of a JPEG decoded alone has the pixels of the whole one."""

import io
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_decoders import SCALED, part, picture

from nextblock.data import decoders
from nextblock.data.decode import decode
from nextblock.data.decoders import decode_crop
from nextblock.data.jpeg_header import plain_header
from nextblock.data.jpeg_units import UnitJpeg, are_as_listed, cut_units, has_units, with_units


def jpeg(image: Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **{"quality": 90, "restart_marker_blocks": 1, **options})
    return out.getvalue()


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


KINDS = {
    "4:2:0": jpeg(noise(83, 121)),
    "4:4:4": jpeg(noise(83, 121), subsampling=0),
    "4:2:2": jpeg(noise(80, 128), subsampling=1),
    "gray": jpeg(noise(83, 121).convert("L")),
    "one unit": jpeg(noise(9, 11)),
    # libjpeg interpolates no colours where there are not three across: a last unit of two must not stand alone
    **{
        f"{kind}, {width} px": jpeg(noise(20, width), subsampling=subsampling)
        for kind, subsampling in (("4:2:0", 2), ("4:2:2", 1))
        for width in (33, 34, 35, 36)
    },
    "smooth": jpeg(picture(83, 121)),
}


def pixels(content: bytes | bytearray, scale: int) -> NDArray[np.uint8]:
    return decoders._drafted(Image.open(io.BytesIO(content)), scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_a_part_has_the_pixels_of_the_whole(kind: str, scale: int) -> None:
    content = UnitJpeg(with_units(KINDS[kind]))
    header = plain_header(content)
    assert header is not None
    whole = pixels(content, scale)
    assert np.array_equal(whole, pixels(KINDS[kind], scale))
    rng = np.random.default_rng(1)
    for _ in range(40):
        rows, columns = (slice(*sorted(rng.choice(side + 1, 2, replace=False).tolist())) for side in whole.shape[:2])
        cut, of_cut, above, left = cut_units(content, header, rows, columns, scale)
        found = pixels(cut, scale)
        assert found.shape[:2] == (-(-of_cut.height // scale), -(-of_cut.width // scale))
        here = found[rows.start - above : rows.stop - above, columns.start - left : columns.stop - left]
        assert np.array_equal(here, whole[rows, columns])


def test_a_part_is_much_smaller_than_the_whole() -> None:
    content = UnitJpeg(with_units(jpeg(noise(512, 512))))
    header = plain_header(content)
    assert header is not None
    cut, of_cut, above, left = cut_units(content, header, slice(100, 200), slice(300, 390), 1)
    assert (of_cut.height, of_cut.width, above, left) == (112, 112, 96, 288)
    assert len(cut) < 0.08 * len(content)
    cut, *_ = cut_units(content, header, slice(96, 208), slice(288, 400), 1)  # the neighbours' colours are needed
    assert plain_header(bytes(cut))[:2] == (144, 144)  # type: ignore[index]
    assert cut_units(content, header, slice(0, 512), slice(0, 512), 1)[0] is content


@pytest.mark.parametrize("decoder", SCALED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_those_of_the_same_file_without_the_list(decoder: str, kind: str, channels: int) -> None:
    content = UnitJpeg(with_units(KINDS[kind]))
    for size, each in product([(4, 5), (20, 24), (60, 90)], [decoder, "pillow"]):
        listed, plain = (
            decode_crop(given, "x", part, size, decoder=each, channels=channels) for given in (content, KINDS[kind])
        )
        assert np.array_equal(listed, plain)


@pytest.mark.parametrize("decoder", SCALED)
def test_only_the_part_is_decoded(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "_by_simplejpeg" if decoder == "simplejpeg" else "_by_pillow"
    decoded, sides = getattr(decoders, name), []
    monkeypatch.setattr(decoders, name, lambda *given: sides.append(given[1]) or decoded(*given))
    content = UnitJpeg(with_units(jpeg(noise(200, 300))))
    decode_crop(content, "x", lambda h, w: (70, 20, 20, 100), (16, 16), decoder=decoder)
    assert sides == [(32, 112)]


@pytest.mark.parametrize("decoder", SCALED)
def test_a_list_that_is_wrong_is_no_broken_image(decoder: str) -> None:
    """Nobody vouches for such a one; but were it given, the whole image would be decoded."""
    content = bytearray(with_units(jpeg(noise(64, 64))))
    content[40:60] = bytes(20)
    assert not are_as_listed(bytes(content))
    found, expected = (
        decode_crop(given, "x", lambda h, w: (0, 0, 30, 30), (16, 16), decoder=decoder)
        for given in (UnitJpeg(content), jpeg(noise(64, 64)))
    )
    assert np.array_equal(found, expected)


def test_which_files_get_a_list() -> None:
    for kind, content in KINDS.items():
        listed = with_units(content)
        assert has_units(listed), kind
        assert not has_units(content)
        assert are_as_listed(listed)
        assert np.array_equal(decode(listed, "x"), decode(content, "x"))
        assert with_units(listed) == listed
    most, many = (jpeg(Image.new("L", (1456, 8 * rows))) for rows in (179, 181))  # 182 units in a row
    assert has_units(with_units(most))
    assert with_units(many) == many
    for other in (
        b"", b"no image", jpeg(noise(40, 40), restart_marker_blocks=2), jpeg(noise(40, 40), restart_marker_blocks=0),
        jpeg(noise(40, 40), progressive=True), jpeg(noise(40, 40), keep_rgb=True, subsampling=0),
    ):  # fmt: skip
        assert with_units(other) == other
    assert not has_units(b"")
