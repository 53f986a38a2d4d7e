"""A web server over files in memory, with Range, ETag and a list of what goes wrong."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

DRIP_S = 0.02


@dataclass
class Fault:
    """What goes wrong with `times` requests, after `after` that went well, whose path contains `path`.

    what: a status to answer with, or "drop": the connection is closed without an answer; "stall": half the body, then
    silence; "cut": half the body, then the connection is closed; "short": half the body, announced as such;
    "drip": a byte of the body each `DRIP_S`; "drip from the start": even of the headers; "elsewhere": other bytes than
    were asked for; "whole": the whole file with status 200; "unsaid": no Content-Range.
    """

    what: int | str
    times: int = 1
    path: str = ""
    after: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


class FlakyServer:
    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, dict[str, str]]] = []  # path with query, headers
        self.connections = 0
        self.etags = True
        self.moved: dict[str, str] = {}
        self.headers: dict[str, str] = {}  # of every answer
        self._released, self._lock = threading.Event(), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"of": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[FlakyServer]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._released.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def ranges(self, path: str = "") -> list[str]:
        return [headers.get("range", "") for where, headers in self.seen if path in where]

    def fault(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.path in path and fault.times:
                    if fault.after:
                        fault.after -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def stall(self, seconds: float = 30) -> bool:
        """Whether the server ended meanwhile."""
        return self._released.wait(seconds)


class _Handler(BaseHTTPRequestHandler):
    of: FlakyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.of.connections += 1

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.of.seen.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        path = urlsplit(self.path).path
        fault = self.of.fault(path)
        what = fault.what if fault else ""
        if what == "drop":
            self.close_connection = True
        elif what == "drip from the start":
            self._drip(b"HTTP/1.1 206 Partial Content\r\nX-Filler: " + bytes(1000))
        elif isinstance(what, int):
            self._send(what, b"it was told to fail", fault.headers if fault else {})
        elif path in self.of.moved:
            self._send(302, b"", {"Location": self.of.moved[path]})
        elif path not in self.of.files:
            self._send(404, b"", {})
        else:
            self._file(self.of.files[path], what)

    def _file(self, content: bytes, what: str) -> None:
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        about = {"ETag": etag} if self.of.etags else {}
        if self.headers.get("If-Match", etag) != etag:
            self._send(412, b"", about)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or what == "whole":
            self._send(200, content, about)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            self._send(416, b"", about | {"Content-Range": f"bytes */{len(content)}"})
            return
        first += what == "elsewhere"
        if what != "unsaid":
            about["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        body = content[first : last + 1]
        self._send(206, body[: len(body) // 2] if what == "short" else body, about, what)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], what: str = "") -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | self.of.headers | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if what == "drip":
            self._drip(body)
            return
        try:
            self.wfile.write(body[: len(body) // 2] if what in ("cut", "stall") else body)
            self.wfile.flush()
        except OSError:  # whoever asked has gone
            self.close_connection = True
        if what in ("cut", "stall"):
            self.close_connection = True
        if what == "stall":
            self.of.stall()

    def _drip(self, content: bytes) -> None:
        self.close_connection = True
        for byte in content:
            try:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            except OSError:  # whoever asked has gone
                return
            if self.of.stall(DRIP_S):
                return
