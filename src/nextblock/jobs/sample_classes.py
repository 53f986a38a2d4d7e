"""From the classes that a person names to their numbers."""

from __future__ import annotations

from collections.abc import Sequence

from nextblock.errors import ConfigError, nearest

ALL = "all"
MOST_TOLD = 10


def chosen_classes(
    given: str | int | Sequence[str | int] | None, names: Sequence[str], where: object = "the model"
) -> tuple[int, ...]:
    """The numbers of the classes that take turns, in the order given.

    Args:
        given: names or numbers, with commas between them or as a list; "all" or None = every class. Upper and lower
            case are alike where that leaves no doubt, and a name may hold commas. A text that is both a class's name
            and a number means the name; a whole number (not text) is always a number.
        names: of the model's classes; empty when it is unconditional, and then nothing is returned.
        where: the model, for messages.

    Raises ConfigError for classes of an unconditional model, an unknown name (with the nearest), a number out of range.
    """
    if not names:
        if given is not None and given != ALL:
            raise ConfigError(f"{where} is unconditional: it knows no classes. Leave out --classes.")
        return ()
    if given is None or (isinstance(given, str) and given.strip().lower() == ALL and ALL not in names):
        return tuple(range(len(names)))
    parts = [given] if isinstance(given, str | int) else list(given)
    found = [n for part in parts for n in (_split(part, names, where) if isinstance(part, str) else [part])]
    for number in found:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
            raise ConfigError(f"class {number} is out of range: {where} has classes 0 to {len(names) - 1}.")
    if not found:
        raise ConfigError("--classes names no class. Give names or numbers with commas between them, or leave it out.")
    return tuple(found)


def _split(text: str, names: Sequence[str], where: object) -> list[int]:
    """At commas; but as many pieces together as are the name of one class, for names that hold commas."""
    pieces = [piece.strip() for piece in text.split(",")]
    found: list[int] = []
    start = 0
    while start < len(pieces):
        stops = range(len(pieces), start, -1) if any("," in name for name in names) else (start + 1,)
        joined = ((stop, _named(", ".join(pieces[start:stop]), names)) for stop in stops)
        stop, number = next((hit for hit in joined if hit[1] is not None), (start + 1, None))
        if number is None and pieces[start]:
            number = _number(pieces[start], names, where)
        if number is not None:
            found.append(number)
        start = stop
    return found


def _named(text: str, names: Sequence[str]) -> int | None:
    """The class of that name; None when there is none. Raises ConfigError when several differ by case only."""
    if text in names:
        return list(names).index(text)
    alike = [i for i, name in enumerate(names) if _plain(name) == _plain(text)]
    if len(alike) > 1:
        raise ConfigError(f"'{text}' may be any of {', '.join(names[i] for i in alike)}. Write it exactly.")
    return alike[0] if alike else None


def _plain(name: str) -> str:
    return ",".join(part.strip() for part in name.casefold().split(","))


def _number(text: str, names: Sequence[str], where: object) -> int:
    try:
        return int(text)
    except ValueError:
        told = ", ".join(names[:MOST_TOLD]) + (f" ... ({len(names)} in all)" if len(names) > MOST_TOLD else "")
        hint = nearest(text.casefold(), [name.casefold() for name in names])
        raise ConfigError(f"{where} knows no class '{text}'.{hint} Its classes: {told}.") from None
