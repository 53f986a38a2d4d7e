"""Each operation does what its table row says; what is drawn has the right distribution."""

import pickle
from collections import Counter

import numpy as np
import pytest

from nextblock.data.randaugment import OPERATIONS, RandAugment, argument_of, change
from nextblock.errors import ConfigError
from nextblock.randomness import uniforms

IMAGE = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
FILL = (9, 8, 7)


def changed(name: str, level: float, sign: int = 1, pixels: np.ndarray = IMAGE, increasing: bool = True) -> np.ndarray:
    fill = FILL if pixels.shape[2] == 3 else (9,)
    return change(pixels, name, argument_of(name, level, sign, increasing), fill)


@pytest.mark.parametrize(
    ("name", "increasing", "otherwise"),
    [
        # at levels 0, 9 and 10
        ("rotate", (0, 27, 30), (0, 27, 30)),
        ("shear_x", (0, 0.27, 0.3), (0, 0.27, 0.3)),
        ("shear_y", (0, 0.27, 0.3), (0, 0.27, 0.3)),
        ("translate_x", (0, 0.405, 0.45), (0, 0.405, 0.45)),
        ("translate_y", (0, 0.405, 0.45), (0, 0.405, 0.45)),
        ("solarize_add", (0, 99, 110), (0, 99, 110)),
        ("posterize", (4, 1, 0), (0, 3, 4)),
        ("solarize", (256, 26, 0), (0, 230, 256)),
        ("color", (1, 1.81, 1.9), (0.1, 1.72, 1.9)),
        ("contrast", (1, 1.81, 1.9), (0.1, 1.72, 1.9)),
        ("brightness", (1, 1.81, 1.9), (0.1, 1.72, 1.9)),
        ("sharpness", (1, 1.81, 1.9), (0.1, 1.72, 1.9)),
    ],
)
def test_arguments(name: str, increasing: tuple[float, ...], otherwise: tuple[float, ...]) -> None:
    assert [argument_of(name, level, 1, True) for level in (0, 9, 10)] == pytest.approx(increasing)
    assert [argument_of(name, level, 1, False) for level in (0, 9, 10)] == pytest.approx(otherwise)


def test_signs() -> None:
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        assert argument_of(name, 7, -1, True) == -argument_of(name, 7, 1, True)
    for name in ("color", "contrast", "brightness", "sharpness"):
        assert argument_of(name, 9, -1, True) == pytest.approx(0.19)
        assert argument_of(name, 10, -1, True) == pytest.approx(0.1)
        assert argument_of(name, 9, -1, False) == argument_of(name, 9, 1, False)
    for name in ("posterize", "solarize", "solarize_add"):
        assert argument_of(name, 9, -1, True) == argument_of(name, 9, 1, True)


def test_values_are_mapped_one_by_one() -> None:
    values = RAMP.astype(int)
    assert np.array_equal(changed("invert", 9, pixels=RAMP), 255 - values)
    assert np.array_equal(changed("posterize", 9, pixels=RAMP), values & 0b1000_0000)
    assert np.array_equal(changed("posterize", 5, pixels=RAMP), values & 0b1100_0000)
    assert not changed("posterize", 10, pixels=RAMP).any()
    assert np.array_equal(changed("solarize", 9, pixels=RAMP), np.where(values >= 26, 255 - values, values))
    assert np.array_equal(changed("solarize_add", 9, pixels=RAMP), np.where(values < 128, values + 99, values))
    assert changed("brightness", 10, -1, pixels=RAMP).max() == 25
    assert changed("brightness", 10, 1, pixels=RAMP)[0, 10] == 19


