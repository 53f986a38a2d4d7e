"""The hub, spoken to for real by a process of its own, as a user's is: environment variables, cache, server."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub_server import READER, WRITER, Fault, HubServer
from nextblock.checkpoints.hub import FILES, is_hub_name

WEIGHTS = bytes(range(256)) * 800  # 200 KiB
MODEL = {
    "config.json": b'{"model_type": "xtra"}\n',
    "model.safetensors": WEIGHTS,
    "preprocessor_config.json": b"{}\n",
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
}

# Reads calls, one a line, and answers each with what came of it.
_CLIENT = """
import json, sys
from pathlib import Path
from nextblock.checkpoints import hub, hub_errors
hub_errors.RETRY_WAITS_S = (0.01, 0.01)
for line in sys.stdin:
    call = json.loads(line)
    if (limit := call.pop("file_size_limit", None)) is not None:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if "folder" in call:
        call["folder"] = Path(call["folder"])
    try:
        answer = {"value": str(getattr(hub, call.pop("do"))(**call))}
    except Exception as error:
        answer = {"kind": type(error).__name__, "error": str(error)}
    print(json.dumps(answer | {"heavy": [name for name in ("torch", "lightning") if name in sys.modules]}), flush=True)
"""


class Client:
    """A process that has these environment variables and no other of the hub's."""

    def __init__(self, url: str, home: Path, **variables: str) -> None:
        kept = {key: os.environ[key] for key in ("PATH", "SYSTEMROOT") if key in os.environ}
        given = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "DO_NOT_TRACK": "1"}
        self.said = home.parent / f"{home.name}.said"
        with open(self.said, "a") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CLIENT],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=kept | {"HOME": str(home)} | given | variables,
            )

    def ask(self, do: str, **call: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **call}) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said.read_text()
        answer: dict[str, Any] = json.loads(line)
        assert answer["heavy"] == []
        return answer

    def value(self, do: str, **call: Any) -> str:
        self.ask(do, **call)
        answer = self.answer()
        assert "value" in answer, answer
        return str(answer["value"])

    def error(self, do: str, **call: Any) -> str:
        """The message; of no other error than ours, in one or two lines, without a token or a library's words."""
        self.ask(do, **call)
        answer = self.answer()
        assert answer.get("kind") == "CheckpointError", answer
        told = str(answer["error"])
        assert len(told) < 500
        assert "\n" not in told
        for never in (WRITER, READER, "Traceback", "repo_id", "Error:", "snapshot"):
            assert never not in told
        return told

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub")).running() as server:
        yield server


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("user") / "home"


@pytest.fixture(scope="module")
def anyone(server: HubServer, home: Path) -> Iterator[Client]:
    """Who is not logged in."""
    client = Client(server.url, home)
    yield client
    client.stop()


