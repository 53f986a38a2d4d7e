"""Streamed sets: every row once an epoch, resumed exactly wherever they were stopped, refused for other processes."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

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
    assert batch.bad[0].name.startswith("stream epoch0/part0of1/chunk")


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


def test_what_cannot_be_opened_or_read(files, tmp_path: Path) -> None:
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
