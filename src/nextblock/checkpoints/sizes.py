"""The sizes of a model in a foreign file: what its tensors show, what they cannot show, and where the rest is from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nextblock.errors import CheckpointError, ConfigError, nearest

FROM_FILE, FROM_YOU, PUBLISHED = "the file", "you", "what was published"


@dataclass(frozen=True)
class Sizes:
    """values: of the configuration's fields. origin: by field, "the file", "you", or "preset NAME"."""

    values: dict[str, Any]
    origin: dict[str, str]


def completed(
    shown: Mapping[str, Any],
    hidden: Mapping[str, Sequence[str]],
    given: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
    preset: str | None,
    where: object,
    published: Mapping[str, Any] | None = None,
) -> Sizes:
    """All that is known of a model's sizes.

    Args:
        shown: fields that the tensors show.
        hidden: fields that they cannot show and that must be known; of each, in which shown fields a preset must agree
            with the file to tell it.
        given: what the caller says, of both; None = nothing.
        presets: the named models, every field of each.
        preset: the caller's choice among them.
        where: the file, for messages.
        published: fields that neither show nor are said, but are alike in all that was published.

    Raises ConfigError for an unknown preset; CheckpointError when the caller or the preset contradicts the file, or a
    hidden field stays unknown.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name in shown and shown[name] != value:
            raise CheckpointError(f"{where} shows {name} {shown[name]}; {value} was asked for. Leave it out.")
    if preset is not None and preset not in presets:
        raise ConfigError(f"No preset '{preset}'. Presets: {', '.join(presets)}.{nearest(preset, presets)}")
    if preset is not None:
        wrong = [f"{field} {shown[field]} there, {presets[preset][field]} in the preset"
                 for field in ("width", "depth") if shown[field] != presets[preset][field]]  # fmt: skip
        if wrong:
            raise CheckpointError(f"{where} is not of preset {preset}: {'; '.join(wrong)}.")
    values, origin = {**(published or {}), **shown, **given}, dict.fromkeys(published or {}, PUBLISHED)
    origin |= dict.fromkeys(shown, FROM_FILE)
    origin |= {name: FROM_YOU for name in given if name not in shown}
    for name in (name for name in hidden if name not in values):
        agreeing = [p for p in presets if all(presets[p][field] == shown[field] for field in hidden[name])]
        if preset is not None and preset not in agreeing:
            wrong = [f"{f} {shown[f]} there, {presets[preset][f]} in the preset" for f in hidden[name]
                     if presets[preset][f] != shown[f]]  # fmt: skip
            raise CheckpointError(f"{where} is not of preset {preset}: {'; '.join(wrong)}.")
        named = preset or next(iter(agreeing), None)
        if named:
            values[name], origin[name] = presets[named][name], f"preset {named}"
    if unknown := {name: fields for name, fields in hidden.items() if name not in values}:
        fields = dict.fromkeys(field for name in unknown for field in unknown[name])
        raise CheckpointError(
            f"the tensors of {where} do not show {' and '.join(unknown)}, and no preset has "
            f"{', '.join(f'{field} {shown[field]}' for field in fields)}. Say it: "
            f"{' '.join(f'--{name} N' for name in unknown)} (in Python, {', '.join(f'{n}=N' for n in unknown)})."
        )
    return Sizes(values, origin)


MOST_TOKENS = 16_384  # a grid of 128 × 128; the mask of more is larger than the weights that ask for it


def require_tokens(count: int, where: object) -> None:
    """Raise CheckpointError for a sequence whose mask alone would fill the memory."""
    if count > MOST_TOKENS:
        raise CheckpointError(f"{where} has {count:,} positions; more than {MOST_TOKENS:,} are not opened.")


def square(count: int, what: str, option: str | None, where: object) -> int:
    """The side of a square of `count`. Raises CheckpointError, naming the option that tells, when it is none."""
    side = math.isqrt(count)
    if side * side != count:
        advice = f" Say the sides: --{option} HEIGHT WIDTH." if option else ""
        raise CheckpointError(f"{where} has {count} {what}, which make no square.{advice}")
    return side


def ratio_of(hidden: int, width: int, thirds: int = 3) -> float:
    """The ratio r for which int(width · r · thirds / 3) is `hidden`; a whole number where one is."""
    whole = round(hidden * 3 / thirds / width)
    if whole and int(width * float(whole) * thirds / 3) == hidden:
        return float(whole)
    ratio = hidden * 3 / thirds / width
    while int(width * ratio * thirds / 3) < hidden:  # rounded down on the way
        ratio = math.nextafter(ratio, math.inf)
    return ratio
