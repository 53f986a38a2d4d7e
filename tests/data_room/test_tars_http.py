"""Tar shards behind HTTP: the same images as from the disk, over a server that drops, stalls, truncates and refuses."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
import torch

from flaky_server import Fault, FlakyServer
from nextblock.data import heartbeat
from nextblock.data.augment import CropConfig
from nextblock.data.loading import training_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import fingerprint, open_source, tar_web, web_connections
from nextblock.data.stream import TrainingStream
from nextblock.errors import DataError
from tar_shards import png, write_shards


@pytest.fixture(autouse=True)
def quick(tmp_path_factory, monkeypatch) -> None:
    monkeypatch.setenv("NEXTBLOCK_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(tar_web, "FIRST_WAIT_S", 0.002)
    monkeypatch.setattr(web_connections, "TIMEOUT_S", 0.3)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path):
    """Three shards, of 5, 1 and 4 images, on the disk and behind HTTP."""
    server = FlakyServer()
    for path in write_shards(tmp_path / "shards", [5, 1, 4]):
        server.files[f"/set/{path.name}"] = path.read_bytes()
    with server.running():
        yield server


def pattern(server: FlakyServer) -> str:
    return f"{server.url}/set/train-{{000000..000002}}.tar"


def stream_of(spec: object) -> TrainingStream:
    return TrainingStream(open_source(spec), 0, CropConfig((4, 4)), Preprocessing((4, 4)))


def test_the_same_images_as_from_the_disk(server, tmp_path) -> None:
    far, near = open_source(pattern(server)), open_source(tmp_path / "shards")
    assert [far.name(i) for i in range(10)] == [near.name(i) for i in range(10)]
    assert [far[i] for i in range(10)] == [near[i] for i in range(10)]
    assert far.labels().tolist() == near.labels().tolist()
    assert fingerprint(far) == fingerprint(near)
    there, here = stream_of(pattern(server)).load(range(30)), stream_of(tmp_path / "shards").load(range(30))
    assert torch.equal(there.images, here.images)


def test_requests_are_few_and_connections_are_kept(server) -> None:
    source = open_source(pattern(server))
    assert len(server.seen) == 3 * 3  # a byte before, all of it, a byte after
    server.seen.clear()
    before = server.connections
    for i in range(10):
        assert source[i].content == png(i)
    assert len(server.seen) == 10
    assert all(headers["if-match"].startswith('"') for _, headers in server.seen)
    assert server.connections <= before + 1
    open_source(pattern(server))
    assert len(server.seen) == 13  # the index is kept; it is asked whether it is still the same tar
    assert {headers["range"] for _, headers in server.seen[10:]} == {"bytes=0-0"}


def test_large_images_are_left_out_when_indexing(server, monkeypatch) -> None:
    monkeypatch.setattr(tar_web, "_SKIPPED_BY_READING", 100)
    monkeypatch.setattr(tar_web, "_AHEAD", 600)
    source = open_source(pattern(server))
    assert [source[i].content for i in range(10)] == [png(i) for i in range(10)]


@pytest.mark.parametrize("what", ["drop", "stall", "cut", "short", "elsewhere", "unsaid", 500, 502, 503, 429, 408])
def test_what_passes_is_tried_again(server, what) -> None:
    server.faults = [Fault(what, times=2, path="000000", after=after) for after in (0, 1)]
    source = open_source(pattern(server))  # while it is indexed
    server.faults = [Fault(what, times=3)]
    assert source[0].content == png(0)
    assert source[9].content == png(9)
    assert not sum(fault.times for fault in server.faults)


@pytest.mark.parametrize("what", ["drop", "stall", 503])
def test_a_server_that_stays_away_is_an_error_and_no_other_image(server, what) -> None:
    stream = stream_of(pattern(server))
    server.faults = [Fault(what, times=10**6)]
    server.seen.clear()
    with pytest.raises(DataError, match=r"train-00000.\.tar: 6 tries to read byte \d+ failed; the last time, .*resume"):
        stream.load([0])
    assert 6 <= len(server.seen) <= 7


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (403, r"cannot read .*train-000000.tar: it is refused .*expired\) \(HTTP 403\)"),
        (404, r"it is not there \(HTTP 404\)"),
        (401, r"it wants a login"),
        ("whole", "gives whole files only"),
        (412, "was changed while it was in use"),
    ],
)
def test_what_does_not_pass_is_told_at_once(server, what, message) -> None:
    source = open_source(pattern(server))
    server.seen.clear()
    server.faults = [Fault(what)]
    with pytest.raises(DataError, match=message):
        source[0]
    assert len(server.seen) == 1
    assert source[0].content == png(0)  # over a new connection


def test_shards_that_are_not_there_or_no_tars(server) -> None:
    with pytest.raises(DataError, match=r"train-000003.tar: it is not there"):
        open_source(f"{server.url}/set/train-{{000000..000003}}.tar")
    with pytest.raises(DataError, match=r"is not called .tar"):
        open_source(f"{server.url}/set/train.parquet")
    server.files["/x.tar"] = b""
    with pytest.raises(DataError, match=r"x.tar is empty"):
        open_source(f"{server.url}/x.tar")
    server.files["/x.tar"] = server.files["/set/train-000000.tar"][:2048]
    with pytest.raises(DataError, match="ends without a mark"):
        open_source(f"{server.url}/x.tar")


@pytest.mark.parametrize("etags", [True, False])
def test_a_tar_that_changes_is_an_error(server, etags) -> None:
    server.etags = etags
    source = open_source(pattern(server))
    server.files["/set/train-000001.tar"] += bytes(512)
    assert source[0].content == png(0)
    with pytest.raises(DataError, match=r"train-000001.tar was changed while it was in use"):
        source[5]
    assert open_source(pattern(server))[5].content == png(5)


def test_the_server_says_how_long_to_wait(server, monkeypatch) -> None:
    source = open_source(pattern(server))
    waits: list[float] = []
    monkeypatch.setattr(tar_web, "waiting", waits.append)
    asked = ("3", "9999", "Wed, 21 Oct 2026 07:28:00 GMT", "nan", "-5")
    server.faults = [Fault(429, headers={"Retry-After": wait}) for wait in asked]
    assert source[0].content == png(0)
    assert waits[:2] == [3.0, 20.0]
    assert 0 < waits[2] < waits[3] < waits[4] < 0.1


def test_waits_double_and_differ_from_place_to_place(server, monkeypatch) -> None:
    source = open_source(pattern(server))
    monkeypatch.setattr(tar_web, "FIRST_WAIT_S", 0.5)
    waits: list[float] = []
    monkeypatch.setattr(tar_web, "waiting", waits.append)
    for index in (0, 1, 0):
        server.faults = [Fault(500, times=5)]
        source[index]
    first, second, again = waits[:5], waits[5:10], waits[10:]
    assert first == again
    assert first != second
    for number, wait in enumerate(first):
        assert 0.375 * 2**number <= wait <= 0.625 * 2**number


def test_redirects(server) -> None:
    server.moved = {"/old.tar": "/older.tar", "/older.tar": "/set/train-000000.tar", "/round.tar": "/round.tar",
                    "/away.tar": "ftp://127.0.0.1/x.tar"}  # fmt: skip
    assert len(open_source(f"{server.url}/old.tar")) == 5
    with pytest.raises(DataError, match="more than 5 times"):
        open_source(f"{server.url}/round.tar")
    with pytest.raises(DataError, match=r"ftp://127.0.0.1 is no web address"):
        open_source(f"{server.url}/away.tar")
    for wrong in ("http:///x.tar", "http://a:99999/x.tar"):
        with pytest.raises(DataError, match="no web address"):
            open_source(wrong)


def test_signatures_are_sent_and_told_nobody(server) -> None:
    source = open_source(f"{server.url}/set/train-00000{{0..1}}.tar?key=SECRET")
    assert all(path.endswith("?key=SECRET") for path, _ in server.seen)
    server.faults = [Fault(403)]
    with pytest.raises(DataError) as refused:
        source[0]
    told = f"{refused.value} {source.description} {source.name(0)} {list(source.manifest())}"
    assert "SECRET" not in told
    assert fingerprint(open_source(f"{server.url}/set/train-00000{{0..1}}.tar?key=NEW")) == fingerprint(source)


def test_a_proxy_that_the_environment_names(server, monkeypatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    server.files["/x.tar"] = server.files["/set/train-000000.tar"]
    source = open_source("http://images.example/x.tar")
    assert source[0].content == png(0)
    assert {path for path, _ in server.seen} == {"http://images.example/x.tar"}


def test_a_fork_has_connections_of_its_own(server) -> None:
    source = open_source(pattern(server))
    assert source[0].content == png(0)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=lambda: [source[i] for i in range(10)])
    before = server.connections
    process.start()
    assert [source[i].content for i in range(10)] == [png(i) for i in range(10)]
    process.join()
    assert process.exitcode == 0
    assert server.connections == before + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_is_the_same_over_a_bad_line(server, tmp_path, workers) -> None:
    near = stream_of(tmp_path / "shards").load(range(40))
    stream = stream_of(pattern(server))
    server.faults = [Fault(what, 2, after=5 * n) for n, what in enumerate(("drop", "cut", "short", 503, "stall"))]
    plan = [range(start, start + 8) for start in range(0, 40, 8)]
    batches = list(training_batches(stream, plan, workers=workers))
    assert torch.equal(torch.cat([batch.images for batch in batches]), near.images)
    assert not any(batch.bad for batch in batches)
    assert not any(fault.times for fault in server.faults)


def test_a_host_that_does_not_answer(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(DataError, match=r"6 tries to read byte 0 failed; the last time, .*refused"):
        open_source("http://127.0.0.1:9/x.tar")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("what", ["drip", "drip from the start"])
def test_a_server_that_drips_is_tried_again_and_told(server, monkeypatch, what) -> None:
    """Each byte puts the socket's time-out off."""
    source = open_source(pattern(server))
    monkeypatch.setattr(web_connections, "PATIENCE_S", 0.25)
    server.faults = [Fault(what, times=2)]
    assert source[0].content == png(0)
    server.faults = [Fault(what, times=10**6)]
    start = time.monotonic()
    with pytest.raises(
        DataError, match=r"train-000000.tar: 6 tries .* it sends [\d.]+ bytes a second, fewer than 1,024"
    ):
        source[0]
    assert time.monotonic() - start < 6