def test_autocontrast_and_equalize_use_the_whole_range() -> None:
    dull = np.tile((RAMP // 4 + 60).astype(np.uint8), (1, 4, 1))  # equalize takes steps of 1 / 255 of the pixels
    for name in ("autocontrast", "equalize"):
        result = changed(name, 9, pixels=dull)
        assert result.min() == 0
        assert result.max() == 255
        assert (np.diff(result[:, :16].reshape(-1).astype(int)) >= 0).all()
    assert np.array_equal(changed("equalize", 9, pixels=RAMP), RAMP)


def test_colour_and_sharpness() -> None:
    saturation = np.ptp(IMAGE.astype(int), axis=2).mean()
    assert np.ptp(changed("color", 10, -1).astype(int), axis=2).mean() == pytest.approx(0.1 * saturation, rel=0.1)
    assert np.ptp(changed("color", 9).astype(int), axis=2).mean() > 1.2 * saturation
    assert changed("contrast", 10, -1).std() == pytest.approx(0.1 * IMAGE.std(), rel=0.1)
    inside = IMAGE[1:-1, 1:-1].std()  # the border stays as it is
    assert changed("sharpness", 10, -1)[1:-1, 1:-1].std() < 0.6 * inside
    assert changed("sharpness", 10)[1:-1, 1:-1].std() > 1.1 * inside


def test_translation_moves_pixels_and_fills() -> None:
    right = changed("translate_x", 10, -1, pixels=np.repeat(IMAGE, 2, axis=1)[:, :20])  # 0.45 * 20 = 9 pixels
    assert np.array_equal(right[:, 9:], np.repeat(IMAGE, 2, axis=1)[:, :11])
    assert (right[:, :9] == FILL).all()
    square = np.concatenate([IMAGE, IMAGE])  # 0.45 * 20 = 9 pixels
    up = changed("translate_y", 10, 1, pixels=square)
    assert np.array_equal(up[:11], square[9:])
    assert (up[11:] == FILL).all()


def test_rotation_and_shears_are_mirrored_by_their_sign() -> None:
    smooth = np.stack(np.meshgrid(np.arange(0, 90, 5), np.arange(60, 180, 10)), axis=-1).astype(np.uint8)
    smooth = np.concatenate([smooth, smooth[:, :, :1]], axis=2)
    mirrored = smooth[:, ::-1]
    for name in ("rotate", "shear_x", "translate_x"):
        one = changed(name, 6, 1, pixels=smooth).astype(int)
        other = changed(name, 6, -1, pixels=mirrored)[:, ::-1].astype(int)
        assert np.abs(one - other).max() <= 1, name
        assert not np.array_equal(one, changed(name, 6, -1, pixels=smooth)), name
    # positive is counter-clockwise: what is on the right side, in the middle, moves up
    spot = np.zeros((21, 21, 1), dtype=np.uint8)
    spot[10, 18] = 255
    assert np.unravel_index(changed("rotate", 10, pixels=spot).argmax(), (21, 21, 1))[0] == 6
    # shear_x moves each row to the left by 0.3 of its number, shear_y each column up: the upper left corner stays
    assert changed("shear_x", 10, pixels=spot)[10].argmax() == 15
    assert changed("shear_y", 10, pixels=spot)[:, 18].argmax() == 4


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("shape", [(10, 14, 3), (7, 5, 1), (1, 1, 3), (2, 1, 1)])
def test_shapes_stay(name: str, shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    for level in (0.0, 4.5, 10.0):
        result = changed(name, level, -1, pixels=pixels)
        assert result.shape == shape
        assert result.dtype == np.uint8
    exact = ("autocontrast", "equalize", "invert", "posterize")  # these change an image at level 0 too
    assert name in exact or np.array_equal(changed(name, 0, pixels=pixels), pixels)


def test_gray_is_a_plane_of_its_own() -> None:
    gray = IMAGE[:, :, :1]
    assert np.array_equal(changed("color", 9, pixels=gray), gray)
    for name in ("rotate", "solarize", "equalize", "sharpness", "shear_x", "autocontrast"):
        three = change(np.repeat(gray, 3, axis=2), name, argument_of(name, 9, 1, True), (9, 9, 9))
        assert np.array_equal(changed(name, 9, pixels=gray), three[:, :, :1]), name


def test_two_of_fifteen_operations_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, float]] = []

    def record(pixels: np.ndarray, name: str, argument: float, fill: object) -> np.ndarray:
        calls.append((name, argument))
        return pixels

    monkeypatch.setattr("nextblock.data.randaugment.change", record)
    augment = RandAugment.parse("rand-m9-mstd0.5-inc1")
    draws = uniforms(0, "randaugment", np.arange(6000), augment.uniforms_needed)
    sizes = []
    for u in draws:
        calls, before = [], calls
        augment.apply(IMAGE, u)
        sizes.append(len(calls))
        calls = before + calls
    shares = np.bincount(sizes) / len(draws)
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.02)  # 6000 draws: a standard deviation is 0.006
    assert set(Counter(name for name, _ in calls)) == set(OPERATIONS)
    counts = np.array([sum(name == wanted for name, _ in calls) for wanted in OPERATIONS])
    assert counts == pytest.approx(np.full(15, 400), abs=80)  # a standard deviation is 19
    degrees = np.array([argument for name, argument in calls if name == "rotate"])
    assert abs(np.sign(degrees).mean()) < 0.2
    levels = np.abs(np.array([a / w for n, a in calls for m, w in [("rotate", 3), ("shear_x", 0.03)] if n == m]))
    assert np.median(levels) == pytest.approx(9, abs=0.08)
    assert np.quantile(levels, 0.16) == pytest.approx(8.5, abs=0.12)
    assert levels.max() <= 10 + 1e-9


