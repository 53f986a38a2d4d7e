"""Streamed sets: every row once an epoch, resumed exactly wherever they were stopped, refused for other processes."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import hf_file_system
from PIL import Image

from flaky_server import Fault, FlakyServer
from nextblock.data import heartbeat, streaming
from nextblock.data.augment import CropConfig
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.data.sources.streamed import open_streamed
from nextblock.data.stream import Batch
from nextblock.data.streaming import StreamingBatches
from nextblock.errors import DataError, RunError

SIZES = (17, 5, 23, 9)
TOTAL = sum(SIZES)


def png(value: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (5, 4), (value, 0, 0)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> str:
    """54 rows, labelled 0 to 53, in four Parquet files."""
    folder = tmp_path_factory.mktemp("parquet")
    start = 0
    for number, size in enumerate(SIZES):
        labels = list(range(start, start + size))
        images = [{"bytes": png(label), "path": None} for label in labels]
        pq.write_table(pa.table({"image": images, "label": labels}), folder / f"{number}.parquet", row_group_size=6)
        start += size
    return f"hf-stream:parquet:{folder}/*.parquet"


def batches_of(spec: object, plan: list[range], workers: int = 0, chunk: int = 7, **more) -> StreamingBatches:
    crop, preprocessing = CropConfig((4, 4)), Preprocessing((4, 4))
    options = {"seed": 0, "crop": crop, "preprocessing": preprocessing, "workers": workers, "chunk": chunk} | more
    return StreamingBatches(open_streamed(spec), plan, **options)


def plan_of(count: int, size: int = 5) -> list[range]:
    return [range(start, start + size) for start in range(0, count * size, size)]


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("images", "labels", "flip", "positions"))


def test_every_epoch_has_every_row_once_in_another_order(files) -> None:
    labels = torch.cat([batch.labels for batch in batches_of(files, plan_of(3, TOTAL))]).view(3, TOTAL)
    assert (labels.sort(dim=1).values == torch.arange(TOTAL)).all()
    assert len({tuple(order) for order in labels.tolist()}) == 3
    other = next(batches_of(files, plan_of(1, TOTAL), seed=1))
    assert other.labels.tolist() != labels[0].tolist()
    assert labels[0].tolist() != list(range(TOTAL))


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 2), (3, 0), (5, 0)])
def test_ranks_and_workers_share_the_rows(files, world, workers) -> None:
    seen: list[int] = []
    for rank in range(world):
        each = max(1, workers)
        batches = batches_of(files, plan_of(TOTAL * each, 1), workers, rank=rank, world=world)
        for number, batch in enumerate(batches):
            part = rank * each + number % each
            if batches.state_dict()["places"][part]["epoch"] == 0:
                seen += batch.labels.tolist()
    assert sorted(seen) == list(range(TOTAL))


@pytest.mark.parametrize(("workers", "stops"), [(0, range(1, 30, 4)), (2, (1, 4, 11, 16)), (3, (5,))])
def test_it_goes_on_exactly_wherever_it_stopped(files, workers, stops) -> None:
    plan = plan_of(34)  # three epochs
    whole = list(batches_of(files, plan, workers))
    first = batches_of(files, plan, workers)
    states = {}
    for number, batch in enumerate(first, 1):
        assert same(batch, whole[number - 1])
        states[number] = json.dumps(first.state_dict())
    for stop in stops:
        state = json.loads(states[stop])
        for start in (stop, stop + 3):  # a run that goes on is stopped again
            again = batches_of(files, plan[start:], workers, state={0: state})
            some = list(itertools.islice(again, 3 if start == stop else 12))
            assert some
            assert all(same(a, b) for a, b in zip(some, whole[start:], strict=False))
            state = json.loads(json.dumps(again.state_dict()))


def test_the_state_does_not_run_ahead_of_what_was_given_out(files) -> None:
    batches = batches_of(files, plan_of(30), workers=2)
    assert batches.state_dict()["batches"] == 0
    next(batches)
    state = batches.state_dict()
    assert state["batches"] == 1
    assert [place["within"] for place in state["places"].values()] == [5, 0]


def test_other_numbers_of_processes_and_other_sets_are_refused(files) -> None:
    batches = batches_of(files, plan_of(2), workers=0)
    next(batches)
    state = {0: batches.state_dict()}
    with pytest.raises(RunError, match=r"to 1 processes with 0 workers each, now .* 1 with 2.*set data.workers to 0"):
        batches_of(files, plan_of(2), workers=2, state=state)
    with pytest.raises(RunError, match=r"now there are 2 with 0.*start 1 processes"):
        batches_of(files, plan_of(2), world=2, state=state)
    with pytest.raises(RunError, match="its seed was 0, now 1"):
        batches_of(files, plan_of(2), seed=1, state=state)
    with pytest.raises(RunError, match="its shards was 4, now 1"):
        batches_of(files.replace("*", "2"), plan_of(2), state={0: _retitled(state[0], files.replace("*", "2"))})
    with pytest.raises(RunError, match="lacks process 0 of 1"):
        batches_of(files, plan_of(2), state={1: state[0]})


def _retitled(state: dict[str, dict[str, object]], spec: str) -> dict[str, object]:
    return {**state, "settings": {**state["settings"], "title": spec.removeprefix("hf-stream:parquet:")}}


def test_broken_images_are_replaced_from_the_same_chunk_and_listed(files) -> None:
    def rows():
        for number in range(20):
            image = b"broken" if number % 4 == 0 else png(number)
            yield {"image": {"bytes": image if number else None, "path": None}, "label": number}

    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": image, "label": datasets.Value("int64")})
    dataset = datasets.IterableDataset.from_generator(rows, features=features)
    batch, again = (next(batches_of(dataset, plan_of(1, 40))) for _ in range(2))
    assert {label % 4 for label in batch.labels.tolist()} == {1, 2, 3}
    assert len(batch.bad) >= 10
    assert same(batch, again)
    assert batch.bad == again.bad
    assert {"the row holds no image"} < {bad.reason for bad in batch.bad}


def described(rows: list[dict[str, object]]) -> datasets.IterableDataset:
    image = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({"image": image, "label": datasets.Value("int64"), "text": datasets.Value("string")})
    return datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)


def bad_of(batches: StreamingBatches) -> list[tuple[str, int]]:
    return [(bad.name, bad.position) for batch in batches for bad in batch.bad]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_one_however_many_epochs(workers) -> None:
    """Else a run that reads the same few again and again stops as if it had met ever more."""
    contents = [png(0), b"broken", b"broken", b"", None, None, b"in two", b"in two", png(8), png(9), png(10), png(11)]
    paths = {3: "far/away/3.png", 6: "a/same.png", 7: "b/same.png"}
    rows = [
        {"image": {"bytes": content, "path": paths.get(number)}, "label": 0, "text": f"caption {number}"}
        for number, content in enumerate(contents)
    ]
    plan = plan_of(60)
    first = batches_of(described(rows), plan, workers)
    found = [list(itertools.islice(first, 20)), first.state_dict(), list(first)]
    before = [(bad.name, bad.position) for batch in found[0] for bad in batch.bad]
    after = [(bad.name, bad.position) for batch in found[2] for bad in batch.bad]
    assert len(before + after) > 100
    assert len({name for name, _ in before + after}) == 7
    assert {name for name, _ in before} == {name for name, _ in after}
    assert any(name.startswith("stream 3.png sha256:e3b0c44298fc1c14 row:") for name, _ in before)
    state = {0: json.loads(json.dumps(found[1]))}
    assert bad_of(batches_of(described(rows), plan[20:], workers, state=state)) == after


def test_names_last_that_have_nothing_but_an_image() -> None:
    rows = [{"image": png(1)}, {"image": b"broken"}, {"image": b"wrong"}]
    dataset = datasets.IterableDataset.from_generator(lambda: iter(rows))
    names = {name for name, _ in bad_of(batches_of(dataset, plan_of(9, 3)))}
    assert names == {f"stream sha256:{hashlib.sha256(content).hexdigest()[:16]}" for content in (b"broken", b"wrong")}


def test_columns_and_classes(files) -> None:
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"img": [{"bytes": png(1), "path": None}], "fine": [1]}, features=features)
    dataset = rows.to_iterable_dataset()
    images = open_streamed(dataset, image_column="img", label_column="fine")
    assert images.classes == ("cat", "dog")
    assert images.description == "stream: streamed from 1 file"
    with pytest.raises(DataError, match=r"no image column 'image'; columns: img, fine. Did you mean 'img'"):
        open_streamed(dataset)
    with pytest.raises(DataError, match="no label column 'coarse'"):
        open_streamed(dataset, image_column="img", label_column="coarse")
    with pytest.raises(DataError, match=r"label column 'img' of stream is .*class numbers are needed"):
        open_streamed(dataset, image_column="img", label_column="img")
    unlabelled = open_streamed(dataset, image_column="img")
    assert unlabelled.classes is None
    with pytest.raises(DataError, match=r"shuffled with a buffer.*unshuffled"):
        open_streamed(dataset.shuffle(seed=0, buffer_size=10).map(lambda row: row), image_column="img")


def test_names_on_the_hub(monkeypatch) -> None:
    asked = []

    def load(path, name=None, split=None, streaming=False):
        asked.append((path, name, split, streaming))
        if path == "gone":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'gone' doesn't exist on the Hub")
        if split != "test":
            raise ValueError(f"Bad split: {split}. Available splits: ['test']")
        return datasets.Dataset.from_dict({"image": [png(0)]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_streamed("hf-stream:a/b:small@validation").title == "hf-stream:a/b:small@test"
    assert asked[0] == ("a/b", "small", "validation", True)
    with pytest.raises(DataError, match="hf-stream:a/b has no split 'train'"):
        open_streamed("hf-stream:a/b")
    with pytest.raises(DataError, match=r"cannot open hf-stream:gone: .*doesn't exist.*network"):
        open_streamed("hf-stream:gone")


def test_what_cannot_be_opened_or_read(files, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(streaming, "WAITS_S", (0.0, 0.0))
    for nothing in ("", "@train", "parquet:", "parquet:http://localhost:1/x.parquet"):
        with pytest.raises(DataError, match=r"names no (data set|file here)\. Streams are hf-stream:NAME, of"):
            open_streamed(f"hf-stream:{nothing}")
    with pytest.raises(DataError, match="no file matches"):
        open_streamed(f"hf-stream:parquet:{tmp_path}/*.parquet")
    with pytest.raises(DataError, match="is a stream"):
        open_source(files)

    def failing():
        yield {"image": png(1)}
        raise ConnectionResetError("the line is dead")

    dataset = datasets.IterableDataset.from_generator(failing)
    with pytest.raises(DataError, match=r"reading stream failed: ConnectionResetError: the line is dead.*resume"):
        next(batches_of(dataset, plan_of(1)))
    few = datasets.IterableDataset.from_generator(lambda: iter([{"image": png(1)}]))
    with pytest.raises(DataError, match="holds no rows for one of its 2 parts"):
        next(batches_of(few, plan_of(1), rank=1, world=2))


# --- over a bad line


@pytest.fixture
def far(files, monkeypatch) -> Iterator[FlakyServer]:
    """The same four files behind HTTP, and the waits of `datasets` made short."""
    for name in ("READ", "READ_RATE_LIMIT", "READ_SERVER_UNAVAILABLE", "OPEN"):
        monkeypatch.setattr(datasets.config, f"STREAMING_{name}_RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 3)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_MAX_RETRIES", 3)
    monkeypatch.setattr(streaming, "WAITS_S", (0.01, 0.02))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = FlakyServer()
    for path in Path(files.removeprefix("hf-stream:parquet:")).parent.glob("*.parquet"):
        server.files[f"/{path.name}"] = path.read_bytes()
    with server.running():
        yield server


def far_away(server: FlakyServer) -> datasets.IterableDataset:
    """Who reads is not to wait five minutes, as is the custom of fsspec."""
    quick = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_read=0.2)}}
    files = {"train": [f"{server.url}{path}" for path in sorted(server.files)]}
    return datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, storage_options=quick)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("what", ["drop", "stall", "cut", "short", "elsewhere", 500, 503, 429])
def test_over_a_bad_line_the_rows_are_the_same(files, far, workers, what) -> None:
    plan = plan_of(24)  # more than two epochs
    near = list(batches_of(files, plan, workers))
    dataset = far_away(far)
    far.faults = [Fault(what, times=1, after=after) for after in (2, 3, 4)]
    found = list(batches_of(dataset, plan, workers))
    assert len(found) == len(near)
    assert all(same(a, b) for a, b in zip(found, near, strict=True))
    assert not any(fault.times for fault in far.faults)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", ["drop", "stall", "cut", "short", 503, 404])
def test_a_server_that_stays_away_is_told(far, workers, what) -> None:
    batches = batches_of(far_away(far), plan_of(24), workers)
    far.faults = [Fault(what, times=10**6, after=3)]
    start = time.monotonic()
    with pytest.raises(DataError, match=r"reading stream failed: .*\. Check the network; then .*--resume"):
        list(batches)
    assert time.monotonic() - start < 15


@pytest.fixture
def hub(far, monkeypatch, tmp_path) -> FlakyServer:
    """The same files as the data set me/images of a hub; only as much of one as reading needs."""
    commit = "1" * 40
    for name, content in [(path, content) for path, content in far.files.items()]:
        far.files[f"/datasets/me/images/resolve/{commit}{name}"] = far.files.pop(name)
        entry = {"type": "file", "path": name[1:], "size": len(content), "oid": "2" * 40}
        far.headers[f"X-{name}"] = json.dumps(entry)
    entries = [json.loads(far.headers.pop(name)) for name in list(far.headers)]
    about = {"id": "me/images", "sha": commit, "private": False, "siblings": [], "tags": []}
    api = "/api/datasets/me/images"
    far.files |= {api: json.dumps(about).encode(), f"{api}/revision/{commit}": json.dumps(about).encode()}
    far.files[f"{api}/tree/{commit}"] = json.dumps(entries).encode()
    far.headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", far.url)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", far.url)
    template = far.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    patient = hf_file_system.http_backoff
    quick = functools.partial(patient, max_retries=1, base_wait_time=0.01, max_wait_time=0.02)
    monkeypatch.setattr(hf_file_system, "http_backoff", quick)
    return far


@pytest.mark.parametrize(("what", "workers"), [("drop", 1), ("stall", 0), ("cut", 0), ("short", 0), (503, 0), (429, 0)])
def test_the_hub_over_a_bad_line(files, hub, workers, what) -> None:
    plan = plan_of(24)
    near = list(batches_of(files, plan, workers))
    batches = batches_of("hf-stream:me/images", plan, workers)
    hub.faults = [Fault(what, times=1, path=".parquet", after=after) for after in (0, 1, 3)]
    assert all(same(a, b) for a, b in zip(batches, near, strict=True))
    assert not any(fault.times for fault in hub.faults)
    batches = batches_of("hf-stream:me/images", plan, workers)
    hub.faults = [Fault(what, times=10**6, path=".parquet", after=2)]
    start = time.monotonic()
    with pytest.raises(DataError, match=r"reading hf-stream:me/images@train failed: .*; then .*--resume"):
        list(batches)
    assert time.monotonic() - start < 15


def failing(times: int, error: Exception) -> tuple[datasets.IterableDataset, list[int]]:
    """Twenty rows, whose row 9 cannot be had `times` times; how often it was asked for."""
    asked: list[int] = []

    def rows() -> Iterator[dict[str, object]]:
        for number in range(20):
            if number == 9:
                asked.append(number)
                if len(asked) <= times:
                    raise error
            yield {"image": png(number), "label": number}

    return datasets.IterableDataset.from_generator(rows), asked


def test_what_broke_off_is_read_again(monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(streaming, "waiting", waits.append)
    whole = list(batches_of(failing(0, OSError())[0], plan_of(12)))
    dataset, asked = failing(2, ConnectionResetError("the line is dead"))
    assert all(same(a, b) for a, b in zip(batches_of(dataset, plan_of(12)), whole, strict=True))
    assert waits == list(streaming.WAITS_S)
    assert len(asked) == 5  # three times in the first epoch, once in the next two


def test_what_was_tried_for_long_is_not_tried_again(monkeypatch) -> None:
    monkeypatch.setattr(streaming, "_PATIENCE_S", -1)
    dataset, asked = failing(10**6, ConnectionError("Server Disconnected"))
    with pytest.raises(DataError, match="ConnectionError: Server Disconnected"):
        list(batches_of(dataset, plan_of(12)))
    assert len(asked) == 1


# --- signs of life


def slow(action: Callable[[int], object]) -> datasets.IterableDataset:
    def rows() -> Iterator[dict[str, object]]:
        for number in range(30):
            action(number)
            yield {"image": png(number), "label": number}

    return datasets.IterableDataset.from_generator(rows, features=datasets.Features(
        {"image": datasets.Value("binary"), "label": datasets.Value("int64")}
    ))  # fmt: skip


def test_a_stream_that_hangs_is_told(monkeypatch) -> None:
    monkeypatch.setattr(heartbeat, "LOOK_S", 0.2)
    stuck = slow(lambda number: threading.Event().wait(60) if number == 9 else None)
    batches = batches_of(stuck, plan_of(9), 1, timeout_s=1)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"hangs: after 1 s it is still reading stream epoch0/part0of1/chunk1"):
        list(batches)
    assert time.monotonic() - start < 5


def test_a_chunk_that_comes_slowly_does_not_hang(monkeypatch) -> None:
    """It takes three times as long as a worker may be without signs of life."""

    def trickle(number: int) -> None:
        threading.Event().wait(0.1)
        end = time.process_time() + 0.005
        while time.process_time() < end:
            pass

    monkeypatch.setattr(heartbeat, "LOOK_S", 0.2)
    (batch,) = batches_of(slow(trickle), plan_of(1), 1, chunk=30, timeout_s=1)
    assert len(batch) == 5


def test_who_waits_on_purpose_does_not_hang(monkeypatch) -> None:
    """As the hub's client does that is told to come back in some minutes."""
    monkeypatch.setattr(heartbeat, "_PIECE_S", 0.1)
    (batch,) = batches_of(slow(lambda number: time.sleep(2) if number == 3 else None), plan_of(1), 1, timeout_s=0.8)
    assert len(batch) == 5