@pytest.fixture(scope="module")
def writer(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(server.url, tmp_path_factory.mktemp("writer") / "home", HF_TOKEN=WRITER)
    yield client
    client.stop()


@pytest.fixture(autouse=True)
def _nothing_wrong(server: HubServer) -> None:
    server.faults.clear()
    server.seen.clear()


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    folder = tmp_path / "exported"
    folder.mkdir()
    for name, content in MODEL.items():
        (folder / name).write_bytes(content)
    (folder / "optimizer.pt").write_bytes(b"not to be shared")
    return folder


def contents(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_what_a_name_on_the_hub_looks_like() -> None:
    for name in ("me/model", "me/model@v1.0", "a/b", "some-one/xtra_b16.in1k", "me/model@refs/pr/1"):
        assert is_hub_name(name), name
    for name in ("model", "/me/model", "me/model/", "me//model", "a/b/c", "./a", "../model", "me/../x", "me/model@"):
        assert not is_hub_name(name), name
    for name in ("me/a--b", "me/-model", "me/model.git", "me/mo del", "me/model@../x", "me/" + "x" * 100, "", "me/é"):
        assert not is_hub_name(name), name


def test_a_model_comes_without_the_pickles_and_code_beside_it(server: HubServer, anyone: Client) -> None:
    server.add("else/model", MODEL | {"pytorch_model.bin": b"pickle", "model.py": b"code", "sub/config.json": b"{}"})
    folder = anyone.value("fetch", name="else/model")
    assert contents(folder) == MODEL
    assert server.count("GET", "pytorch_model.bin") == server.count("GET", "model.py") == 0
    for _ in range(2):  # the second time from the cache
        assert anyone.value("fetch", name="else/model") == folder
        assert server.count("GET", "/resolve/") == 3
        assert server.count("GET", "/large/") == 1


def test_revisions(server: HubServer, anyone: Client) -> None:
    repository = server.add("else/revised", MODEL)
    first = repository.tags["v1.0"] = repository.branches["main"]
    repository.branches["wide/one"] = repository.branches["main"]
    repository.commit("wide/one", {"config.json": b'{"wide": 1}'})
    second = repository.commit("main", {"config.json": b"{}"})
    for asked, config in (
        ({}, b"{}"),
        ({"revision": "v1.0"}, MODEL["config.json"]),
        ({"revision": first}, MODEL["config.json"]),
        ({"revision": second}, b"{}"),
        ({"revision": "wide/one"}, b'{"wide": 1}'),
    ):
        folder = Path(anyone.value("fetch", name="else/revised", **asked))
        assert (folder / "config.json").read_bytes() == config, asked
    assert Path(anyone.value("fetch", name="else/revised@v1.0")).name == first
    assert server.count("GET", "/large/") == 1, "the weights are the same in all of them"

    told = anyone.error("fetch", name="else/revised", revision="v1.1")
    assert told == (
        f"else/revised on the hub at {server.url} has no revision 'v1.1'. There are main, wide/one, v1.0. "
        "Did you mean 'v1.0'?"
    )
    assert "has no revision" in anyone.error("fetch", name="else/revised", revision="0" * 40)
    assert "give one of them" in anyone.error("fetch", name="else/revised@v1.0", revision="main")
    assert "cannot be a revision" in anyone.error("fetch", name="else/revised", revision="../../x")


def test_what_is_not_there_or_not_for_you(server: HubServer, anyone: Client, writer: Client) -> None:
    server.add("else/private", MODEL, private=True)
    server.add("else/gated", MODEL, gated=True)
    for name in ("else/private", "nobody/nothing"):  # they look the same to who is not logged in
        told = anyone.error("fetch", name=name)
        assert f"'{name}' is neither a folder here nor a model on the hub" in told
        assert "hf auth login" in told
    assert contents(anyone.value("fetch", name="else/private", token=READER)) == MODEL
    assert "your token may see it" in writer.error("fetch", name="nobody/nothing")
    told = anyone.error("fetch", name="else/gated")
    assert f"ask for it at {server.url}/else/gated, then log in" in told
    assert "with the account of your token" in writer.error("fetch", name="else/gated")
    told = anyone.error("fetch", name="else/gated", token="hf_oldandsecret")
    assert "This token is not known to the hub" in told
    assert "HF_TOKEN" in told
    assert "oldandsecret" not in told
    assert "owner/name" in anyone.error("fetch", name="no name")


def test_a_token_stays_with_the_hub(server: HubServer, writer: Client) -> None:
    server.add("else/elsewhere", MODEL)
    writer.value("fetch", name="else/elsewhere")
    to_hub = [headers for _, path, headers in server.seen if "/resolve/" in path]
    to_other_host = [headers for _, path, headers in server.seen if "/large/" in path]
    assert to_other_host
    assert not any("authorization" in headers for headers in to_other_host)
    assert all(headers["authorization"] == f"Bearer {WRITER}" for headers in to_hub)
    assert WRITER not in writer.said.read_text()


def test_what_is_no_model_of_ours(server: HubServer, anyone: Client) -> None:
    server.add("else/other", {"pytorch_model.bin": b"pickle", "README.md": b"# Hello"})
    server.add("else/half", {"config.json": b"{}", "preprocessor_config.json": b"{}"})
    server.add("else/empty", {})
    server.add("else/bare", {name: MODEL[name] for name in FILES if name != "README.md"})
    told = anyone.error("fetch", name="else/other")
    assert "else/other is not a model of nextblock: it has no config.json. It holds README.md, pytorch_model" in told
    assert "has no model.safetensors. It holds config.json, preprocessor" in anyone.error("fetch", name="else/half")
    assert "It is empty." in anyone.error("fetch", name="else/empty")
    assert "README.md" not in contents(anyone.value("fetch", name="else/bare")), "a card may be missing"
    folder = anyone.value("fetch", name="else/other", files=["pytorch_model.bin"])
    assert (Path(folder) / "pytorch_model.bin").read_bytes() == b"pickle", "unless asked for by name"


def test_no_file_is_written_outside_the_cache(server: HubServer, anyone: Client, home: Path) -> None:
    """The names that the hub lists are not taken on trust, nor those that we are asked for."""
    repository = server.add("else/evil", MODEL)
    outside = str(home.parent / "escaped")
    bad = ["../../../../../escaped", outside, "sub/../../../../../escaped", "..\\escaped", "config.json/../x"]
    repository.extra = [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in bad]
    assert contents(anyone.value("fetch", name="else/evil")) == MODEL
    assert {path.name for path in home.parent.iterdir()} == {"home", "home.said"}
    for name in bad:
        assert "give the name of a file inside" in anyone.error("fetch", name="else/evil", files=["config.json", name])
    assert "has no *" in anyone.error("fetch", name="else/evil", files=["config.json", "*"]), "no pattern"
    assert not list(home.parent.rglob("*escaped*"))


def test_a_damaged_body_is_fetched_again_and_never_kept(server: HubServer, anyone: Client, home: Path) -> None:
    for name, path in (("large", "/large/"), ("small", "config.json")):
        server.add(f"else/{name}", MODEL | {"model.safetensors": WEIGHTS + name.encode()})
        server.faults = [Fault("GET", path, "spoil", times=1)]
        folder = Path(anyone.value("fetch", name=f"else/{name}"))
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS + name.encode()
        assert contents(folder)["config.json"] == MODEL["config.json"]

    server.add("else/spoilt", MODEL | {"model.safetensors": WEIGHTS + b"spoilt"})
    server.faults = [Fault("GET", "/large/", "spoil", times=9)]
    told = anyone.error("fetch", name="else/spoilt")
    assert "model.safetensors of else/spoilt arrived damaged twice" in told
    assert "Try again later" in told
    cached = home / "hub" / "models--else--spoilt"
    assert not list(cached.rglob("model.safetensors")), "else it would be loaded by others"
    server.faults = [Fault("GET", "/large/", "short", times=9)]
    assert "was not fetched" in anyone.error("fetch", name="else/spoilt")
    server.faults.clear()
    assert contents(anyone.value("fetch", name="else/spoilt"))["model.safetensors"] == WEIGHTS + b"spoilt"


def test_a_file_damaged_on_disk_is_mended(server: HubServer, anyone: Client) -> None:
    server.add("else/rotten", MODEL | {"model.safetensors": WEIGHTS + b"rotten"})
    folder = Path(anyone.value("fetch", name="else/rotten"))
    (folder / "model.safetensors").resolve().write_bytes(WEIGHTS + b"ROTTEN")
    assert contents(anyone.value("fetch", name="else/rotten"))["model.safetensors"] == WEIGHTS + b"rotten"


def test_a_connection_cut_half_way_goes_on_from_there(server: HubServer, anyone: Client) -> None:
    large = bytes(range(256)) * 100_000  # 24 MiB; huggingface_hub keeps pieces of 10 MiB
    server.add("else/cut", MODEL | {"model.safetensors": large})
    server.faults = [Fault("GET", "/large/", "cut")]
    assert contents(anyone.value("fetch", name="else/cut"))["model.safetensors"] == large
    ranges = [headers.get("range") for method, path, headers in server.seen if method == "GET" and "/large/" in path]
    assert ranges == [None, f"bytes={10 << 20}-"]


def test_a_hub_that_stumbles_is_asked_again(server: HubServer, anyone: Client) -> None:
    server.add("else/slow", MODEL | {"model.safetensors": WEIGHTS + b"slow"})
    server.faults = [Fault("GET", "/api/models/else/slow", 503), Fault("GET", "/large/", 500)]
    assert len(contents(anyone.value("fetch", name="else/slow"))) == 4

    server.add("else/down", MODEL)
    server.faults = [Fault("GET", "/api/models/else/down", 503, times=99)]
    told = anyone.error("fetch", name="else/down")
    assert told == (
        f"else/down was not fetched: the hub at {server.url} cannot answer at the moment (HTTP 503). Try again in "
        "some minutes."
    )
    assert server.count("GET", "/api/models/else/down") == 3
    server.faults = [Fault("GET", "/api/models/else/slow", 503, times=99)]
    assert len(contents(anyone.value("fetch", name="else/slow"))) == 4, "from the cache"
    server.faults = [Fault("GET", "/api/models/else/down", 429)]
    assert "Too many requests" in anyone.error("fetch", name="else/down")
    server.faults = [Fault("GET", "/api/models/else/down", 200)]
    assert "log-in page" in anyone.error("fetch", name="else/down")


def test_a_killed_fetch_is_completed_by_the_next(server: HubServer, anyone: Client, home: Path) -> None:
    server.add("else/killed", MODEL | {"model.safetensors": WEIGHTS + b"killed"})
    server.faults = [Fault("GET", "/large/", "stall")]
    server.stalled.clear()
    victim = Client(server.url, home)
    victim.ask("fetch", name="else/killed")
    assert server.stalled.wait(30)
    deadline = time.monotonic() + 30
    while len(list((home / "hub" / "models--else--killed").glob("snapshots/*/*"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    victim.process.send_signal(signal.SIGKILL)
    victim.process.communicate()

    offline = Client(server.url, home, HF_HUB_OFFLINE="1")
    told = offline.error("fetch", name="else/killed")
    offline.stop()
    assert "not wholly" in told
    assert contents(anyone.value("fetch", name="else/killed")) == MODEL | {"model.safetensors": WEIGHTS + b"killed"}
    assert server.count("GET", "/config.json") == 1, "what had arrived is not fetched again"


def test_without_a_network_the_cache_answers(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with HubServer(tmp_path / "hub").running() as server:
        commit = server.add("else/model", MODEL).branches["main"]
        client = Client(server.url, home)
        folder = client.value("fetch", name="else/model")
        client.stop()
    said = client.said.read_text()

    gone = Client(server.url, home)
    offline = Client(server.url, home, HF_HUB_OFFLINE="1")
    for client in (gone, offline):
        assert client.value("fetch", name="else/model") == folder
        assert client.value("fetch", name="else/model", revision=commit) == folder
    assert client.said.read_text() == said == "", "and says nothing"

    cache = home / "hub"
    assert gone.error("fetch", name="else/new") == (
        f"else/new is not, or not wholly, in the cache {cache}, and the hub at {server.url} cannot be reached. "
        "Try again with a network; what arrived is kept."
    )
    told = gone.error("fetch", name="else/model", revision="v2")
    assert told.startswith("else/model@v2 is not")
    assert offline.error("fetch", name="else/new") == (
        f"else/new is not, or not wholly, in the cache {cache}, and HF_HUB_OFFLINE is set. Unset it and fetch once "
        "with a network."
    )
    gone.stop()
    offline.stop()


@pytest.mark.skipif(sys.platform == "win32", reason="there are no file size limits")
def test_no_room_or_no_right_to_write(server: HubServer, tmp_path: Path) -> None:
    server.add("else/big", MODEL)
    client = Client(server.url, tmp_path / "home")
    told = client.error("fetch", name="else/big", file_size_limit=5000)  # as a full disk or a quota: the weights fail
    assert f"No room on the disk for else/big in {tmp_path}/home/hub" in told
    assert "HF_HOME" in told
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    client.stop()
    (tmp_path / "file").write_text("no folder")
    client = Client(server.url, tmp_path / "home", HF_HUB_CACHE=str(tmp_path / "file" / "hub"))
    told = client.error("fetch", name="else/big")
    client.stop()
    assert os.strerror(errno.ENOTDIR) in told
    assert "set HF_HOME" in told


def test_a_pushed_folder_comes_back_byte_for_byte(server: HubServer, writer: Client, mine: Path) -> None:
    address = writer.value("push", folder=str(mine), name="me/pushed", message="First")
    assert address == f"{server.url}/me/pushed"
    assert server.count("POST", "/commit/") == 1, "all or nothing"
    folder = writer.value("fetch", name="me/pushed")
    assert contents(folder) == MODEL, "and nothing else of the folder"

    (mine / "config.json").write_bytes(b'{"new": 1}')
    (mine / "model.safetensors").write_bytes(WEIGHTS[::-1])
    address = writer.value("push", folder=str(mine), name="me/pushed@next")
    assert address == f"{server.url}/me/pushed/tree/next"
    assert contents(writer.value("fetch", name="me/pushed", revision="next")) == {
        name: (mine / name).read_bytes() for name in MODEL
    }
    assert contents(writer.value("fetch", name="me/pushed")) == MODEL


def test_a_push_that_stumbles_is_repeated(server: HubServer, writer: Client, mine: Path) -> None:
    server.faults = [Fault("POST", "/commit/", 500), Fault("POST", "/api/repos/create", 503)]
    writer.value("push", folder=str(mine), name="me/stumbled")
    assert contents(writer.value("fetch", name="me/stumbled")) == MODEL


def test_private_stays_private(server: HubServer, writer: Client, anyone: Client, mine: Path) -> None:
    writer.value("push", folder=str(mine), name="me/secret", private=True)
    assert server.repositories["me/secret"].private
    assert "neither a folder here nor" in anyone.error("fetch", name="me/secret")
    assert contents(writer.value("fetch", name="me/secret")) == MODEL
    writer.value("push", folder=str(mine), name="me/secret")
    assert server.repositories["me/secret"].private

    writer.value("push", folder=str(mine), name="me/open")
    told = writer.error("push", folder=str(mine), name="me/open", private=True)
    assert "me/open is there already and public" in told
    assert "Nothing was pushed" in told


def test_who_may_not_push(server: HubServer, anyone: Client, writer: Client, mine: Path) -> None:
    folder = str(mine)
    assert "Nobody is logged in" in anyone.error("push", folder=folder, name="me/model")
    assert server.seen == []
    told = anyone.error("push", folder=folder, name="me/model", token=READER)
    assert "This token may not write to me/model: use one that may" in told
    assert "You don't have the rights" in told
    told = writer.error("push", folder=folder, name="else/mine")
    assert "an owner that you belong to" in told
    told = anyone.error("push", folder=folder, name="me/model", token="hf_oldandsecret")
    assert "This token is not known to the hub" in told
    assert "me/model" not in server.repositories


def test_what_cannot_be_pushed(server: HubServer, writer: Client, mine: Path, tmp_path: Path) -> None:
    assert "owner/name" in writer.error("push", folder=str(mine), name="model")
    (mine / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert "Invalid metadata in README.md" in writer.error("push", folder=str(mine), name="me/card")
    (mine / "model.safetensors").unlink()
    server.seen.clear()
    told = writer.error("push", folder=str(mine), name="me/half")
    assert told == f"{mine} is not a weights folder: model.safetensors missing. Nothing was pushed."
    assert "config.json" in writer.error("push", folder=str(tmp_path / "nowhere"), name="me/none")
    assert server.seen == []


def test_a_push_without_a_network(mine: Path, tmp_path: Path) -> None:
    for variables, why in (({}, "cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set")):
        client = Client("http://127.0.0.1:9", tmp_path / "home", HF_TOKEN=WRITER, **variables)
        told = client.error("push", folder=str(mine), name="me/model")
        client.stop()
        assert why in told
        assert "pushed" in told
