"""Any number of workers hands over the same batches, and their failures arrive as what they are."""

import itertools
import os
import signal
import time

import numpy as np
import pytest
import torch

from nextblock.data.augment import CropConfig, resize_and_crop
from nextblock.data.loading import default_workers, evaluation_batches, training_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.data.stream import Batch, TrainingStream
from nextblock.data.workers import context
from nextblock.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 12, 14, 3), dtype=np.uint8)
PREPROCESSING = Preprocessing((8, 8))


class Trap:
    """Images, of which one does something else."""

    def __init__(self, index: int, action: object) -> None:
        self.index, self.action = index, action

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> object:
        if index == self.index:
            return self.action()
        return PIXELS[index], index


def make_stream(items: object = (PIXELS, np.arange(23))) -> TrainingStream:
    return TrainingStream(open_source(items), 0, CropConfig((8, 8)), PREPROCESSING)


def plan_from(start: int, batch: int = 6):
    """Endless."""
    return (range(first, first + batch) for first in itertools.count(start, batch))


def take(count: int, batches) -> list[Batch]:
    return list(itertools.islice(batches, count))


def same(a: list[Batch], b: list[Batch]) -> bool:
    fields = ("images", "labels", "flip", "positions", "indices")
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(getattr(x, f), getattr(y, f)) for x, y in pairs for f in fields) and all(
        x.bad == y.bad for x, y in pairs
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    items = Trap(3, lambda: b"broken")
    inline = take(9, training_batches(make_stream(items), plan_from(0), workers=0))
    assert sum(len(batch.bad) for batch in inline) >= 2
    assert same(inline, take(9, training_batches(make_stream(items), plan_from(0), workers=workers)))
    resumed = take(5, training_batches(make_stream(items), plan_from(24), workers=workers, prefetch=1))
    assert same(inline[4:], resumed)


def test_a_finite_plan_ends_and_the_plan_is_read_lazily() -> None:
    read = []

    def plan():
        for first in range(0, 1000, 4):
            read.append(first)
            yield [first, first + 1]

    batches = training_batches(make_stream(), plan(), workers=2, prefetch=3)
    take(2, batches)
    assert len(read) <= 8
    assert len(list(training_batches(make_stream(), [[0, 1], [5]], workers=1))) == 2
    assert len(list(training_batches(make_stream(), [], workers=0))) == 0


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(2, training_batches(make_stream(), plan_from(0), workers=1))
    assert torch.equal(torch.rand(1), expected)


def storage_fails() -> None:
    raise DataError("read error on x after 4 attempts")


@pytest.mark.parametrize("workers", [0, 1])
def test_data_errors_arrive_clean(workers: int) -> None:
    batches = training_batches(make_stream(Trap(5, storage_fails)), plan_from(0), workers=workers)
    with pytest.raises(DataError) as caught:
        take(4, batches)
    assert str(caught.value) == "read error on x after 4 attempts"


def test_a_bug_in_a_worker_keeps_its_type() -> None:
    class Odd(TrainingStream):
        def load(self, positions):
            raise ZeroDivisionError("a bug")

    stream = Odd(open_source(PIXELS), 0, CropConfig((8, 8)), PREPROCESSING)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        take(1, training_batches(stream, plan_from(0), workers=1))


def test_a_worker_that_dies() -> None:
    stream = make_stream(Trap(5, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    with pytest.raises(DataError, match=r"data worker died .*use fewer workers"):
        take(4, training_batches(stream, plan_from(0), workers=1))


def test_a_worker_that_hangs() -> None:
    stream = make_stream(Trap(5, lambda: time.sleep(1)))
    with pytest.raises(DataError, match=r"worker 0 hangs: after 0.3 s it is still reading Trap\[5\]"):
        take(4, training_batches(stream, plan_from(0), workers=1, timeout_s=0.3))


def test_workers_ignore_control_c() -> None:
    def interrupted():
        os.kill(os.getpid(), signal.SIGINT)
        return PIXELS[5], 5

    stream = make_stream(Trap(5, interrupted))
    batches = take(4, training_batches(stream, plan_from(0), workers=1))
    assert 5 in torch.cat([batch.labels for batch in batches])


def test_folders_and_spawned_workers(tmp_path, monkeypatch) -> None:
    from PIL import Image

    for number in range(5):
        Image.fromarray(PIXELS[number]).save(tmp_path / f"{number}.png")
    stream = make_stream(tmp_path)
    inline = take(3, training_batches(stream, plan_from(0), workers=0))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # after which nothing may be forked
    assert context().get_start_method() == "forkserver"
    assert same(inline, take(3, training_batches(stream, plan_from(0), workers=1)))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_is_in_order_and_leaves_broken_images_out(workers: int) -> None:
    source = open_source(Trap(3, lambda: b"broken"))
    batches = list(evaluation_batches(source, PREPROCESSING, batch_size=5, workers=workers))
    assert [len(batch) for batch in batches] == [4, 5, 5, 5, 3]
    indices = torch.cat([batch.indices for batch in batches])
    assert indices.tolist() == [i for i in range(23) if i != 3]
    assert torch.equal(torch.cat([batch.labels for batch in batches]), indices)
    assert not any(batch.flip.any() for batch in batches)
    assert [(bad.name, bad.position) for bad in batches[0].bad] == [("Trap[3]", 3)]
    expected = resize_and_crop(PIXELS[22], PREPROCESSING.shorter_side_px, (8, 8))
    assert np.array_equal(batches[-1].images[-1].numpy(), expected)


def test_evaluation_of_chosen_indices() -> None:
    source = open_source(Trap(3, lambda: b"broken"))
    (batch,) = evaluation_batches(source, PREPROCESSING, batch_size=5, indices=[7, 3, 1])
    assert batch.indices.tolist() == [7, 1]
    (empty,) = evaluation_batches(source, PREPROCESSING, batch_size=5, indices=[3])
    assert empty.images.shape == (0, 8, 8, 3)
    assert len(empty.bad) == 1


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(1, 1, 0), (2, 1, 1), (8, 1, 7), (64, 1, 16), (64, 8, 7)])
def test_default_workers(cores: int, ranks: int, workers: int, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert default_workers() == workers
