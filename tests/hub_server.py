"""A stand-in for the Hugging Face hub: the part of its HTTP that huggingface_hub 2.4 uses for models, over folders.

Every commit is a folder of files; branches and tags point at commits. Small files are sent by the hub itself, large
ones from another host (here: "localhost" in place of "127.0.0.1"), as from the real one. Xet is not spoken: set
HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_thewriterstoken", "hf_thereaderstoken"
_LARGE = (".safetensors", ".bin", ".pth")


@dataclass
class Repository:
    """Its commits are folders of `folder`; `extra` holds tree entries of files that are not there."""

    folder: Path
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    extra: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, branch: str, files: Mapping[str, bytes]) -> str:
        """On top of what the branch holds."""
        before = self.folder / self.branches[branch] if branch in self.branches else None
        there = {name: (before / name).read_bytes() for name in names(before)} if before else {}
        there |= files
        told = json.dumps([str(before), sorted((name, git_hash(there[name])) for name in there)])
        sha = hashlib.sha1(told.encode()).hexdigest()
        for name, content in there.items():
            path = self.folder / sha / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (self.folder / sha).mkdir(parents=True, exist_ok=True)
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        known = self.branches | self.tags
        commits = {commit.name: commit.name for commit in self.folder.iterdir()}
        return (known | commits).get(revision)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of this method whose path contains `path`.

    `what` is a status to answer with; or "cut": half the body, then the connection is closed; "stall": half the body,
    then silence; "spoil": a body with one bit turned; "short": a body shorter than was announced.
    """

    method: str
    path: str
    what: int | str
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)


