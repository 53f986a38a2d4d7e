"""A data worker that dies or hangs ends in a message that names the sample, soon; one that is slow does not."""

from __future__ import annotations

import inspect
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from nextblock.data import workers as worker_processes
from nextblock.data.augment import CropConfig
from nextblock.data.heartbeat import Heartbeats, reading
from nextblock.data.loading import TIMEOUT_S, evaluation_batches, training_batches
from nextblock.data.preprocess import Preprocessing
from nextblock.data.sources import open_source
from nextblock.data.stream import Batch, TrainingStream
from nextblock.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 12, 14, 3), dtype=np.uint8)
PREPROCESSING = Preprocessing((8, 8))


class Images:
    """Each is read by `action(index)`, which may take its time."""

    def __init__(self, action: Callable[[int], object]) -> None:
        self.action = action

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> object:
        if multiprocessing.parent_process() is not None:  # a source reads its first item when it is opened
            self.action(index)
        return PIXELS[index], index


def at(wanted: int, action: Callable[[], object]) -> Images:
    return Images(lambda index: action() if index == wanted else None)


def batches_of(items: object, *, workers: int = 1, timeout_s: float = 0.6, batch: int = 3) -> Iterator[Batch]:
    stream = TrainingStream(open_source(items), 0, CropConfig((8, 8)), PREPROCESSING)
    plan = (range(first, first + batch) for first in itertools.count(0, batch))
    return training_batches(stream, plan, workers=workers, timeout_s=timeout_s, prefetch=1)


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid}


def told(batches: Iterator[Batch], within_s: float) -> str:
    """The message in which the batches end; afterwards no worker is left."""
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        for _ in batches:
            pass
    assert time.monotonic() - start < within_s
    assert not children()  # none is left to be waited for when Python ends
    return str(caught.value)


def test_by_default_a_hung_worker_is_told_within_30_seconds() -> None:
    for function in (training_batches, evaluation_batches):
        assert inspect.signature(function).parameters["timeout_s"].default == TIMEOUT_S
    # the wait, two ticks until it begins, one until DataLoader sees that the workers are ended
    assert TIMEOUT_S + 3 * worker_processes.tick_s(TIMEOUT_S) <= 28


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_sleeps_for_ever(workers: int) -> None:
    message = told(batches_of(at(5, lambda: time.sleep(3600)), workers=workers), within_s=5)
    assert "hangs: after 0.6 s it is still reading Images[5]" in message
    assert "raise timeout_s" in message


def test_a_worker_that_is_stopped() -> None:
    message = told(batches_of(at(7, lambda: os.kill(os.getpid(), signal.SIGSTOP))), within_s=5)
    assert "data worker 0 hangs" in message
    assert "Images[7]" in message


def test_a_worker_that_is_stopped_between_batches() -> None:
    batches = batches_of(PIXELS)
    next(batches)
    time.sleep(0.3)  # the next one is ready, and its worker waits for work
    (pid,) = children()
    os.kill(pid, signal.SIGSTOP)
    assert "data worker 0 hangs: after 0.6 s no batch arrived" in told(batches, within_s=5)


def test_the_worker_that_hangs_is_named_though_others_go_on() -> None:
    """Worker 1 sleeps at position 3, in its first batch; worker 0 has batches before and after."""
    stream = TrainingStream(open_source(PIXELS), 0, CropConfig((8, 8)), PREPROCESSING)
    index = int(stream.load([3]).indices[0])
    message = told(batches_of(at(index, lambda: time.sleep(3600)), workers=2), within_s=5)
    assert message.startswith("data worker 1 hangs")
    assert f"Images[{index}]" in message


def test_a_slow_worker_does_not_hang() -> None:
    """A batch takes three times as long as a sample may."""
    batches = batches_of(Images(lambda index: time.sleep(0.3)), batch=6, timeout_s=0.6)
    assert len(next(batches)) == 6
    batches.close()  # type: ignore[attr-defined]


def test_a_stream_that_announces_no_samples_has_the_time_for_a_batch() -> None:
    class Silent:
        def load(self, positions: object) -> int:
            time.sleep(0.4 if positions == [0] else 3600)
            return 7

    batches = training_batches(Silent(), [[0], [1]], workers=1, timeout_s=0.8, prefetch=1)
    assert next(batches) == 7
    assert "no batch arrived" in told(batches, within_s=6)  # type: ignore[arg-type]


def test_a_worker_that_is_killed_while_it_reads() -> None:
    message = told(batches_of(at(4, lambda: os.kill(os.getpid(), signal.SIGKILL)), timeout_s=20), within_s=5)
    assert "a data worker died while reading Images[4] (killed by SIGKILL)" in message
    assert "use fewer workers" in message


def test_a_worker_that_crashes_and_one_that_leaves() -> None:
    crash = batches_of(at(4, lambda: os.kill(os.getpid(), signal.SIGSEGV)), timeout_s=20)
    assert "while reading Images[4] (killed by SIGSEGV)" in told(crash, within_s=5)
    leave = batches_of(at(4, lambda: os._exit(3)), timeout_s=20, workers=2)
    assert "while reading Images[4] (exit code 3)" in told(leave, within_s=8)


