"""A stand-in for a kill within this process, where a test needs it at one exact call."""

from __future__ import annotations

from typing import Any


class Killed(BaseException):
    """As if the process had been killed: nothing that handles errors handles it."""


def killed_at(after: int, inner: Any) -> Any:
    """`inner`, whose call number `after`, from 0, and all later ones raise `Killed` instead."""
    calls = iter(range(after))

    def stopping(*arguments: Any, **more: Any) -> Any:
        if next(calls, None) is None:
            raise Killed
        return inner(*arguments, **more)

    return stopping
