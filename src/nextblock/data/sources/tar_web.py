"""A tar behind HTTP or HTTPS, read by ranges.

A server falters: it drops, stalls, sends half, is overloaded. Whatever may pass is tried again after waits that double;
what does not pass is a DataError, and never another image in place of the one asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from nextblock.data.heartbeat import alive, waiting
from nextblock.data.sources.tar_index import Stamp, changed
from nextblock.data.sources.tar_members import Read
from nextblock.data.sources.web_connections import Answer, Broken, answer_to, plain
from nextblock.errors import DataError, shown
from nextblock.randomness import uniforms

TRIES = 6
FIRST_WAIT_S = 0.5  # then 1, 2, 4, 8, each somewhat less or more: 15 s in all, and the time-outs
LONGEST_WAIT_S = 20.0
_AHEAD = 2**16
_SKIPPED_BY_READING = 2**22  # what lies between is read and thrown away; more is left out by a new request
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_WHY = {401: "it wants a login", 403: "it is refused (a signed address may have expired)", 404: "it is not there",
        410: "it is not there any more"}  # fmt: skip

T = TypeVar("T")


class _Busy(Broken):
    """The server asks to be left alone for so many seconds."""

    def __init__(self, reason: str, wait_s: float) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class WebTar:
    """The tar at `url`. What comes behind its '?' (a signature) is sent, and told nobody."""

    def __init__(self, url: str) -> None:
        self.url, self.where = url, plain(url)

    def stamp(self) -> Stamp:
        def once() -> Stamp:
            answer, stamp = self.begin(0, 1, None)
            _whole(answer, 1)
            return stamp

        return self.tried(once, 0)

    def read(self, offset: int, length: int, stamp: Stamp) -> bytes:
        if not length:
            return b""
        return self.tried(lambda: _whole(self.begin(offset, length, stamp)[0], length), offset)

    @contextmanager
    def reading(self, stamp: Stamp) -> Iterator[Read]:
        passing = _Passing(self, stamp)
        try:
            yield passing.read
        finally:
            passing.stop()

    def tried(self, what: Callable[[], T], offset: int) -> T:
        """`what()`, again and again where it is Broken. Raises DataError, naming `offset`, in the end."""
        # Fixed numbers, but others for each place in the file: workers that failed together do not come back together.
        spread = uniforms(0, "retry", [offset], TRIES)[0]
        for attempt in range(TRIES):
            alive()
            try:
                return what()
            except Broken as broken:
                last = broken
                if attempt + 1 < TRIES:
                    own_s = FIRST_WAIT_S * 2**attempt * (0.75 + 0.5 * float(spread[attempt]))
                    waiting(min(max(own_s, getattr(broken, "wait_s", 0.0)), LONGEST_WAIT_S))
        raise DataError(
            f"{self.where}: {TRIES} tries to read byte {offset} failed; the last time, {last}. "
            "Check the server and the network, then resume."
        ) from last

    def begin(self, offset: int, length: int | None, stamp: Stamp | None) -> tuple[Answer, Stamp]:
        """The answer to a range, to the end where `length` is None, not yet read; and what the tar is now."""
        headers = {"Range": f"bytes={offset}-{'' if length is None else offset + length - 1}"}
        if stamp is not None and stamp.version.startswith('"'):  # a weak ETag must not be compared by the server
            headers["If-Match"] = stamp.version
        answer = answer_to(self.url, headers)
        try:
            found = self._checked(answer, offset, length, stamp)
        except BaseException:
            answer.forget()
            raise
        return answer, found

    def _checked(self, answer: Answer, offset: int, length: int | None, stamp: Stamp | None) -> Stamp:
        status = answer.status
        if status in _PASSING:
            raise _Busy(f"it answered {status} {shown(answer.reason)}", _asked_wait_s(answer))
        if status == 200:
            raise DataError(
                f"the server of {self.where} gives whole files only (no Range requests), so its images cannot be read "
                "at random. Use one that answers them (nginx, Apache, S3 and the like), or fetch the tars."
            )
        if status == 416 and stamp is None:
            raise DataError(f"{self.where} is empty: not a tar file.")
        if status not in (206, 412, 416):
            raise DataError(f"cannot read {self.where}: {_WHY.get(status, shown(answer.reason))} (HTTP {status}).")
        found = _stamp_of(answer, offset, length) if status == 206 else None
        if found is None or stamp not in (None, found):
            raise changed(self.where)
        return found


class _Passing:
    """A tar read once, from the beginning to the end, over as few requests as that takes."""

    def __init__(self, tar: WebTar, stamp: Stamp) -> None:
        self._tar, self._stamp = tar, stamp
        self._answer: Answer | None = None
        self._next = 0  # where the answer goes on
        self._begin, self._ahead = 0, b""

    def read(self, offset: int, length: int) -> bytes:
        length = max(0, min(length, self._stamp.size - offset))
        kept = self._ahead[offset - self._begin :] if self._begin <= offset else b""
        if len(kept) < length:
            at, least = offset + len(kept), length - len(kept)
            kept += self._tar.tried(lambda: self._more(at, least), at)
        self._begin, self._ahead = offset, kept
        return kept[:length]

    def _more(self, offset: int, least: int) -> bytes:
        """At least so many bytes from here on; somewhat more where they come along."""
        if self._answer is None or not 0 <= offset - self._next <= _SKIPPED_BY_READING:
            self.stop()
            self._answer, self._next = self._tar.begin(offset, None, self._stamp)[0], offset
        while self._next < offset:
            self._take(min(_AHEAD, offset - self._next))
        return self._take(min(max(least, _AHEAD), self._stamp.size - offset))

    def _take(self, length: int) -> bytes:
        assert self._answer is not None
        answer, self._answer = self._answer, None  # unless all goes well, it is asked for anew
        content = answer.read(length)
        if len(content) != length:
            answer.forget()
            raise Broken("it broke off in the middle")
        self._answer, self._next = answer, self._next + length
        return content

    def stop(self) -> None:
        if self._answer is not None:
            self._answer.forget()
            self._answer = None


def _whole(answer: Answer, length: int) -> bytes:
    """The body of an answer to a range of so many bytes."""
    content = answer.read(length)
    if len(content) == length and not answer.read(1):
        return content
    answer.forget()
    much = "more than" if len(content) == length else f"{len(content)} of"
    raise Broken(f"it sent {much} the {length} bytes asked for")


def _stamp_of(answer: Answer, offset: int, length: int | None) -> Stamp:
    """Of the whole file. Raises Broken for an answer to another range than the one asked for."""
    told = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", answer.header("Content-Range"))
    if told is None:
        raise Broken("it did not say which bytes it sent")
    first, last, size = map(int, told.groups())
    if first != offset or last != (size if length is None else min(offset + length, size)) - 1:
        raise Broken(f"it sent bytes {first} to {last}, not those asked for")
    return Stamp(size, answer.header("ETag") or answer.header("Last-Modified"))


def _asked_wait_s(answer: Answer) -> float:
    with suppress(ValueError):
        return max(0.0, float(answer.header("Retry-After") or 0))
    return 0.0  # a date: our own waits do
