"""What can go wrong with the hub, in a sentence or two with what to do next; and trying again what passes by itself."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from nextblock.errors import CheckpointError, nearest

RETRY_WAITS_S = (1.0, 4.0)
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"

_STUMBLED = (408, 500, 502, 503, 504)
_BROKEN_OFF = ("RemoteProtocolError", "ReadError", "WriteError", "ChunkedEncodingError")
_UNREACHABLE = ("TransportError", "ConnectionError", "Timeout")  # of httpx, then of requests
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Made = TypeVar("Made")


@dataclass(frozen=True)
class Request:
    """What was asked of the hub, to tell of it."""

    job: Literal["fetch", "push"]
    name: str
    revision: str | None
    token: str | None

    @property
    def what(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def undone(self) -> str:
        return f"{self.what} was not {'pushed' if self.job == 'push' else 'fetched'}"

    @property
    def known(self) -> bool:
        """Whether a token went with it."""
        from huggingface_hub import get_token

        return bool(self.token or get_token())


def hub_name() -> str:
    """The hub in words; with its address when it is not the usual one."""
    from huggingface_hub import constants

    usual = constants.ENDPOINT == "https://huggingface.co"
    return "the Hugging Face hub" if usual else f"the hub at {constants.ENDPOINT}"


def patiently(call: Callable[[], Made]) -> Made:
    """Call again after a while when the hub stumbled or the connection broke off."""
    for wait_s in RETRY_WAITS_S:
        try:
            return call()
        except Exception as error:
            root = _root(error)
            if _status(root) not in _STUMBLED and not _is_a(root, _BROKEN_OFF):
                raise
            time.sleep(wait_s)
    return call()


@contextmanager
def in_sentences(request: Request) -> Iterator[None]:
    """Raises CheckpointError in place of whatever is raised inside."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of many kinds: hub, network, files, JSON
        root = _root(error)
        told = _of_the_hub(root, request) or _of_status(root, request) or _of_this_machine(root, request)
        raise CheckpointError(told or _of_an_odd_answer(root, request)) from error


def _root(error: BaseException) -> BaseException:
    """What lies under the errors that only say "not in the cache" or "error while uploading"."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, (LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_a(error: BaseException, names: tuple[str, ...]) -> bool:
    """By name, because huggingface_hub changes the library that it speaks HTTP with."""
    return any(kind.__name__ in names for kind in type(error).__mro__)


def _of_the_hub(error: BaseException, request: Request) -> str | None:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DisabledRepoError,
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, OfflineModeIsEnabled):
        if request.job == "push":
            return f"HF_HUB_OFFLINE is set, so nothing was pushed to {request.what}. Unset it to push."
        return (
            f"{request.what} is not, or not wholly, in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set. "
            "Unset it and fetch once with a network."
        )
    if isinstance(error, GatedRepoError):
        address = f"{constants.ENDPOINT}/{request.name}"
        then = "with the account of your token" if request.known else f"then {LOG_IN}"
        return f"{request.name} is shown only to those whom its owner lets in: ask for it at {address}, {then}."
    if isinstance(error, RevisionNotFoundError):
        return f"{request.name} on {hub_name()} has no revision '{request.revision}'.{_revisions(request)}"
    if isinstance(error, DisabledRepoError):
        return f"{request.name} has been closed by {hub_name()}."
    if isinstance(error, RepositoryNotFoundError):
        private = "check that your token may see it" if request.known else LOG_IN
        return (
            f"'{request.name}' is neither a folder here nor a model on {hub_name()}. Check the spelling; if it is "
            f"private, {private}."
        )
    return None


def _revisions(request: Request) -> str:
    """Some that are there, and the nearest; nothing when they are not to be had."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi(token=request.token).list_repo_refs(request.name)
    except Exception:
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    listed = f" There are {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}." if names else ""
    return listed + nearest(request.revision or "", names)


def _of_status(error: BaseException, request: Request) -> str | None:
    status = _status(error)
    if status is None:
        return None
    if status in (401, 403) and not request.known:
        return f"For {request.name}, {hub_name()} wants to know who asks: {LOG_IN}."
    if status == 401:
        return f"This token is not known to {hub_name()}: mistyped, out of date or withdrawn. Please {LOG_IN} anew."
    if status == 403:
        may = "write to" if request.job == "push" else "read"
        whose = " and an owner that you belong to" if request.job == "push" else ""
        return f"This token may not {may} {request.name}: use one that may{whose}.{_answer(error, request)}"
    if status == 429:
        return f"Too many requests from here to {hub_name()}: wait some minutes, or {LOG_IN} to be allowed more."
    if status in _STUMBLED:
        return f"{request.undone}: {hub_name()} cannot answer at the moment (HTTP {status}). Try again in some minutes."
    return f"{request.undone}: {hub_name()} refused (HTTP {status}).{_answer(error, request)}"


def _of_this_machine(error: BaseException, request: Request) -> str | None:
    from huggingface_hub import constants

    cache = constants.HF_HUB_CACHE
    if _is_a(error, _UNREACHABLE):
        if request.job == "push":
            return f"{request.undone}: {hub_name()} cannot be reached. Is there a network, or a proxy?"
        return (
            f"{request.what} is not, or not wholly, in the cache {cache}, and {hub_name()} cannot be reached. Try "
            "again with a network; what arrived is kept."
        )
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in _DISK_FULL:
        return f"No room on the disk for {request.what} in {cache}. Free some, or set HF_HOME to a folder elsewhere."
    where = error.filename or cache
    return f"{where}: {error.strerror}. Make {cache} writable, or set HF_HOME to a folder that is."


def _of_an_odd_answer(error: BaseException, request: Request) -> str:
    told = f"{request.undone}: {_first_line(str(error), request) or type(error).__name__}"
    if isinstance(error, (ValueError, KeyError, TypeError, AssertionError)) and request.job == "fetch":
        told += f". Is it {hub_name()} that answered, and not the log-in page of a network?"
    return told


def _answer(error: BaseException, request: Request) -> str:
    """What the hub said itself."""
    said = _first_line(str(getattr(error, "server_message", None) or ""), request)
    return f" It says: {said}" if said else ""


def _first_line(text: str, request: Request) -> str:
    """Never with the token."""
    from huggingface_hub import get_token

    for token in (request.token, get_token()):
        text = text.replace(token, "***") if token else text
    return " ".join(text.split())[:300]