def test_a_server_that_drips_while_it_is_indexed(server, monkeypatch) -> None:
    monkeypatch.setattr(web_connections, "PATIENCE_S", 0.25)
    server.faults = [Fault("drip", times=10**6, after=1)]
    with pytest.raises(DataError, match=r"6 tries to read byte 0 failed; .* bytes a second"):
        open_source(pattern(server))


def test_what_is_slow_but_comes_is_no_fault(server, monkeypatch) -> None:
    """And whoever reads may take his time."""
    source = open_source(pattern(server))
    monkeypatch.setattr(web_connections, "PATIENCE_S", 0.1)
    monkeypatch.setattr(web_connections, "SLOWEST_BYTES_S", 10)
    server.faults = [Fault("drip")]  # 50 bytes a second
    server.seen.clear()
    assert source[0].content == png(0)
    assert len(server.seen) == 1


@pytest.mark.parametrize("fault", [Fault("stall", times=4), Fault(503, headers={"Retry-After": "1.5"})])
def test_a_worker_that_tries_again_does_not_hang(server, monkeypatch, fault) -> None:
    """Though all its tries take longer than a worker may be without signs of life."""
    stream = stream_of(pattern(server))
    monkeypatch.setattr(heartbeat, "_PIECE_S", 0.1)
    server.faults = [fault]
    (batch,) = training_batches(stream, [range(10)], workers=1, timeout_s=0.9)
    assert len(batch) == 10
    assert not fault.times
