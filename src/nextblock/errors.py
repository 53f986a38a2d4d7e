"""The errors a person can meet. Each message says what was given, what is accepted, and what to do next."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class NextblockError(Exception):
    """Base of every error raised on purpose; the shell prints its message without a traceback."""


class ConfigError(NextblockError, ValueError):
    """A value, key or combination of a configuration that cannot work."""


class DataError(NextblockError):
    """A data source that cannot be opened or used at all."""


class SampleError(NextblockError):
    """One image that cannot be decoded. `name` is the sample's name, `reason` one clause."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[SampleError], tuple[str, str]]:
        return type(self), (self.name, self.reason)


class CheckpointError(NextblockError):
    """Weights or a checkpoint that do not fit, are damaged, or are not there."""


class RunError(NextblockError):
    """A run that cannot start, go on, or be found."""


def shown(text: object, most: int = 200) -> str:
    """A name out of somebody's file, without what would steer the terminal, and not longer than `most` letters."""
    letters = str(text)
    cut = letters if len(letters) <= most else f"{letters[:most]}..."
    return "".join(letter if letter.isprintable() else "?" for letter in cut)


def nearest(given: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest of `known`, or an empty string when nothing is close."""
    match = difflib.get_close_matches(str(given), list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


def in_plain_words(text: str) -> str:
    """A parser's message on one line, without the names of Python types."""
    text = " ".join(text.split())
    text = re.sub(r"Expected a (?:typing\.)?Literal\[(.*?)\]", r"Expected one of \1", text)
    text = re.sub(r"Expected an? <class '(\w+)'>", lambda found: f"Expected {_KINDS.get(found[1], found[1])}", text)
    text = re.sub(_ONE_OF_SEVERAL, r"\1. Got value: \2", text)
    return text.replace("List[", "list[")


# What an option that may be left out says of a wrong value: the type that was meant, then that it is not None either.
_ONE_OF_SEVERAL = (
    r"Does not validate against any of the Union subtypes.*?Errors: - (.*?) - Expected NoneType.*?Given value: (.*)"
)

_KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "yes or no"}