def test_levels() -> None:
    assert RandAugment(9, deviation=0)._level(0.01) == 9
    assert RandAugment(9, deviation=3)._level(0.999) == 10
    assert RandAugment(1, deviation=3)._level(0.0) == 0
    assert RandAugment(8, deviation=101)._level(0.25) == 2
    assert RandAugment.parse("rand-m8-mstdinf")._level(0.25) == 2


def test_probability_and_the_numbers_drawn_decide() -> None:
    u = uniforms(0, "randaugment", [5], 8)[0]
    assert np.array_equal(RandAugment(probability=0).apply(IMAGE, u), IMAGE)
    always = RandAugment(probability=1)
    assert always.uniforms_needed == 8
    assert np.array_equal(always.apply(IMAGE, u), always.apply(IMAGE.copy(), u.copy()))
    results = {always.apply(IMAGE, v).tobytes() for v in uniforms(0, "randaugment", np.arange(50), 8)}
    assert len(results) > 45
    first, second = u.reshape(2, 4)[:1].reshape(-1), u.reshape(2, 4)[1:].reshape(-1)
    one = RandAugment(probability=1, layers=1)
    assert np.array_equal(always.apply(IMAGE, u), one.apply(one.apply(IMAGE, first), second))


def test_fill() -> None:
    left = np.array([OPERATIONS.index("translate_x") / 15 + 0.01, 0, 0.5, 0.9])
    augment = RandAugment(9, 0, layers=1, probability=1)
    assert augment.apply(IMAGE, left)[0, 0].tolist() == [124, 116, 104]
    assert augment.apply(IMAGE[:, :, :1], left)[0, 0].tolist() == [128]
    assert augment.filled((0.2, 0.4, 1.0)).fill == (51, 102, 255)
    assert RandAugment(fill=(1, 2, 3)).filled((0.5, 0.5, 0.5)).fill == (1, 2, 3)
    with pytest.raises(ConfigError, match="fill must have one value for each of the 1 channels"):
        RandAugment(fill=(1, 2, 3)).filled((0.5,))
    with pytest.raises(ConfigError, match=r"3 channels \(RGB\) or 1 \(gray\), these have 5"):
        RandAugment().filled((0.5,) * 5)
    with pytest.raises(ConfigError, match="these have 4"):
        RandAugment(probability=1).apply(np.zeros((4, 4, 4), dtype=np.uint8), np.zeros(8))


def test_notation() -> None:
    assert RandAugment.parse("rand-m9-mstd0.5-inc1") == RandAugment()
    assert RandAugment.parse("rand") == RandAugment(10, 0, 2, increasing=False)
    assert RandAugment.parse("rand-n3-m7-p1-inc0") == RandAugment(7, 0, 3, increasing=False, probability=1)
    assert pickle.loads(pickle.dumps(RandAugment())) == RandAugment()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("m9", "written like 'rand-m9-mstd0.5-inc1', got 'm9'"),
        ("rand-mst0.5", "'mst0.5' of 'rand-mst0.5' must be one of m, mstd, n, inc, p .* Did you mean 'mstd'"),
        ("rand-m", "'m' of"),
        ("rand-m9-", "'' of"),
        ("rand-inc2", "inc must be 0 or 1"),
        ("rand-n1.5", "n a whole number"),
        ("rand-m11", "magnitude must be from 0 to 10, got 11"),
        ("rand-n0", "layers must be at least 1"),
        ("rand-p2", "probability must be from 0 to 1"),
    ],
)
def test_wrong_notation(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RandAugment.parse(text)


def test_wrong_values() -> None:
    with pytest.raises(ConfigError, match="deviation must be 0 or more, got -1"):
        RandAugment(deviation=-1)
    with pytest.raises(ConfigError, match="fill must be whole numbers from 0 to 255"):
        RandAugment(fill=(0, 0, 256))