class HubServer:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: dict[str, Repository] = {}
        self.tokens = {WRITER: "write", READER: "read"}
        self.faults: list[Fault] = []
        self.seen: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.stalled, self.released = threading.Event(), threading.Event()
        self.large = folder / "large"
        self.large.mkdir(parents=True)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.elsewhere = f"http://localhost:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def add(self, name: str, files: Mapping[str, bytes], **options: Any) -> Repository:
        """A repository with these files on its main branch."""
        repository = self.repositories[name] = Repository(self.folder / "repositories" / name, **options)
        repository.folder.mkdir(parents=True)
        repository.commit("main", files)
        return repository

    def count(self, method: str, path: str) -> int:
        """Requests of this method whose path contains `path`."""
        return sum(seen == method and path in where for seen, where, _ in list(self.seen))

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and fault.path in path:
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        self.path = unquote(urlsplit(self.path).path) if "%2F" not in self.path else urlsplit(self.path).path
        self.body = b"".join(self._pieces())
        self.hub.seen.append((self.command, self.path, {key.lower(): value for key, value in self.headers.items()}))
        self.wrong = self.hub.fault(self.command, self.path)
        if self.wrong and isinstance(self.wrong.what, int):
            self._json({"error": "it was told to fail"}, self.wrong.what, self.wrong.headers)
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return
        self.may = self.hub.tokens.get(token, "")
        for methods, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, self.path)
            if self.command in methods and found:
                answer(self, *map(unquote, found.groups()))
                return
        self._refuse(404, "", "no such page")

    def _pieces(self) -> Iterator[bytes]:
        """Of the body, whose length is told before it or piece by piece."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
            return
        while length := int(self.rfile.readline(), 16):
            yield self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    # ---- reading

    def _readable(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit, or None after an answer that says why not."""
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self.may):
            self._refuse(404 if self.may else 401, "RepoNotFound", "Repository not found")
        elif (commit := repository.find(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repository, commit
        return None

    def info(self, name: str, revision: str = "main") -> None:
        if found := self._readable(name, revision):
            repository, commit = found
            about = {"id": name, "modelId": name, "private": repository.private, "gated": repository.gated}
            self._json(about | {"sha": commit, "siblings": [], "tags": []})

    def tree(self, name: str, revision: str) -> None:
        if found := self._readable(name, revision):
            repository, commit = found
            files = {
                path: (repository.folder / commit / path).read_bytes() for path in names(repository.folder / commit)
            }
            self._json([tree_entry(path, content) for path, content in files.items()] + repository.extra)

    def refs(self, name: str) -> None:
        if found := self._readable(name, "main"):
            branches, tags = (
                [{"name": key, "ref": f"refs/{kind}/{key}", "targetCommit": commit} for key, commit in there.items()]
                for kind, there in (("heads", found[0].branches), ("tags", found[0].tags))
            )
            self._json({"branches": branches, "tags": tags, "converts": []})

    def resolve(self, name: str, revision: str, path: str) -> None:
        found = self._readable(name, revision)
        if found is None:
            return
        repository, commit = found
        if repository.gated:
            self._refuse(403 if self.may else 401, "GatedRepo", f"Access to model {name} is restricted.")
            return
        file = repository.folder / commit / path
        if not file.is_file():
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        content = file.read_bytes()
        about = {"X-Repo-Commit": commit}
        if not path.endswith(_LARGE):
            self._content(content, about | {"ETag": f'"{git_hash(content)}"'})
            return
        sha = hashlib.sha256(content).hexdigest()
        (self.hub.large / sha).write_bytes(content)
        about |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{sha}"'}
        self._send(302, b"", about | {"Location": f"{self.hub.elsewhere}/large/{sha}"})

    def large(self, sha: str) -> None:
        self._content((self.hub.large / sha).read_bytes(), {"ETag": f'"{sha}"'})

    # ---- writing

    def _writable(self, name: str) -> Repository | None:
        if self.may != "write" or not name.startswith("me/"):
            self._refuse(403 if self.may else 401, "", "You don't have the rights to write here")
            return None
        return self.hub.repositories.get(name)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if self._writable(name):
            self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
            return
        if self.may == "write" and name.startswith("me/"):
            self.hub.add(name, {}, private=asked.get("visibility") == "private")
            self._json({"url": f"{self.hub.url}/{name}"})

    def check_card(self) -> None:
        wrong = "\nlicense: [unclosed\n" in json.loads(self.body)["content"]
        self._json({"errors": [{"message": "bad YAML"}] if wrong else [], "warnings": []}, 400 if wrong else 200)

    def branch(self, name: str, branch: str) -> None:
        if repository := self._writable(name):
            taken = branch in repository.branches
            repository.branches.setdefault(branch, repository.branches["main"])
            self._json({"error": "Reference already exists"} if taken else {}, 409 if taken else 200)

    def preupload(self, name: str, revision: str) -> None:
        if not (repository := self._writable(name)):
            return
        folder = repository.folder / repository.branches[revision]
        answer = []
        for path in (file["path"] for file in json.loads(self.body)["files"]):
            large, there = path.endswith(_LARGE), (folder / path).is_file()
            content = (folder / path).read_bytes() if there else b""
            oid = (hashlib.sha256(content).hexdigest() if large else git_hash(content)) if there else None
            mode = "lfs" if large else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def large_batch(self, name: str) -> None:
        if not self._writable(name):
            return
        objects: list[dict[str, Any]] = []
        for asked in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.hub.elsewhere}/upload/{asked['oid']}"}
            there = (self.hub.large / asked["oid"]).exists()
            objects.append(asked if there else asked | {"actions": {"upload": upload}})
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, sha: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha:
            self._refuse(400, "", "The content does not match its hash")
            return
        (self.hub.large / sha).write_bytes(self.body)
        self._json({})

    def commit(self, name: str, branch: str) -> None:
        if not (repository := self._writable(name)):
            return
        files = {}
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = (self.hub.large / value["oid"]).read_bytes()
        sha = repository.commit(branch, files)
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    # ---- answering

    def _refuse(self, status: int, code: str, told: str) -> None:
        self._json({"error": told}, status, {"X-Error-Code": code, "X-Error-Message": told})

    def _json(self, answer: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _content(self, content: bytes, headers: Mapping[str, str]) -> None:
        """Of a file; all of it, or from the byte asked for."""
        whole = len(content)
        what = self.wrong.what if self.wrong else ""
        if what == "spoil":
            content = content[:-1] + bytes([content[-1] ^ 1])
        if what == "short":
            content = content[: whole // 2]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            start = int(asked[1])
            self._send(206, content[start:], {**headers, "Content-Range": f"bytes {start}-{whole - 1}/{whole}"})
            return
        self._send(200, content, headers, broken=what in ("cut", "stall"))

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], broken: bool = False) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | dict(headers)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if broken else content)
        if broken:
            self.wfile.flush()
            self.hub.stalled.set()
            if self.wrong and self.wrong.what == "stall":
                self.hub.released.wait(30)
            self.close_connection = True


_NAME, _REVISION = r"([\w.-]+/[\w.-]+)", r"([^/]+)"
_ROUTES = (
    (("GET",), f"/api/models/{_NAME}", _Handler.info),
    (("GET",), f"/api/models/{_NAME}/revision/{_REVISION}", _Handler.info),
    (("GET",), f"/api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    (("GET",), f"/api/models/{_NAME}/refs", _Handler.refs),
    (("GET", "HEAD"), f"/{_NAME}/resolve/{_REVISION}/(.+)", _Handler.resolve),
    (("GET", "HEAD"), r"/large/(\w{64})", _Handler.large),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.check_card),
    (("POST",), f"/api/models/{_NAME}/branch/{_REVISION}", _Handler.branch),
    (("POST",), f"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.large_batch),
    (("PUT",), r"/upload/(\w{64})", _Handler.upload),
    (("POST",), f"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def tree_entry(path: str, content: bytes) -> dict[str, Any]:
    """What the hub lists of a file; a large one is a small pointer in git."""
    if not path.endswith(_LARGE):
        return {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    sha = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(content)}\n".encode()
    about = {"oid": sha, "size": len(content), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(content), "oid": git_hash(pointer), "lfs": about}
