"""RandAugment: a few random changes of colour and shape of an image, drawn from fifteen. All functions are pure.

Source: Cubuk, Zoph, Shlens and Le, "RandAugment: Practical automated data augmentation with a reduced search space",
2020; ranges and the random magnitude as in timm, which the XTRA probes were trained with.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from nextblock.data.preprocess import IMAGENET_MEAN
from nextblock.errors import ConfigError, nearest

LARGEST = 10  # magnitudes are 0 to 10
LAYER_UNIFORMS = 4  # of each layer: which operation, whether at all, how much, which sign

Fill = tuple[int, ...]
Change = Callable[[Image.Image, float, Fill], Image.Image]

_PARTS = {"m": "magnitude", "mstd": "deviation", "n": "layers", "inc": "increasing", "p": "probability"}


@dataclass(frozen=True)
class RandAugment:
    """`layers` operations on each image, drawn with replacement from OPERATIONS, each skipped now and then.

    Arguments:
        magnitude: how much, 0 to 10; the centre of a normal distribution, clipped to 0 to 10.
        deviation: its standard deviation; above 100: uniform from 0 to `magnitude` instead.
        layers: how many operations are drawn for an image.
        increasing: whether posterize, solarize, color, contrast, brightness and sharpness get stronger with the
            magnitude; see `argument_of`.
        probability: of each drawn operation to be applied.
        fill: colour, 0 to 255 per channel, of what rotations, shears and translations uncover; None: the mean of
            ImageNet, for gray images 128.

    Raises ConfigError for values that cannot work.
    """

    magnitude: float = 9
    deviation: float = 0.5
    layers: int = 2
    increasing: bool = True
    probability: float = 0.5
    fill: Fill | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= LARGEST:
            raise ConfigError(f"magnitude must be from 0 to {LARGEST}, got {self.magnitude}")
        if not self.deviation >= 0:
            raise ConfigError(f"deviation must be 0 or more, got {self.deviation}")
        if self.layers < 1:
            raise ConfigError(f"layers must be at least 1, got {self.layers}")
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"probability must be from 0 to 1, got {self.probability}")
        if self.fill is not None:
            object.__setattr__(self, "fill", tuple(self.fill))
            _check_channels(len(self.fill))
            if any(not isinstance(value, int) or not 0 <= value <= 255 for value in self.fill):
                raise ConfigError(f"fill must be whole numbers from 0 to 255, one per channel, got {self.fill}")

    @classmethod
    def parse(cls, text: str) -> RandAugment:
        """From timm's notation, say `rand-m9-mstd0.5-inc1`.

        m: magnitude (10), mstd: deviation (0), n: layers (2), inc: increasing, 0 or 1 (0), p: probability (0.5);
        in brackets what holds where a part is missing, as in timm. Raises ConfigError for anything else.
        """
        first, *parts = text.split("-")
        if first != "rand":
            raise ConfigError(f"RandAugment is written like 'rand-m9-mstd0.5-inc1', got '{text}'")
        values: dict[str, float] = {"m": LARGEST, "mstd": 0.0, "n": 2, "inc": 0, "p": 0.5}
        for part in parts:
            match = re.fullmatch(r"([a-z]+)(\d+\.?\d*|inf)", part)
            if match is None or match[1] not in _PARTS:
                hint = nearest(match[1], _PARTS) if match else ""
                raise ConfigError(f"'{part}' of '{text}' must be one of {', '.join(_PARTS)} and a number.{hint}")
            values[match[1]] = float(match[2])
        if values["inc"] not in (0, 1) or values["n"] % 1:
            raise ConfigError(f"inc must be 0 or 1 and n a whole number, got '{text}'")
        return cls(values["m"], values["mstd"], int(values["n"]), bool(values["inc"]), values["p"])

    @property
    def uniforms_needed(self) -> int:
        """How many uniform numbers `apply` takes for an image."""
        return LAYER_UNIFORMS * self.layers

    def filled(self, mean: Sequence[float]) -> RandAugment:
        """The same with `fill`, unless it is given, from the `mean` per channel of pixels in 0..1.

        Raises ConfigError when images of so many channels cannot be augmented, or `fill` has another number.
        """
        _check_channels(len(mean))
        fill = _color(mean) if self.fill is None else self.fill
        if len(fill) != len(mean):
            raise ConfigError(f"fill must have one value for each of the {len(mean)} channels, got {fill}")
        return dataclasses.replace(self, fill=fill)

    def apply(self, pixels: NDArray[np.uint8], u: NDArray[np.float64]) -> NDArray[np.uint8]:
        """`pixels` uint8 [H, W, C] changed as the uniform numbers `u` [uniforms_needed] in [0, 1) say; same shape.

        C is 3 (RGB) or 1 (gray, which color leaves as it is); ConfigError for others.
        """
        fill = self.fill or _color(IMAGENET_MEAN if pixels.shape[2] == 3 else (0.5,))
        for which, chance, spread, side in u.reshape(self.layers, LAYER_UNIFORMS).tolist():
            if chance < self.probability:
                name = OPERATIONS[int(which * len(OPERATIONS))]
                sign = 1 if side < 0.5 else -1
                argument = argument_of(name, self._level(spread), sign, self.increasing)
                pixels = change(pixels, name, argument, fill)
        return pixels

    def _level(self, u: float) -> float:
        if self.deviation > 100:
            return u * self.magnitude
        # u may be 0, where the inverse is minus infinity.
        return min(max(self.magnitude + self.deviation * NormalDist().inv_cdf(max(u, 1e-300)), 0.0), LARGEST)


def argument_of(name: str, level: float, sign: int, increasing: bool) -> float:
    """What the operation `name` is given at `level` 0 to 10; `sign` is 1 or -1. Level 10 reaches the last value.

    | operation                                 | argument                | increasing      | otherwise       |
    |-------------------------------------------|-------------------------|-----------------|-----------------|
    | autocontrast, equalize, invert            | none                    |                 |                 |
    | rotate                                    | degrees                 | 0 to ±30        | the same        |
    | shear_x, shear_y                          | pixels per pixel        | 0 to ±0.3       | the same        |
    | translate_x, translate_y                  | part of the side        | 0 to ±0.45      | the same        |
    | solarize_add                              | added to values < 128   | 0 to 110        | the same        |
    | posterize                                 | bits kept               | 4 to 0          | 0 to 4          |
    | solarize                                  | values >= it inverted   | 256 to 0        | 0 to 256        |
    | color, contrast, brightness, sharpness    | factor, 1: as it is     | 1 to 0.1 or 1.9 | 0.1 to 1.9      |

    Bits and thresholds are whole numbers, rounded down before they are subtracted from 4 and 256.
    """
    part = level / LARGEST
    match name:
        case "autocontrast" | "equalize" | "invert":
            return 0.0
        case "rotate":
            return sign * part * 30
        case "shear_x" | "shear_y":
            return sign * part * 0.3
        case "translate_x" | "translate_y":
            return sign * part * 0.45
        case "solarize_add":
            return int(part * 110)
        case "posterize" | "solarize":
            top = 4 if name == "posterize" else 256
            return top - int(part * top) if increasing else int(part * top)
        case _:
            return max(0.1, 1 + sign * part * 0.9) if increasing else 0.1 + part * 1.8


def change(pixels: NDArray[np.uint8], name: str, argument: float, fill: Fill) -> NDArray[np.uint8]:
    """One operation of OPERATIONS on `pixels` uint8 [H, W, C], C 1 or 3; the same shape. `fill` as in RandAugment."""
    _check_channels(pixels.shape[2])
    gray = pixels.shape[2] == 1
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if gray else pixels))
    changed = np.asarray(_CHANGES[name](image, argument, fill))
    return changed[:, :, None] if gray else changed


def _color(mean: Sequence[float]) -> Fill:
    return tuple(min(255, max(0, round(255 * value))) for value in mean)


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise ConfigError(f"RandAugment changes images of 3 channels (RGB) or 1 (gray), these have {channels}")


def _rotate(image: Image.Image, degrees: float, fill: Fill) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=_fillcolor(fill))


def _affine(image: Image.Image, matrix: tuple[float, ...], fill: Fill) -> Image.Image:
    """`matrix` (a, b, c, d, e, f): the result at (x, y) is the image at (ax + by + c, dx + ey + f)."""
    how = Image.Transform.AFFINE
    return image.transform(image.size, how, matrix, Image.Resampling.BICUBIC, fillcolor=_fillcolor(fill))


def _fillcolor(fill: Fill) -> tuple[int, ...] | int:
    return fill[0] if len(fill) == 1 else fill


def _mapped(image: Image.Image, values: list[int]) -> Image.Image:
    return image.point(values * len(image.getbands()))


def _solarize(image: Image.Image, threshold: float, _: Fill) -> Image.Image:
    return _mapped(image, [255 - value if value >= threshold else value for value in range(256)])


def _solarize_add(image: Image.Image, added: float, _: Fill) -> Image.Image:
    return _mapped(image, [min(255, value + int(added)) if value < 128 else value for value in range(256)])


def _posterize(image: Image.Image, bits: float, _: Fill) -> Image.Image:
    step = 2 ** (8 - int(bits))
    return _mapped(image, [math.floor(value / step) * step for value in range(256)])


_CHANGES: dict[str, Change] = {
    "autocontrast": lambda image, _, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, _, fill: ImageOps.equalize(image),
    "invert": lambda image, _, fill: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": lambda image, factor, fill: ImageEnhance.Color(image).enhance(factor),
    "contrast": lambda image, factor, fill: ImageEnhance.Contrast(image).enhance(factor),
    "brightness": lambda image, factor, fill: ImageEnhance.Brightness(image).enhance(factor),
    "sharpness": lambda image, factor, fill: ImageEnhance.Sharpness(image).enhance(factor),
    "shear_x": lambda image, factor, fill: _affine(image, (1, factor, 0, 0, 1, 0), fill),
    "shear_y": lambda image, factor, fill: _affine(image, (1, 0, 0, factor, 1, 0), fill),
    "translate_x": lambda image, part, fill: _affine(image, (1, 0, part * image.width, 0, 1, 0), fill),
    "translate_y": lambda image, part, fill: _affine(image, (1, 0, 0, 0, 1, part * image.height), fill),
}

OPERATIONS = tuple(_CHANGES)