def test_a_death_is_told_where_batches_are_waited_for() -> None:
    """Not in the middle of whatever the main process is doing, which may be a save."""
    batches = batches_of(PIXELS, timeout_s=20)
    next(batches)
    (pid,) = children()
    os.kill(pid, signal.SIGKILL)
    for _ in range(20):  # with torch's own handler this raises RuntimeError
        time.sleep(0.02)
    message = told(batches, within_s=5)
    assert message.startswith("a data worker died")
    assert "(killed by SIGKILL)" in message


def test_a_worker_that_dies_while_the_others_are_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's handler would raise in the middle of it."""

    def at_once(start: object, worker: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def later(iterator: _MultiProcessingDataLoaderIter, *arguments: object, **options: object) -> None:
        time.sleep(0.3)
        reset(iterator, *arguments, **options)

    reset = _MultiProcessingDataLoaderIter._reset
    monkeypatch.setattr(worker_processes.StartWorker, "__call__", at_once)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "_reset", later)
    assert "a data worker died (killed by SIGKILL)" in told(batches_of(PIXELS, workers=2, timeout_s=20), within_s=8)


def test_a_worker_that_dies_while_it_hands_a_batch_over() -> None:
    """Of which a part has come, that nobody will ever complete."""

    class Large:
        def load(self, positions: object) -> bytes:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return bytes(10**8)

    batches = training_batches(Large(), [[0], [1]], workers=1, timeout_s=2)
    time.sleep(1)  # more than the pipe takes waits in the worker
    assert "a data worker died (killed by SIGKILL)" in told(batches, within_s=6)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ConnectionResetError(), EOFError(), RuntimeError("received 0 items of ancdata")])
def test_what_breaks_a_moment_before_the_death_is_told_as_the_death(error: Exception) -> None:
    class Process:
        looks = 0

        @property
        def exitcode(self) -> int | None:
            self.looks += 1
            return -9 if self.looks > 3 else None

    class Batches:
        _workers = (Process(),)

        def __next__(self) -> object:
            raise error

    beats = Heartbeats(multiprocessing.get_context("fork"), 1)
    with pytest.raises(DataError, match="a data worker died"):
        next(worker_processes.arrived(Batches(), beats, 1, 20))


def test_a_bug_is_not_taken_for_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        def load(self, positions: object) -> int:
            raise OSError("a bug")

    start = time.monotonic()
    with pytest.raises(OSError, match="a bug"):
        next(training_batches(Odd(), [[0]], workers=1, timeout_s=20))
    assert time.monotonic() - start < worker_processes.DEATH_S


def test_the_handler_of_others_is_left_in_place() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: seen.append(number))
    try:
        ours = signal.getsignal(signal.SIGCHLD)
        batches = batches_of(PIXELS)
        next(batches)
        assert signal.getsignal(signal.SIGCHLD) is ours
        batches.close()  # type: ignore[attr-defined]
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_batches_in_a_thread() -> None:
    """Where no signal handler can be set."""
    found: list[str] = []
    items = at(4, lambda: os.kill(os.getpid(), signal.SIGKILL))
    thread = threading.Thread(target=lambda: found.append(told(batches_of(items, timeout_s=20), within_s=5)))
    thread.start()
    thread.join(20)
    assert "while reading Images[4]" in found[0]


def test_a_worker_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_processes, "START_S", 0.5)
    monkeypatch.setattr(worker_processes.StartWorker, "__call__", lambda self, worker: time.sleep(3600))
    assert "data worker 0 did not start within" in told(batches_of(PIXELS), within_s=8)


def test_a_file_that_is_never_read_to_its_end(tmp_path: Path) -> None:
    """A pipe without a writer among the images: opening it waits for ever."""
    from PIL import Image

    for number, pixels in enumerate(PIXELS[:3]):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    source = open_source(str(tmp_path))
    (tmp_path / "1.png").unlink()
    os.mkfifo(tmp_path / "1.png")
    stream = TrainingStream(source, 0, CropConfig((8, 8)), PREPROCESSING)
    batches = training_batches(stream, itertools.repeat(range(3)), workers=1, timeout_s=0.6)
    assert "it is still reading 1.png" in told(batches, within_s=5)


def test_names_of_all_kinds_and_lengths() -> None:
    beats = Heartbeats(multiprocessing.get_context("fork"), 2)
    names = {
        "a/b.jpg": "a/b.jpg",
        "größe.png": "größe.png",
        "ü" * 300: "ü" * 119,
        os.fsdecode(b"odd\xff.jpg"): "odd.jpg",
    }
    for name, seen in (names | {"": ""}).items():
        beats.beat(1, name)
        assert beats.sample(1) == seen
    assert beats.sample(0) == ""
    assert [beats.count(worker) for worker in (0, 1)] == [0, 5]
    reading("outside of a worker nothing happens")
