"""Connections to web servers that are kept from one request to the next: one for each server, thread and process."""

from __future__ import annotations

import http.client
import io
import os
import ssl
import threading
import time
from typing import Any, NamedTuple
from urllib.parse import SplitResult, quote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from nextblock.data.heartbeat import alive
from nextblock.errors import DataError
from nextblock.version import __version__

TIMEOUT_S = 10.0  # without a single byte
PATIENCE_S = 30.0  # of waiting for an answer, in which at least so many bytes a second must have come:
SLOWEST_BYTES_S = 1024
_REDIRECTS = 5
_AS_THEY_ARE = "/%:@!$&'()*+,;=~?"
_MOVED = (301, 302, 303, 307, 308)


class Broken(Exception):
    """A connection that failed in a way that may pass."""


class _Drips(OSError):
    """What comes is too little."""


class _Watched(io.RawIOBase):
    """What comes over a socket: with a sign of life before each piece, and an end to a server that only drips.

    A time-out of the socket alone is put off by every single byte.
    """

    def __init__(self, raw: io.RawIOBase) -> None:
        self._raw = raw
        self._came, self._waited_s = 0, 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        alive()
        start = time.monotonic()
        came = self._raw.readinto(buffer)
        self._waited_s += time.monotonic() - start  # here alone: whoever reads may take his time
        self._came += came or 0
        if self._waited_s >= PATIENCE_S:
            rate = self._came / self._waited_s
            if rate < SLOWEST_BYTES_S:
                raise _Drips(f"it sends {rate:,.1f} bytes a second, fewer than {SLOWEST_BYTES_S:,}")
            self._came, self._waited_s = 0, 0.0
        return came

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """Its headers come as its body does."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fp = io.BufferedReader(_Watched(self.fp.detach()))


class _Server(NamedTuple):
    scheme: str
    host: str
    port: int | None


class Answer:
    """The answer to a request. Its body is read to the end, or else `forget` is called: connections are used again."""

    def __init__(self, response: http.client.HTTPResponse, server: _Server) -> None:
        self._response, self._server = response, server
        self.status, self.reason = response.status, response.reason

    def header(self, name: str) -> str:
        return self._response.getheader(name, "")

    def read(self, length: int) -> bytes:
        """So many bytes of the body, fewer only at its end. Raises Broken, and forgets the rest, when it breaks off."""
        try:
            return self._response.read(length)
        except (OSError, http.client.HTTPException) as error:
            self.forget()
            broke_off = isinstance(error, http.client.IncompleteRead)
            raise Broken("it broke off in the middle" if broke_off else _told(error)) from error

    def forget(self) -> None:
        self._response.close()
        _drop(self._server)


class _Kept(threading.local):
    """A fork takes sockets along, but what comes back over them belongs to the process that asked."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.connections: dict[_Server, http.client.HTTPConnection] = {}


_KEPT = _Kept()


def _kept() -> dict[_Server, http.client.HTTPConnection]:
    if _KEPT.process != os.getpid():
        _KEPT.process, _KEPT.connections = os.getpid(), {}
    return _KEPT.connections


def _drop(server: _Server) -> None:
    connection = _kept().pop(server, None)
    if connection is not None:
        connection.close()


def answer_to(url: str, headers: dict[str, str]) -> Answer:
    """The answer to GET, after redirects. Raises Broken where it may be tried again, DataError where that is no use."""
    at = url
    for _ in range(_REDIRECTS + 1):
        answer = _asked(urlsplit(at), headers)
        if answer.status not in _MOVED:
            return answer
        answer.forget()
        before, at = at, urljoin(at, answer.header("Location"))
        if urlsplit(before).scheme == "https" and urlsplit(at).scheme != "https":
            raise DataError(f"{plain(url)} leads from https to an address that is not. Use that one if you trust it.")
    raise DataError(f"{plain(url)} leads from one address to the next, more than {_REDIRECTS} times.")


def _asked(parts: SplitResult, headers: dict[str, str]) -> Answer:
    try:
        server = _Server(parts.scheme, parts.hostname or "", parts.port)
    except ValueError as error:
        raise DataError(f"{parts.netloc} is no web address: {error}.") from error
    if server.scheme not in ("http", "https") or not server.host:
        raise DataError(f"{server.scheme}://{server.host} is no web address; those begin with http:// or https://.")
    headers = {"User-Agent": f"nextblock/{__version__}"} | headers
    for is_new in (server not in _kept(), True):
        try:
            alive()
            connection, target = _connection(server), _target(server, parts)
            connection.request("GET", target, headers=headers)
            return Answer(connection.getresponse(), server)
        except ssl.SSLCertVerificationError as error:
            _drop(server)
            raise DataError(f"the certificate of {server.host} is not trusted: {error.verify_message}.") from error
        except (UnicodeError, http.client.InvalidURL) as error:
            _drop(server)
            raise DataError(f"{server.scheme}://{server.host} is no web address: {error}.") from error
        except (OSError, http.client.HTTPException) as error:
            _drop(server)
            if is_new:
                raise Broken(_told(error)) from error
            # otherwise the server closed a connection that lay idle: no fault, and no reason to wait
    raise AssertionError("not reached")


def _proxy(server: _Server) -> SplitResult | None:
    """That the environment names for this server."""
    found = None if proxy_bypass(server.host) else getproxies().get(server.scheme)
    return urlsplit(found if "://" in found else f"http://{found}") if found else None


def _connection(server: _Server) -> http.client.HTTPConnection:
    """The kept one, else a new one."""
    kept = _kept()
    if server not in kept:
        proxy = _proxy(server)
        host, port = (proxy.hostname or "", proxy.port) if proxy else (server.host, server.port)
        encrypted = server.scheme == "https"
        made = http.client.HTTPSConnection if encrypted else http.client.HTTPConnection
        kept[server] = made(host, port, timeout=TIMEOUT_S)
        kept[server].response_class = _Response
        if proxy and encrypted:
            kept[server].set_tunnel(server.host, server.port)
    return kept[server]


def _target(server: _Server, parts: SplitResult) -> str:
    """What is asked for: a path, of a proxy for http the whole address."""
    path = quote(parts.path or "/", safe=_AS_THEY_ARE) + (parts.query and f"?{quote(parts.query, safe=_AS_THEY_ARE)}")
    whole = server.scheme == "http" and _proxy(server) is not None
    return f"http://{parts.netloc.rpartition('@')[2]}{path}" if whole else path


def plain(url: str) -> str:
    """The address without what may be secret: a login, a signature behind '?'."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _told(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it sends nothing more"
    return str(getattr(error, "strerror", None) or error or type(error).__name__).rstrip(".") or type(error).__name__
